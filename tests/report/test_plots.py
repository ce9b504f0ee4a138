"""The pictures of the report."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from PIL import Image

from pipeline.report import plots
from tests.report.test_markdown import RESULTS
from tests.workflow.test_other_reports import PAIR_SETS

RNG = np.random.default_rng(0)


def test_the_mosaic_has_a_row_per_sampler_and_a_column_per_noise() -> None:
    images = [RNG.integers(0, 256, (3, 3, 32, 32), dtype=np.uint8) for _ in range(2)]
    picture = plots.mosaic(images)
    factor = 2
    pitch = 32 * factor + plots.GAP
    assert picture.shape == (2 * pitch - plots.GAP, 3 * pitch - plots.GAP, 3)
    for row in range(2):
        for column in range(3):
            cell = picture[row * pitch :, column * pitch :][: 32 * factor : factor, : 32 * factor : factor]
            assert np.array_equal(cell, images[row][column].transpose(1, 2, 0))
    assert (picture[pitch - plots.GAP : pitch] == 255).all()


def test_large_images_are_not_enlarged() -> None:
    assert plots.mosaic([np.zeros((2, 3, 256, 256), dtype=np.uint8)]).shape == (256, 512 + plots.GAP, 3)


def test_the_sample_grid_shows_the_mosaic_pixel_by_pixel() -> None:
    images = [RNG.integers(0, 256, (3, 3, 32, 32), dtype=np.uint8) for _ in range(2)]
    names = ["teacher, FM", "DD 1 step"]
    shown = np.asarray(Image.open(io.BytesIO(plots.samples(names, images, np.arange(3)))).convert("RGB"))
    picture = plots.mosaic(images)
    height, width = picture.shape[:2]
    left, top = shown.shape[1] - 12 - width, shown.shape[0] - 12 - height
    assert np.array_equal(shown[top : top + height, left : left + width], picture)
    assert (shown[top : top + height, :left] < 128).any()  # names


PROMPTS = [
    "a bold 7 leaning right at the top left",
    "W" * 70,
    "",
    "costs $\\frac$5 or $6",
    "x" * 10_000,
    "🦄 مرحبا 漢字",
]


def as_column(prompts: list[str]) -> np.ndarray:
    out = np.empty(len(prompts), dtype=object)
    out[:] = prompts
    return out


@pytest.mark.parametrize("side", [6, 32, 256])
def test_prompts_stand_above_their_columns_and_do_not_overlap(side: int, recwarn: pytest.WarningsRecorder) -> None:
    images = [RNG.integers(0, 256, (len(PROMPTS), 3, side, side), dtype=np.uint8) for _ in range(2)]
    figure = plots._sample_grid(["teacher, AR", "DD 1 step"], images, as_column(PROMPTS))
    canvas = plots.FigureCanvasAgg(figure)
    canvas.draw()
    assert not recwarn.list, "no glyph is missing"
    (axes,) = figure.axes
    texts = axes.get_xticklabels()
    assert [text.get_text().replace("\n", "").replace(" ", "") for text in texts] == [
        plots.lettering.shown(prompt).replace(" ", "") for prompt in PROMPTS
    ]
    boxes = [text.get_window_extent(canvas.get_renderer()) for text in texts]
    assert not [1 for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)]
    width, height = canvas.get_width_height()
    assert all(box.x0 >= 0 and box.x1 <= width and box.y1 <= height for box in boxes)
    assert min(box.y0 for box in boxes) > axes.get_window_extent().y1


def test_the_grid_of_prompts_shows_the_mosaic_pixel_by_pixel() -> None:
    images = [RNG.integers(0, 256, (6, 3, 32, 32), dtype=np.uint8) for _ in range(2)]
    of, picture = as_column(PROMPTS), plots.mosaic(images)
    height, width = picture.shape[:2]
    named = np.asarray(Image.open(io.BytesIO(plots.samples(["a", "b"], images, of))).convert("RGB"))
    alone = plots.training_samples(images, of)
    for shown in (named, alone):
        left, top = shown.shape[1] - 12 - width, shown.shape[0] - 12 - height
        assert np.array_equal(shown[top : top + height, left : left + width], picture)
        assert (shown[:top] < 128).any(), "prompts"
    assert (alone.dtype, alone.shape[1]) == (np.uint8, width + 24)
    assert np.array_equal(plots.training_samples(images, np.arange(6)), picture), "of classes the mosaic alone"


def test_the_curve_is_a_picture() -> None:
    image = Image.open(io.BytesIO(plots.curve(RESULTS)))
    assert image.format == "PNG"
    assert image.width > 800


def test_the_grid_never_grows_beyond_what_can_be_drawn() -> None:
    images = [np.zeros((40, 3, 256, 256), dtype=np.uint8)] * 3
    images[0][:, :, ::3] = 150  # one line of three
    picture = plots.mosaic(images)
    assert picture.shape[1] <= plots.LARGEST + 40 * plots.GAP
    assert picture[0, 0].tolist() == [50, 50, 50]
    many = plots.mosaic([np.zeros((200, 3, 32, 32), dtype=np.uint8)])
    assert many.shape[1] <= plots.LARGEST + 200 * plots.GAP


def test_a_grid_of_large_images_has_larger_letters() -> None:
    large = [np.zeros((12, 3, 256, 256), dtype=np.uint8)]
    small = [np.zeros((12, 3, 32, 32), dtype=np.uint8)]
    sizes = [
        Image.open(io.BytesIO(plots.samples(["teacher, AR"], some, np.arange(12)))).size for some in (large, small)
    ]
    margins = [size[0] - plots.mosaic(some).shape[1] for size, some in zip(sizes, (large, small), strict=True)]
    assert margins[0] > 2 * margins[1]


def test_a_compressed_picture_is_the_same_picture() -> None:
    png = plots.curve(RESULTS)
    jpeg = Image.open(io.BytesIO(plots.compressed(png)))
    original = Image.open(io.BytesIO(png)).convert("RGB")
    assert (jpeg.format, jpeg.size) == ("JPEG", original.size)
    assert np.abs(np.asarray(jpeg).astype(int) - np.asarray(original)).mean() < 3


def test_charts_are_those_that_there_are_numbers_for() -> None:
    assert plots.charts(RESULTS).keys() == {"tradeoff.png", "curve.png"}
    alone = RESULTS | {"rows": RESULTS["rows"][:2], "curve": None}
    assert plots.charts(alone) == {}
    assert plots.charts(alone | {"pair_sets": PAIR_SETS}).keys() == {"pairs.png"}
    assert plots.charts(alone | {"pair_sets": PAIR_SETS | {"curve": None}}).keys() == {"pairs.png"}


def drawn(monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, Any]]) -> Figure:
    """The figure of quality against time, kept from becoming a file."""
    kept: list[Figure] = []
    monkeypatch.setattr(plots, "png", lambda figure: kept.append(figure) or b"")
    plots.tradeoff(RESULTS | {"rows": rows})
    return kept[0]


def test_names_do_not_cover_one_another_or_a_point(monkeypatch: pytest.MonkeyPatch) -> None:
    places = [(20, 10.8, "DD"), (31, 8.2, "DD"), (33, 7.9, "DD + AR"), (37, 7.1, "DD + AR"), (35, 8.1, "baseline")]
    places += [(91, 4.6, "DD + AR"), (106, 8.9, "baseline"), (117, 4.0, "AR"), (115, 4.2, "AR")]
    rows = [
        {"name": f"sampler number {i}", "type": kind, "ms": ms, "score": score}
        for i, (ms, score, kind) in enumerate(places)
    ]
    figure = drawn(monkeypatch, rows)
    (axes,) = figure.axes
    canvas = plots.FigureCanvasAgg(figure)
    canvas.draw()
    texts = [child for child in axes.get_children() if isinstance(child, Annotation)]
    assert sorted(text.get_text() for text in texts) == [row["name"] for row in rows]
    boxes = [plots.Text.get_window_extent(text, canvas.get_renderer()) for text in texts]
    points = axes.transData.transform([(ms, score) for ms, score, _ in places])
    assert not [1 for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)]
    assert not [1 for box in boxes for x, y in points if box.contains(x, y)]
    frame = axes.get_window_extent()
    assert all(frame.contains(box.x0, box.y0) and frame.contains(box.x1, box.y1) for box in boxes)


def test_types_differ_in_more_than_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"name": kind, "type": kind, "ms": 10.0 * i, "score": 5.0} for i, kind in enumerate(plots.TYPES, 1)]
    lines = [line for line in drawn(monkeypatch, rows).axes[0].lines if line.get_label() in plots.TYPES]
    assert len({line.get_marker() for line in lines}) == len(plots.TYPES) == 4
    assert drawn(monkeypatch, rows).axes[0].get_xscale() == "log"


def test_each_panel_of_the_tradeoff_is_of_one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sampler that was not timed at the throughput batch has no place in its panel."""
    rows = [row | {"ms": row["ms"]} for row in RESULTS["rows"][1:]]
    rows.append({"name": "large", "type": "baseline", "ms": 7.0, "score": 4.0})
    panels = drawn(monkeypatch, rows).axes
    assert [axes.get_xlabel().split(",")[0] for axes in panels] == [
        f"milliseconds per image at batch {batch}" for batch in (1, 64)
    ]
    found = [sorted(float(x) for line in axes.lines for x in line.get_xdata()) for axes in panels]
    assert found == [[5.0, 7.0, 40.0], [4.0, 10.0]]


def test_a_type_of_ones_own_is_drawn_too(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"name": kind, "type": kind, "ms": 10.0, "score": 5.0} for kind in ("AR", "another")]
    assert {line.get_label() for line in drawn(monkeypatch, rows).axes[0].lines} == {"AR", "another"}


def test_scores_far_apart_are_on_a_logarithmic_axis(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"name": "a", "type": "AR", "ms": 10.0, "score": 5.0}, {"name": "b", "type": "DD", "ms": 1.0, "score": 9.0}]
    assert drawn(monkeypatch, rows).axes[0].get_ylim()[0] == 0
    rows[1]["score"] = 90.0
    assert drawn(monkeypatch, rows).axes[0].get_yscale() == "log"
