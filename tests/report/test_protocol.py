"""What somebody needs who wants the same numbers is said in sentences."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.report import markdown
from pipeline.report.protocol import RESIZED, protocol
from pipeline.settings.evaluate import Flavour
from tests.report.test_markdown import RESULTS


def said(**made: Any) -> dict[str, str]:
    return dict(protocol(RESULTS | {"made": RESULTS["made"] | made}))


def test_the_protocol_says_how_images_were_drawn_and_scored() -> None:
    found = said(classes=10, teacher={"precision": "fp32", "filter": {"guidance": 2.0}}, student={"precision": "bf16"})
    assert "5,000 images a sampler. Sample i, from 0, has class i modulo 10, so classes are balanced" in found["drawn"]
    assert "(seed 2, i)" in found["drawn"]
    assert "The teacher in fp32 and the student in bf16. Guidance and filter: guidance 2.0." in found["drawn"]
    assert "rounded to uint8 as PNG savers do" in found["scored"]
    assert "without a resize" in found["scored"]
    assert "Some CPU, 1 torch thread(s) of 2 cores" in found["timed"]


def of_prompts(repeated: int | None = 0, **more: Any) -> dict[str, str]:
    facts = {"uri": "captions.parquet", "column": "TEXT", "rows": 9000, "skip": 4000, "SHA-256": "0"}
    prompts = facts | {"also among the pairs' prompts": repeated} | more.pop("prompts", {})
    return said(prompts=prompts, **{"reference": {"uri": "", "described": True}} | more)


def test_the_protocol_says_which_prompts_were_drawn() -> None:
    drawn = of_prompts()["drawn"]
    assert "Sample i, from 0, has prompt i of captions.parquet, column TEXT from row 4,000 on, and the noise" in drawn
    assert "0 of 5,000 prompts occur among those of the pairs, capital letters and blanks aside." in drawn
    assert "class" not in drawn
    assert "not known here: captions.uri is not set" in of_prompts(None)["drawn"]
    chosen = of_prompts(prompts={"chosen": "1", "column": "", "skip": 0})["drawn"]
    assert "has prompt i of captions.parquet, rows without an image left out, and" in chosen
    encoder = {"uri": "t5", "length": 120, "clean": "rules", "precision": "bf16"}
    text = "Prompts are rewritten by the rules rules and encoded by t5 in bf16, at most 120 tokens of each."
    assert text in of_prompts(encoder=encoder)["drawn"]
    assert "Prompts are encoded by t5" in of_prompts(encoder=encoder | {"clean": ""})["drawn"]


def test_the_protocol_says_whose_real_images_they_are_and_how_they_were_cut() -> None:
    facts = {"uri": "r.parquet", "statistics": "made here", "images": 5000, "described": True, "cut": "in two"}
    text = of_prompts(reference=facts | {"rows without an image": 1234})["scored"]
    assert text.endswith(
        "of 5,000 images. They are those of the prompts that are drawn, in their order. 1,234 rows there have no image"
        " and are left out. Real images of another size are cut: in two."
    )
    assert "Which prompts they have is not known here." in of_prompts(reference=facts | {"described": False})["scored"]
    assert said(reference={"uri": "r", "statistics": "read", "count": 5})["scored"].endswith("statistics of 5 images.")


@pytest.mark.parametrize("flavour", Flavour.__args__)
def test_every_flavour_has_its_resize(flavour: str) -> None:
    reference = {"uri": "s3://bucket/ref.npz", "statistics": "read", "count": 50000}
    found = said(flavour=flavour, reference=reference)["scored"]
    assert f"{RESIZED[flavour]} ({flavour})" in found
    assert "Compared with s3://bucket/ref.npz: statistics of 50,000 images." in found
    both = said(flavour="both", **{"pixels across an image": 256})["scored"]
    assert "scored at 256 pixels across" in both
    assert all(text in both for text in RESIZED.values())


def test_the_run_itself_is_named() -> None:
    facts = {"written": "2026-01-02", "version": "0.1.0", "commit": "abc", "changed": True, "command": "python a b"}
    text = said(report=facts)["written"]
    assert text == (
        "Written 2026-01-02 by distilled-decoding 0.1.0, commit abc with files that differ from it, with: python a b"
    )
    assert text in markdown.markdown(RESULTS | {"made": RESULTS["made"] | {"report": facts}})
    assert said(timing={"device": None, "threads": None})["timed"] == "Speed was not measured."
