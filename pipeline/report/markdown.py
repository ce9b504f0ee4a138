"""A report as Markdown, and its numbers for MLflow.

``summary`` computes, the others only format what it found, so report.json holds everything that report.md and
report.html say.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pipeline.report import legend, lettering, tables
from pipeline.report.names import metric_name
from pipeline.report.protocol import protocol
from pipeline.report.results import Results
from pipeline.report.tables import Table


def headlines(results: Results) -> dict[str, float]:
    """The few numbers that MLflow draws: {"DD_1_step/FD": 5.2, "DD_1_step/speed-up_at_batch_1": 40.1, ...}.

    The distance of the AR teacher and of each few-step sampler, and the latter's speed-ups over the former at batch 1
    and at the throughput batch. All others are in ``scores``.
    """
    batch, out = results["speed"]["throughput_batch"], dict[str, float]()
    for row in results["rows"]:
        kind, name = row.get("sampler", {}).get("name"), metric_name(row["name"])
        if kind in ("Autoregressive", "FewStep"):
            out[f"{name}/{metric_name(results['title'])}"] = row["score"]
        for size, factor in ((1, row.get("speedup")), (batch, row.get("throughput_speedup"))):
            if kind == "FewStep" and factor is not None:
                out[f"{name}/speed-up_at_batch_{size}"] = factor
    return out


def headline(results: Results) -> str:
    """A report in a few words: "FD 27.1 at 1 step", by its first few-step sampler; of another "FD 6.72 of skip-1"."""
    rows = [row for row in results["rows"] if "sampler" in row]
    first = next((row for row in rows if row["sampler"]["name"] == "FewStep"), rows[0])
    found = f"{results['title']} {first['score']:.{1 if first['score'] >= 10 else 2}f}"
    if first["sampler"]["name"] != "FewStep":
        return f"{found} of {first['name']}"
    return f"{found} at {first['steps']} step{'s' * (first['steps'] > 1)}"


def scores(results: Results) -> tuple[list[str], list[list[Any]]]:
    """(columns, rows): every number that the report has of every sampler."""
    keys = dict.fromkeys(key for row in results["rows"] for key, v in row.items() if isinstance(v, int | float))
    return ["name", *keys], [[row["name"], *(row.get(key) for key in keys)] for row in results["rows"]]


def table(results: Results) -> str:
    """The main table as Markdown."""
    return as_markdown(tables.main(results))


def as_markdown(content: Table) -> str:
    """A Markdown table whose source lines up: words to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(content.headings, *content.cells, strict=True)]

    def line(row: list[str]) -> str:
        texts = (
            text.ljust(width) if i < content.text else text.rjust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        return "| " + " | ".join(texts) + " |"

    rules = (f":{'-' * (w + 1)}" if i < content.text else f"{'-' * (w + 1)}:" for i, w in enumerate(widths))
    return "\n".join([line(content.headings), "|" + "|".join(rules) + "|", *map(line, content.cells)])


def markdown(results: Results) -> str:
    """The whole report."""
    parts = [
        f"# {results['name']}: report",
        legend.introduction(results),
        "![one column per noise, one row per sampler](samples.png)",
        *_prompts(results),
        table(results),
        _legend(legend.about_columns(results)),
    ]
    if rows := legend.about_rows(results):
        parts += ["The samplers:", _legend(rows)]
    if len(tables.timed(results)) > 1:
        parts += ["## Quality against time", "![distance over milliseconds per image](tradeoff.png)"]
    if apart := tables.differences(results):
        parts += ["## Differences between students", legend.about_differences(results), as_markdown(apart)]
    if others := tables.further(results):
        parts += ["## Other distances", as_markdown(others)]
    if both := tables.beside_paper(results):
        parts += ["## Beside the paper's figures", as_markdown(both)]
    if results["agreement"]:
        parts += ["## Flow matching against plain sampling", legend.about_agreement(results)]
    if results["made"]["timing"]["device"]:
        parts += ["## Speed", legend.about_speeds(results), as_markdown(tables.speeds(results))]
        if encoded := tables.with_encoder(results):
            parts += [legend.about_encoder(results), as_markdown(encoded)]
    if results["curve"]:
        curve = as_markdown(tables.over_training(results["curve"]))
        parts += ["## Over training", "![distance over training](curve.png)", legend.about_training(results), curve]
    if pair_sets := results.get("pair_sets"):
        sizes = as_markdown(tables.over_pairs(pair_sets))
        parts += ["## Over the size of the pair set", "![distance over pairs](pairs.png)"]
        parts += [legend.about_pairs(results), sizes]
    parts += ["## How these images were drawn, scored and timed", _legend(protocol(results))]
    parts += ["## How these numbers were made", _nested(results["made"], 0)]
    return "\n\n".join(parts) + "\n"


def _prompts(results: Results) -> list[str]:
    """The whole prompts of the grid's columns as code, in which nothing is Markdown."""
    lines = [f"{number}. {_as_code(prompt)}" for number, prompt in enumerate(results.get("grid", []), 1)]
    return [legend.about_grid(results), "\n".join(lines)] if lines else []


def _as_code(prompt: str) -> str:
    """One line of code, between more backticks than stand together anywhere in it."""
    line = lettering.printable(" ".join(prompt.split()))
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    return f"{fence} {line} {fence}"


def _legend(entries: list[tuple[str, str]]) -> str:
    return "\n".join(f"* **{term}**: {text}" for term, text in entries)


def _nested(tree: Mapping[str, object], indent: int) -> str:
    """Nested settings as an indented list."""
    lines = []
    for key, value in tree.items():
        inside = value if isinstance(value, dict) else {}
        lines.append(f"{'  ' * indent}* {key}:" + ("" if inside else f" {value}"))
        if inside:
            lines.append(_nested(inside, indent + 1))
    return "\n".join(lines)
