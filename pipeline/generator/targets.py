"""Where many images go, part by part: one .npz, or a folder with a picture of each. Parts that are there are kept.

Whoever makes a part again writes the same bytes, and a file is there whole or not at all, so a job that was stopped
goes on from what is there, and a part whose actor died is made again by another.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
from PIL import Image

from pipeline import storage
from pipeline.files.local import TEMPORARY
from pipeline.generator.request import Request
from pipeline.host.behind import Behind
from pipeline.host.errors import Refused
from pipeline.recipe import fingerprint
from pipeline.sampling import sample_files

ABOUT = "sample.json"  # in a folder of pictures: what they are of
AT_ONCE = 16  # pictures that a thread writes one after the other


class Target(Protocol):
    """Where the images of one sampler go."""

    def missing(self) -> list[int]:
        """The parts that are still to be made; Refused for a place that holds something else."""
        ...

    def begin(self) -> None:
        """The first parts are about to be made."""
        ...

    def put(self, item: int, batches: Iterator[np.ndarray], behind: Behind) -> None:
        """Write a part, uint8 images [B, 3, H, W] as they are drawn; on the disk when ``behind`` has ended."""
        ...

    def finish(self) -> None:
        """All parts are there: make of them what was asked for."""
        ...


def targets(request: Request) -> list[Target]:
    """One for each sampler of a request."""
    pairs = zip(request.samplers, request.places, strict=True)
    return [
        (NpzTarget if place.endswith(".npz") else FolderTarget)(request, request.facts(sampler), place)
        for sampler, place in pairs
    ]


class NpzTarget:
    """uint8 [count, H, W, 3] as ``arr_0``, which OpenAI's evaluator reads; parts lie beside it until it is whole.

    What was there before stays until then.
    """

    def __init__(self, request: Request, facts: dict[str, Any], place: str) -> None:
        self.request, self.place, self.key = request, place, fingerprint(facts)

    def missing(self) -> list[int]:
        """All parts but those that lie beside the file; none where that holds this draw."""
        if sample_files.holds(self.place, self.key):
            return []
        there = set(self._beside())
        parts = range(self.request.parts)
        return [item for item in parts if _name(sample_files.part(self.place, self.key, item)) not in there]

    def begin(self) -> None:
        pass  # the parts say by their names what they are of

    def put(self, item: int, batches: Iterator[np.ndarray], behind: Behind) -> None:
        behind.call(sample_files.write_part, self.place, self.key, item, np.concatenate([*batches]))

    def finish(self) -> None:
        """Join the parts; those of a job that was stopped and began something else here are deleted, too."""
        sample_files.join(self.place, self.key, self.request.parts)
        for name in self._beside():
            storage.remove(storage.join(self._folder, name))

    @property
    def _folder(self) -> str:
        return self.place.rpartition("/")[0]

    def _beside(self) -> list[str]:
        """The names of all parts that lie beside the file, of whatever draw."""
        beginning = _name(self.place) + sample_files.PART
        return [name for name in storage.listing(self._folder) if name.startswith(beginning)]


class FolderTarget:
    """A PNG for each image, named after its sample id, and ``sample.json``, which says what they are of."""

    def __init__(self, request: Request, facts: dict[str, Any], place: str) -> None:
        self.request, self.facts, self.place = request, facts, place
        self._digits = len(str(request.first + request.count - 1))

    def missing(self) -> list[int]:
        """The parts of which a picture is missing; Refused for a folder that holds anything but this draw's."""
        there = {name for name in storage.listing(self.place) if not name.startswith(TEMPORARY)}
        if there and ABOUT not in there:
            raise Refused(f"the folder --out {self.place} is not empty; name another.")
        found = storage.read_json(self._about) if there else self.facts
        if found != self.facts:
            known = found if isinstance(found, dict) else {}
            differs = [name for name, value in self.facts.items() if known.get(name) != value]
            raise Refused(
                f"the folder --out {self.place} holds pictures of another draw: its {ABOUT} has another"
                f" {', '.join(differs) or 'format'}; name another folder, or empty this one."
            )
        parts = range(self.request.parts)
        return [item for item in parts if any(self._name(i) not in there for i in self.request.ids(item))]

    def begin(self) -> None:
        storage.write_json(self._about, self.facts)

    def put(self, item: int, batches: Iterator[np.ndarray], behind: Behind) -> None:
        ids = self.request.ids(item)
        for images in batches:
            numbers, ids = ids[: len(images)], ids[len(images) :]
            for start in range(0, len(images), AT_ONCE):
                behind.call(self._write, numbers[start : start + AT_ONCE], images[start : start + AT_ONCE])

    def finish(self) -> None:
        storage.sweep(self.place)

    def _write(self, ids: range, images: np.ndarray) -> None:
        files = {self._name(number): _png(image) for number, image in zip(ids, images, strict=True)}
        storage.write_files(self.place, files)

    @property
    def _about(self) -> str:
        return storage.join(self.place, ABOUT)

    def _name(self, number: int) -> str:
        return f"{number:0{self._digits}d}.png"


def _png(image: np.ndarray) -> bytes:
    """Of uint8 [3, H, W]."""
    buffer = io.BytesIO()
    Image.fromarray(image.transpose(1, 2, 0)).save(buffer, format="PNG")
    return buffer.getvalue()


def _name(uri: str) -> str:
    return uri.rpartition("/")[2]
