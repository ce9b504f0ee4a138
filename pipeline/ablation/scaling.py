"""How the distance to the teacher falls with pairs, steps or size: power laws over the axes of an ablation.

A student that has seen all there is would have the distance of its teacher, so what is fitted is what lies above that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from pipeline.ablation.results import AblationRow, PowerLaw
from pipeline.recipe import leaves

FEWEST = 3  # values of an axis: two always lie on a line


def laws(columns: Sequence[str], rows: Sequence[AblationRow]) -> list[PowerLaw]:
    """A law for each column of each axis of ``FEWEST`` or more positive numbers whose students are all above theirs.

    Where the values of an axis are mappings, the number is that of the first field in which they differ.
    """
    out: list[PowerLaw] = []
    for axis in dict.fromkeys(row["axis"] for row in rows if row["axis"]):
        listed = [row for row in rows if row["axis"] == axis]
        over, numbers = _numbers(axis, listed)
        if len(set(numbers)) < FEWEST:
            continue
        for i, column in enumerate(columns):
            points = [
                (x, score - row["teacher"])
                for x, row in zip(numbers, listed, strict=True)
                for score in row["scores"][i]
                if score is not None and row["teacher"] is not None
            ]
            if len({x for x, _ in points}) >= FEWEST and all(above > 0 for _, above in points):
                out.append({"axis": axis, "column": column, "over": over, **_fit(points)})  # type: ignore[typeddict-item]
    return out


def _numbers(axis: str, rows: Sequence[AblationRow]) -> tuple[str, list[float]]:
    """The field in which the values of an axis differ, and its numbers; none where it has others."""
    values = [
        leaves(row["value"], axis) if not isinstance(row["value"], dict) else leaves(row["value"]) for row in rows
    ]
    for name in dict.fromkeys(name for value in values for name in value):
        found = [value.get(name) for value in values]
        if len({str(one) for one in found}) > 1:
            sound = all(isinstance(one, int | float) and not isinstance(one, bool) and one > 0 for one in found)
            return name, [float(one) for one in found] if sound else []  # type: ignore[arg-type]
    return axis, []


def _fit(points: Sequence[tuple[float, float]]) -> dict[str, float | int | None]:
    """The line through (log x, log distance), and the standard error of its slope."""
    log_x, log_y = np.log(np.array(points)).T
    slope, start = np.polyfit(log_x, log_y, 1)
    residuals, spread = log_y - (start + slope * log_x), log_x - log_x.mean()
    error = math.sqrt((residuals @ residuals) / (len(points) - 2) / (spread @ spread))
    return {
        "factor": math.exp(start),
        "exponent": float(slope),
        "error": error,
        "points": len(points),
        "lowest": min(x for x, _ in points),
        "highest": max(x for x, _ in points),
    }


def sentences(found: Sequence[PowerLaw], title: str) -> list[str]:
    """A line for each law, and before them what they say."""
    if not found:
        return []
    about = (
        f"What a student's {title} has above its AR teacher's, as a power of what is varied: least squares of the"
        " logarithms, over all seeds, with the standard error of the exponent. Beyond the values that were tried no law"
        " has been seen.\n"
    )
    return [about] + [
        f"* **{law['axis']}**, {law['column']}: {law['over']}^({law['exponent']:.2f} ± {law['error']:.2f}), from"
        f" {law['lowest']:g} to {law['highest']:g}, {law['points']} students"
        for law in found
    ]
