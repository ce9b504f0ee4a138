"""The numbers of the report, its tables and sentences, and its Markdown."""

from __future__ import annotations

from html import escape
from typing import Any

import numpy as np
import pytest
from faults import TIMED

from pipeline.evaluation.rows import Entry, Reference, agreement, numbers
from pipeline.report import legend, markdown, page, tables
from pipeline.report.names import metric_name
from pipeline.report.protocol import protocol
from pipeline.sampling.samplers import SAMPLERS
from pipeline.sampling.speed import Speed
from pipeline.scoring.metrics import ClassVariance, InceptionScore, Moments, frechet
from pipeline.scoring.tally import Statistics

RNG = np.random.default_rng(0)
RESULTS: dict[str, Any] = {
    "name": "example",
    "title": "FD",
    "meaning": "Fréchet distance of 64 features of the digits scorer",
    "rows": [
        {"name": "real images", "type": "real", "accuracy": 0.998, "variance_over_teacher": 1.08},
        {
            "name": "teacher, AR",
            "type": "AR",
            "sampler": {"name": "Autoregressive"},
            "parameters": 1_223_680,
            "steps": 10,
            "ms": 40.0,
            "speedup": 1.0,
            "speedup_std": 0.0,
            "throughput": 100.0,
            "throughput_batch": 64.0,
            "throughput_speedup": 1.0,
            "throughput_speedup_std": 0.0,
            "score": 3.0,
            "score_over_teacher": 1.0,
            "speeds": [
                {"batch": 1, "network_ms": 38.0, "ms": 40.0, "rounds": [41.0, 40.0, 39.0]},
                {"batch": 64, "network_ms": 9.0, "ms": 10.0, "rounds": [10.0, 10.0, 10.0]},
            ],
        },
        {
            "name": "DD 2 steps (1, 6)",
            "type": "DD",
            "sampler": {"name": "FewStep", "split": 5, "steps": [1, 6]},
            "parameters": 1_217_156,
            "steps": 2,
            "ms": 5.0,
            "speedup": 8.0,
            "speedup_std": 0.25,
            "throughput": 250.0,
            "throughput_batch": 64.0,
            "throughput_speedup": 2.5,
            "throughput_speedup_std": 0.04,
            "score": 6.75,
            "score_over_teacher": 2.25,
            "speeds": [
                {"batch": 1, "network_ms": 3.25, "ms": 5.0, "rounds": [5.0, 5.0, 5.0]},
                {"batch": 64, "network_ms": 3.0, "ms": 4.0, "rounds": [4.0, 4.0, 4.0]},
                {"batch": 256, "network_ms": 3.0, "ms": 3.9, "rounds": [3.9, 3.9, 3.9]},
            ],
        },
    ],
    "speed": {"teacher": [{"batch": 1, "network_ms": 38.0, "ms": 40.0, "rounds": [40.0] * 3}], "throughput_batch": 64},
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
    "made": {
        "count": 5000,
        "seed": 2,
        "dimensions": 64,
        "timing": {
            "device": "Some CPU",
            "cores": 2,
            "threads": 1,
            "calls": "3 to 20 calls after 2 to warm up",
            "load": {"average": 0.3, "before": 0.01, "during": 0.02, "gpu": None, "busy": False},
        },
    },
}

PAPER = {"fid": 7.82, "is": 197.0, "precision": 0.8, "parameters": 327_000_000, "seconds": 0.036, "speedup": 3.7}


def with_paper() -> dict[str, Any]:
    """The example as a report of FID, with the paper's figures for its last row."""
    real, teacher, student = RESULTS["rows"]
    row = student | {"paper": PAPER, "inception_score": 190.0, "precision": 0.812, "parameters": 328_165_664}
    return RESULTS | {"title": "FID (torch-fidelity)", "rows": [real, teacher, row]}


TABLE = """\
| sampler           | type |   FD | FD / teacher's | class accuracy | variance / teacher's | #parameters | #Step | ms/image, batch 1 | speed-up, batch 1 | images/s, batch 64 | speed-up, batch 64 |
|:------------------|:-----|-----:|---------------:|---------------:|---------------------:|------------:|------:|------------------:|------------------:|-------------------:|-------------------:|
| real images       | real |    - |              - |          99.8% |                 1.08 |           - |     - |                 - |                 - |                  - |                  - |
| teacher, AR       | AR   | 3.00 |           1.00 |              - |                    - |       1.22M |    10 |                40 |              1.0x |                100 |               1.0x |
| DD 2 steps (1, 6) | DD   | 6.75 |           2.25 |              - |                    - |       1.22M |     2 |                 5 |        8.0x ± 0.2 |                250 |        2.5x ± 0.04 |"""  # noqa: E501


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


def speed(batch: int, ms: float) -> Speed:
    return Speed(batch, ms / 2, ms, (ms, ms, ms))


def test_numbers_of_a_row() -> None:
    real, teacher, student = statistics(0.0, right=199), statistics(0.1, right=190), statistics(1.0, 0.5, right=100)
    speeds = [speed(1, 10.0), speed(16, 2.0), speed(64, 2.5), speed(256, 1.0)]
    ar = [speed(1, 80.0), speed(16, 12.0), speed(64, 8.0)]
    entries = [
        Entry("DD 1 step", "FewStep", {"split": 1, "steps": (1,)}, 1, student, speeds, "DD", 1_000_000, {"fid": 9.94}),
        Entry("teacher, AR", "Autoregressive", {}, 10, teacher, ar),
    ]
    rows = numbers(entries, Reference(real.moments.gaussian(), real, of_digits=True), ar, 64)
    assert not [row for row in rows if "with_encoder" in row or "clip_score" in row], "of classes"
    assert [row["name"] for row in rows] == ["real images", "DD 1 step", "teacher, AR"]
    row = rows[1]
    expected = frechet(student.moments.gaussian(), real.moments.gaussian())
    assert row["score"] == expected
    assert row["score_over_teacher"] == pytest.approx(expected / rows[2]["score"])
    assert (row["ms"], row["speedup"]) == (10.0, 8.0)
    assert (row["throughput"], row["throughput_speedup"], row["throughput_batch"]) == (400.0, 3.2, 64)
    assert (rows[2]["speedup"], rows[2]["throughput_speedup"]) == (1.0, 1.0)
    assert row["accuracy"] == 0.5
    assert row["variance_over_teacher"] == pytest.approx(0.25, rel=0.1)
    assert row["precision"] is None, "of a scorer whose classes are the labels"
    assert (row["type"], row["parameters"], row["paper"]) == ("DD", 1_000_000, {"fid": 9.94})
    assert rows[0]["type"] == "real"
    assert row["sampler"] == {"name": "FewStep", "split": 1, "steps": (1,)}
    assert "score" not in rows[0]


def test_numbers_without_real_images_or_teacher() -> None:
    real, student = statistics(0.0), statistics(1.0)
    entries = [Entry("DD 1 step", "FewStep", {}, 1, student)]
    (row,) = numbers(entries, Reference(real.moments.gaussian(), None))
    assert row["score"] > 0
    for key in ("pixel_score", "precision", "recall", "score_over_teacher", "variance_over_teacher"):
        assert row[key] is None


def test_agreement_is_a_ratio_of_distances() -> None:
    first, second, far = statistics(0.0), statistics(0.0), statistics(1.0)
    found = agreement(far, first, second)
    assert found["ratio"] == pytest.approx(found["fm_to_ar"] / found["ar_to_ar"])
    assert found["ratio"] > 10


def test_the_table_lines_up_and_leaves_empty_columns_out() -> None:
    assert markdown.table(RESULTS) == TABLE


def test_slow_samplers_are_shown_without_powers_of_ten() -> None:
    rows = [{"name": "teacher, AR", "ms": 12345.6, "throughput": 0.01234}]
    text = markdown.table({"title": "FD", "rows": rows, "speed": {"throughput_batch": 64}})
    assert text.splitlines()[2] == "| teacher, AR |            12,346 |             0.0123 |"


def test_fid_tables_hold_the_inception_score() -> None:
    rows = [{"name": "DD 1 step", "score": 9.94, "inception_score": 193.6}]
    for title, header in [("FID", "|  FID |    IS |"), ("FID (pytorch-fid)", "| FID (pytorch-fid) |    IS |")]:
        assert markdown.table({"title": title, "rows": rows}).splitlines()[0] == f"| sampler   {header}"
    assert "| DD 1 step | 9.94 | 193.6 |" in markdown.table({"title": "FID", "rows": rows})


def test_scores_have_their_standard_errors_and_relatives() -> None:
    row = {
        "name": "a",
        "score": 9.94,
        "score_std": 0.061,
        "score_inf": 9.1,
        "sfid": 8.0,
        "kid": 0.00321,
        "kid_std": 0.0004,
    }
    rows = [{"name": "real images"}, row]
    found = tables.main({"title": "FID (torch-fidelity)", "rows": rows})
    assert (found.headings, found.cells[1]) == (["sampler", "FID (torch-fidelity)"], ["a", "9.94 ± 0.06"])
    others = tables.further({"title": "FID (torch-fidelity)", "rows": rows})
    assert others
    assert others.headings == ["sampler", "FID, limit", "sFID", "KID x 1000"]
    assert others.cells == [["a", "9.10", "8.00", "3.21"]]
    digits = tables.further({"title": "FD", "rows": rows})
    assert digits
    assert digits.headings[-1] == "KD x 1000", "KID is Inception's"
    assert tables.further({"title": "FD", "rows": [{"name": "a", "score": 1.0}]}) is None


def test_the_papers_figures_stand_beside_ours() -> None:
    results = with_paper()
    found = tables.main(results)
    shown = dict(zip(found.headings, found.cells[2], strict=True))
    assert (shown["FID, paper"], shown["speed-up, paper"]) == ("7.82", "3.7x")
    assert found.headings.index("FID, paper") == found.headings.index("FID (torch-fidelity)") + 1
    assert [cells[found.headings.index("FID, paper")] for cells in found.cells] == ["-", "-", "7.82"]
    both = tables.beside_paper(results)
    assert both is not None
    assert [cells[0] for cells in both.cells] == ["DD 2 steps (1, 6)"]
    assert dict(zip(both.headings[1:], both.cells[0][1:], strict=True)) == {
        "FID (torch-fidelity)": "6.75",
        "FID, paper": "7.82",
        "IS": "190.0",
        "IS, paper": "197.0",
        "precision": "0.812",
        "precision, paper": "0.80",
        "#parameters": "328M",
        "#parameters, paper": "327M",
        "ms/image, batch 1": "5",
        "ms/image, paper": "36",
        "speed-up, batch 1": "8.0x ± 0.2",
        "speed-up, paper": "3.7x",
    }
    assert "## Beside the paper's figures" in markdown.markdown(results)
    assert tables.beside_paper(RESULTS) is None


@pytest.mark.parametrize(
    ("value", "text"),
    [(310_283_520, "310M"), (1_033_399_360, "1.03B"), (98_321_672, "98.3M"), (849_696, "850k"), (7, "7")],
)
def test_parameters_are_printed_as_in_the_paper(value: int, text: str) -> None:
    assert tables.count(value) == text


def test_speed_that_was_not_measured_is_not_shown() -> None:
    made = RESULTS["made"] | {"timing": {"device": None, "threads": None}}
    rows = [{key: value for key, value in row.items() if key not in TIMED} for row in RESULTS["rows"]]
    text = markdown.markdown(RESULTS | {"made": made, "rows": rows, "speed": {"teacher": [], "throughput_batch": None}})
    assert "## Speed" not in text
    assert "## Quality against time" not in text
    assert "**speed**: was not measured: evaluate.timing_batches is empty." in text
    entry, reference = Entry("DD", "FewStep", {}, 1, statistics(0.1)), Reference((np.zeros(4), np.eye(4)), None)
    (row,) = numbers([entry], reference)
    assert "ms" not in row
    assert row["score"] > 0


def test_the_legend_says_which_distance_it_is() -> None:
    assert dict(legend.about_columns(RESULTS | {"meaning": "distance of toes"}))["FD"] == "distance of toes."


def test_every_column_and_every_sampler_is_explained() -> None:
    names = ["score", "score_inf", "sfid", "kid", "inception_score", "pixel_score", "accuracy", "variance_over_teacher"]
    names += [
        "precision",
        "recall",
        "parameters",
        "steps",
        "ms",
        "speedup",
        "throughput",
        "throughput_speedup",
        "score_over_teacher",
    ]
    rows = [{"name": kind, "type": "DD", "sampler": {"name": kind}} | dict.fromkeys(names, 1) for kind in legend.ROWS]
    results = RESULTS | {"title": "FID", "rows": rows}
    explained = dict(legend.about_columns(results))
    own = {"sampler", "recall"}  # recall with precision
    shown = [*tables.columns(results), *tables.further_columns(results)]
    assert {column.heading for column in shown} - own == explained.keys()
    assert len(legend.about_rows(results)) == len(legend.ROWS)
    assert "zero vector of the code space" in dict(legend.about_rows(results))["skip-n"]
    assert dict(legend.about_rows(RESULTS)).keys() == {"teacher, AR", "DD n steps"}


def of_prompts(**made: Any) -> dict[str, Any]:
    """The example, drawn for prompts of which the digits can say how far they were met."""
    _, teacher, student = RESULTS["rows"]
    rows = [{"name": "real images", "type": "real", "prompt_agreement": 1.0, "prompt_agreement_of_others": 0.02}]
    rows += [row | {"prompt_agreement": 0.876, "prompt_agreement_of_others": 0.01} for row in (teacher, student)]
    rows[1] |= {"variance_over_teacher": 1.0, "sampler": {"name": "OneStepStar"}}
    facts = {"uri": "p", "column": "c", "rows": 9, "skip": 0, "SHA-256": "0", "also among the pairs' prompts": 0}
    origin = RESULTS["made"] | {"prompts": facts, "features kept": {"images": 10}} | made
    return RESULTS | {"rows": rows, "made": origin, "grid": ["a ``b`` `c`\n<i>", ""]}


def test_of_prompts_no_sentence_speaks_of_classes() -> None:
    results = of_prompts()
    text = markdown.markdown(results)
    assert not [line for line in text.splitlines() if "class" in line and "classifier" not in line]
    assert "the same prompt and the same noise" in text
    explained = dict(legend.about_columns(results))
    assert explained["variance / teacher's"].startswith("pixel variance of all images, whatever their prompts; below 1")
    assert "real images 2.0%, teacher, AR 1.0%, DD 2 steps (1, 6) 1.0%" in explained["prompt agreement"]
    assert "are of the features of 10 of the images, which are evenly spread." in text
    table = tables.main(results)
    assert [cells[table.headings.index("prompt agreement")] for cells in table.cells] == ["100.0%", "87.6%", "87.6%"]
    assert "1. ``` a ``b`` `c` <i> ```\n2. ` (empty) `" in text
    columns, rows = markdown.scores(results)
    assert rows[1][columns.index("prompt_agreement")] == 0.876


def test_of_classes_every_sentence_is_as_it_was() -> None:
    assert legend.introduction(RESULTS).endswith("gives every sampler the same label and the same noise.")
    said = dict(legend.about_columns(RESULTS))["variance / teacher's"]
    assert said == (
        "pixel variance within a class, averaged over classes; below 1 the sampler is less diverse than the teacher."
    )
    kept = RESULTS["made"] | {"features kept": {"images": 10}}
    spread = dict(legend.about_columns(RESULTS | {"made": kept}))["precision, recall, KID, limits and standard errors"]
    assert spread == "are of the features of 10 of the images, whole rounds of classes that are evenly spread."
    star = dict(legend.about_rows(RESULTS | {"rows": [{"name": "a", "sampler": {"name": "OneStepStar"}}]}))["onestep*"]
    assert "given the class, from those of the pairs of that class" in star
    assert legend.about_grid(RESULTS) == "One row per sampler, one column per noise."
    assert "prompt agreement" not in tables.main(RESULTS).headings


@pytest.mark.parametrize(("place", "said"), [("cuda", True), ("cpu", False), (None, False)])
def test_only_times_of_a_gpu_waited_for_one(place: str | None, said: bool) -> None:
    """None stands for a report of before, which does not say."""
    timing = RESULTS["made"]["timing"] | ({"runs on": place} if place else {})
    made = RESULTS["made"] | {"timing": timing}
    explained = dict(legend.about_columns(RESULTS | {"made": made}))["ms/image, batch 1"]
    assert ("GPU" in explained) is said
    assert "the samplers taking turns call by call" in explained


def test_the_share_of_real_images_is_said_to_be_of_plain_ones() -> None:
    rows = [row | {"accuracy": 0.9, "prompt_agreement": 0.8} for row in RESULTS["rows"]]
    explained = dict(legend.about_columns(RESULTS | {"rows": rows}))
    for heading in ("class accuracy", "prompt agreement"):
        assert "of the plain images, not of what the tokenizer makes of them" in explained[heading]


def test_every_kind_of_sampler_has_a_sentence() -> None:
    assert legend.ROWS.keys() == {kind.__name__ for kind in SAMPLERS}


def test_markdown_has_every_part() -> None:
    text = markdown.markdown(RESULTS)
    headings = [line for line in text.splitlines() if line.startswith("#")]
    assert headings == [
        "# example: report",
        "## Quality against time",
        "## Flow matching against plain sampling",
        "## Speed",
        "## Over training",
        "## How these images were drawn, scored and timed",
        "## How these numbers were made",
    ]
    assert TABLE in text
    assert "FD 0.0900 between the two; 0.0600 between two AR draws" in text
    assert "| teacher, AR       |  40 (38) |   10 (9) |         - |" in text
    assert "| DD 2 steps (1, 6) | 5 (3.25) |    4 (3) |   3.9 (3) |" in text
    assert "| 1000           |      9.50 |              6.00 |" in text
    assert "  * device: Some CPU" in text
    assert "as the AR teacher at the same batch, 40 ms; behind ±" in text
    assert "Meanwhile others kept 0.02 of the machine's 2 cores busy, and 0.01 in the second before." in text
    assert "Only" not in text


def test_parts_without_numbers_are_left_out_and_few_images_are_said() -> None:
    made = RESULTS["made"] | {"count": 64}
    text = markdown.markdown(RESULTS | {"agreement": None, "curve": None, "made": made})
    assert "Over training" not in text
    assert "Flow matching against" not in text
    assert "**Only 64 images for 64 features**" in text


def test_mlflow_gets_a_few_numbers_and_a_table_of_all() -> None:
    found = markdown.headlines(RESULTS)
    assert found["DD_2_steps_1_6/FD"] == 6.75
    assert found["DD_2_steps_1_6/speed-up_at_batch_1"] == 40.0 / 5.0
    assert {name.partition("/")[0] for name in found} == {"teacher_AR", "DD_2_steps_1_6"}
    assert markdown.headline(RESULTS) == "FD 6.75 at 2 steps"
    real, teacher, student = RESULTS["rows"]
    assert markdown.headline(RESULTS | {"rows": [real, teacher, student | {"score": 27.02, "steps": 1}]}) == (
        "FD 27.0 at 1 step"
    )
    assert markdown.headline(RESULTS | {"rows": [real, teacher]}) == "FD 3.00 of teacher, AR"
    columns, rows = markdown.scores(RESULTS)
    assert [row[0] for row in rows] == [row["name"] for row in RESULTS["rows"]]
    assert {len(row) for row in rows} == {len(columns)}
    assert rows[[row["name"] for row in RESULTS["rows"]].index("teacher, AR")][columns.index("ms")] == 40.0


def test_names_of_samplers_are_made_fit_for_files_and_tags() -> None:
    assert metric_name("onestep* given the class") == "onestep-star_given_the_class"


def with_clip() -> dict[str, Any]:
    """The example as a report of prompts: with a CLIP score, and with the text encoder's time."""
    real, teacher, student = RESULTS["rows"]
    pace = {"ms": 44.0, "speedup": 1.0, "speedup_std": 0.0, "throughput": 80.0, "throughput_speedup": 1.0}
    faster = {"ms": 9.0, "speedup": 4.9, "speedup_std": 0.2, "throughput": 125.0, "throughput_speedup": 1.6}
    scores = {"clip_score": 27.126, "clip_score_std": 0.054, "clip_score_of_others": 14.9}
    rows = [
        real | {"clip_score": 31.5, "clip_score_of_others": 14.8},
        teacher | scores | {"with_encoder": pace},
        student | {"clip_score": 25.0, "with_encoder": faster},
    ]
    times = [{"batch": 1, "ms": 4.0, "ms_std": 0.25}, {"batch": 64, "ms": 2.5, "ms_std": 0.125}]
    sums = {"scorer": "s", "clip": "c" * 64, "clip reads": "r" * 64}
    facts = {"CLIP": {"model": "hf://a/b", "convention": "mean of 100 x max(cos, 0)"}, "features SHA-256": sums}
    return RESULTS | {"rows": rows, "speed": RESULTS["speed"] | {"encoder": times}, "made": RESULTS["made"] | facts}


def test_a_report_of_prompts_shows_the_clip_score_with_its_floor() -> None:
    results = with_clip()
    headings, cells, _ = tables.main(results)
    scores, others = (headings.index(name) for name in ("CLIP score", "CLIP score, others' prompts"))
    assert [row[scores] for row in cells] == ["31.50", "27.13 ± 0.05", "25.00"]
    assert [row[others] for row in cells] == ["14.80", "14.90", "-"]
    said = dict(legend.about_columns(results))
    assert "mean of 100 x max(cos, 0), by hf://a/b; behind ± its standard error" in said["CLIP score"]
    assert "each with the prompt of the image before it" in said["CLIP score, others' prompts"]
    scored = dict(protocol(results))["scored"]
    assert f"CLIP, hf://a/b (SHA-256 of its weights {'c' * 12}, of tokenizer and preparation {'r' * 12})" in scored


def test_a_report_of_prompts_shows_times_with_and_without_the_encoder() -> None:
    results = with_clip()
    headings, cells, _ = tables.main(results)
    plain, whole = (headings.index(name) for name in ("ms/image, batch 1", "ms/image, batch 1, with encoder"))
    assert [(row[plain], row[whole]) for row in cells] == [("-", "-"), ("40", "44"), ("5", "9")]
    encoded = tables.with_encoder(results)
    assert encoded is not None
    assert encoded.headings[1:] == [
        "ms/image, batch 1",
        "speed-up, batch 1",
        "images/s, batch 64",
        "speed-up, batch 64",
    ]
    faster = ["DD 2 steps (1, 6)", "9", "4.9x ± 0.2", "125", "1.6x"]
    assert encoded.cells == [["teacher, AR", "44", "1.0x", "80", "1.0x"], faster]
    said = legend.about_encoder(results)
    assert "took a prompt 4 ± 0.25 ms at batch 1; 2.5 ± 0.125 ms at batch 64" in said
    whole_page = page.html(results | {"curve": None}, {"samples.png": b"", "tradeoff.png": b""})
    for text, asked in ((markdown.markdown(results), said), (whole_page, escape(said))):
        assert asked in text
        assert "Among these inputs are the encoded prompts" in text


def test_the_papers_figures_of_prompts_are_those_of_its_third_table() -> None:
    results = with_paper()
    for classes, table in ((1000, "Tables 1 and 2"), (0, "Table 3")):
        said = dict(legend.about_columns(results | {"made": results["made"] | {"classes": classes}}))
        assert f"printed in arXiv 2412.17153, {table}, as the recipe lists it" in said["paper"]


def test_a_report_of_classes_says_nothing_with_clip() -> None:
    text = markdown.markdown(RESULTS)
    assert not [word for word in ("CLIP", "encoder", "prompt") if word in text]
    assert tables.with_encoder(RESULTS) is None
