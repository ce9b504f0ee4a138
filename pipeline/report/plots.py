"""The pictures of a report as PNG: the sample grid and the charts, all from numbers that report.json holds.

No chart needs its colours: what they tell apart differs in marker or line style too.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import imread, imsave
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from matplotlib.transforms import Bbox

from pipeline.report import lettering
from pipeline.report.results import Results
from pipeline.report.tables import count, throughput_batch, timed

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito, for every eye
MARKERS = "oDs^vP"
LINES = ("-", "--", "-.", ":")
TYPES = {  # of a sampler: marker, colour, size
    "AR": ("s", "#333333", 8.0),
    "DD": ("o", "#0072B2", 9.0),
    "DD + AR": ("D", "#D55E00", 7.5),
    "baseline": ("^", "#888888", 8.0),
}
OTHER = ("X", "#009E73", 8.0)
GREY = "#333333"
GAP = 4  # white pixels between the images of the grid
LEAST_CELL = 72  # small images are enlarged by a whole factor to about this many pixels
LARGEST = 4096  # pixels of the grid's longer side; a larger one shows its images smaller
PAGE_PIXELS = 1100  # pixels that a report gives a picture; larger ones have larger letters
WIDE = 10.0  # a score's range, as a ratio, from which its axis is logarithmic


# ---- the sample grid


def mosaic(images: Sequence[np.ndarray]) -> np.ndarray:
    """uint8 [columns, 3, H, W] per row -> one uint8 [H', W', 3] picture.

    Small images are enlarged pixel by pixel; where the picture would pass LARGEST, blocks of pixels are averaged.
    """
    cells = np.stack(images)  # [rows, columns, 3, h, w]
    side, most = cells.shape[-1], LARGEST // max(cells.shape[:2])
    factor = max(1, min(round(LEAST_CELL / side), most // side))
    cells = cells.repeat(factor, axis=-1).repeat(factor, axis=-2)
    if side > most:
        cells = _smaller(cells, -(-side // most))
    framed = np.pad(cells, ((0, 0), (0, 0), (0, 0), (0, GAP), (0, GAP)), constant_values=255)
    rows, columns, _, h, w = framed.shape
    return framed.transpose(0, 3, 1, 4, 2).reshape(rows * h, columns * w, 3)[:-GAP, :-GAP]


def _smaller(cells: np.ndarray, factor: int) -> np.ndarray:
    """Means of factor x factor pixels; what is left of a side is cut off."""
    h, w = (size // factor * factor for size in cells.shape[-2:])
    blocks = cells[..., :h, :w].reshape(*cells.shape[:-2], h // factor, factor, w // factor, factor)
    return blocks.mean((-3, -1)).round().astype(np.uint8)


def samples(names: Sequence[str], images: Sequence[np.ndarray], of: np.ndarray) -> bytes:
    """The sample grid: a named row per sampler, a column per noise with what it was drawn for on top.

    ``of`` [columns] holds labels, or an object array of prompts, of which the beginnings are shown.
    """
    return png(_sample_grid(names, images, of))


def training_samples(images: Sequence[np.ndarray], of: np.ndarray) -> np.ndarray:
    """Rows of the grid along training, uint8 [H, W, 3]: the mosaic of classes alone, prompts above their columns."""
    if of.dtype != object:
        return mosaic(images)
    canvas = FigureCanvasAgg(_sample_grid([""] * len(images), images, of))
    canvas.draw()
    return np.array(canvas.buffer_rgba())[..., :3]


def _sample_grid(names: Sequence[str], images: Sequence[np.ndarray], of: np.ndarray) -> Figure:
    picture = mosaic(images)
    height, width = picture.shape[:2]
    rows, columns = len(names), len(of)
    scale = max(1.0, width / PAGE_PIXELS)  # of the letters, which shrink with the picture where it is shown
    heads, size, top = list(map(str, of)), 10 * scale, round(34 * scale)
    if of.dtype == object:
        size = min(8 * scale, width / columns / 10)  # so that about twelve letters stand above a narrow column
        heads, top = _headings(of, width / columns - 2 * GAP, size)
    longest = max(map(len, names))
    left, right, bottom = round(scale * (30 + 8 * longest)) if longest else 12, 12, 12  # margins
    full_width, full_height = left + width + right, top + height + bottom
    figure = Figure(figsize=(full_width / lettering.DPI, full_height / lettering.DPI), dpi=lettering.DPI)
    axes = figure.add_axes((left / full_width, bottom / full_height, width / full_width, height / full_height))
    axes.imshow(picture, interpolation="nearest", aspect="auto")
    places = [(i + 0.5) * (height + GAP) / rows - GAP / 2 for i in range(rows)]
    axes.set_yticks(places, list(names), fontsize=11 * scale)
    places = [(i + 0.5) * (width + GAP) / columns - GAP / 2 for i in range(columns)]
    axes.set_xticks(places, heads, fontsize=size, parse_math=False)  # a prompt may name prices in $
    axes.xaxis.tick_top()
    axes.tick_params(length=0, pad=8 * scale, colors=GREY)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return figure


def _headings(prompts: np.ndarray, width: float, size: float) -> tuple[list[str], int]:
    """Prompts in lines of ``width`` pixels at ``size`` points, and the pixels that the highest of them takes."""
    heads = [lettering.wrapped(lettering.shown(prompt), width, size) for prompt in prompts]
    line = 1.3 * size * lettering.DPI / 72  # pixels
    return ["\n".join(lines) for lines in heads], round((max(map(len, heads)) + 1.5) * line) + 8


def compressed(png: bytes) -> bytes:
    """The same picture as JPEG, for pages that carry photographs."""
    buffer = io.BytesIO()
    imsave(buffer, imread(io.BytesIO(png))[..., :3], format="jpg", pil_kwargs={"quality": 88})
    return buffer.getvalue()


# ---- the charts


def charts(results: Results) -> dict[str, bytes]:
    """The charts that these results have numbers for, by file name."""
    functions = {"tradeoff.png": tradeoff, "curve.png": curve, "pairs.png": pairs}
    numbers = {
        "tradeoff.png": len(timed(results)) > 1,
        "curve.png": results["curve"],
        "pairs.png": results.get("pair_sets"),
    }
    return {name: functions[name](results) for name in functions if numbers[name]}


def tradeoff(results: Results) -> bytes:
    """Quality against time, as the paper's Fig. 3: a named point per sampler, DD's joined by a line.

    A panel for batch 1 and one for the throughput batch, where there is one: in each, all are timed at the same batch.
    """
    rows, batch = timed(results), throughput_batch(results)
    panels = [(1, [(row, row["ms"]) for row in rows])]
    if batch and (throughputs := [(row, 1000 / row["throughput"]) for row in rows if row.get("throughput")]):
        panels.append((batch, throughputs))
    figure = Figure(figsize=(8.2 if len(panels) == 1 else 13.0, 5.0), dpi=130, layout="constrained")
    panes = np.atleast_1d(figure.subplots(1, len(panels)))
    for axes, (size, points) in zip(panes, panels, strict=True):
        plain(axes)
        _points(axes, [(row["type"], row.get("student", ""), at, row["score"]) for row, at in points])
        axes.set_xlabel(f"milliseconds per image at batch {size}, decoding included")
        axes.set_ylabel(f"{results['title']}, {results['made']['count']:,} images")
        _from_zero_or_log(axes, [row["score"] for row, _ in points])
        _plain_numbers(axes)
    _fix_layout(figure)
    for axes, (_, points) in zip(panes, panels, strict=True):
        order = sorted(range(len(points)), key=lambda i: (not points[i][0]["type"].startswith("DD"), points[i][1]))
        _name_points(
            figure, axes, [(at, row["score"]) for row, at in points], [row["name"] for row, _ in points], order
        )
    return png(figure)


def _points(axes: Axes, points: Sequence[tuple[str, str, float, float]]) -> None:
    """(type, student, milliseconds, score) of every sampler, marked by its type, each student's joined.

    Marks of other students than the recipe's own, whose name is empty, are hollow and of a colour of their own.
    """
    students = list(dict.fromkeys(["", *(student for _, student, _, _ in points)]))
    for i, student in enumerate(students):
        ours = sorted((at, score) for kind, one, at, score in points if kind.startswith("DD") and one == student)
        if len(ours) > 1:
            style: dict[str, Any] = {"color": COLOURS[i % len(COLOURS)], "linestyle": "-"}
            axes.plot(*zip(*ours, strict=True), linewidth=1.2, alpha=0.45, zorder=1, **style)
    for kind in dict.fromkeys([*TYPES, *(kind for kind, _, _, _ in points)]):
        marker, colour, size = TYPES.get(kind, OTHER)
        for i, student in enumerate(students):
            of_kind = [(at, score) for one, other, at, score in points if (one, other) == (kind, student)]
            style = {"marker": marker, "color": COLOURS[i % len(COLOURS)] if student else colour, "markersize": size}
            style |= {"markerfacecolor": "none", "markeredgewidth": 1.8} if student else {}
            if of_kind:
                label = f"{kind} of {student}" if student else kind
                axes.plot(*zip(*of_kind, strict=True), linestyle="", label=label, zorder=2, **style)
    axes.set_xscale("log")
    axes.margins(x=0.15)
    axes.legend(frameon=False)


def _plain_numbers(axes: Axes) -> None:
    """1, 2, 5, 10 at the ticks of logarithmic axes, never powers of ten."""
    for axis in (axes.xaxis, axes.yaxis)[: 1 + (axes.get_yscale() == "log")]:
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_minor_formatter(NullFormatter())
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))


def curve(results: Results) -> bytes:
    """Distance over training, as the paper's Fig. 7: a line per few-step sampler, dashed ones for the teacher at the
    same count.
    """
    data = results["curve"]
    assert data is not None
    figure, axes = _chart(7.2, 4.2)
    names = list(dict.fromkeys(point["name"] for point in data["points"]))
    for i, name in enumerate(names):
        points = sorted((point["step"], point["score"]) for point in data["points"] if point["name"] == name)
        axes.plot(*zip(*points, strict=True), **line(i), label=name)
    for (name, value), style in zip(data["teachers"].items(), ("--", ":"), strict=False):
        axes.axhline(value, linestyle=style, linewidth=1.5, color="#555555", label=name)
    axes.set_xlabel("optimiser step")
    if each := data.get("steps_per_epoch"):
        epochs: Any = (lambda step: step / each, lambda epoch: epoch * each)  # and back
        above = axes.secondary_xaxis("top", functions=epochs)
        above.set_xlabel("epochs")
    axes.set_ylabel(f"{results['title']}, {data['count']:,} images")
    axes.set_ylim(0, 1.08 * max([*(point["score"] for point in data["points"]), *data["teachers"].values()]))
    axes.legend(frameon=False)
    return png(figure)


def pairs(results: Results) -> bytes:
    """Distance over the size of the pair set and, as the paper's Fig. 8, over the epochs on each of its sizes."""
    data = results["pair_sets"]
    assert data is not None
    curve = data["curve"] or {"count": 0, "axis": "", "points": []}
    panels = list(dict.fromkeys(point["name"] for point in curve["points"]))
    figure = Figure(figsize=(4.8 * (1 + len(panels)), 4.2), dpi=130, layout="constrained")
    first, *others = np.atleast_1d(figure.subplots(1, 1 + len(panels)))
    for i, name in enumerate(dict.fromkeys(point["name"] for point in data["points"])):
        points = sorted((point["pairs"], point["score"]) for point in data["points"] if point["name"] == name)
        first.plot(*zip(*points, strict=True), **line(i), label=name)
    sizes = sorted({point["pairs"] for point in data["points"]})
    first.set_xlim(0, 1.1 * sizes[-1])
    first.xaxis.set_major_locator(MaxNLocator(5))
    first.xaxis.set_major_formatter(FuncFormatter(lambda value, _: count(value)))
    first.set_xlabel("pairs")
    first.set_ylabel(f"{results['title']}, {data['count']:,} images")
    for axes, name in zip(others, panels, strict=True):
        for i, size in enumerate(sizes):
            here = [p for p in curve["points"] if (p["name"], p["pairs"]) == (name, size)]
            if way := sorted((point["x"], point["score"]) for point in here):
                axes.plot(*zip(*way, strict=True), **line(i), label=f"{size:,} pairs")
        axes.set_title(name, fontsize=11, color=GREY)
        axes.set_xlabel(curve["axis"])
        axes.set_ylabel(f"{results['title']}, {curve['count']:,} images")
    for axes in (first, *others):
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False)
        plain(axes)
    return png(figure)


def line(i: int) -> dict[str, Any]:
    """How the i-th line of a chart looks: keywords of ``Axes.plot``."""
    colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
    return {"color": colour, "marker": marker, "linestyle": LINES[i % len(LINES)], "markersize": 5, "linewidth": 2}


def _chart(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    axes = figure.subplots()
    plain(axes)
    return figure, axes


def plain(axes: Axes) -> None:
    """A faint grid, and no frame above and to the right."""
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _from_zero_or_log(axes: Axes, values: Sequence[float]) -> None:
    """A score's axis: from 0, or logarithmic where the scores differ too much to be seen on one scale."""
    if max(values) > WIDE * min(values):
        axes.set_yscale("log")
        axes.set_ylim(min(values) / 1.6, max(values) * 1.6)
    else:
        axes.set_ylim(0, 1.15 * max(values))


def _fix_layout(figure: Figure) -> None:
    """Lay a figure out for good, so that what is written next can be placed by pixels."""
    FigureCanvasAgg(figure).draw()
    figure.set_layout_engine("none")


def _name_points(
    figure: Figure, axes: Axes, points: Sequence[tuple[float, float]], names: Sequence[str], order: Sequence[int]
) -> None:
    """Write each name beside its point, in this order, where it covers least of points, lines, names and legend."""
    canvas = FigureCanvasAgg(figure)
    renderer, frame = canvas.get_renderer(), axes.get_window_extent()
    dots = [Bbox.from_bounds(x - 7, y - 7, 14, 14) for x, y in axes.transData.transform(points)]
    taken = dots + [box for line in axes.lines if line.get_linestyle() == "-" for box in _beads(line)]
    if legend := axes.get_legend():
        taken.append(legend.get_window_extent(renderer))
    sides = [(1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1)]
    for i in order:
        tried: list[tuple[float, int, dict[str, Any], Bbox]] = []  # hidden pixels, place, style, box
        for distance, (right, up) in itertools.product((8, 16, 26, 38), sides):
            style: dict[str, Any] = {"xytext": (right * distance, up * distance), "fontsize": 9, "color": GREY}
            style |= {"ha": ("center", "left", "right")[right], "va": ("center", "bottom", "top")[up]}
            if distance > 8:  # away from its point: a line leads there
                style |= {"arrowprops": {"arrowstyle": "-", "color": "#999999", "linewidth": 0.7, "shrinkB": 4}}
            text = axes.annotate(names[i], points[i], textcoords="offset points", **style)
            text.update_positions(renderer)
            box = Text.get_window_extent(text, renderer)  # without the leading line
            hidden = sum(_overlap(box, other) for other in taken if other is not dots[i])
            hidden += box.width * box.height - _overlap(box, frame)
            tried.append((hidden + distance / 4, len(tried), style, box))
            text.remove()
        _, _, style, box = min(tried, key=lambda one: one[:2])
        axes.annotate(names[i], points[i], textcoords="offset points", **style)
        taken.append(box)


def _beads(line: Line2D) -> list[Bbox]:
    """A drawn line as small boxes along it, in pixels."""
    ends = line.get_transform().transform(line.get_xydata())
    between = np.linspace(0, 1, 40)[:, None]
    spots = np.concatenate([a + (b - a) * between for a, b in itertools.pairwise(ends)])
    return [Bbox.from_bounds(x - 2, y - 2, 4, 4) for x, y in spots]


def _overlap(a: Bbox, b: Bbox) -> float:
    """Square pixels that two boxes share."""
    width, height = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
    return max(width, 0.0) * max(height, 0.0)


def png(figure: Figure) -> bytes:
    """A figure as a file's bytes."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()
