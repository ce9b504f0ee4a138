"""Digits at their places: drawn from seed and id, described by captions, and shown again from a table."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from pipeline.digits import captioned, captions, networks, properties
from pipeline.host.errors import Missing, Refused


def test_placements_are_functions_of_seed_and_id() -> None:
    drawn = captioned.placements(3, range(2000), 500)
    assert drawn.dtype == np.int64
    assert (captioned.placements(3, [7, 1], 500) == drawn[[7, 1]]).all()
    assert (captioned.placements(4, range(10), 500) != drawn[:10]).any()
    assert (drawn.min(axis=0) >= [0, -4, -4]).all()
    assert drawn[:, 0].max() < 500
    assert [sorted(set(column)) for column in drawn[:, 1:].T.tolist()] == [list(range(-4, 5))] * 2


def test_a_placement_shows_its_digit_at_its_place() -> None:
    images, labels = networks.centred()
    shown, digits = captioned.shown(np.array([[12, 0, 0], [12, 2, -1]]))
    assert digits.tolist() == [labels[12].item()] * 2
    assert torch.equal(shown[0], images[12])
    assert torch.equal(shown[1], images[12].roll((2, -1), (1, 2))), "12 has room on all sides"


def test_training_captions_tell_of_training_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captioned, "DRAWN_AT_ONCE", 32)
    texts = captioned.training_captions(5, 80)["caption"].to_pylist()
    assert len(texts) == 80
    drawn = captioned.placements(5, range(80), 4500)
    found = properties.described(*captioned.shown(drawn))
    named = np.stack([captions.named_by(text) for text in texts])
    assert ((named == found) | (named == captions.UNNAMED)).all()
    assert not captions.reveals(named).any()
    assert captioned.training_captions(5, 40)["caption"].to_pylist() == texts[:40], "however many are wanted"


def test_unseen_captions_tell_all_of_held_out_combinations(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(captioned, "DRAWN_AT_ONCE", 200)
    table = captioned.unseen_captions(6, 50)
    named = np.stack([captions.named_by(text) for text in table["caption"].to_pylist()])
    assert captions.reveals(named).all()
    captioned.write(table, uri := f"{tmp_path}/unseen.parquet")
    real = captioned.CaptionedDigits(uri)
    assert len(real) == 50
    images, labels = real[:50]
    assert images.shape == (50, 3, 32, 32)
    assert labels is not None
    found = properties.described(images, torch.from_numpy(labels))
    medium = named[:, captions.WEIGHT] == captions.UNNAMED
    named[medium, captions.WEIGHT] = captions.MEDIUM
    assert (found == named).all(), "row i is the image of caption i"
    part, _ = real[20:30]
    assert torch.equal(part, images[20:30])


@pytest.mark.parametrize(
    ("columns", "sentence"),
    [
        ({"caption": ["a 1"]}, "no column digit of whole numbers"),
        ({"digit": [1], "down": [0]}, "no column right of whole numbers"),
        ({"digit": [1.0], "down": [0], "right": [0]}, "no column digit of whole numbers"),
        ({"digit": [1, 2], "down": [0, 0], "right": [0, None]}, "no column right of whole numbers"),
        ({"digit": [1, 5000], "down": [0, 0], "right": [0, 0]}, r"row 1 .* \[5000, 0, 0\]; digits are 0 to 4999"),
        ({"digit": [1], "down": [-5], "right": [0]}, "shifts at most 4 pixels"),
    ],
)
def test_a_table_without_placements_is_refused(columns: dict[str, list], sentence: str, tmp_path: Path) -> None:
    captioned.write(pa.table(columns), uri := f"{tmp_path}/odd.parquet")
    with pytest.raises(Refused, match=sentence):
        captioned.CaptionedDigits(uri)


def test_what_is_no_parquet_is_refused(tmp_path: Path) -> None:
    (tmp_path / "odd.parquet").write_text("caption\n")
    with pytest.raises(Refused, match="is no Parquet file or damaged"):
        captioned.CaptionedDigits(f"{tmp_path}/odd.parquet")
    with pytest.raises(Missing):
        captioned.CaptionedDigits(f"{tmp_path}/none.parquet")
