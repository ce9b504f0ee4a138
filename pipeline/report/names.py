"""Names of samplers and distances in alphabets other than a reader's: of MLflow's metrics and of files."""

from __future__ import annotations


def metric_name(name: str) -> str:
    """A sampler's name in MLflow's alphabet, which file systems share: "DD 2 steps (1, 6)" -> "DD_2_steps_1_6"."""
    plain = "".join(c if c.isalnum() or c in "-." else "_" for c in name.replace("*", "-star"))
    return "_".join(filter(None, plain.split("_")))
