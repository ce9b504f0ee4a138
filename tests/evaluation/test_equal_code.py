"""Code that is only renamed stands for what it was, and an older checkout says what that is."""

from __future__ import annotations

import json
import shutil
import tomllib
from pathlib import Path

import pytest

from pipeline.evaluation import equal_code
from pipeline.host import provenance
from pipeline.host.errors import Refused
from pipeline.sampling.samplers import SAMPLERS, Autoregressive, FewStep

FAMILY = "pipeline.models.llamagen"
ROOT = Path(__file__).parents[2]


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The package's file, an empty one of the test's own."""
    place = tmp_path / "equal_code.json"
    place.write_text("{}")
    monkeypatch.setattr(equal_code, "PLACE", place)
    return place


def test_a_chain_leads_to_the_oldest_and_an_unknown_digest_stands_for_itself() -> None:
    equals = {"c": "b", "b": "a", "x": "y"}
    assert [equal_code.oldest(digest, equals) for digest in "abcxz"] == ["a", "a", "a", "y", "z"]
    assert equal_code.oldest("a", {"a": "b", "b": "a"}) in "ab", "a ring ends, too"


def test_an_alias_is_honoured_for_draws_and_for_measuring(shipped: Path) -> None:
    kinds = [Autoregressive, FewStep]
    today, measuring = equal_code.of_draws(FAMILY, kinds), equal_code.of_measuring()
    assert today["FewStep"] == provenance.digest(
        *equal_code.SCORED,
        *equal_code.DRAWN,
        equal_code.STUDENT,
        "pipeline.sampling.samplers:FewStep",
        *(f"{FAMILY}:{name}" for name in ("Config", "Teacher", "Tokenizer", "Student")),
    )
    shipped.write_text(json.dumps({today["FewStep"]: "older", "older": "oldest", measuring: "old measuring"}))
    assert equal_code.of_draws(FAMILY, kinds) == today | {"FewStep": "oldest"}
    assert equal_code.of_measuring() == "old measuring"


def test_what_is_written_down_leads_to_the_oldest_and_never_in_a_ring() -> None:
    here, there = {"a": "1", "b": "2", "c": "3"}, {"a": "1", "b": "20", "c": "30", "gone": "4"}
    assert equal_code.joined({}, here, there) == {"2": "20", "3": "30"}, "equal digests need no line"
    assert equal_code.joined({"2": "19"}, here, there)["2"] == "19", "what was found before stays"
    assert equal_code.joined({"20": "2"}, here, there) == {"20": "2", "3": "30"}, "the code is what it was once"


def test_every_sampler_of_every_family_has_a_digest() -> None:
    found = equal_code.everything()
    assert found.keys() == {equal_code.REAL, equal_code.MEASURING} | {
        f"{family} {kind.__name__}" for family in equal_code.FAMILIES for kind in SAMPLERS
    }
    assert len(set(found.values())) == len(found), "no two are of the same code"


def test_a_checkout_answers_for_its_own_code(tmp_path: Path) -> None:
    """A copy of the package in which a sampler's code is another."""
    shutil.copytree(ROOT / "pipeline", tmp_path / "pipeline", ignore=shutil.ignore_patterns("__pycache__"))
    place = tmp_path / "pipeline/sampling/samplers.py"
    place.write_text(place.read_text().replace("for t in self.steps:\n", "for t in [*self.steps]:\n"))
    found, here = equal_code.of_checkout(tmp_path), equal_code.everything()
    assert {name for name in here if found[name] != here[name]} == {
        f"{family} FewStep" for family in equal_code.FAMILIES
    }
    with pytest.raises(Refused, match="holds no checkout of this package"):
        equal_code.of_checkout(tmp_path / "pipeline" / "assets")


def test_the_package_ships_the_file_and_it_has_no_ring() -> None:
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert data["pipeline.evaluation"] == [equal_code.PLACE.name]
    equals = equal_code.known()
    assert all(equal_code.oldest(digest, equals) not in equals for digest in equals)
