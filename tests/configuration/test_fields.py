"""Every field of a recipe against values that are none, and URIs that are no places."""

from __future__ import annotations

import json
import math
from dataclasses import is_dataclass, replace
from typing import Any

import pytest

from pipeline.command_line import with_settings
from pipeline.configuration import fields
from pipeline.configuration.fields import Kind
from pipeline.host.errors import Refused
from pipeline.models import checkpoints
from pipeline.recipe import Recipe
from pipeline.services import cluster
from pipeline.settings.pairs import PairSettings
from pipeline.settings.studies import AblationSettings
from pipeline.settings.teacher import TeacherSettings

LEAVES = {name: kind for name, kind in fields.named(Recipe) if not is_dataclass(kind.of)}
NUMBERS = {name: kind for name, kind in LEAVES.items() if kind.of in (int, float)}
LISTS = {name: kind for name, kind in LEAVES.items() if kind.of is tuple and kind.parts[0].of in (int, float)}
ADDRESSES = [name for name, kind in LEAVES.items() if any(map(fields._addresses, (kind, *kind.parts)))]
HUGE = 10**30
ZERO = {  # fields that may be 0
    *("pairs.seed", "train.seed", "evaluate.seed", "teacher.filter.guidance", "teacher.filter.top_k", "train.split"),
    *("train.cross_entropy", "train.lpips", "train.micro_batch", "train.warmup", "train.weight_decay", "train.ema"),
    *(
        "train.workers",
        "evaluate.curve_count",
        "evaluate.image_size",
        "evaluate.captions.skip",
        "cluster.stall_minutes",
        "pairs.patience_hours",
        "cluster.gpus",
        "cluster.usd_per_gpu_hour",
        "train.betas",
        "ablate.seeds",
    ),
}
UNBOUNDED = {  # fields that may be as large as a float can be
    *("teacher.filter.guidance", "teacher.filter.temperature", "train.cross_entropy", "train.lpips", "train.lr"),
    *("train.weight_decay", "train.clip", "cluster.usd_per_gpu_hour"),
}


def refusal(name: str, value: Any) -> str | None:
    """The one sentence with which a recipe with ``value`` in a field is refused; None where it is accepted."""
    try:
        with_settings(Recipe(), {name: value})
    except Refused as error:
        found = str(error)
    else:
        return None
    assert found.startswith(name), "the field comes first"
    assert found.endswith((".", "?"))
    assert "\n" not in found
    assert "class" not in found, "no words of Python's"
    return found


def addressed(name: str, value: str) -> Any:
    """What a field of an address, of a list or of a mapping of them is given."""
    return {tuple: [value], dict: {"one": value}}.get(LEAVES[name].of, value)


def test_the_walk_is_complete() -> None:
    assert len(NUMBERS) > 35
    assert set(LISTS) == {
        *(
            "train.start_steps",
            "train.start_weights",
            "train.betas",
            "evaluate.timing_batches",
            "ablate.seeds",
            "benchmark.batches",
        ),
    }
    assert all(kind.limits for kind in NUMBERS.values()), "every number says what it may be"
    assert all(kind.parts[0].limits for kind in LISTS.values())


@pytest.mark.faults("recipe: number out of range", "recipe: no value")
@pytest.mark.parametrize("name", NUMBERS | LISTS)
def test_every_number_is_checked(name: str) -> None:
    kind = (NUMBERS | LISTS)[name]

    def sentence(value: Any) -> str | None:
        return refusal(name, value if kind.of is not tuple else [value] * (kind.length or 1))

    for value in (-1, math.nan, math.inf, -math.inf, "many", True, [3], {"a": 1}):
        assert sentence(value), value
    assert bool(sentence(0)) == (name not in ZERO)
    assert bool(sentence(HUGE)) == (name not in UNBOUNDED)
    assert sentence(10**400), "more than a float holds"
    assert bool(refusal(name, None)) != kind.optional
    if (kind.parts[0] if kind.parts else kind).of is int:
        assert sentence(1.5)
        assert sentence("1.2e6")


@pytest.mark.parametrize(
    ("name", "bad", "good"),
    [
        ("evaluate.curve_count", 1, 2),
        ("pairs.count", 10**11, 10**9),  # in shards of 1,000 rows
        ("train.betas", [0.9], [0.9, 0.9]),
        ("train.betas", [0.9, 0.9, 0.9], [0, 0]),
        ("pairs.solver.tolerance", 1e-7, 1e-6),
        ("cluster.gpus", 2, 0.25),
        ("pairs.seed", 2**63, 2**63 - 1),
        ("train.start_steps", [2, 3], [1, 3]),
        ("evaluate.timing_batches", [0, 4], []),
    ],
)
def test_bounds_and_what_needs_several_fields(name: str, bad: Any, good: Any) -> None:
    assert refusal(name, bad)
    assert refusal(name, good) is None


@pytest.mark.parametrize("name", LEAVES)
def test_no_value_is_one_only_where_the_type_allows_it(name: str) -> None:
    assert (refusal(name, None) is None) == LEAVES[name].optional


def test_the_entries_of_free_mappings_are_checked_too() -> None:
    def config(**values: Any) -> Any:
        return checkpoints.config(replace(Recipe().teacher, config=values))

    with pytest.raises(Refused, match=r"teacher.config.depth has no value; it must be a whole number"):
        config(depth=None)
    with pytest.raises(Refused, match=r"teacher.config.depth is '8'; it must be a whole number"):
        config(depth="8")
    with pytest.raises(Refused, match=r"teacher.config.patch_nums\[1\] is 2.5"):
        config(patch_nums=[1, 2.5])
    assert config(depth=8, patch_nums=[1, 2]).patch_nums == (1, 2)
    assert (
        refusal("teacher.config", {"quant_resi": math.inf})
        == "teacher.config.quant_resi is inf; it must be a finite number."
    )
    assert refusal("evaluate.samplers", [{"name": "Skip", "n": math.nan}])
    assert refusal("ablate.axes", {"train.lr": None})


SECTIONS = dict.fromkeys(kind.of for _, kind in fields.named(Recipe) if is_dataclass(kind.of))


@pytest.mark.parametrize("section", [Recipe, *SECTIONS])
def test_python_is_checked_as_yaml_is(section: Any) -> None:
    """Every section checks itself, whoever makes it."""
    for key, kind in fields.kinds(section).items():
        with pytest.raises(Refused, match=rf"{key} is .*; it must be"):
            replace(section(), **{key: object()})
        if kind.limits and kind.of in (int, float):
            with pytest.raises(Refused, match=rf"{key} is -1; it must be"):
                replace(section(), **{key: -1})


def test_python_is_refused_in_the_same_sentences() -> None:
    with pytest.raises(Refused, match=r"pairs.count is '5'; it must be a whole number"):
        PairSettings(count="5")  # type: ignore[arg-type]
    with pytest.raises(Refused, match=r"ablate.seeds\[1\] is -1; it must be 0 or more"):
        AblationSettings(seeds=(1, -1))
    with pytest.raises(Refused, match=r"teacher.family is 'a-b'; it must be the dotted path"):
        TeacherSettings(family="a-b")


# ---- paths and URIs


@pytest.mark.parametrize("name", ADDRESSES)
@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ("", "is empty"),
        ("  ", "is empty"),
        ("None", "is the text None"),
        ("/", "the root of the disk"),
        (" x", "a blank at an end"),
        ("s3:/bucket/run", "write s3://bucket/run, with two slashes"),
        ("s3:bucket/run", "write s3://bucket/run, with two slashes"),
        ("s3//bucket/run", "write s3://bucket/run, with two slashes"),
        ("s3:///bucket/run", "write s3://bucket/run, with two slashes"),
        ("S3://bucket/run", "write s3://bucket/run, with two slashes"),
        ("gs:/bucket", "write gs://bucket, with two slashes"),
        ("s3://", "nothing is named behind s3://"),
        ("file://folder/run", "write file:///folder/run, with three slashes"),
        ("http://host/run", "http: is not supported; give a path, or a URI of s3://, gs://, hf:// or package://"),
        ("https:/host/run", "https: is not supported"),
        ("~nobody-of-this-name/run", "no home of that user is known"),
        ("a\nb", "characters that do not print"),
        ("a\x00b", "characters that do not print"),
        ("a\udce4b", "characters that do not print"),
    ],
)
@pytest.mark.faults("recipe: URI without a slash")
def test_every_uri_is_checked(name: str, value: str, sentence: str) -> None:
    if value == "" and name in ("teacher.tokenizer", "teacher.checkpoint"):
        return  # not set; who needs the weights says so
    found = refusal(name, addressed(name, value)) or ""
    assert sentence in found.replace("compare[0]", "compare").replace("students.one", "students")


@pytest.mark.parametrize(
    "value",
    [
        *("runs/x", "/a b/ü/100%", "a:b", "../x", "~/x", "file:///tmp/x", "s3://bucket", "s3://bucket/a b/#1"),
        *("gs://b/x", "hf://owner/name/file.pt", "package://digits/x", "CHANGE: URI of the file"),
    ],
)
def test_places_that_are_meant_are_accepted(value: str) -> None:
    assert [name for name in ADDRESSES if refusal(name, addressed(name, value))] == []


def test_models_of_the_registry_are_for_the_student_alone() -> None:
    assert refusal("evaluate.student", "models:/mine@best") is None
    assert refusal("evaluate.students", {"one": "models:/mine@best"}) is None
    assert refusal("evaluate.reference", "models:/mine@best")


def test_every_uri_is_made_portable(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """Whichever fields there are: what is declared a URI no longer depends on the folder that a process is in."""
    monkeypatch.chdir(tmp_path)
    recipe = with_settings(Recipe(), {name: addressed(name, "x") for name in ADDRESSES})
    portable = json.dumps(cluster.portable(recipe).resolved())
    assert len(ADDRESSES) == 20
    assert portable.count(json.dumps(str(tmp_path / "x"))) == len(ADDRESSES)
    stays: dict[str, Any] = {
        "evaluate.student": "models:/a/1",
        "evaluate.inception": "formula",
        "evaluate.reference": "CHANGE: it",
    }
    stays |= {"evaluate.dinov2": "formula", "evaluate.students": {"one": "models:/a/1"}}
    kept = with_settings(Recipe(), stays)
    assert cluster.portable(kept).evaluate == kept.evaluate
    assert cluster.portable(cluster.portable(recipe)) == cluster.portable(recipe)


# ---- what types say


def test_types_are_told_in_words() -> None:
    assert {name: LEAVES[name].text for name in ("pairs.count", "pairs.noise", "train.betas", "evaluate.uri")} == {
        "pairs.count": "a whole number, 1 or more, and at most 10^12",
        "pairs.noise": "stored or derived",
        "train.betas": "a list of 2, each a number, 0 or more, and below 1",
        "evaluate.uri": "a path or a URI, or null",
    }
    assert Kind(bool).text == "true or false"
