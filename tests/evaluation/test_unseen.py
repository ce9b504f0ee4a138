"""The prompts of a report: new to the student, and those of the real images."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.digits import captioned, networks
from pipeline.evaluation import real_images, scoring, unseen
from pipeline.host.errors import Refused
from pipeline.recipe import Recipe
from pipeline.settings.evaluate import EvaluateSettings
from pipeline.settings.pairs import PairSettings
from pipeline.settings.teacher import TeacherSettings
from pipeline.settings.text import CaptionSettings, UnseenSettings

TEXTS = [f"prompt {i}" for i in range(20)]


def parquet(place: Path, texts: Sequence[str | None], images: Sequence[Any] | None = None, **columns: Any) -> str:
    """A Parquet file of prompts in row groups of three, beside images where there are some; returns its path."""
    table: dict[str, Any] = {"caption": pa.array(texts, pa.string())} | columns
    if images is not None:
        table["jpg"] = pa.array(images, pa.binary())
    pq.write_table(pa.table(table), place, row_group_size=3)
    return str(place)


def picture(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 4, 3), shade, dtype=np.uint8)).save(buffer, "png")
    return buffer.getvalue()


def recipe(of_pairs: str | None, count: int = 5, pairs: int = 8, caption_dim: int = 16, **settings: Any) -> Recipe:
    """Pairs of the first ``pairs`` prompts at ``of_pairs``; ``settings`` are of ``evaluate``."""
    teacher = TeacherSettings("pipeline.models.llamagen", {"caption_dim": caption_dim}, "tokenizer", "checkpoint")
    return Recipe(
        name="prompts",
        run="run",
        teacher=teacher,
        captions=CaptionSettings(of_pairs),
        pairs=PairSettings(count=pairs),
        evaluate=EvaluateSettings(count=count, **settings),
    )


def own(uri: str | None = None, column: str | None = None, skip: int = 0) -> dict[str, Any]:
    return {"captions": UnseenSettings(uri, column, skip)}


def opened(given: Recipe) -> unseen.UnseenPrompts:
    found = unseen.prompts(given)
    assert found is not None
    return found


def refused(given: Recipe, sentence: str) -> None:
    with pytest.raises(Refused, match=sentence) as caught:
        unseen.reference(given, opened(given))
    assert "\n" not in str(caught.value)


# ---- which prompts


def test_prompts_begin_behind_those_of_the_pairs(tmp_path: Path) -> None:
    uri = parquet(tmp_path / "a.parquet", TEXTS)
    assert opened(recipe(uri))(range(3)).tolist() == TEXTS[8:11]
    assert opened(recipe(uri, **own(skip=10)))([1, 0]).tolist() == TEXTS[11:9:-1]
    other = parquet(tmp_path / "b.parquet", ["b"] * 5, other=["c", "d", "e", "f", "g"])
    assert opened(recipe(uri, **own(other, "other")))(range(6)).tolist() == ["c", "d", "e", "f", "g", "c"]


def test_classes_have_no_prompts(tmp_path: Path) -> None:
    assert unseen.prompts(recipe(None, caption_dim=0)) is None
    given = recipe(None, caption_dim=0, **own(parquet(tmp_path / "a.parquet", TEXTS)))
    refused(given, "evaluate.captions.uri is .*, and the teacher takes classes; leave it out")


def test_prompts_that_cannot_serve_are_one_sentence(tmp_path: Path) -> None:
    uri = parquet(tmp_path / "a.parquet", TEXTS)
    refused(recipe(None), "neither captions.uri nor evaluate.captions.uri is set")
    refused(recipe(uri, **own(skip=7)), r"skip is 7, but pairs are made of the first 8 rows .*; set it to 8 or more")
    refused(recipe(uri, **own(f"{tmp_path}/../{tmp_path.name}/a.parquet", skip=7)), "skip is 7, but pairs are made of")
    refused(recipe(uri, count=13), r"has 12 prompts, .* from row 8 on, for evaluate.count 13; give more, or lower")
    refused(recipe(uri, pairs=20), "pairs are made of all 20 rows of .*so none are left for the report")
    refused(recipe(uri, **own(skip=20)), "evaluate.captions.skip")
    refused(recipe(uri, **own(column="captoin")), "has no column captoin")


def test_facts_change_with_what_is_drawn(tmp_path: Path) -> None:
    """Statistics are found again by them, and another skip is another list."""
    uri = parquet(tmp_path / "a.parquet", TEXTS)
    given = [recipe(uri), recipe(uri, **own(skip=9)), recipe(None, **own(uri))]
    shades = [picture(0)] * 20
    images = parquet(tmp_path / "b.parquet", TEXTS, [None, *shades[1:]])
    holes = parquet(tmp_path / "c.parquet", TEXTS, [*shades[1:], None])
    found = [opened(one).facts() for one in given]
    found += [opened(beside(images)).facts(), opened(beside(holes)).facts()]
    assert len({str(sorted(one.items())) for one in found}) == 5
    assert {"sha256", "rows", "column", "skip"} == found[0].keys()


@pytest.mark.parametrize("block", [3, 1 << 16])
def test_prompts_that_pairs_were_made_of_too_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(unseen, "BLOCK", block)
    pairs = ["a cat", "a  Dog\n", "STRASSE", "d", "e", "f", "g", "not of a pair"]
    asked = ["A cat ", "straße", "a dog", "a dog", "not of a pair", "a cat!"]
    uri = parquet(tmp_path / "a.parquet", pairs)
    given = recipe(uri, count=6, pairs=7, **own(parquet(tmp_path / "b.parquet", asked)))
    assert unseen.repeated(given, opened(given)) == 4
    every = replace(given, pairs=PairSettings(count=100))
    assert unseen.repeated(every, opened(every)) == 5, "of fewer rows than pairs, all are taken"
    nameless = replace(given, captions=CaptionSettings())
    assert unseen.repeated(nameless, opened(nameless)) is None


# ---- the real images


def beside(uri: str, captions: str | None = None, count: int = 5, skip: int = 0, **more: Any) -> Recipe:
    """A recipe that is scored by Inception against the images at ``uri``, for prompts of that file or another."""
    scored: dict[str, Any] = {"features": "inception", "inception": "formula", "reference": uri}
    return recipe(None, count=count, **own(captions or uri, skip=skip), **scored | more)


def shades(given: Recipe, facts: dict[str, Any]) -> list[int]:
    """The shade of each real image that is compared with."""
    images = scoring.real(given.evaluate, 4)
    assert images is not None
    first = facts.get("first", 0)
    pixels = images[first : first + facts.get("images", len(images))][0]
    return [round(float(image.mean() + 1) * 127.5) for image in pixels]


def test_rows_without_an_image_are_left_out_with_their_prompts(tmp_path: Path) -> None:
    missing = {0, 4, 5, 9, 10, 11, 17}
    images = [None if i in missing else picture(10 * i) for i in range(20)]
    uri = parquet(tmp_path / "a.parquet", TEXTS, images)
    for skip, rows in [(0, [1, 2, 3, 6, 7]), (5, [6, 7, 8, 12, 13]), (12, [12, 13, 14, 15, 16])]:
        given = beside(uri, skip=skip)
        found = opened(given)
        assert found(range(7)).tolist() == [TEXTS[i] for i in [*rows, *rows[:2]]]
        facts = unseen.reference(given, found)
        assert facts["described"]
        assert shades(given, facts) == [10 * i for i in rows]
    refused(beside(uri, skip=12, count=8), "has 7 prompts with an image, .* from row 12 on, for evaluate.count 8")
    both = beside(str(tmp_path / "stats.npz"), captions=uri, images=uri)
    assert opened(both)(range(2)).tolist() == [TEXTS[1], TEXTS[2]], "images beside statistics"


def test_a_reference_of_the_very_prompts_is_taken(tmp_path: Path) -> None:
    images = [None, *(picture(i) for i in range(5))]
    uri = parquet(tmp_path / "a.parquet", [None, *TEXTS[8:13]], images)
    given = beside(uri, parquet(tmp_path / "b.parquet", TEXTS), skip=8)
    assert unseen.reference(given, opened(given)) == {"described": True}
    assert shades(given, {}) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("texts", "sentence"),
    [
        ([*TEXTS[:2], "another\nthing", *TEXTS[3:5]], "row 3 reads 'another thing' where prompt 2 is 'prompt 2'"),
        (["x" * 100, *TEXTS[1:5]], f"row 1 reads '{'x' * 59}…' where"),
        (TEXTS[:6], "6 images for 5 prompts .*, and row 6 is beyond the last prompt"),
        (TEXTS[:4], "4 images for 5 prompts .*, and prompt 4 has no row"),
    ],
)
def test_a_reference_of_other_prompts_is_refused(tmp_path: Path, texts: list[str], sentence: str) -> None:
    """The first row has no image; rows are counted with it."""
    uri = parquet(tmp_path / "a.parquet", ["none", *texts], [None, *[picture(0)] * len(texts)])
    refused(beside(uri, parquet(tmp_path / "b.parquet", TEXTS)), f"does not hold the images .*{sentence}")


def test_a_reference_without_prompts_says_nothing_of_them(tmp_path: Path) -> None:
    captions = parquet(tmp_path / "a.parquet", TEXTS)
    (tmp_path / "images").mkdir()
    for i in range(3):
        (tmp_path / "images" / f"{i}.png").write_bytes(picture(0))
    plain = parquet(tmp_path / "b.parquet", TEXTS, [picture(0)] * 20)
    pq.write_table(pq.read_table(plain).drop_columns(["caption"]), plain)
    for uri in (str(tmp_path / "images"), plain, str(tmp_path / "stats.npz")):
        given = beside(uri, captions)
        assert unseen.reference(given, opened(given)) == {"described": False}


def test_a_folder_that_is_read_in_two_ways_is_refused(tmp_path: Path) -> None:
    for name in ("a.parquet", "b/c.parquet"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        parquet(tmp_path / name, TEXTS, [picture(0)] * 20)
    with pytest.raises(Refused, match=r"has 20 rows as evaluate.captions and 40 as evaluate.reference"):
        unseen.prompts(beside(str(tmp_path)))


# ---- digits


def test_captions_of_digits_bring_their_images(tmp_path: Path) -> None:
    place = str(tmp_path / "unseen.parquet")
    table = captioned.unseen_captions(3, 12)
    captioned.write(table, place)
    given = recipe(None, **own(place, skip=4))
    found = opened(given)
    facts = unseen.reference(given, found)
    assert (facts["images"], facts["first"], facts["described"]) == (5, 4, True)
    assert found(range(5)).tolist() == table.column("caption").to_pylist()[4:9]
    assert real_images.has_placements(given.evaluate)
    images = scoring.real(given.evaluate, 32)
    assert isinstance(images, captioned.CaptionedDigits)
    assert unseen.outside_grammar(found, 5) is None
    plain = recipe(None, **own(parquet(tmp_path / "b.parquet", ["a 7", "a three", "a cat", *TEXTS])))
    assert unseen.reference(plain, opened(plain)) == {"described": False}
    assert unseen.outside_grammar(opened(plain), 5) == 2
    assert len(scoring.real(plain.evaluate, 32) or []) == len(networks.images_and_labels()[0])
