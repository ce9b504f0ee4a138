"""Digits with captions: which digit stands where, drawn from seed and id, and the real images behind unseen captions.

A placement is the index of a digit (as in ``networks.centred``) and how far it is moved down and to the right. It says
all about an image, so the images need not ship.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from pipeline import noise, storage
from pipeline.digits import captions, networks, properties
from pipeline.host.errors import Refused

COLUMNS = ("digit", "down", "right")  # of a placement
DRAWN_AT_ONCE = 1_000


def placements(seed: int, ids: Sequence[int] | np.ndarray, digits: int) -> np.ndarray:
    """One of the first ``digits`` digits at a place, for every id: int64 [B, 3] with the columns ``COLUMNS``."""
    across = 2 * networks.SHIFT + 1
    index, down, right = (
        noise.choice(seed, ids, draw, options) for draw, options in enumerate((digits, *[across] * 2))
    )
    return np.stack([index, down - networks.SHIFT, right - networks.SHIFT], axis=1)


def shown(placements: np.ndarray) -> tuple[Tensor, Tensor]:
    """Placements int64 [B, 3] -> images float32 [B, 3, 32, 32] in [-1, 1] and their labels int64 [B]."""
    images, labels = networks.centred()
    index = torch.from_numpy(placements[:, 0])
    return networks.moved(images[index], torch.from_numpy(placements[:, 1:])), labels[index]


def training_captions(seed: int, count: int) -> pa.Table:
    """``count`` captions of digits of the training split, none of which names a held-out combination completely."""
    split = len(networks.training_split()[0])
    texts: list[str] = []
    for start in range(0, count, DRAWN_AT_ONCE):
        ids = np.arange(start, min(start + DRAWN_AT_ONCE, count))
        found = properties.described(*shown(placements(seed, ids, split)))
        texts += captions.composed(found, seed, ids)
    return pa.table({"caption": texts})


def unseen_captions(seed: int, count: int) -> pa.Table:
    """``count`` complete captions of held-out combinations, with the placements of the digits that they describe.

    All digits at all places are drawn as often as they are in training, until enough are held out.
    """
    texts: list[str] = []
    kept: list[np.ndarray] = []
    start, every = 0, len(networks.centred()[0])
    while len(texts) < count:
        ids = np.arange(start, start := start + DRAWN_AT_ONCE)
        drawn = placements(seed, ids, every)
        found = properties.described(*shown(drawn))
        wanted = captions.held_out(found)
        texts += captions.complete(found[wanted], seed, ids[wanted])
        kept.append(drawn[wanted])
    rows = np.concatenate(kept)[:count].astype(np.int16)
    return pa.table({"caption": texts[:count]} | dict(zip(COLUMNS, rows.T.copy(), strict=True)))


def write(table: pa.Table, uri: str) -> None:
    """Write a table as Parquet, atomically."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    storage.write_bytes(uri, buffer.getvalue())


class CaptionedDigits:
    """The real images that the rows of a table of ``unseen_captions`` describe; row i is that of its caption i.

    A sequence as the evaluation reads references: slices are images float32 [B, 3, 32, 32] in [-1, 1] and their
    labels. Raises Refused, one sentence, for a table without placements or with impossible ones, Missing for none.
    """

    def __init__(self, uri: str) -> None:
        self.placements = _placements_of(uri)
        digits, shifts = self.placements[:, 0], self.placements[:, 1:]
        possible = (digits >= 0) & (digits < len(networks.centred()[0])) & (abs(shifts) <= networks.SHIFT).all(axis=1)
        if not possible.all():
            row = int(possible.argmin())
            raise Refused(
                f"row {row} of {uri} is digit, down, right = {self.placements[row].tolist()}; digits are 0 to"
                f" {len(networks.centred()[0]) - 1} and shifts at most {networks.SHIFT} pixels: write the table again."
            )

    def __len__(self) -> int:
        return len(self.placements)

    def __getitem__(self, rows: slice) -> tuple[Tensor, np.ndarray | None]:
        images, labels = shown(self.placements[rows])
        return images, labels.numpy()


def _placements_of(uri: str) -> np.ndarray:
    """The columns ``COLUMNS`` of a Parquet file, int64 [N, 3]; Refused, one sentence, where they are not there."""
    try:
        with storage.reading(uri) as file:
            table = pq.read_table(file)
    except pa.ArrowException as error:
        reason = " ".join(str(error).split())[:200]
        raise Refused(f"{uri} is no Parquet file or damaged ({reason}); fetch it again.") from None
    whole = [field.name for field in table.schema if pa.types.is_integer(field.type)]
    lacking = [name for name in COLUMNS if name not in whole or table.column(name).null_count]
    if lacking:
        raise Refused(
            f"{uri} does not say which digits its captions describe: it has no column {lacking[0]} of whole numbers; it"
            f" must have {', '.join(COLUMNS)}, as package://digits/unseen.parquet has."
        )
    return np.stack([table.column(name).to_numpy() for name in COLUMNS], axis=1).astype(np.int64)
