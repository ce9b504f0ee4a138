"""The tables of a report as plain data: headings and rows of text, for Markdown and for the page.

``summary`` computes, this module only formats what it found. The columns follow the paper's Tables 1 and 2: quality,
then parameters, steps and time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from pipeline.report.results import Pace, PairSets, Results, Row, SpeedAtBatch, TrainingCurve

DEPARTS = "†"
PROMPT_AGREEMENT = "prompt agreement"
Shown = Literal[  # what a column may take out of a row as it is
    "type",
    "score",
    "second_score",
    "dinov2_score",
    "score_over_teacher",
    "score_inf",
    "inception_score",
    "pixel_score",
    "sfid",
    "kid",
    "accuracy",
    "prompt_agreement",
    "clip_score",
    "clip_score_of_others",
    "variance_over_teacher",
    "precision",
    "recall",
    "parameters",
    "steps",
    "ms",
    "throughput",
]
SpeedUp = Literal["speedup", "throughput_speedup"]
PaceKey = Literal["ms", "speedup", "throughput", "throughput_speedup"]
WITH_ENCODER = "ms/image, batch 1, with encoder"
Error = Literal["score_std", "inception_score_std", "clip_score_std"]
MAIN = ("fid", "speedup")  # the paper's figures that stand in the main table itself


class Table(NamedTuple):
    """Headings and rows of text; the first ``text`` columns are words, the others numbers."""

    headings: list[str]
    cells: list[list[str]]
    text: int = 1


class Column(NamedTuple):
    """A column of the main table: a row's text, "" where it has no number, and the paper's where it prints one."""

    heading: str
    text: Callable[[Row], str]
    key: str = ""  # of the paper's figure in a row's ``paper``
    paper: str = ""  # heading of the paper's figures
    form: Callable[[float], str] = str

    def printed(self, row: Row) -> str:
        """The paper's figure, "" where it prints none."""
        figures = row.get("paper") or {}
        return self.form(figures[self.key]) if self.key in figures else ""


def columns(results: Results) -> list[Column]:
    """The main table's columns; one that no row fills is left out."""
    title, short = results["title"], short_title(results)
    second = results.get("second_title")  # which is the flavour of the paper's FID, then
    one, two, three = "{:.1f}".format, "{:.2f}".format, "{:.3f}".format
    paper_fid: Any = ("fid", "FID, paper", two)
    candidates = [
        Column("sampler", marked),
        Column("type", _text("type", str)),
        Column(title, _with_error("score", "score_std", two), *([] if second else paper_fid)),
        *([Column(second, _text("second_score", two), *paper_fid)] if second else []),
        Column(results.get("dinov2_title", ""), _text("dinov2_score", two)),
        Column(f"{short} / teacher's", _text("score_over_teacher", two)),
        Column("IS", _with_error("inception_score", "inception_score_std", one), "is", "IS, paper", one),
        Column("FD, pixel PCA", _text("pixel_score", two)),
        Column("class accuracy", _text("accuracy", "{:.1%}".format)),
        Column(PROMPT_AGREEMENT, _text("prompt_agreement", "{:.1%}".format)),
        Column("CLIP score", _with_error("clip_score", "clip_score_std", two)),
        Column("CLIP score, others' prompts", _text("clip_score_of_others", two)),
        Column("variance / teacher's", _text("variance_over_teacher", two)),
        Column("precision", _text("precision", three), "precision", "precision, paper", two),
        Column("recall", _text("recall", three), "recall", "recall, paper", two),
        Column("#parameters", _text("parameters", count), "parameters", "#parameters, paper", count),
        Column("#Step", _text("steps", str)),
        Column("ms/image, batch 1", _text("ms", ms), "seconds", "ms/image, paper", lambda value: ms(1000 * value)),
        Column(WITH_ENCODER, lambda row: _pace(row, "ms")),
        Column(
            "speed-up, batch 1", lambda row: speed_up(row, "speedup"), "speedup", "speed-up, paper", "{:,.1f}x".format
        ),
    ]
    if batch := throughput_batch(results):
        candidates.append(Column(f"images/s, batch {batch}", _text("throughput", ms)))
        candidates.append(Column(f"speed-up, batch {batch}", lambda row: speed_up(row, "throughput_speedup")))
    return _with_numbers(candidates, results)


def further_columns(results: Results) -> list[Column]:
    """Other distances between the same images and the same reference; one that no row has is left out."""
    short, two = short_title(results), "{:.2f}".format
    candidates = [
        Column(f"{short}, limit", _text("score_inf", two)),
        Column("sFID", _text("sfid", two)),
        Column(kernel_distance(results), _text("kid", lambda value: f"{1000 * value:.2f}")),
    ]
    return _with_numbers(candidates, results)


def kernel_distance(results: Results) -> str:
    """KID is that of Inception's features alone."""
    return "KID x 1000" if short_title(results) == "FID" else "KD x 1000"


def _with_numbers(candidates: list[Column], results: Results) -> list[Column]:
    def has_numbers(column: Column) -> bool:
        """Ours in any row; of precision and recall, for which ours may lack images, the paper's will do."""
        alone = column.key in ("precision", "recall")
        return any(column.text(row) or (alone and column.printed(row)) for row in results["rows"])

    return [column for column in candidates if has_numbers(column)]


def further(results: Results) -> Table | None:
    """The other distances of every row that has one; None without any."""
    distances = further_columns(results)
    rows = [row for row in results["rows"] if any(column.text(row) for column in distances)]
    cells = [[row["name"], *(column.text(row) or "-" for column in distances)] for row in rows]
    return Table(["sampler", *(column.heading for column in distances)], cells) if rows else None


def differences(results: Results) -> Table | None:
    """How far the rows of several students are apart; None in the report of one."""
    cells = []
    for one in results.get("differences", []):
        error = "-" if one["std"] is None else f"{one['std']:.3g}"
        verdict = _verdict(one["first"], one["second"], one["difference"], one["indistinguishable"])
        cells.append([one["first"], one["second"], verdict, f"{one['difference']:+.2f}", error, f"{one['count']:,}"])
    short = short_title(results)
    headings = ["first row", "second row", f"lower {short}", f"{short}, first - second", "standard error", "images"]
    return Table(headings, cells, 3) if cells else None


def _verdict(first: str, second: str, difference: float, indistinguishable: bool | None) -> str:
    """The row of the lower distance, where the two can be told apart; a dash where nobody knows."""
    if indistinguishable is None:
        return "-"
    return "indistinguishable" if indistinguishable else (first if difference < 0 else second)


def main(results: Results) -> Table:
    """The report's table, the most telling of the paper's figures behind ours."""
    texts: dict[str, Callable[[Row], str]] = {}  # by heading
    for column in columns(results):
        texts[column.heading] = column.text
        if column.key in MAIN and any(column.printed(row) for row in results["rows"]):
            texts[column.paper] = column.printed
    cells = [[text(row) or "-" for text in texts.values()] for row in results["rows"]]
    return Table(list(texts), cells, 1 + ("type" in texts))


def beside_paper(results: Results) -> Table | None:
    """Ours and the paper's figures side by side, for the rows that the paper has; None without any."""
    rows = [row for row in results["rows"] if row.get("paper")]
    both = [column for column in columns(results) if any(column.printed(row) for row in rows)]
    if not both:
        return None
    headings = [heading for column in both for heading in (column.heading, column.paper)]
    cells = [[text(row) or "-" for column in both for text in (column.text, column.printed)] for row in rows]
    return Table(["sampler", *headings], [[row["name"], *line] for row, line in zip(rows, cells, strict=True)])


def speeds(results: Results) -> Table:
    """Milliseconds per image at every batch size, in brackets without decoding."""
    rows = [row for row in results["rows"] if row.get("speeds")]
    batches = sorted({speed["batch"] for row in rows for speed in row["speeds"]})
    cells = []
    for row in rows:
        by_batch: dict[int, SpeedAtBatch] = {speed["batch"]: speed for speed in row["speeds"]}
        times = [by_batch.get(batch) for batch in batches]
        cells.append([row["name"], *(f"{ms(one['ms'])} ({ms(one['network_ms'])})" if one else "-" for one in times)])
    return Table(["sampler", *(f"batch {batch}" for batch in batches)], cells)


def with_encoder(results: Results) -> Table | None:
    """Every row's figures of speed with the text encoder's time in them; None where no prompts were read."""
    rows = [row for row in results["rows"] if row.get("with_encoder")]
    batch = throughput_batch(results)
    headings = ["ms/image, batch 1", "speed-up, batch 1"]
    headings += [f"images/s, batch {batch}", f"speed-up, batch {batch}"] if batch else []
    keys: tuple[PaceKey, ...] = ("ms", "speedup", "throughput", "throughput_speedup")
    shown = keys[: len(headings)]
    cells = [[row["name"], *(_pace(row, key) or "-" for key in shown)] for row in rows]
    return Table(["sampler", *headings], cells) if rows else None


def _pace(row: Row, key: PaceKey) -> str:
    """A figure of a row's pace with the text encoder in it."""
    pace: Pace = row.get("with_encoder") or {}
    if key == "speedup" or key == "throughput_speedup":
        return speed_up(pace, key)
    return ms(pace[key]) if key in pace else ""


def throughput_batch(results: Results) -> int | None:
    """The batch of images a second: the largest at which all samplers were timed; None where that is 1, or none."""
    speed = results.get("speed")
    return speed.get("throughput_batch") if speed else None


def timed(results: Results) -> list[Row]:
    """The rows that have a place in quality against time."""
    return [row for row in results["rows"] if row.get("ms") and (row.get("score") or 0) > 0]


def over_training(curve: TrainingCurve) -> Table:
    """The distance of every student exported along the way."""
    scores = {(point["step"], point["name"]): f"{point['score']:.2f}" for point in curve["points"]}
    return _crossed("optimiser step", str, scores)


def over_pairs(pair_sets: PairSets) -> Table:
    """The distance of every sampler over the count of pairs."""
    scores = {(point["pairs"], point["name"]): f"{point['score']:.2f}" for point in pair_sets["points"]}
    return _crossed("pairs", "{:,}".format, scores)


def _crossed(heading: str, form: Callable[[int], str], scores: dict[tuple[int, str], str]) -> Table:
    """{(row, column): text} as a table, rows in rising order."""
    names = list(dict.fromkeys(name for _, name in scores))
    lines = sorted({line for line, _ in scores})
    return Table(
        [heading, *names], [[form(line), *(scores.get((line, name), "-") for name in names)] for line in lines]
    )


def marked(row: Row) -> str:
    """A row's name, with a mark where it asks more of its student than that was trained for."""
    return row["name"] + (f" {DEPARTS}" if row.get("departs") else "")


def _text(key: Shown, form: Callable[[Any], str]) -> Callable[[Row], str]:
    return lambda row: form(row[key]) if row.get(key) is not None else ""


def speed_up(row: Pace, key: SpeedUp) -> str:
    """So many times as fast as the AR teacher, with its standard error; the teacher's own has none."""
    if row.get(key) is None:
        return ""
    error = row.get("speedup_std") if key == "speedup" else row.get("throughput_speedup_std")
    return f"{row[key]:,.1f}x" + (f" ± {error:,.{1 if error >= 0.1 else 2}f}" if error else "")


def _with_error(key: Shown, error: Error, form: Callable[[Any], str]) -> Callable[[Row], str]:
    """A number with its standard error behind it, where there is one."""

    def text(row: Row) -> str:
        value, deviation = row.get(key), row.get(error)
        if value is None:
            return ""
        return form(value) + (f" ± {form(deviation)}" if deviation is not None else "")

    return text


def short_title(results: Results) -> str:
    """FID or FD, without what stands behind it."""
    return results["title"].split()[0]


def ms(value: float) -> str:
    """Milliseconds, or images a second, with three digits, never in powers of ten."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def count(value: float) -> str:
    """Parameters as the paper prints them: 310M, 98.3M, 1.03B."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:g}"
