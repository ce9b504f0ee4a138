"""The report as one HTML page that needs nothing else: pictures inside, no script, nothing fetched.

It says what report.md says, with the paper's figures under ours. Light or dark as the reader's system is, and made to
be printed. Every value goes through ``html.escape``.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from html import escape
from typing import Any

from pipeline.report import legend, lettering, plots, tables
from pipeline.report.protocol import protocol
from pipeline.report.results import Results, Row
from pipeline.report.tables import Column, Table

HEAD, ROW = ' scope="col"', ' scope="row"'
WIDE = 14  # columns from which a table is set smaller
HEAVY = 2 << 20  # bytes of a picture from which the page carries it as JPEG

STYLE = """
:root { color-scheme: light dark; --ink: #1c1f23; --soft: #5c6570; --line: #d9dee4; --ground: #fff; --tint: #f4f6f8;
  --ours: #0063a6; --marked: #eef5fb; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7ea; --soft: #98a2ad; --line: #343b43; --ground: #14171a;
  --tint: #1d2125; --ours: #6bb8ee; --marked: #17252f; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 16px/1.55 system-ui, "Segoe UI", Roboto,
  "Helvetica Neue", Arial, "DejaVu Sans", sans-serif; }
main { max-width: 86rem; margin: 0 auto; padding: 2.5rem 1.5rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .4rem; letter-spacing: -.01em; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 3rem 0 .8rem; padding-top: .9rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.8rem 0 .5rem; }
p { margin: .5rem 0; max-width: 52rem; }
.soft, figcaption { color: var(--soft); }
nav { display: flex; flex-wrap: wrap; gap: .3rem 1.1rem; margin: .9rem 0 0; font-size: .9rem; }
nav a { color: var(--ours); text-decoration: none; }
nav a:hover { text-decoration: underline; }
.cards { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1.6rem 0 0; padding: 0; list-style: none; }
.cards li { flex: 1 1 11rem; max-width: 20rem; padding: .7rem 1rem .8rem; background: var(--tint); border-radius: 8px; }
.cards b { display: block; font-size: 1.6rem; line-height: 1.25; font-variant-numeric: tabular-nums; }
.cards .ours b { color: var(--ours); }
.cards span { display: block; font-size: .86rem; color: var(--soft); }
.scroll { overflow-x: auto; margin: 1rem 0; --shade: color-mix(in srgb, var(--ink) 22%, transparent);
  background: linear-gradient(to right, var(--ground) 30%, transparent) 0 0 / 2.5rem 100% no-repeat local,
    linear-gradient(to left, var(--ground) 30%, transparent) 100% 0 / 2.5rem 100% no-repeat local,
    linear-gradient(to right, var(--shade), transparent) 0 0 / .8rem 100% no-repeat scroll,
    linear-gradient(to left, var(--shade), transparent) 100% 0 / .8rem 100% no-repeat scroll; }
.scroll:focus-visible { outline: 2px solid var(--ours); }
table { border-collapse: collapse; font-size: .84rem; font-variant-numeric: tabular-nums; min-width: min(100%, 30rem); }
table.wide { font-size: .765rem; }
table.wide th, table.wide td { padding: .38rem .4rem; }
th, td { padding: .38rem .5rem; text-align: right; vertical-align: top; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
thead th { vertical-align: bottom; white-space: normal; font-weight: 600; line-height: 1.25; color: var(--soft);
  border-bottom: 2px solid var(--line); min-width: 3.4rem; }
th.text, td.text { text-align: left; }
tbody th { font-weight: 500; position: sticky; left: 0; background: var(--ground); }
tr.ours td, tr.ours th { background: var(--marked); }
tr.ours th { color: var(--ours); }
small.paper { display: block; color: var(--soft); font-size: .92em; }
figure { margin: 1.2rem 0; }
figure img { display: block; max-width: 100%; height: auto; background: #fff; border: 1px solid var(--line);
  border-radius: 6px; }
figcaption { font-size: .86rem; margin-top: .4rem; max-width: 52rem; }
dl { display: grid; grid-template-columns: 11rem 1fr; gap: .35rem 1.2rem; margin: .8rem 0;
  max-width: 62rem; font-size: .92rem; }
dt { font-weight: 600; }
dd { margin: 0; min-width: 0; overflow-wrap: anywhere; }
dl dl { margin: 0; font-size: 1em; }
dl dl dt { font-weight: 400; color: var(--soft); }
.prompts { max-width: 62rem; font-size: .92rem; overflow-wrap: anywhere; white-space: pre-wrap; }
.code { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: .86em; }
@media (max-width: 40rem) { main { padding: 1.5rem 1rem 3rem; } h1 { font-size: 1.5rem; }
  dl { grid-template-columns: minmax(0, 1fr); } dd { margin-bottom: .5rem; } .cards li { max-width: none; }
  tbody th { white-space: normal; min-width: 6rem; max-width: 8rem; } }
@page { size: A4 landscape; margin: 12mm; }
@media print {
  :root { color-scheme: light; --ink: #000; --soft: #444; --line: #bbb; --ground: #fff; --tint: #f4f6f8;
    --ours: #004b80; --marked: #eef5fb; }
  body { font-size: 10pt; } main { max-width: none; padding: 0; } nav { display: none; }
  .scroll { overflow: visible; background: none; break-inside: avoid; }
  table { font-size: 7.6pt; } th, td { padding: .25rem .32rem; }
  table.wide { font-size: 6.6pt; width: 100%; } table.wide th, table.wide td { padding: .18rem .2rem; }
  thead th { min-width: 0; } tbody th { position: static; white-space: normal; }
  h2, h3 { break-after: avoid; } h2 { margin: 1rem 0 .4rem; padding-top: .5rem; } h3 { margin: .8rem 0 .3rem; }
  h2 + p { break-after: avoid; } p, figcaption { max-width: none; }
  .cards { margin-top: .8rem; } .cards b { font-size: 1.3rem; }
  figure, tr, .cards li { break-inside: avoid; } figure { margin: .5rem 0; }
  figure img { max-height: 98mm; max-width: 100%; width: auto; }
  dl { max-width: none; font-size: 8pt; line-height: 1.3; gap: .1rem .8rem; grid-template-columns: 8rem 1fr; }
  .made { columns: 3; column-gap: 1.5rem; } .made dl { display: block; font-size: 7pt; }
  .made dl dl { padding-left: .6rem; clear: left; } .made dt { float: left; clear: left; margin-right: .5rem; }
  .made dd { overflow-wrap: anywhere; } .made dd > dl { margin-top: 0; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; } }
"""


def html(results: Results, pictures: dict[str, bytes]) -> str:
    """The page of these results; ``pictures`` are the PNG files of ``plots`` by name."""
    sections = _sections(results, pictures)
    links = "".join(f'<a href="#{key}">{escape(heading)}</a>' for key, heading, _ in sections)
    body = "\n".join(f'<h2 id="{key}">{escape(heading)}</h2>\n{content}' for key, heading, content in sections)
    name = escape(results["name"])
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{name}: report</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<header>
<h1>{name}: report</h1>
<p class="soft">{escape(legend.introduction(results))}</p>
<nav>{links}</nav>
</header>
{_cards(results)}
{body}
</main>
</body>
</html>
"""


def _sections(results: Results, pictures: dict[str, bytes]) -> list[tuple[str, str, str]]:
    """(anchor, heading, content) of every part that these results have."""
    table = _results_table(results)
    grid = _figure(pictures, "samples.png", legend.about_grid(results)) + _prompts(results.get("grid", []))
    out = [("images", "Images", grid)]
    out.append(("results", "Results", table + _described(results)))
    if "tradeoff.png" in pictures:
        caption = (
            "Lower is better, further left is faster; in each panel all samplers are timed at the same batch. The line"
            " joins those that draw with the student."
        )
        out.append(("time", "Quality against time", _figure(pictures, "tradeoff.png", caption)))
    if apart := tables.differences(results):
        text = _paragraph(legend.about_differences(results)) + _plain_table(apart)
        out.append(("differences", "Differences between students", text))
    if others := tables.further(results):
        out.append(("distances", "Other distances", _plain_table(others)))
    if results["agreement"]:
        text = _paragraph(legend.about_agreement(results))
        out.append(("agreement", "Flow matching against plain sampling", text))
    if results["made"]["timing"]["device"]:
        text = _paragraph(legend.about_speeds(results)) + _plain_table(tables.speeds(results))
        if encoded := tables.with_encoder(results):
            text += _paragraph(legend.about_encoder(results)) + _plain_table(encoded)
        out.append(("speed", "Speed", text))
    if results["curve"]:
        text = _figure(pictures, "curve.png", legend.about_training(results))
        out.append(("training", "Over training", text + _plain_table(tables.over_training(results["curve"]))))
    if pair_sets := results.get("pair_sets"):
        text = _figure(pictures, "pairs.png", legend.about_pairs(results))
        text += _plain_table(tables.over_pairs(pair_sets))
        out.append(("pairs", "Over the size of the pair set", text))
    out.append(("protocol", "How these images were drawn, scored and timed", _list(protocol(results))))
    made = f'<div class="made">{_nested(results["made"])}</div>'
    out.append(("made", "How these numbers were made", made))
    return out


def _prompts(prompts: list[str]) -> str:
    """The whole prompts of the grid's columns, each written from where its own script begins."""
    items = "".join(f'<li dir="auto">{escape(lettering.printable(prompt))}</li>' for prompt in prompts)
    return f'<ol class="prompts">{items}</ol>' if items else ""


def _cards(results: Results) -> str:
    """The distance and the speed of the teacher and of the few-step samplers, at a glance."""
    cards = []
    for row in results["rows"]:
        teacher = (row.get("sampler") or {}).get("name") == "Autoregressive"
        if row.get("score") is None or not (teacher or row.get("type") == "DD"):
            continue
        notes = [f"{tables.ms(row['ms'])} ms an image at batch 1"] if row.get("ms") else []
        if not teacher and row.get("speedup"):
            notes.append(_both_speed_ups(row))
        if not teacher and row.get("score_over_teacher"):
            notes.append(f"{tables.short_title(results)} {row['score_over_teacher']:.2f} times the teacher's")
        texts = "".join(f"<span>{escape(note)}</span>" for note in notes)
        marked = "" if teacher else ' class="ours"'
        score = f"{tables.short_title(results)} {row['score']:.2f}"
        cards.append(f"<li{marked}>{escape(row['name'])}<b>{escape(score)}</b>{texts}</li>")
    return f'<ul class="cards">{"".join(cards)}</ul>' if cards else ""


def _both_speed_ups(row: Row) -> str:
    """A latency and a throughput in one breath: either alone would say too much."""
    text = f"{tables.speed_up(row, 'speedup')} as fast as the teacher at batch 1"
    if row.get("throughput_speedup"):
        text += f", {tables.speed_up(row, 'throughput_speedup')} at batch {row['throughput_batch']:g}"
    return text


def _results_table(results: Results) -> str:
    """The main table, the paper's figures in small under ours."""
    columns = tables.columns(results)
    words = {"sampler", "type"}
    heads = "".join(_cell("th", escape(c.heading), c.heading in words, HEAD) for c in columns)
    lines = []
    for row in results["rows"]:
        first = _cell("th", _both(columns[0], row), True, ROW)
        others = "".join(_cell("td", _both(column, row), column.heading in words) for column in columns[1:])
        marked = ' class="ours"' if str(row.get("type", "")).startswith("DD") else ""
        lines.append(f"<tr{marked}>{first}{others}</tr>")
    return _scrolled(heads, lines)


def _both(column: Column, row: Row) -> str:
    ours, paper = escape(column.text(row) or "-"), column.printed(row)
    return ours + (f'<small class="paper">paper {escape(paper)}</small>' if paper else "")


def _described(results: Results) -> str:
    """What the columns and the samplers are."""
    rows = legend.about_rows(results)
    text = "<h3>The columns</h3>" + _list(legend.about_columns(results))
    return text + ("<h3>The samplers</h3>" + _list(rows) if rows else "")


def _plain_table(table: Table) -> str:
    heads = "".join(_cell("th", escape(h), i < table.text, HEAD) for i, h in enumerate(table.headings))
    lines = []
    for first, *others in table.cells:
        cells = "".join(_cell("td", escape(text), i < table.text) for i, text in enumerate(others, 1))
        lines.append(f"<tr>{_cell('th', escape(first), True, ROW)}{cells}</tr>")
    return _scrolled(heads, lines)


def _cell(tag: str, content: str, words: bool = False, more: str = "") -> str:
    kind = ' class="text"' if words else ""
    return f"<{tag}{kind}{more}>{content}</{tag}>"


def _scrolled(heads: str, lines: list[str]) -> str:
    """A table in a box of its own that scrolls sideways, with the keyboard too, where the page is too narrow for it."""
    body, kind = "\n".join(lines), ' class="wide"' if heads.count("<th") > WIDE else ""
    table = f"<table{kind}>\n<thead><tr>{heads}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>"
    return f'<div class="scroll" tabindex="0">{table}</div>'


def _list(entries: list[tuple[str, str]]) -> str:
    return f"<dl>{''.join(f'<dt>{escape(term)}</dt><dd>{escape(text)}</dd>' for term, text in entries)}</dl>"


def _nested(tree: Mapping[str, object]) -> str:
    """Nested settings as nested lists."""
    parts = []
    for key, value in tree.items():
        content = (
            _nested(value)
            if isinstance(value, dict) and value
            else f'<span class="code">{escape(_inline(value))}</span>'
        )
        parts.append(f"<dt>{escape(str(key))}</dt><dd>{content}</dd>")
    return f"<dl>{''.join(parts)}</dl>"


def _inline(value: Any) -> str:
    """A value on one line: ["FewStep", {"steps": [1, 6]}] -> "FewStep, steps [1, 6]"."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_inline(inside)}" for key, inside in value.items())
    if isinstance(value, list) and any(isinstance(inside, dict) for inside in value):
        return ", ".join(filter(None, map(_inline, value)))
    return str(value)


def _paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>"


def _figure(pictures: dict[str, bytes], name: str, caption: str) -> str:
    """A picture inside the page; one of photographs, which would make it heavy, as JPEG."""
    data, kind = pictures[name], "png"
    if len(data) > HEAVY:
        data, kind = plots.compressed(data), "jpeg"
        caption += f" Compressed; {name} beside this page has every pixel."
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return f'<figure><img src="{source}" alt="{escape(caption)}"><figcaption>{escape(caption)}</figcaption></figure>'
