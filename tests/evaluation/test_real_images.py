"""Real images from a folder, from Parquet, from an .npz; cut as ADM cuts them."""

from __future__ import annotations

import io
import math
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.evaluation import real_images
from pipeline.host.errors import Refused
from pipeline.models.convnet import to_uint8

RNG = np.random.default_rng(0)


def picture(height: int, width: int) -> np.ndarray:
    return RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(pixels: np.ndarray, form: str = "png", mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, form)
    return buffer.getvalue()


def opened(uri: Path | str, side: int) -> real_images.RealImages:
    found = real_images.of_file(str(uri), side)
    assert found is not None
    return found


def read(images: real_images.RealImages, rows: slice) -> np.ndarray:
    """uint8 [B, H, W, 3], as they are scored."""
    return to_uint8(images[rows][0]).permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize(
    ("height", "width", "halvings"), [(16, 16, 0), (20, 31, 0), (9, 12, 0), (24, 18, 1), (16, 33, 2)]
)
def test_photographs_are_cut_as_adm_cuts_them(height: int, width: int, halvings: int) -> None:
    """Blocks of equal pixels are halved without a rest, so what PIL resizes after that is known."""
    small = picture(height, width)
    large = small.repeat(2**halvings, axis=0).repeat(2**halvings, axis=1)
    scale = 16 / min(height, width)
    resized = Image.fromarray(small).resize((round(width * scale), round(height * scale)), Image.Resampling.BICUBIC)
    top, left = (resized.height - 16) // 2, (resized.width - 16) // 2
    expected = np.asarray(resized)[top : top + 16, left : left + 16]
    assert np.array_equal(real_images.decoded(encoded(large), 16, "x"), expected)
    if height == width == 16:
        assert np.array_equal(expected, small), "an image of the right size stays as it is"


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path: Path) -> None:
    stored = [picture(8, 8) for _ in range(5)]
    for name, pixels in zip(["b/0.png", "a/1.PNG", "b/1.png", "a/2.png", "c.png"], stored, strict=True):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(encoded(pixels))
    (tmp_path / "LICENSE.txt").write_text("no image")
    images = opened(tmp_path, 8)
    assert len(images) == 5
    expected = np.stack([stored[i] for i in (1, 3, 0, 2, 4)])
    assert np.array_equal(read(images, slice(0, 5)), expected)
    assert np.array_equal(read(images, slice(3, 9)), expected[3:])
    assert images[:1][1] is None


def test_grey_and_transparent_images_and_jpegs_become_rgb(tmp_path: Path) -> None:
    for form, mode, name in [("png", "L", "0.png"), ("png", "RGBA", "1.png"), ("jpeg", "CMYK", "2.jpeg")]:
        (tmp_path / name).write_bytes(encoded(picture(8, 8), form, mode))
    assert read(opened(tmp_path, 8), slice(0, 3)).shape == (3, 8, 8, 3)


@pytest.mark.parametrize("structs", [True, False])
@pytest.mark.parametrize("folder", [True, False])
def test_parquet_is_read_across_files_and_row_groups(tmp_path: Path, structs: bool, folder: bool) -> None:
    stored = [picture(8, 8) for _ in range(11)]
    cells: list[Any] = [encoded(pixels) for pixels in stored]
    if structs:
        cells = [{"bytes": data, "path": None} for data in cells]
    parts = {"train-00000-of-00002.parquet": cells[:7], "train-00001-of-00002.parquet": cells[7:]}
    if not folder:
        parts = {"all.parquet": cells}
    for name, part in parts.items():
        table = pa.table({"label": list(range(len(part))), "image": part})
        pq.write_table(table, tmp_path / name, row_group_size=3)
    images = opened(tmp_path if folder else tmp_path / "all.parquet", 8)
    assert len(images) == 11
    assert np.array_equal(read(images, slice(1, 9)), np.stack(stored[1:9]))
    assert np.array_equal(read(images, slice(9, 20)), np.stack(stored[9:]))


@pytest.mark.parametrize("statistics", [True, False])
@pytest.mark.parametrize("structs", [True, False])
def test_rows_without_an_image_are_left_out(tmp_path: Path, structs: bool, statistics: bool) -> None:
    """As img2dataset leaves them where a download failed; whether the footer counts them or not."""
    stored, missing = [picture(8, 8) for _ in range(11)], {0, 4, 6, 7, 8, 10}
    cells: list[Any] = [None if i in missing else encoded(pixels) for i, pixels in enumerate(stored)]
    kind: pa.DataType = pa.binary()
    if structs:
        cells = [cell and {"bytes": cell, "path": None} for cell in cells]
        cells[4] = {"bytes": None, "path": "gone.png"}
        kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    for name, part in (("a.parquet", cells[:7]), ("b.parquet", cells[7:])):
        table = pa.table({"jpg": pa.array(part, kind)})
        pq.write_table(table, tmp_path / name, row_group_size=3, write_statistics=statistics)
    images = opened(tmp_path, 8)
    assert isinstance(images, real_images.ImageRows)
    assert (len(images), images.row_count) == (5, 11)
    assert images.rows().tolist() == [1, 2, 3, 5, 9]
    assert np.array_equal(read(images, slice(0, 5)), np.stack([stored[i] for i in (1, 2, 3, 5, 9)]))
    assert np.array_equal(read(images, slice(3, 9)), np.stack([stored[i] for i in (5, 9)]))


def test_the_first_column_of_images_is_read(tmp_path: Path) -> None:
    stored = {name: picture(8, 8) for name in ("webp", "png", "jpg", "image")}
    for last in range(1, 5):
        names = list(stored)[:last]
        pq.write_table(pa.table({name: [encoded(stored[name])] for name in names}), tmp_path / "a.parquet")
        assert np.array_equal(read(opened(tmp_path, 8), slice(0, 1))[0], stored[names[-1]])
        assert real_images.columns(str(tmp_path)) == real_images.columns(str(tmp_path / "a.parquet")) == names
    (tmp_path / "b").mkdir()
    assert real_images.columns(str(tmp_path / "b")) == real_images.columns(str(tmp_path / "a.npz")) == []


def test_an_unreadable_image_is_named_by_its_row(tmp_path: Path) -> None:
    """Rows without an image count."""
    pq.write_table(pa.table({"image": [encoded(picture(8, 8)), None, None, b"no"]}), tmp_path / "a.parquet")
    with pytest.raises(Refused, match=r"row 3 of evaluate.reference, in .*a.parquet is no readable image"):
        read(opened(tmp_path, 8), slice(0, 2))
    pq.write_table(pa.table({"image": pa.array([None, None], pa.binary())}), tmp_path / "a.parquet")
    wrong(tmp_path, "a.parquet has 2 rows and no image in any")


def test_images_of_an_npz_are_read_row_by_row(tmp_path: Path) -> None:
    stored = np.stack([picture(5, 5) for _ in range(7)])
    np.savez(tmp_path / "r.npz", arr_0=stored)
    images = opened(tmp_path / "r.npz", 5)
    assert len(images) == 7
    assert images[2:6][1] is None
    assert np.array_equal(read(images, slice(2, 6)), stored[2:6])
    assert len(images[5:9][0]) == 2
    with pytest.raises(ValueError, match=r"holds images of 5x5 pixels and the teacher makes 8x8; give a reference"):
        real_images.of_file(str(tmp_path / "r.npz"), 8)
    np.savez(tmp_path / "s.npz", mu=np.zeros(3))
    assert real_images.of_file(str(tmp_path / "s.npz"), 8) is None
    assert real_images.of_file(str(tmp_path / "statistic.pth"), 8) is None


def test_the_digits_know_their_labels() -> None:
    images, labels = real_images.Digits()[100:103]
    assert images.shape == (3, 3, 32, 32)
    assert labels is not None
    assert len(labels) == 3


def test_a_fingerprint_changes_with_any_file(tmp_path: Path) -> None:
    for i in range(2):
        (tmp_path / f"{i}.png").write_bytes(encoded(picture(4, 4)))
    before = real_images.fingerprint(str(tmp_path))
    assert real_images.fingerprint(str(tmp_path)) == before
    seconds = math.floor((tmp_path / "0.png").stat().st_mtime) + 10
    os.utime(tmp_path / "0.png", (seconds, seconds))
    touched = real_images.fingerprint(str(tmp_path))
    (tmp_path / "1.png").rename(tmp_path / "2.png")
    assert len({before, touched, real_images.fingerprint(str(tmp_path))}) == 3
    assert len(real_images.fingerprint(str(tmp_path / "2.png"))) == 64


def wrong(folder: Path, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as caught:
        real_images.of_file(str(folder), 8)
    assert "\n" not in str(caught.value)


def test_what_holds_no_images_is_one_sentence(tmp_path: Path) -> None:
    wrong(tmp_path, "is a folder without images or Parquet; it may hold .png,")
    (tmp_path / "0.png").write_bytes(b"no image")
    wrong(tmp_path, r"0.png is no readable image \(.*; take it out")
    pq.write_table(pa.table({"label": [1]}), tmp_path / "a.parquet")
    wrong(tmp_path, "a.parquet has no column image, jpg, png, webp; it must hold encoded images")
    pq.write_table(pa.table({"image": ["text"]}), tmp_path / "a.parquet")
    wrong(tmp_path, "has a column image of string; it must hold")
    (tmp_path / "a.parquet").write_bytes(b"no parquet")
    wrong(tmp_path, "a.parquet is no Parquet file")


@pytest.mark.parametrize(
    "name",
    [
        "._0.png",
        ".hidden.png",
        ".ipynb_checkpoints/0-checkpoint.png",
        "__MACOSX/0.png",
        "a/.Trash/b/0.png",
        "Thumbs.db",
    ],
)
def test_hidden_companions_are_passed_over(tmp_path: Path, name: str) -> None:
    (tmp_path / "0.png").write_bytes(encoded(picture(8, 8)))
    before = real_images.fingerprint(str(tmp_path))
    (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
    (tmp_path / name).write_bytes(encoded(picture(8, 8)))
    assert len(opened(tmp_path, 8)) == 1
    assert real_images.fingerprint(str(tmp_path)) == before


def test_a_hidden_folder_may_hold_the_images(tmp_path: Path) -> None:
    """Only what is below the folder that the recipe names counts as hidden."""
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "0.png").write_bytes(encoded(picture(8, 8)))
    assert len(opened(tmp_path / ".cache", 8)) == 1


def flipped(data: bytes) -> bytes:
    return data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 0xFF]) + data[len(data) // 2 + 1 :]


@lru_cache
def broken() -> dict[str, bytes]:
    whole, bomb = encoded(picture(64, 64)), io.BytesIO()
    Image.new("1", (20000, 20000)).save(bomb, "png")
    return {
        "empty": b"",
        "cut short": whole[: len(whole) // 2],
        "a flipped byte": flipped(whole),
        "a JPEG cut short": encoded(picture(64, 64), "jpeg")[:700],
        "a WebP cut short": encoded(picture(64, 64), "webp")[:100],
        "a bitmap cut short": encoded(picture(64, 64), "bmp")[:100],
        "too large": bomb.getvalue(),
        "text": b"<html>",
        "32 bits": floats(),
    }


def floats() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.ones((8, 8), np.float32)).save(buffer, "tiff")
    return buffer.getvalue()


@pytest.mark.faults("images: truncated, damaged, too large")
@pytest.mark.parametrize("case", broken())
def test_an_image_that_cannot_be_used_is_named(tmp_path: Path, case: str) -> None:
    for i in range(2):
        (tmp_path / f"{i}.png").write_bytes(encoded(picture(8, 8)))
    (tmp_path / "2.png").write_bytes(broken()[case])
    images = opened(tmp_path, 8)
    with pytest.raises(Refused, match=r"2\.png is no readable image \(.+\); take it out or fetch it again") as caught:
        images[0:3]
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400 + len(str(tmp_path))


def test_sixteen_bits_keep_their_brightness(tmp_path: Path) -> None:
    """PIL alone makes nearly all of them white."""
    pixels = picture(8, 8)[..., 0]
    Image.fromarray(pixels.astype(np.uint16) * 257).save(tmp_path / "0.png")
    assert np.array_equal(read(opened(tmp_path, 8), slice(0, 1)), np.stack([pixels] * 3, -1)[None])


@pytest.mark.parametrize("name", ["r.npz", "r.parquet"])
def test_a_damaged_reference_is_named(tmp_path: Path, name: str) -> None:
    place = tmp_path / name
    if name == "r.npz":
        np.savez(place, arr_0=np.stack([picture(8, 8) for _ in range(7)]))
    else:
        pq.write_table(pa.table({"image": [encoded(picture(8, 8)) for _ in range(7)]}), place)
    data = place.read_bytes()
    for damaged in (b"", data[: len(data) // 2], flipped(data)):
        place.write_bytes(damaged)
        with pytest.raises(Refused, match=name) as caught:
            read(opened(place, 8), slice(0, 7))
        assert "\n" not in str(caught.value)
