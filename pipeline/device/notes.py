"""What a step's own process hands over, figures as they are found, so that they outlast it, and its time."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from pipeline import storage


class Notes:
    """Figures by key and sentences about them, in a JSON file that is whole after every ``put``."""

    def __init__(self, file: Path, seconds: float) -> None:
        """``seconds`` are those that the process has, from now on."""
        self.file, self.until = file, time.monotonic() + seconds
        self.content: dict[str, Any] = {"values": {}, "about": []}
        self.put()

    @property
    def left(self) -> float:
        """Seconds, below 0 where they are over."""
        return self.until - time.monotonic()

    def put(self, *about: str, **values: float | None) -> None:
        """Add figures and sentences."""
        self.content["values"] |= values
        self.content["about"] += about
        storage.write_json(str(self.file), self.content)
