"""What a check found, as JSON and as Markdown. A later run of other steps is laid over an earlier one's sheet."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from typing import Any

from pipeline.benchmark.sheet import number
from pipeline.device.budget import Ending
from pipeline.device.plan import KINDS, Figure, Kind, Step
from pipeline.host import provenance
from pipeline.host.errors import Refused
from pipeline.report.markdown import as_markdown
from pipeline.report.tables import Table

FORMAT = "distilled-decoding gpu-check 1"
SAME = ("name", "rehearsal")  # of the card: what a sheet is of
TITLES: dict[Kind, str] = {
    "tests": "Tests",
    "benchmark": "Benchmark",
    "pairs": "Pairs a second",
    "memory": "Memory",
    "training": "Training",
}
ABOUT: dict[Kind, str] = {
    "tests": "Those tests of the suite that need a GPU or are of what only GPUs have: kernel, graphs, precision, fp16.",
    "benchmark": (
        "`jobs/benchmark.py`'s sections of matching, sampling and the teacher. The student is as it starts from its"
        " teacher; *decoded* ends at the image."
    ),
    "pairs": (
        "`jobs/generate_pairs.py`, one replica, ended by a signal. Counted are the shards after the first, from the"
        " moment at which that was written to the one of the last; not counted is what lies before: imports, Ray,"
        " reading and checking the weights, recording the graphs, and the first shard itself."
    ),
    "memory": (
        "Predicted is what `--dry_run` says of the recipe's `pairs.batch` and `train.micro_batch`. nvidia-smi counts"
        " all that is on the card, other programs' too. GB are 10^9 bytes."
    ),
    "training": (
        "Optimiser steps of the whole `train.batch` on one card, in passes of `train.micro_batch` or of what fits, from"
        " made-up pairs; reading and the meeting of workers are not in it."
    ),
}


def new(card: dict[str, Any]) -> dict[str, Any]:
    """An empty sheet of a card, as ``card.facts`` describes it."""
    return {"format": FORMAT, "card": card, "runs": [], "steps": {}}


def onto(earlier: dict[str, Any] | None, card: dict[str, Any]) -> dict[str, Any]:
    """The sheet on which a run goes on: the earlier one, if there is one.

    Raises Refused for one of another format or another card: two cards' figures are not one sheet.
    """
    if earlier is None:
        return new(card)
    if earlier.get("format") != FORMAT:
        raise Refused(f"the sheet there says format {earlier.get('format')!r}, not {FORMAT!r}; choose another --out.")
    if any(earlier["card"].get(key) != card.get(key) for key in SAME):
        raise Refused(
            f"the sheet there is of {_titled(earlier['card'])}, and this is {_titled(card)}; choose another --out."
        )
    return earlier | {"card": card}


def record(sheet: dict[str, Any], step: Step, outcome: Ending, card: dict[str, Any]) -> None:
    """Lay a step's outcome over what the sheet has of it; one that was not begun leaves earlier figures alone."""
    if outcome.state == "left" and step.name in sheet["steps"]:
        return
    figures = [asdict(one) | {"met": one.met} for one in filled(step, outcome.values)]
    about = {"kind": step.kind, "recipe": step.recipe, "date": provenance.now(), "commit": card["commit"]}
    sheet["steps"][step.name] = about | outcome.as_json() | {"figures": figures}
    del sheet["steps"][step.name]["values"]


def filled(step: Step, values: dict[str, float | None]) -> list[Figure]:
    """The figures of a step with what was found of them."""
    return [replace(one, value=values.get(one.key)) for one in step.figures]


def finish(sheet: dict[str, Any], run: dict[str, Any], every: Sequence[Step], command: str) -> None:
    """Add a run, and say what is left of all the steps that there are, with the command that does only those."""
    sheet["runs"].append(run)
    rest = [step for step in every if _state(sheet, step) not in ("measured", "failed")]
    failed = [step.name for step in every if _state(sheet, step) == "failed"]
    minutes = math.ceil((sum(step.wanted for step in rest) + 30) / 60)
    only = f"--only {','.join(step.name for step in rest)} --minutes {minutes}"
    sheet["left"] = {
        "steps": [step.name for step in rest],
        "failed": failed,
        "command": f"{command} {only}" if rest else None,
    }


def command(out: str, cpu: bool) -> str:
    """Of a run into the same folder, without what it is to do."""
    return f"python jobs/gpu_check.py --out {shlex.quote(out)}" + (" --cpu true" if cpu else "")


# ---- Markdown


def markdown(sheet: dict[str, Any], every: Sequence[Step]) -> str:
    """The whole sheet. Cells of what was not measured are empty."""
    parts = [f"# GPU check: {_titled(sheet['card'])}", _where(sheet), _claims(sheet, every)]
    for kind in KINDS:
        of_kind = [step for step in every if step.kind == kind]
        parts += [f"## {TITLES[kind]}", ABOUT[kind], _table(sheet, of_kind), *_remarks(sheet, of_kind)]
    parts.append(_left(sheet))
    return "\n\n".join(filter(None, parts)) + "\n"


def _titled(card: dict[str, Any]) -> str:
    return f"a rehearsal on a CPU, {card['name']}" if card["rehearsal"] else str(card["name"])


def _where(sheet: dict[str, Any]) -> str:
    card = sheet["card"]
    memory = f"{card['memory_bytes'] / 1e9:.0f} GB; " if card["memory_bytes"] else ""
    versions = [("driver", card["driver"]), ("CUDA", card["cuda"]), ("torch", card["torch"])]
    said = ", ".join(f"{name} {value or 'unknown'}" for name, value in [*versions, ("triton", card["triton"])])
    minutes = sum(run["minutes"] for run in sheet["runs"])
    commits = sorted({(step["commit"] or "unknown")[:9] for step in sheet["steps"].values()})
    text = (
        f"{memory}{said}, Python {card['python']}, {card['cores']} cores; commit {', '.join(commits) or 'unknown'};"
        f" {_days(sheet)}; {minutes:.1f} minutes in {len(sheet['runs'])} run(s). Weights are by formula:"
        " shapes and speed are those of the real networks, images and probabilities are not."
    )
    if card.get("changed"):
        text += " The code is not quite that of the commit: files were changed."
    if card["rehearsal"]:
        text += " **No GPU took part: small recipes stand in for the large ones, and no figure is of a GPU.**"
    return text


def _days(sheet: dict[str, Any]) -> str:
    """The days of the runs: 2026-11-30, or the first and the last of several."""
    days = sorted({run["begun"][:10] for run in sheet["runs"]})
    return " to ".join(dict.fromkeys([days[0], days[-1]])) if days else "no run"


def _claims(sheet: dict[str, Any], every: Sequence[Step]) -> str:
    """One row for every figure that has a bound, whether or not it was measured; nothing where none has."""
    cells = []
    for step in every:
        for one in _found(sheet, step):
            if one.bound is not None:
                about = f"{step.recipe}: {one.text}" if step.recipe else one.text
                wanted = f"{'<=' if one.at_most else '>='} {number(one.bound)} {one.unit}"
                verdict = {True: "yes", False: "**no**", None: ""}[one.met]
                cells.append([about, _cell(one), wanted, verdict])
    return as_markdown(Table(["claim", "measured", "wanted", "met"], cells, 1)) if cells else ""


def _table(sheet: dict[str, Any], steps: Sequence[Step]) -> str:
    """The figures of one kind, a column for each recipe."""
    columns = [{one.key: _cell(one) for one in _found(sheet, step)} for step in steps]
    cells = [[one.text, one.unit, *(column[one.key] for column in columns)] for one in steps[0].figures]
    return as_markdown(Table(["", "unit", *(step.recipe or "found" for step in steps)], cells, 2))


def _cell(figure: Figure) -> str:
    """A number as tables print it, whole ones without a point, bold where it misses its bound; empty without one."""
    if figure.value is None:
        return ""
    value = number(int(figure.value) if float(figure.value).is_integer() else figure.value)
    return f"**{value}**" if figure.met is False else value


def _remarks(sheet: dict[str, Any], steps: Iterable[Step]) -> list[str]:
    """A line for each step that did not end as it should or has something to say."""
    lines = []
    for step in steps:
        found = sheet["steps"].get(step.name)
        if found is None:
            continue
        said = [] if found["state"] == "measured" else [SAID[found["state"]]]
        said += [f"It had {found['given']:.0f} s of the {step.wanted:g} that it wants."] if found["shortened"] else []
        said += found["about"]
        named = {name: ", ".join(f"`{one}`" for one in names) for name, names in found["details"].items() if names}
        said += [f"{name}: {names}." for name, names in named.items()]
        lines += [f"- {step.name}: {' '.join(said)}"] if said else []
    return ["\n".join(lines)] if lines else []


SAID = {
    "cut": "Its time ended before all was measured.",
    "failed": "It failed.",
    "stopped": "A signal stopped it.",
    "left": "Not begun.",
}


def _left(sheet: dict[str, Any]) -> str:
    left = sheet["left"]
    said = [f"Failed: {', '.join(left['failed'])}; their logs lie beside this sheet."] if left["failed"] else []
    if left["steps"]:
        said.append(f"Left: {', '.join(left['steps'])}. These alone: `{left['command']}`")
    return "\n\n".join(said or ["Nothing is left."])


def _found(sheet: dict[str, Any], step: Step) -> list[Figure]:
    values = {one["key"]: one["value"] for one in sheet["steps"].get(step.name, {}).get("figures", [])}
    return filled(step, values)


def _state(sheet: dict[str, Any], step: Step) -> str | None:
    found = sheet["steps"].get(step.name)
    return found["state"] if found else None
