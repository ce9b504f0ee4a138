"""What a field of a recipe may hold: its type declares it, and here it is checked, in one sentence with the field.

``count: Count`` is a whole number from 1 on, ``uri: Uri | None`` a path, a URI or nothing. ``check`` refuses what does
not fit its field; ``converted`` makes values of what YAML and flags give, and ``built`` the dataclasses. Knows types,
and nothing of what a recipe is about.
"""

from __future__ import annotations

import math
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from difflib import get_close_matches
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pipeline.configuration.addresses import Address, Appended, check_printable
from pipeline.host.errors import Refused

LARGEST = sys.float_info.max  # finite, unlike infinity


@dataclass(frozen=True)
class Range:
    """Numbers from ``low`` to ``high``, both allowed; NaN never is."""

    low: float
    high: float
    text: str

    def check(self, value: float, name: str) -> None:
        if not self.low <= value <= self.high:
            raise Refused(f"{name} is {shown(value)}; it must be {self.text}.")


@dataclass(frozen=True)
class Text:
    """Text on one line that is not blank."""

    text: str = "text"

    def check(self, value: str, name: str) -> None:
        check_printable(value, name)
        if not value.strip():
            raise Refused(f"{name} is {value!r}; it must be {self.text} (is a variable of the shell not set?).")


Seed = Annotated[int, Range(0, 2**63 - 1, "0 or more, and below 2^63")]
Count = Annotated[int, Range(1, 10**12, "1 or more, and at most 10^12")]  # rows, samples, steps
Size = Annotated[int, Range(1, 2**31 - 1, "1 or more, and below 2^31")]  # what is in memory at once
SizeOrOff = Annotated[int, Range(0, 2**31 - 1, "0 or more, and below 2^31")]
Pool = Annotated[int, Range(1, 10_000, "1 or more, and at most 10,000")]  # processes, files: what is listed one by one
PoolOrOff = Annotated[int, Range(0, 10_000, "0 or more, and at most 10,000")]
Actors = Pool | Literal["auto"]  # so many, or as many as there are places for
Workers = PoolOrOff | tuple[Pool, Pool]  # so many, or from one number to another
Switch = bool | Literal["auto"]  # auto: whoever asks settles it by where the models run
Weight = Annotated[float, Range(0, LARGEST, "0 or more, and finite")]
Positive = Annotated[float, Range(math.nextafter(0, 1), LARGEST, "above 0, and finite")]
Share = Annotated[float, Range(0, math.nextafter(1, 0), "0 or more, and below 1")]
Uri = Annotated[str, Address()]
Lines = Annotated[str, Appended()]  # a file that lines are added to
Name = Annotated[str, Text("a name")]


# ---- types


@dataclass(frozen=True)
class Kind:
    """A type, taken apart: what values are of, what limits them, whether None is one, and the types of its parts.

    ``of`` is bool, int, float, str, Any, a dataclass, tuple, list or dict, or for a Literal the tuple of its choices.
    ``length`` is that of a tuple whose length is fixed; ``others`` are types whose values may stand there instead.
    """

    of: Any
    limits: tuple[Any, ...] = ()
    optional: bool = False
    parts: tuple[Kind, ...] = ()
    length: int | None = None
    others: tuple[Kind, ...] = ()

    @property
    def text(self) -> str:
        """What it holds, for people: "a whole number, 1 or more"."""
        texts = [self._noun, *(other.text for other in self.others), *["null"] * self.optional]
        return ", or ".join(texts)

    @property
    def _noun(self) -> str:
        if isinstance(self.of, tuple):
            return " or ".join(self.of) if len(self.of) < 3 else f"one of {', '.join(self.of)}"
        if self.of in (tuple, list):
            return f"a list{f' of {self.length}' if self.length else ''}, each {self.parts[0].text}"
        texts = [limit.text for limit in self.limits]
        nouns = {int: "a whole number", float: "a number", bool: "true or false", str: "text", dict: "a mapping"}
        return ", ".join(([] if self.of is str and texts else [nouns.get(self.of, "a value")]) + texts)

    def fits(self, value: Any) -> bool:
        """Whether a value is of the type, its parts and limits aside; true and false are no numbers."""
        return self._fits(value) or any(other.fits(value) for other in self.others)

    def taken_for(self, value: Any) -> Kind:
        """The type that a value is of, of this one and those that may stand instead; this one where it is of none."""
        return self if self._fits(value) else next((other for other in self.others if other.fits(value)), self)

    def _fits(self, value: Any) -> bool:
        if isinstance(self.of, tuple):
            return isinstance(value, str) and value in self.of
        if self.of is dict:
            return isinstance(value, dict) and all(isinstance(key, str) for key in value)
        if self.of is tuple:
            return isinstance(value, tuple) and self.length in (None, len(value))
        if self.of in (int, float):
            return isinstance(value, (int, self.of)) and not isinstance(value, bool)
        return self.of is Any or isinstance(value, self.of)


@cache
def kind(hint: Any) -> Kind:
    """A type hint, taken apart."""
    if get_origin(hint) is Annotated:
        return replace(kind(hint.__origin__), limits=hint.__metadata__)
    inside = get_args(hint)
    if get_origin(hint) in (Union, types.UnionType):
        first, *others = (kind(part) for part in inside if part is not type(None))
        return replace(first, optional=type(None) in inside, others=tuple(others))
    if get_origin(hint) is Literal:
        return Kind(inside)
    of, parts = get_origin(hint) or hint, tuple(kind(part) for part in inside if part is not ...)
    return Kind(of, parts=parts, length=len(inside) if of is tuple and ... not in inside else None)


def kinds(section: Any) -> dict[str, Kind]:
    """Every field of a dataclass, or of the class of one, with its type."""
    return _kinds(section if isinstance(section, type) else type(section))


@cache
def _kinds(section: Any) -> dict[str, Kind]:
    found = get_type_hints(section, include_extras=True)
    return {field.name: kind(found[field.name]) for field in fields(section)}


def named(section: Any, name: str = "") -> Iterator[tuple[str, Kind]]:
    """(dotted name, type) of every field, a section before what it holds."""
    for key, inside in kinds(section).items():
        yield dotted(name, key), inside
        if is_dataclass(inside.of):
            yield from named(inside.of, dotted(name, key))


# ---- checking


def require(good: bool, sentence: str) -> None:
    """Refused with the sentence where something is not ``good``."""
    if not good:
        raise Refused(sentence)


def check(section: Any, name: str) -> None:
    """Refuses the first field of a dataclass whose value is not what its type says; ``name`` is the section's."""
    for key, wanted in kinds(section).items():
        check_value(getattr(section, key), wanted, dotted(name, key))


def check_value(value: Any, wanted: Kind, name: str) -> None:
    """Refuses a value that is not of the type ``wanted``, or not within its limits."""
    if value is None and (wanted.optional or wanted.of is Any):
        return
    if value is None:
        raise Refused(f"{name} has no value; it must be {wanted.text}. Leave the key out for the default.")
    if not wanted.fits(value):
        raise Refused(f"{name} is {shown(value)}; it must be {wanted.text}.")
    wanted = wanted.taken_for(value)
    for limit in wanted.limits:
        limit.check(value, name)
    if isinstance(value, float) and not math.isfinite(value):
        raise Refused(f"{name} is {value}; it must be a finite number.")
    free = Kind(Any)
    if isinstance(value, dict):
        for key, part in value.items():
            check_value(part, wanted.parts[-1] if wanted.parts else free, dotted(name, key))
    elif isinstance(value, list | tuple):
        several = wanted.parts if wanted.length else (wanted.parts or (free,))[:1] * len(value)
        for i, (part, part_wanted) in enumerate(zip(value, several, strict=True)):
            check_value(part, part_wanted, f"{name}[{i}]")


# ---- reading


def converted(tree: Any, wanted: Kind, name: str, scalar: Callable[[str], Any]) -> Any:
    """What YAML or a flag gives for a field, or for some of the fields of a section, checked and of the field's type.

    Lists become tuples and whole numbers floats where such are wanted, and text is read by ``scalar`` where no text is.
    A section stays a mapping. Raises Refused for unknown keys and for values that do not fit.
    """
    try:
        value = _cast(tree, wanted, scalar)
    except Refused as error:
        raise Refused(f"{name}, {error}") from None
    if is_dataclass(wanted.of):
        if not isinstance(value, dict):
            found = "has no value" if value is None else f"is {shown(value)}"
            raise Refused(f"the section {name} of the recipe {found}; it must hold named settings.")
        known: dict[str, Kind] = kinds(wanted.of)
        for key in value:
            if key not in known:
                raise Refused(unknown(dotted(name, key), [dotted(name, other) for other in known]))
        return {key: converted(part, known[key], dotted(name, key), scalar) for key, part in value.items()}
    check_value(value, wanted, name)
    return value


def _cast(value: Any, wanted: Kind, scalar: Callable[[str], Any]) -> Any:
    textual = wanted.of is str or isinstance(wanted.of, tuple)
    if isinstance(value, str) and (not textual or (wanted.optional and value in ("null", "~"))):
        value = scalar(value)
    if wanted.of is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < LARGEST:
        return float(value)
    for one in (wanted, *wanted.others):
        if one.of is tuple and isinstance(value, list | tuple):
            return tuple(_cast(part, one.parts[0], scalar) for part in value)
    return value


def built(section: Any, tree: dict[str, Any]) -> Any:
    """The dataclass with what ``converted`` gave, and the defaults of all else."""
    known = kinds(section)
    return section(
        **{k: built(known[k].of, value) if is_dataclass(known[k].of) else value for k, value in tree.items()}
    )


def laid_over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Two nested mappings as one: ``above`` wins, mappings are laid over mappings, lists are replaced whole."""
    out = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(out.get(key), dict)
        out[key] = laid_over(out[key], value) if both else value
    return out


def unknown(name: str, known: list[str], what: str = "a recipe has no field") -> str:
    """The sentence for a name that is none, with the names that may be meant."""
    last = name.rpartition(".")[2].lstrip("-")
    alike = [other for other in known if other.rpartition(".")[2].lstrip("-") == last or other.startswith(name)]
    alike = (alike or get_close_matches(name, known, 3))[:3]
    hint = f"did you mean {' or '.join(alike)}?" if alike else "--help lists them all."
    return f"{what} {name}; {hint}"


# ---- the rest


def mapped(section: Any, change: Callable[[str], str]) -> Any:
    """The dataclass with every URI in it (declared ``Uri``, a list or a mapping of them) put through ``change``.

    What is not set, and what a user has still to set, stays.
    """
    changed: dict[str, Any] = {}
    for key, wanted in kinds(section).items():
        value = getattr(section, key)
        if is_dataclass(wanted.of):
            changed[key] = mapped(value, change)
        elif value and _addresses(wanted):
            changed[key] = change(value)
        elif wanted.of is dict and any(map(_addresses, wanted.parts)):
            changed[key] = {name: change(uri) for name, uri in value.items()}
        elif any(map(_addresses, wanted.parts)):
            changed[key] = tuple(change(uri) for uri in value)
    return replace(section, **changed)


def _addresses(wanted: Kind) -> bool:
    return any(isinstance(limit, Address) for limit in wanted.limits)


def shown(value: Any) -> str:
    """A value as a sentence quotes it, never long."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) and value.bit_length() > 256:
        return f"a number of {value.bit_length()} bits"
    text = repr(list(value) if isinstance(value, tuple) else value)  # as it is written in YAML
    return text if len(text) <= 80 else f"{text[:77]}..."


def dotted(name: str, key: Any) -> str:
    return f"{name}.{key}".lstrip(".")
