"""From statistics to the report: numbers as JSON, a table and how it was made as Markdown, two pictures as
PNG.

``numbers`` computes, the others only format what it found, so report.json holds everything that report.md
says.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito, for every eye
GAP = 4  # white pixels between the images of the grid
LEAST_CELL = 72  # small images are enlarged by a whole factor to about this many pixels


def scalars(results: dict[str, Any]) -> dict[str, float]:
    """The table's numbers for MLflow: {"DD_1_step/score": 5.2, ...}."""
    out: dict[str, float] = {}
    for row in results["rows"]:
        name = metric_name(row["name"])
        out |= {f"{name}/{key}": float(v) for key, v in row.items() if isinstance(v, int | float)}
    return out | {f"agreement/{key}": value for key, value in (results["agreement"] or {}).items()}


def metric_name(name: str) -> str:
    """A sampler's name in MLflow's alphabet: "DD 2 steps (1, 6)" -> "DD_2_steps_1_6"."""
    plain = "".join(c if c.isalnum() or c in "-." else "_" for c in name.replace("*", "-star"))
    return "_".join(filter(None, plain.split("_")))


# ---- Markdown


def table(results: dict[str, Any]) -> str:
    """The report's table; a column that no row fills is left out."""
    title = results["title"]
    columns = [
        ("sampler", "name", "{}"),
        ("#Step", "steps", "{}"),
        ("ms/image, batch 1", "single", "{}"),
        ("ms/image, best batch", "best", "{}"),
        ("speed-up", "speedup", "{:.1f}x"),
        (title, "score", "{:.2f}"),
        (f"{title} / teacher's", "score_over_teacher", "{:.2f}"),
        ("FD, pixel PCA", "pixel_score", "{:.2f}"),
        ("class accuracy", "accuracy", "{:.1%}"),
        ("variance / teacher's", "variance_over_teacher", "{:.2f}"),
        ("precision", "precision", "{:.3f}"),
        ("recall", "recall", "{:.3f}"),
    ]
    if title != "FD":
        columns.insert(7, ("IS", "inception_score", "{:.1f}"))
    rows = [
        row
        | {"single": _ms(row["ms"]) if row.get("ms") else None}
        | {"best": f"{_ms(row['best_ms'])} ({row['best_batch']})" if row.get("best_ms") else None}
        for row in results["rows"]
    ]
    columns = [column for column in columns if any(row.get(column[1]) is not None for row in rows)]
    cells = [[form.format(row[key]) if row.get(key) is not None else "-" for _, key, form in columns] for row in rows]
    return _grid_of_text([header for header, _, _ in columns], cells)


def _ms(value: float) -> str:
    """Three digits, never in powers of ten."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _grid_of_text(headers: list[str], cells: list[list[str]]) -> str:
    """A Markdown table whose source lines up: first column to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(headers, *cells, strict=True)]

    def line(row: list[str]) -> str:
        first, *others = (
            text.ljust(width) if i == 0 else text.rjust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        return "| " + " | ".join([first, *others]) + " |"

    rule = "|" + "|".join([f":{'-' * (widths[0] + 1)}", *(f"{'-' * (width + 1)}:" for width in widths[1:])]) + "|"
    return "\n".join([line(headers), rule, *map(line, cells)])


def markdown(results: dict[str, Any]) -> str:
    """The whole report."""
    made = results["made"]
    parts = [
        f"# {results['name']}: report",
        f"{made['count']:,} images per sampler, sample ids from 0, seed {made['seed']}; the same id gives"
        " every sampler the same label and the same noise.",
        "![one column per noise, one row per sampler](samples.png)",
        table(results),
        _legend(results),
    ]
    if results["agreement"]:
        parts += ["## Flow matching against plain sampling", _agreement(results)]
    if made["timing"]["device"]:
        parts += ["## Speed", _speed(results)]
    if results["curve"]:
        parts += ["## Over training", "![distance over training](curve.png)", _curve_table(results)]
    parts += ["## How these numbers were made", _made(made)]
    return "\n\n".join(parts) + "\n"


def _legend(results: dict[str, Any]) -> str:
    title, made = results["title"], results["made"]
    network = (
        "Fréchet distance of 64 features of the digits scorer to the 5,000 real digits. It is not FID and"
        " compares with nothing outside this recipe"
        if title == "FD"
        else results["meaning"]
    )
    lines = [
        f"* **{title}**: {network}.",
        "* **FD, pixel PCA**: Fréchet distance of 50 principal components of grey thumbnails; it sees the"
        " blur that a classifier forgives.",
        "* **variance**: pixel variance within a class, averaged over classes; below 1 the sampler is less"
        " diverse than the teacher.",
        "* **precision, recall**: Kynkäänniemi et al. 2019, k = 3; both depend on the number of images.",
        f"* **ms/image**: decoding included, on {made['timing']['device']}, {made['timing']['threads']}"
        " torch thread(s); the best batch in brackets. **Speed-up** is over the AR teacher at batch 1."
        if made["timing"]["device"]
        else "* **Speed** was not measured: evaluate.timing_batches is empty.",
        "* **#Step**: network evaluations per image.",
    ]
    if made["count"] <= made["dimensions"]:
        lines.append(
            f"* **Only {made['count']} images for {made['dimensions']} features**: the covariance is"
            f" singular and {title} is strongly biased; compare it only with runs of the same count."
        )
    return "\n".join(lines)


def _agreement(results: dict[str, Any]) -> str:
    found, title = results["agreement"], results["title"]
    return (
        f"FM teacher against AR teacher: {title} {found['fm_to_ar']:.4f} between the two;"
        f" {found['ar_to_ar']:.4f} between two AR draws (sample ids from 0 and from"
        f" {results['made']['count']}); ratio {found['ratio']:.2f}. Near 1, flow matching keeps the"
        " teacher's distribution as well as this many images can tell."
    )


def _speed(results: dict[str, Any]) -> str:
    rows = [row for row in results["rows"] if row.get("speeds")]
    batches = sorted({speed["batch"] for row in rows for speed in row["speeds"]})
    cells = []
    for row in rows:
        by_batch = {speed["batch"]: speed for speed in row["speeds"]}
        found = [by_batch.get(batch) for batch in batches]
        texts = [f"{_ms(one['ms'])} ({_ms(one['network_ms'])})" if one else "-" for one in found]
        cells.append([row["name"], *texts])
    text = "Milliseconds per image, in brackets without decoding; medians. A dash was beyond the time budget."
    return text + "\n\n" + _grid_of_text(["sampler", *(f"batch {b}" for b in batches)], cells)


def _curve_table(results: dict[str, Any]) -> str:
    curve = results["curve"]
    names = list(dict.fromkeys(point["name"] for point in curve["points"]))
    by_step: dict[int, dict[str, float]] = {}
    for point in curve["points"]:
        by_step.setdefault(point["step"], {})[point["name"]] = point["score"]
    cells = [[str(step), *(f"{found[name]:.2f}" for name in names)] for step, found in sorted(by_step.items())]
    teachers = ", ".join(f"{name} {value:.2f}" for name, value in curve["teachers"].items())
    text = f"{results['title']} of {curve['count']:,} images at a time; at that count: {teachers}."
    return text + "\n\n" + _grid_of_text(["optimiser step", *names], cells)


def _made(made: dict[str, Any]) -> str:
    def lines(tree: dict[str, Any], indent: int) -> list[str]:
        """Nested settings as an indented list."""
        out = []
        for key, value in tree.items():
            if isinstance(value, dict) and value:
                out += [f"{'  ' * indent}* {key}:", *lines(value, indent + 1)]
            else:
                out.append(f"{'  ' * indent}* {key}: {value}")
        return out

    return "\n".join(lines(made, 0))


# ---- pictures


def mosaic(images: Sequence[np.ndarray]) -> np.ndarray:
    """uint8 [columns, 3, H, W] per row -> one uint8 [H', W', 3] picture, small images enlarged pixel by
    pixel.
    """
    factor = max(1, round(LEAST_CELL / images[0].shape[-1]))
    cells = np.stack(images).repeat(factor, axis=-1).repeat(factor, axis=-2)  # [rows, columns, 3, h, w]
    framed = np.pad(cells, ((0, 0), (0, 0), (0, 0), (0, GAP), (0, GAP)), constant_values=255)
    rows, columns, _, h, w = framed.shape
    return framed.transpose(0, 3, 1, 4, 2).reshape(rows * h, columns * w, 3)[:-GAP, :-GAP]


def samples(names: Sequence[str], images: Sequence[np.ndarray], labels: np.ndarray) -> bytes:
    """The sample grid as PNG: a labelled row per sampler, a column per noise with its class on top."""
    picture = mosaic(images)
    height, width = picture.shape[:2]
    left, right, top, bottom = 30 + 8 * max(map(len, names)), 12, 34, 12  # margins in pixels
    figure = Figure(figsize=((left + width + right) / 100, (top + height + bottom) / 100), dpi=100)
    full_width, full_height = left + width + right, top + height + bottom
    axes = figure.add_axes((left / full_width, bottom / full_height, width / full_width, height / full_height))
    axes.imshow(picture, interpolation="nearest", aspect="auto")
    rows, columns = len(names), len(labels)
    axes.set_yticks([(i + 0.5) * (height + GAP) / rows - GAP / 2 for i in range(rows)], list(names), fontsize=11)
    axes.set_xticks([(i + 0.5) * (width + GAP) / columns - GAP / 2 for i in range(columns)], list(map(str, labels)))
    axes.xaxis.tick_top()
    axes.tick_params(length=0, pad=8, colors="#333333")
    for spine in axes.spines.values():
        spine.set_visible(False)
    return _png(figure)


def curve(results: dict[str, Any]) -> bytes:
    """Distance over training as PNG: a line per few-step sampler, dashed ones for the teacher at the same
    count.
    """
    data, title = results["curve"], results["title"]
    figure = Figure(figsize=(7.2, 4.2), dpi=130, layout="constrained")
    axes = figure.subplots()
    names = list(dict.fromkeys(point["name"] for point in data["points"]))
    for name, colour in zip(names, COLOURS * len(names), strict=False):
        points = sorted((point["step"], point["score"]) for point in data["points"] if point["name"] == name)
        axes.plot(*zip(*points, strict=True), marker="o", markersize=5, linewidth=2, color=colour, label=name)
    for (name, value), style in zip(data["teachers"].items(), ("--", ":"), strict=False):
        axes.axhline(value, linestyle=style, linewidth=1.5, color="#555555", label=name)
    axes.set_xlabel("optimiser step")
    axes.set_ylabel(f"{title}, {data['count']:,} images")
    highest = max([*(point["score"] for point in data["points"]), *data["teachers"].values()])
    axes.set_ylim(0, 1.08 * highest)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return _png(figure)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()
