"""Samples as one .npz for OpenAI's evaluator, joined from parts."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from s3server import BUCKET, Relay

from pipeline import storage
from pipeline.sampling import sample_files

KEY = "0123456789abcdef" * 4


def write_parts(uri: str, sizes: list[int], side: int = 6) -> np.ndarray:
    """uint8 [N, H, W, 3] of all parts."""
    parts = [np.random.default_rng(i).integers(0, 256, (n, 3, side, side), np.uint8) for i, n in enumerate(sizes)]
    for item in reversed(range(len(parts))):
        sample_files.write_part(uri, KEY, item, parts[item])
    return np.concatenate(parts).transpose(0, 2, 3, 1)


def test_parts_become_one_array_in_the_order_of_ids(tmp_path: Path) -> None:
    uri = str(tmp_path / "samples" / "DD_1_step.npz")
    expected = write_parts(uri, [4, 4, 3])
    sample_files.join(uri, KEY, 3)
    with np.load(uri) as file:
        assert np.array_equal(file["arr_0"], expected)
        assert not {"mu", "sigma"} & set(file.files), "which the evaluator would take for the statistics"
    assert storage.listing(str(tmp_path / "samples")) == ["DD_1_step.npz"]


def test_a_file_knows_whose_images_it_holds(tmp_path: Path) -> None:
    uri = str(tmp_path / "a.npz")
    assert not sample_files.holds(uri, KEY)
    write_parts(uri, [2])
    sample_files.join(uri, KEY, 1)
    assert sample_files.holds(uri, KEY)
    assert not sample_files.holds(uri, KEY[::-1])
    np.savez(uri, arr_0=np.zeros(3))
    assert not sample_files.holds(uri, KEY)
    Path(uri).write_bytes(b"torn")
    assert not sample_files.holds(uri, KEY)


def test_a_second_driver_finds_the_work_done(tmp_path: Path) -> None:
    uri = str(tmp_path / "a.npz")
    expected = write_parts(uri, [2, 2])
    sample_files.join(uri, KEY, 2)
    write_parts(uri, [2, 2])
    sample_files.join(uri, KEY, 2)
    assert storage.listing(str(tmp_path)) == ["a.npz"]
    with np.load(uri) as file:
        assert np.array_equal(file["arr_0"], expected)


def test_the_same_on_s3(s3_server: Relay) -> None:
    uri = f"s3://{BUCKET}/samples/DD_1_step.npz"
    expected = write_parts(uri, [4, 3])
    sample_files.join(uri, KEY, 2)
    assert sample_files.holds(uri, KEY)
    assert storage.listing(f"s3://{BUCKET}/samples") == ["DD_1_step.npz"]
    with storage.reading(uri) as file, np.load(file) as arrays:
        assert np.array_equal(arrays["arr_0"], expected)
    assert list(storage.below(f"s3://{BUCKET}/samples")) == ["DD_1_step.npz"]
    assert storage.is_folder(f"s3://{BUCKET}/samples")
    assert not storage.is_folder(uri)


def test_a_missing_part_leaves_no_file(tmp_path: Path) -> None:
    uri = str(tmp_path / "a.npz")
    write_parts(uri, [2, 2])
    Path(sample_files.part(uri, KEY, 1)).unlink()
    with pytest.raises(FileNotFoundError):
        sample_files.join(uri, KEY, 2)
    assert not Path(uri).exists()


def test_joining_holds_one_block_at_a_time(tmp_path: Path) -> None:
    uri = str(tmp_path / "a.npz")
    size = write_parts(uri, [60] * 4, 256).nbytes
    assert size > 40 << 20
    tracemalloc.start()
    sample_files.join(uri, KEY, 4)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 << 20


def test_names_are_those_of_samplers() -> None:
    assert sample_files.file_name("DD 2 steps (1, 6)") == "DD_2_steps_1_6.npz"
