"""Distilled Decoding on Ray: from sample ids to a scored one-step generator.

Reading order follows the data: noise -> flow -> models -> pairs -> generate -> losses -> distill -> samplers ->
metrics -> evaluate -> report.

``from pipeline import Generator`` draws images with a student and knows nothing of the rest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.generator.generator import Generator

__all__ = ["Generator"]


def __getattr__(name: str) -> Any:
    """Import ``Generator`` when somebody asks for it: jobs and Ray's workers have no use for it."""
    if name == "Generator":
        from pipeline.generator.generator import Generator

        return Generator
    raise AttributeError(f"module {__name__} has no attribute {name}")
