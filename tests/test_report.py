"""The numbers of the report, its Markdown and its pictures.

python -m pytest tests/test_report.py
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline import report, summary
from pipeline.metrics import ClassVariance, InceptionScore, Moments, frechet
from pipeline.speed import Speed
from pipeline.summary import Entry, Reference
from pipeline.tally import Statistics

RNG = np.random.default_rng(0)
RESULTS: dict[str, Any] = {
    "name": "example",
    "title": "FD",
    "rows": [
        {"name": "real images", "accuracy": 0.998, "variance_over_teacher": 1.08},
        {
            "name": "teacher, AR",
            "steps": 10,
            "ms": 40.0,
            "best_ms": 10.0,
            "best_batch": 64,
            "speedup": 1.0,
            "score": 3.0,
            "score_over_teacher": 1.0,
            "speeds": [
                {"batch": 1, "network_ms": 38.0, "ms": 40.0, "repeats": 20},
                {"batch": 64, "network_ms": 9.0, "ms": 10.0, "repeats": 3},
            ],
        },
        {
            "name": "DD 2 steps (1, 6)",
            "steps": 2,
            "ms": 5.0,
            "best_ms": 5.0,
            "best_batch": 1,
            "speedup": 8.0,
            "score": 6.75,
            "score_over_teacher": 2.25,
            "speeds": [{"batch": 1, "network_ms": 3.25, "ms": 5.0, "repeats": 20}],
        },
    ],
    "agreement": {"fm_to_ar": 0.09, "ar_to_ar": 0.06, "ratio": 1.5},
    "curve": {
        "count": 1000,
        "teachers": {"teacher, AR": 4.0},
        "points": [
            {"step": 500, "name": "DD 1 step", "score": 30.0},
            {"step": 500, "name": "DD 2 steps (1, 6)", "score": 20.0},
            {"step": 1000, "name": "DD 1 step", "score": 9.5},
            {"step": 1000, "name": "DD 2 steps (1, 6)", "score": 6.0},
        ],
    },
    "made": {"count": 5000, "seed": 2, "dimensions": 64, "timing": {"device": "Some CPU", "threads": 1}},
}

TABLE = """\
| sampler           | #Step | ms/image, batch 1 | ms/image, best batch | speed-up |   FD | FD / teacher's | class accuracy | variance / teacher's |
|:------------------|------:|------------------:|---------------------:|---------:|-----:|---------------:|---------------:|---------------------:|
| real images       |     - |                 - |                    - |        - |    - |              - |          99.8% |                 1.08 |
| teacher, AR       |    10 |                40 |              10 (64) |     1.0x | 3.00 |           1.00 |              - |                    - |
| DD 2 steps (1, 6) |     2 |                 5 |                5 (1) |     8.0x | 6.75 |           2.25 |              - |                    - |"""  # noqa: E501


def statistics(shift: float, spread: float = 1.0, right: int = 0) -> Statistics:
    """Of 200 random images with 4 features, 16 pixels and 2 classes."""
    out = Statistics(Moments(4), Moments(64), ClassVariance(2, 64), InceptionScore(1, 3), right=right, labelled=200)
    features = (RNG.normal(size=(200, 4)) * spread + shift).astype(np.float32)
    out.moments.add(features)
    out.pixels.add(RNG.normal(size=(200, 64)) * spread)
    out.variance.add(RNG.normal(size=(200, 64)) * spread, np.arange(200) % 2)
    out.score.add(RNG.normal(size=(200, 3)), np.zeros(200, dtype=int))
    out.features = [features]
    return out


def test_numbers_of_a_row() -> None:
    real, teacher, student = statistics(0.0, right=199), statistics(0.1, right=190), statistics(1.0, 0.5, right=100)
    speeds = [Speed(1, 8.0, 10.0, 20), Speed(16, 1.0, 2.0, 20), Speed(64, 1.5, 2.5, 20)]
    entries = [
        Entry("DD 1 step", "FewStep", {"split": 1, "steps": (1,)}, 1, student, speeds),
        Entry("teacher, AR", "Autoregressive", {}, 10, teacher, [Speed(1, 70.0, 80.0, 5)]),
    ]
    rows = summary.numbers(entries, Reference(real.moments.gaussian(), real), baseline_ms=80.0)
    assert [row["name"] for row in rows] == ["real images", "DD 1 step", "teacher, AR"]
    row = rows[1]
    expected = frechet(student.moments.gaussian(), real.moments.gaussian())
    assert row["score"] == expected
    assert row["score_over_teacher"] == pytest.approx(expected / rows[2]["score"])
    assert (row["ms"], row["best_ms"], row["best_batch"], row["speedup"]) == (10.0, 2.0, 16, 8.0)
    assert rows[2]["speedup"] == 1.0
    assert row["accuracy"] == 0.5
    assert row["variance_over_teacher"] == pytest.approx(0.25, rel=0.1)
    assert row["precision"] < rows[2]["precision"]
    assert row["sampler"] == {"name": "FewStep", "split": 1, "steps": (1,)}
    assert "score" not in rows[0]


def test_numbers_without_real_images_or_teacher() -> None:
    real, student = statistics(0.0), statistics(1.0)
    entries = [Entry("DD 1 step", "FewStep", {}, 1, student)]
    (row,) = summary.numbers(entries, Reference(real.moments.gaussian(), None), baseline_ms=1.0)
    assert row["score"] > 0
    for key in ("pixel_score", "precision", "recall", "score_over_teacher", "variance_over_teacher"):
        assert row[key] is None


def test_agreement_is_a_ratio_of_distances() -> None:
    first, second, far = statistics(0.0), statistics(0.0), statistics(1.0)
    found = summary.agreement(far, first, second)
    assert found["ratio"] == pytest.approx(found["fm_to_ar"] / found["ar_to_ar"])
    assert found["ratio"] > 10


def test_the_table_lines_up_and_leaves_empty_columns_out() -> None:
    assert report.table(RESULTS) == TABLE


def test_slow_samplers_are_shown_without_powers_of_ten() -> None:
    rows = [{"name": "teacher, AR", "ms": 12345.6, "best_ms": 0.01234, "best_batch": 64}]
    assert (
        report.table({"title": "FD", "rows": rows}).splitlines()[2]
        == "| teacher, AR |            12,346 |          0.0123 (64) |"
    )


def test_fid_tables_hold_the_inception_score() -> None:
    rows = [{"name": "DD 1 step", "score": 9.94, "inception_score": 193.6}]
    text = report.table({"title": "FID", "rows": rows})
    assert text.splitlines()[0] == "| sampler   |  FID |    IS |"
    assert text.splitlines()[2] == "| DD 1 step | 9.94 | 193.6 |"


def test_markdown_has_every_part() -> None:
    text = report.markdown(RESULTS)
    headings = [line for line in text.splitlines() if line.startswith("#")]
    assert headings == [
        "# example: report",
        "## Flow matching against plain sampling",
        "## Speed",
        "## Over training",
        "## How these numbers were made",
    ]
    assert TABLE in text
    assert "FD 0.0900 between the two; 0.0600 between two AR draws" in text
    assert "| teacher, AR       |  40 (38) |   10 (9) |" in text
    assert "| DD 2 steps (1, 6) | 5 (3.25) |        - |" in text
    assert "| 1000           |      9.50 |              6.00 |" in text
    assert "  * device: Some CPU" in text
    assert "Only" not in text


def test_parts_without_numbers_are_left_out_and_few_images_are_said() -> None:
    made = RESULTS["made"] | {"count": 64}
    text = report.markdown(RESULTS | {"agreement": None, "curve": None, "made": made})
    assert "Over training" not in text
    assert "Flow matching against" not in text
    assert "**Only 64 images for 64 features**" in text


def test_speed_that_was_not_measured_is_not_shown() -> None:
    made = RESULTS["made"] | {"timing": {"device": None, "threads": None}}
    text = report.markdown(RESULTS | {"made": made})
    assert "## Speed" not in text
    assert "**Speed** was not measured: evaluate.timing_batches is empty." in text
    entry, reference = Entry("DD", "FewStep", {}, 1, statistics(0.1)), Reference((np.zeros(4), np.eye(4)), None)
    (row,) = summary.numbers([entry], reference, None)
    assert "ms" not in row
    assert row["score"] > 0


def test_scalars_have_names_that_mlflow_takes() -> None:
    found = report.scalars(RESULTS)
    assert found["DD_2_steps_1_6/score"] == 6.75
    assert found["teacher_AR/ms"] == 40.0
    assert found["agreement/ratio"] == 1.5
    assert report.metric_name("onestep* given the class") == "onestep-star_given_the_class"


# ---- pictures


def test_the_mosaic_has_a_row_per_sampler_and_a_column_per_noise() -> None:
    images = [RNG.integers(0, 256, (3, 3, 32, 32), dtype=np.uint8) for _ in range(2)]
    picture = report.mosaic(images)
    factor = 2
    pitch = 32 * factor + report.GAP
    assert picture.shape == (2 * pitch - report.GAP, 3 * pitch - report.GAP, 3)
    for row in range(2):
        for column in range(3):
            cell = picture[row * pitch :, column * pitch :][: 32 * factor : factor, : 32 * factor : factor]
            assert np.array_equal(cell, images[row][column].transpose(1, 2, 0))
    assert (picture[pitch - report.GAP : pitch] == 255).all()


def test_large_images_are_not_enlarged() -> None:
    assert report.mosaic([np.zeros((2, 3, 256, 256), dtype=np.uint8)]).shape == (256, 512 + report.GAP, 3)


def test_the_sample_grid_shows_the_mosaic_pixel_by_pixel() -> None:
    images = [RNG.integers(0, 256, (3, 3, 32, 32), dtype=np.uint8) for _ in range(2)]
    names = ["teacher, FM", "DD 1 step"]
    shown = np.asarray(Image.open(io.BytesIO(report.samples(names, images, np.arange(3)))).convert("RGB"))
    picture = report.mosaic(images)
    height, width = picture.shape[:2]
    left, top = shown.shape[1] - 12 - width, shown.shape[0] - 12 - height
    assert np.array_equal(shown[top : top + height, left : left + width], picture)
    assert (shown[top : top + height, :left] < 128).any()  # names


def test_the_curve_is_a_picture() -> None:
    image = Image.open(io.BytesIO(report.curve(RESULTS)))
    assert image.format == "PNG"
    assert image.width > 800
