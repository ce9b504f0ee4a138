"""Lets ``import torchvision`` succeed where its compiled operators cannot load.

Imported before lpips and torch-fidelity. lpips and torch-fidelity only use torchvision's networks, but importing
torchvision registers shape rules for ``nms`` and ``qnms``, operators of its compiled extension. A torchvision wheel
built for CUDA beside a CPU build of torch (PyPI's wheel, say) cannot load that extension, and the import dies with
"operator torchvision::nms does not exist". Declaring the two signatures is enough; calling them still fails. Where the
extension loads, nothing is declared.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch


def _extension_loads() -> bool:
    """Whether torchvision's operators exist, after loading its extension as torchvision itself does."""
    spec = find_spec("torchvision")
    if spec is None or spec.origin is None:
        return True  # nothing to mend: the import of torchvision will say that it is missing
    for binary in Path(spec.origin).parent.glob("_C.*"):
        try:
            torch.ops.load_library(str(binary))
        except OSError:
            return False
    return hasattr(torch.ops.torchvision, "nms")


def _declare() -> torch.library.Library:
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


# Kept for the life of the process: the operators are undeclared when the Library is collected.
DECLARED = None if _extension_loads() else _declare()
