"""What determines the rows of a pair set, prompts and their encoder among it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from tiny import PROMPTS, tiny, tiny_text, with_pairs

from pipeline.host.errors import Refused
from pipeline.pairs.facts import PairFacts, conditioning
from pipeline.recipe import Recipe
from pipeline.settings.text import CaptionSettings, TextSettings


def prompts_of(recipe: Recipe) -> Path:
    assert recipe.captions.uri
    return Path(recipe.captions.uri)


def test_facts_of_classes_name_no_text(tmp_path: Path) -> None:
    """So the sets from before there were prompts stay valid."""
    facts = PairFacts.of(tiny(tmp_path))
    assert not {"captions", "encoder"} & facts.json().keys()
    assert PairFacts.from_json(facts.json()) == facts


def test_facts_of_prompts_name_the_list_and_the_encoder(tmp_path: Path) -> None:
    facts = PairFacts.of(tiny_text(tmp_path))
    assert facts.layout.classes == 0
    assert facts.captions
    assert facts.captions["rows"] == PROMPTS
    assert facts.encoder
    assert (facts.encoder["length"], facts.encoder["clean"], facts.encoder["precision"]) == (8, "", "fp32")
    assert PairFacts.from_json(facts.json()) == facts


def test_another_list_is_another_set_and_growth_is_growth(tmp_path: Path) -> None:
    recipe = tiny_text(tmp_path)
    before = PairFacts.of(recipe).fingerprint
    assert PairFacts.of(with_pairs(recipe, count=50)).fingerprint == before
    moved = prompts_of(recipe).rename(tmp_path / "moved.txt")
    assert PairFacts.of(replace(recipe, captions=CaptionSettings(uri=str(moved)))).fingerprint == before
    moved.write_text(moved.read_text().replace("number 59", "number 60"))
    assert PairFacts.of(replace(recipe, captions=CaptionSettings(uri=str(moved)))).fingerprint != before


@pytest.mark.parametrize("change", [{"length": 7}, {"clean": True}, {"precision": "bf16"}])
def test_another_encoding_is_another_set(tmp_path: Path, change: dict[str, object]) -> None:
    recipe = tiny_text(tmp_path)
    other = replace(recipe, text=replace(recipe.text, **change))  # type: ignore[arg-type]
    assert PairFacts.of(other).fingerprint != PairFacts.of(recipe).fingerprint


def test_the_prompt_of_an_id_is_its_row(tmp_path: Path) -> None:
    recipe = tiny_text(tmp_path)
    lines = prompts_of(recipe).read_text().splitlines()
    assert conditioning(recipe)([0, 59, 60, 61]).tolist() == [lines[0], lines[59], lines[0], lines[1]]
    assert conditioning(tiny(tmp_path))([0, 2, 3, 4]).tolist() == [0, 2, 0, 1], "classes in turn"


@pytest.mark.faults("captions: teacher and prompts do not belong together")
def test_teacher_captions_and_encoder_must_belong_together(tmp_path: Path) -> None:
    classes, captions = tiny(tmp_path), tiny_text(tmp_path)
    with pytest.raises(Refused, match=r"^captions\.uri is .*prompts\.txt, and the teacher takes classes"):
        PairFacts.of(replace(classes, captions=captions.captions))
    with pytest.raises(Refused, match=r"^text\.encoder is .*encoder, and the teacher takes classes"):
        PairFacts.of(replace(classes, text=captions.text))
    with pytest.raises(Refused, match=r"takes captions and captions\.uri is not set; give a Parquet file"):
        PairFacts.of(replace(captions, captions=CaptionSettings()))
    with pytest.raises(Refused, match=r"text\.encoder is not set"):
        PairFacts.of(replace(captions, text=TextSettings()))
    (tmp_path / "wider").mkdir()
    wider = tiny_text(tmp_path / "wider", caption_dim=24)
    with pytest.raises(Refused, match=r"text\.encoder .*16.*24"):
        PairFacts.of(wider)


def test_shapes_of_shards_are_known_without_reading_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For ``--status``, which may not take minutes over an encoder of gigabytes."""
    recipe = tiny_text(tmp_path)
    whole = PairFacts.of(recipe)
    monkeypatch.setattr("pipeline.storage.sha256", lambda uri: pytest.fail(f"{uri} was read"))
    facts = PairFacts.of(recipe, checksums={})
    assert (facts.row_bytes, facts.shard_name(3, 16)) == (whole.row_bytes, whole.shard_name(3, 16))
