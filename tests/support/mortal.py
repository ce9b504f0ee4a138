"""A sampling actor that dies; Ray's workers find it because ``conftest`` puts this folder on PYTHONPATH."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from faulty import first

from pipeline.generator.spread import SamplingActor


class Mortal(SamplingActor):
    """Takes its process with it when it has made part 1, of which nobody is told, the first time."""

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        place = Path(self.request.places[0]).parent
        out = super().__call__(batch)
        if int(batch["item"][0]) == 1 and first(place / "died"):
            os._exit(1)
        (place / f"made-{int(batch['draw'][0])}-{int(batch['item'][0])}-{os.getpid()}").touch()
        return out
