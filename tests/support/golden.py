"""Golden files: outputs of the official code on the weights and inputs of ``fill``, as JSON records.

    {"kind": "full", "shape", "dtype", "data"}                            the whole tensor, row-major
    {"kind": "sample", "shape", "dtype", "index", "value", "proj", "mean", "std", "min", "max"}   some entries

``proj`` of a sample is ``fill.projections`` of the whole tensor. -inf is written "-inf".
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fill
import numpy as np
import torch

FOLDER = Path(__file__).parents[1] / "goldens"
DTYPES = {"f": np.float64, "i": np.int64, "b": np.bool_}


def load(name: str) -> dict[str, Any]:
    """The golden file ``name``.json."""
    return json.loads((FOLDER / f"{name}.json").read_text())


def array(record: dict[str, Any]) -> np.ndarray:
    """The tensor of a full record: float64, int64 or bool."""
    values = [float(v) if v == "-inf" else v for v in record["data"]]
    return np.array(values, dtype=DTYPES[record["dtype"]]).reshape(record["shape"])


def tensor(record: dict[str, Any]) -> torch.Tensor:
    """The tensor of a full record as torch sees it: float32, int64 or bool."""
    found = torch.from_numpy(array(record))
    return found.float() if found.is_floating_point() else found


def deviation(record: dict[str, Any], found: torch.Tensor | np.ndarray) -> float:
    """Largest distance of ``found`` from the record; inf for another shape or another pattern of -inf."""
    x = np.asarray(found.detach() if isinstance(found, torch.Tensor) else found).astype(np.float64)
    if list(x.shape) != record["shape"]:
        return float("inf")
    if record["kind"] == "full":
        expected = array(record).astype(np.float64)
        hole = np.isneginf(expected)
        if not np.array_equal(hole, np.isneginf(x)):
            return float("inf")
        return float(np.abs(np.where(hole, 0.0, x) - np.where(hole, 0.0, expected)).max(initial=0))
    flat = x.ravel()
    got = [flat[record["index"]], fill.projections(flat), [flat.mean(), flat.std(), flat.min(), flat.max()]]
    wanted = [record["value"], record["proj"], [record[k] for k in ("mean", "std", "min", "max")]]
    return float(np.abs(np.concatenate(got) - np.concatenate(wanted)).max())


def check(record: dict[str, Any], found: torch.Tensor | np.ndarray, atol: float = 0.0) -> None:
    """Fail unless ``found`` has the record's shape and lies within ``atol`` of it everywhere."""
    away = deviation(record, found)
    assert away <= atol, f"{away:.3g} away from the golden of shape {record['shape']}, allowed are {atol:.3g}"


def rows(module: torch.nn.Module) -> list[list[Any]]:
    """[name, shape, kind] of every entry of the state_dict, in order, as golden files list them."""
    parameters = dict(module.named_parameters())
    state = module.state_dict()
    return [[k, list(v.shape), "parameter" if k in parameters else "buffer"] for k, v in state.items()]
