"""What a benchmark found: tables of numbers and the claims that they bear out, as Markdown and as plain data."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from typing import Any

from pipeline.report.markdown import as_markdown
from pipeline.report.tables import Table

Row = dict[str, str | int | float | None]
"""Heading -> what stands below it; the first row of a section names its columns."""


@dataclass(frozen=True)
class Claim:
    """A number that must stay on one side of ``bound``; ``at_most`` says on which. None: nothing was promised."""

    text: str
    value: float
    bound: float | None = None
    at_most: bool = False

    @property
    def met(self) -> bool:
        """Whether the number keeps what was promised."""
        if self.bound is None:
            return True
        return self.value <= self.bound if self.at_most else self.value >= self.bound

    @property
    def key(self) -> str:
        """As MLflow calls the metric."""
        return re.sub(r"[^a-z0-9_./ -]+", "", self.text.lower()).strip().replace(" ", "_")


@dataclass
class Section:
    """One table under a heading, the sentences that say how it was measured, and its claims."""

    title: str
    about: str
    rows: list[Row] = field(default_factory=list)
    claims: list[Claim] = field(default_factory=list)

    def markdown(self) -> str:
        """Heading, sentences and table."""
        headings = list(self.rows[0])
        text = sum(isinstance(value, str) for value in self.rows[0].values())
        cells = [[number(row.get(heading)) for heading in headings] for row in self.rows]
        return f"## {self.title}\n\n{self.about}\n\n{as_markdown(Table(headings, cells, text))}"


def number(value: str | int | float | None, digits: int = 3) -> str:
    """Text as it is, whole numbers with commas, others to so many digits; a dash where there is none."""
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:#.{digits}g}".rstrip(".")


def claims(sections: list[Section]) -> str:
    """The claims of all sections as a Markdown table; those that are not met say so."""
    cells = []
    for claim in (claim for section in sections for claim in section.claims):
        bound = "" if claim.bound is None else f"{'<=' if claim.at_most else '>='} {number(claim.bound)}"
        verdict = "" if claim.bound is None else "yes" if claim.met else "**no**"
        cells.append([claim.text, number(claim.value, 4), bound, verdict])
    return as_markdown(Table(["claim", "measured", "wanted", "met"], cells))


def plain(sections: list[Section]) -> list[dict[str, Any]]:
    """The sections as JSON takes them, each claim with whether it is met."""
    return [asdict(s) | {"claims": [asdict(c) | {"met": c.met} for c in s.claims]} for s in sections]
