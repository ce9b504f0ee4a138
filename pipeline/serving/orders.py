"""What a client asks for: the JSON of ``POST /images`` as an ``Order``, checked before anything is drawn."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from pipeline.generator.generator import sample_keys
from pipeline.host.errors import Refused

BODY = 64 * 1024  # bytes of a request
IMAGES = 64  # of a request
PROMPT = 1_000  # characters
STEPS = 8  # jumps: each is a pass through the network
LARGEST = 2**63 - 1  # seed or sample id

Model = Literal["student", "teacher"]
Form = Literal["png", "json"]
FIELDS = ("labels", "prompts", "n", "seed", "seeds", "ids", "steps", "model", "format")


class Malformed(Refused):
    """What came is no JSON object at all."""


@dataclass(frozen=True)
class Sample:
    """One image: everything that decides it, but for the student.

    Attributes:
        wanted: a label or a prompt.
        seed: of its noise.
        id: its sample id.
        steps: the AR steps from which the student jumps; empty for the teacher, which takes all of them.
    """

    wanted: int | str
    seed: int
    id: int
    steps: tuple[int, ...]


@dataclass(frozen=True)
class Order:
    """The images of one request, by whom they are to be drawn, and in which form they are wanted, if it says so."""

    samples: tuple[Sample, ...]
    model: Model = "student"
    form: Form | None = None


def parse(body: bytes) -> Order:
    """The order in a request's body.

    Raises Malformed for what is no JSON object and Refused for values that cannot be used, each one sentence. What the
    student has no class or no step for, only its ``Generator`` can tell.
    """
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        raise Malformed('the body is no JSON; send an object such as {"labels": [3, 7], "seed": 5}.') from None
    if not isinstance(content, dict):
        raise Malformed('the body is JSON, but no object; send one such as {"labels": [3, 7], "seed": 5}.')
    for name in content:
        if name not in FIELDS:
            raise Refused(f"there is no field {name[:40]!r}; there are {', '.join(FIELDS)}.")
    model: Model = _choice(content, "model", get_args(Model)) or "student"
    if model == "teacher" and "steps" in content:
        raise Refused("steps are given for the teacher, which takes all of its own; leave them out.")
    wanted = _wanted(content)
    if "seed" in content and "seeds" in content:
        raise Refused("seed and seeds are both given; give one of them.")
    seeds = _whole("seeds", content["seeds"]) if "seeds" in content else _whole("seed", [content.get("seed", 0)])[0]
    ids = _whole("ids", content["ids"]) if "ids" in content else None
    steps = _steps(content) if model == "student" else ()
    keys = sample_keys(len(wanted), seeds, ids)
    samples = tuple(Sample(one, seed, sample, steps) for one, (seed, sample) in zip(wanted, keys, strict=True))
    return Order(samples, model, _choice(content, "format", get_args(Form)))


def _wanted(content: dict[str, Any]) -> list[int | str]:
    """A label or a prompt for each image: those that are given, in turn, until there are n."""
    given = [name for name in ("labels", "prompts") if name in content]
    if len(given) != 1:
        raise Refused(f"{' and '.join(given) or 'neither labels nor prompts'} are given; give one of the two.")
    (name,) = given
    listed: list[Any] = _whole(name, content[name]) if name == "labels" else _texts(content[name])
    (count,) = _whole("n", [content.get("n", len(listed))])
    if not len(listed) <= count <= IMAGES:
        raise Refused(f"n is {count:,} for {len(listed):,} {name}; it must be from that number to {IMAGES}.")
    return [listed[i % len(listed)] for i in range(count)]


def _texts(value: Any) -> list[str]:
    """A list of prompts of bearable length."""
    if not isinstance(value, list) or not value or not all(isinstance(one, str) for one in value):
        raise Refused('prompts must be a list of texts, such as ["a bold seven"].')
    longest = max(map(len, value))
    if longest > PROMPT:
        raise Refused(f"a prompt has {longest:,} characters; it may have {PROMPT:,}.")
    if any("\ud800" <= letter <= "\udfff" for one in value for letter in one):
        raise Refused("a prompt holds half a surrogate pair, which is no character; send whole ones.")
    return value


def _whole(name: str, value: Any) -> list[int]:
    """A list of whole numbers; what ``name`` is when it stands alone comes in a list of its own."""
    values: Sequence[Any] = value if isinstance(value, list) else ()
    fit = [isinstance(one, int) and not isinstance(one, bool) and 0 <= one <= LARGEST for one in values]
    if not values or not all(fit):
        what = "a whole number" if name in ("seed", "n") else "a list of whole numbers"
        raise Refused(f"{name} must be {what} from 0 to 2^63 - 1.")
    return list(values)


def _steps(content: dict[str, Any]) -> tuple[int, ...]:
    steps = tuple(_whole("steps", content.get("steps", [1])))
    if len(steps) > STEPS:
        raise Refused(f"steps lists {len(steps):,}; a request may list {STEPS}.")
    return steps


def _choice(content: dict[str, Any], name: str, choices: tuple[str, ...]) -> Any:
    """The value of a field with few of them, None where it is left out."""
    if name not in content:
        return None
    if content[name] not in choices:
        raise Refused(f"{name} must be one of {', '.join(choices)}.")
    return content[name]
