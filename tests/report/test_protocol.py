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
