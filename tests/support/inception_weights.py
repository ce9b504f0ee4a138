"""Inception's weights by formula, drawn once for a session: they take seconds."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import numpy as np
import pytest

from pipeline.scoring.inception import formula

if find_spec("torch_fidelity") is None:
    pytest.skip("torch-fidelity is not installed: pip install torch-fidelity", allow_module_level=True)


@cache
def weights() -> dict[str, np.ndarray]:
    return formula()
