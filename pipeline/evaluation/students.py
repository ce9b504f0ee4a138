"""The students of a report, and those exported on the way to its own: what their files say, and whether they fit.

The authors' own files say nothing of themselves: of other students their tensors are held against the network, and the
recipe's own is checked where it is loaded.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

from pipeline import storage
from pipeline.generator import folder
from pipeline.host.errors import Missing, Refused
from pipeline.models import checkpoints
from pipeline.models.base import Layout
from pipeline.recipe import Recipe
from pipeline.sampling.samplers import Sampler

Exported = dict[str, Any]  # what distillation wrote into a student's file; empty of the authors' own
SNAPSHOT = re.compile(r"step-(\d+)\.safetensors")  # students exported along the way


def exported(uri: str, wanted: dict[str, Any]) -> Exported:
    """What the student's file says of itself.

    Raises Missing where there is none, and Refused for one that was distilled with another value of anything in
    ``wanted``: family, teacher, pair set.
    """
    if not storage.exists(uri):
        raise Missing(f"there is no student at {uri}; run jobs/distill.py first or set evaluate.student.")
    settings = checkpoints.metadata(uri) if uri.endswith(".safetensors") else {}  # the authors' are .pth and .pt
    for key, value in wanted.items() if settings else ():
        if settings.get(key) != value:
            raise Refused(
                f"the student at {uri} was distilled with {key} {settings.get(key)}, but this recipe has {value}; use"
                " the recipe that it was distilled with, or set evaluate.student."
            )
    return settings


def snapshots(recipe: Recipe, uri: str, student: Exported) -> tuple[dict[int, str], list[str]]:
    """({step: URI} of the students exported on the way to the one at ``uri``, what is said of others in the folder)."""
    names = storage.listing(recipe.student_uri) if recipe.evaluate.curve_count else []
    folder = {int(m[1]): storage.join(recipe.student_uri, m[0]) for m in map(SNAPSHOT.fullmatch, names) if m}
    ours = {step: place for step, place in folder.items() if _on_the_way(checkpoints.metadata(place), student)}
    if len(ours) == len(folder):
        return folder, []
    others = ", ".join(f"{step:,}" for step in sorted(folder.keys() - ours.keys()))
    return ours, [
        f"The curve over training leaves out the students of step {others} in {recipe.student_uri}, which are of"
        f" another run or later than {uri}."
    ]


def _on_the_way(snapshot: Exported, student: Exported) -> bool:
    """Whether a snapshot was exported by the run that made ``student``, and not after it; files that say nothing do
    not count.
    """
    run = "recipe_fingerprint" if "recipe_fingerprint" in student else "mlflow_run"
    same = run in student and snapshot.get(run) == student[run]
    return same and snapshot.get("step", 0) <= student.get("step", math.inf)


def about_split(recipe: Recipe, uri: str, student: Exported) -> list[str]:
    """What a reader must know of where the heads' split comes from."""
    split = student.get("split")
    if split is None:
        return [
            f"The student's file {uri} does not say with which split and start steps it was trained; the split is the"
            f" recipe's, {recipe.train.split} where a sampler names none."
        ]
    if split != recipe.train.split and any(entry.get("split") is None for entry in recipe.evaluate.samplers):
        return [f"train.split is {recipe.train.split}, but the student was trained with {split}, and so it draws."]
    return []


def departures(student: Exported, layout: Layout, sampler: Sampler) -> list[str]:
    """In what a sampler asks its student for more than it was trained for, as far as the student's file says so."""
    out: list[str] = []
    if not sampler.student or not student:
        return out
    split = getattr(sampler, "split")  # noqa: B009  every sampler with a student has one, Sampler has not
    if split != student.get("split", split):
        out.append(f"split {split}, trained with {student['split']}")
    asked = sampler.jumps(layout)
    if beyond := [step for step in asked if step not in student.get("start_steps", asked)]:
        at, trained = (", ".join(map(str, steps)) for steps in (beyond, student["start_steps"]))
        out.append(f"jumps from step {at}, trained from {trained}")
    return out


# ---- other students beside the recipe's own


def beside(recipe: Recipe, name: str, uri: str, teacher: dict[str, str]) -> Exported:
    """What the file of another student says of itself, whose weights are at ``uri``.

    ``teacher`` are SHA-256 of the recipe's teacher's two files. Raises Missing where there is no file, and Refused, one
    sentence, for a student of another family, layout, tokenizer, conditioning or number of classes.
    """
    who = f"evaluate.students: {name}, at {uri},"
    if not storage.exists(uri):
        raise Missing(f"{who} is not there; give a student's folder, its file, or models:/NAME@best.")
    said = checkpoints.metadata(uri) if uri.endswith(".safetensors") else {}
    for what, theirs, ours in _conditions(recipe, uri, said, teacher):
        if theirs != ours:
            raise Refused(
                f"{who} has {what} {theirs} and this recipe has {ours}; only students of one layout, tokenizer and"
                " conditioning can be drawn for the same labels or prompts from the same noise, so leave it out."
            )
    options = recipe.train.student_options
    try:
        checkpoints.check_student(recipe.teacher, uri, {key: said.get(key, value) for key, value in options.items()})
    except Refused as error:
        raise Refused(f"evaluate.students: {name} is no student of this recipe's teacher: {error}") from None
    return said


def _conditions(
    recipe: Recipe, uri: str, said: Exported, teacher: dict[str, str]
) -> Iterator[tuple[str, object, object]]:
    """(what, the other student's, the recipe's) of all that must be alike, as far as its files say it."""
    settings = recipe.teacher
    if "family" in said:
        yield "the family", said["family"], settings.family
    if "config" in said:
        theirs = replace(settings, config=said["config"])
        takes = ["labels" if checkpoints.caption_shape(one) is None else "prompts" for one in (theirs, settings)]
        yield "as its conditions", takes[0], takes[1]
        other, own = (asdict(checkpoints.config(one)) for one in (theirs, settings))
        for key in own:
            yield f"teacher.config.{key}", other[key], own[key]
    if "teacher" in said:
        yield "a tokenizer of SHA-256", said["teacher"]["tokenizer"], teacher["tokenizer"]
    place = storage.join(uri.rpartition("/")[0], folder.CONFIG)
    content = storage.read_json(place) if said and storage.exists(place) else {}
    text: dict[str, Any] = content.get("text") or {}
    for key in text.keys() & {"clean", "length"}:  # which weights encode, two URIs do not tell
        yield f"text.{key}", text[key], getattr(recipe.text, key)


def about_beside(name: str, uri: str, student: Exported, teacher: dict[str, str]) -> list[str]:
    """What a reader must know of another student: a split that nobody says, and another teacher's weights."""
    if not student:
        return [
            f"The file {uri} of the student {name} does not say with which split and start steps it was trained, nor of"
            " which teacher and tokenizer; the split is the recipe's where a sampler names none."
        ]
    found = student.get("teacher", teacher)["checkpoint"]
    if found == teacher["checkpoint"]:
        return []
    return [f"The student {name} was distilled from another teacher's weights, SHA-256 {found[:12]}...."]
