"""The report as one HTML page."""

from __future__ import annotations

import html
import re
from html.parser import HTMLParser
from typing import Any

import numpy as np

from pipeline.report import page, plots, tables
from tests.report.test_markdown import RESULTS, with_paper
from tests.workflow.test_other_reports import PAIR_SETS

VOID = {"meta", "img"}


class Reader(HTMLParser):
    """Text, links and whether every element is closed."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.text, self.links, self.tags, self.open = "", [], [], []  # type: ignore[var-annotated]
        self.feed(content)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value for key, value in attrs if key in ("src", "href", "srcset", "data", "action")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data + "\n"


def rendered(results: dict[str, Any]) -> str:
    images = [np.zeros((3, 3, 32, 32), dtype=np.uint8)] * 2
    return page.html(results, {"samples.png": plots.samples(["a", "b"], images, np.arange(3))} | plots.charts(results))


def full() -> dict[str, Any]:
    """Results with every part that a report can have."""
    made = RESULTS["made"] | {"student": {"pairs_count": 1200, "precision": "bf16"}}
    return with_paper() | {"pair_sets": PAIR_SETS, "made": made}


def test_the_page_needs_nothing_else() -> None:
    content = rendered(full())
    reader = Reader(content)
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in reader.links)
    assert sum(link.startswith("data:") for link in reader.links) == 4
    assert not {"script", "link", "iframe", "object"} & set(reader.tags)
    assert not re.search(r"url\(|@import|https?:", content)
    anchors = {link[1:] for link in reader.links if link.startswith("#")}
    assert anchors == set(re.findall(r'<h2 id="(\w+)"', content))


def test_the_page_says_what_the_markdown_says() -> None:
    results = full()
    text = Reader(rendered(results)).text
    both = tables.beside_paper(results)
    assert both is not None
    shown = [tables.main(results), tables.speeds(results), tables.over_training(results["curve"])]
    for table in [*shown, tables.over_pairs(PAIR_SETS), both]:
        for words in {word for line in table.cells for word in line}:
            assert words in text, words
    for words in ("two AR draws", "Some CPU", "student in bf16", "600 pairs: s3://bucket/half/report.json"):
        assert words in text
    assert "paper 7.82" in text
    assert "paper 36" in text


def test_parts_without_numbers_are_left_out() -> None:
    text = rendered(RESULTS | {"agreement": None, "curve": None})
    assert re.findall(r'<h2 id="(\w+)"', text) == ["images", "results", "time", "speed", "protocol", "made"]


def test_values_are_escaped() -> None:
    wicked = "<script>alert('&\"')</script>"
    rows = [row | {"name": f"{row['name']}{wicked}", "type": wicked} for row in RESULTS["rows"]]
    made = RESULTS["made"] | {wicked: {"inside": [wicked, {"n": wicked}]}}
    curve = {"count": 10, "teachers": {wicked: 1.0}, "points": [{"step": 1, "name": wicked, "score": 2.0}]}
    content = rendered(RESULTS | {"name": wicked, "rows": rows, "made": made, "curve": curve})
    assert "<script" not in content
    assert content.count(html.escape(wicked)) >= 3 + 2 * len(rows)


PROMPTS = ["<script>alert('&\"')</script>", "a `b` ``c``", "🦄 مرحبا", "x" * 10_000, "", "two\nlines \x00"]


def with_prompts(**made: Any) -> dict[str, Any]:
    """Results of images that were drawn for prompts."""
    facts = {"uri": "s3://b/<p>.parquet", "column": "TEXT", "rows": 9000, "skip": 4000, "SHA-256": "0"}
    origin = {"prompts": facts | {"also among the pairs' prompts": 3}, "reference": {"uri": "", "described": True}}
    return RESULTS | {"grid": PROMPTS, "made": RESULTS["made"] | origin | made}


def test_whole_prompts_stand_below_the_grid_and_are_text() -> None:
    content = rendered(with_prompts())
    reader = Reader(content)
    assert "<script" not in content
    items = re.findall('<li dir="auto">(.*?)</li>', content, re.DOTALL)
    assert [html.unescape(item) for item in items] == [*PROMPTS[:4], "(empty)", "two\nlines □"]
    assert "Its prompts, cut and with boxes for what cannot be drawn, stand above them, and whole below." in reader.text
    assert content.index('<ol class="prompts">') > content.index("<img")
    assert '<ol class="prompts">' not in rendered(RESULTS)


def test_a_heavy_picture_is_carried_as_jpeg() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (4, 3, 256, 256), dtype=np.uint8)
    png = plots.samples(["a"] * 4, [noise] * 4, np.arange(4))
    assert len(png) > page.HEAVY
    content = page.html(RESULTS | {"curve": None}, {"samples.png": png})
    assert "data:image/jpeg;base64," in content
    assert "samples.png beside this page has every pixel" in content
    assert len(content) < len(png)


def test_nothing_is_wider_than_a_phone() -> None:
    """Every table has a box that scrolls, links wrap, and no rule asks for more than 390 px."""
    content = rendered(full())
    assert content.count("<table") == content.count('<div class="scroll" tabindex="0"><table') == 4
    assert ".scroll { overflow-x: auto;" in page.STYLE
    assert "nav { display: flex; flex-wrap: wrap;" in page.STYLE
    assert "figure img { display: block; max-width: 100%;" in page.STYLE
    screen = re.sub(r"min\(100%, [^)]*\)|max-width: [^;})]+", "", page.STYLE.split("@media print")[0])
    widths = re.findall(r"(?:width|flex|columns): ([^;}]+)", screen)
    assert max(float(length) for value in widths for length in re.findall(r"([\d.]+)rem", value)) * 16 < 390
    assert not re.search(r"width: [\d.]+px", screen)


def test_prints_keep_tables_whole() -> None:
    printed = page.STYLE.split("@media print")[1]
    assert "break-inside: avoid" in printed.split(".scroll {")[1].split("}")[0]
    assert "overflow: visible" in printed
    assert "nav { display: none; }" in printed


def test_cards_say_both_speed_ups() -> None:
    text = Reader(rendered(full())).text
    assert "5 ms an image at batch 1" in text
    assert "8.0x ± 0.2 as fast as the teacher at batch 1, 2.5x ± 0.04 at batch 64" in text


def test_wide_tables_are_set_smaller() -> None:
    more = {"pixel_score": 1.0, "accuracy": 0.9, "variance_over_teacher": 0.5, "recall": 0.5, "precision": 0.5}
    rows = [row | more for row in with_paper()["rows"]]
    assert '<table class="wide">' in rendered(with_paper() | {"rows": rows})
    assert '<table class="wide">' not in rendered(RESULTS)
