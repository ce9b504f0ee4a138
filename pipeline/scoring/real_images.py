"""The real images that samples are compared with: digits, a folder, Parquet, or the images in an .npz file.

Each is a sequence whose slices are images [B, 3, H, W] with their labels. Photographs are cut as ADM's reference was:
the short side halved with a box filter while it is twice the wanted size or more, then resized bicubically to it, then
the centre taken. An image of the right size stays as it is. Rows of Parquet without an image, as img2dataset leaves
them where a download failed, are left out.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import zipfile
import zlib
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from pipeline import storage
from pipeline.digits import captioned, networks
from pipeline.host.errors import Refused, Unfinished
from pipeline.sampling.sample_files import header
from pipeline.settings.evaluate import EvaluateSettings

DIGITS = 5_000  # real digits, all of them
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
IMAGE_COLUMNS = ("image", "jpg", "png", "webp")  # of Parquet: the first that is there; img2dataset names the format
CUT = (  # of images of another size, for the reader of a report
    "ADM's centre crop: the short side halved with a box filter while it is twice the wanted size or more, resized"
    " bicubically, the centre taken"
)
COMPANIONS = ("__macosx", "thumbs.db", "desktop.ini", "@eadir")  # what systems lay beside images, in small letters


class RealImages(Protocol):
    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice) -> tuple[Tensor, np.ndarray | None]:
        """Images float32 [B, 3, H, W] in [-1, 1] and labels [B], or None where they are not known."""


def of_file(uri: str, side: int) -> RealImages | None:
    """The images at ``uri``, ``side`` pixels wide; None for a file of statistics alone.

    ValueError, one sentence, where there are none or the first one cannot serve.
    """
    if not (storage.is_folder(uri) or uri.endswith((".parquet", ".npz"))):
        return None
    if uri.endswith(".npz"):
        array = Array(uri)
        if len(array) and array.shape[1:3] != (side, side):
            raise Refused(
                f"evaluate.reference {uri} holds images of {array.shape[2]}x{array.shape[1]} pixels and the teacher"
                f" makes {side}x{side}; give a reference of that size."
            )
        return array if len(array) else None
    tables, pictures = _inside(uri)
    if not tables and not pictures:
        raise Refused(
            f"evaluate.reference {uri} is a folder without images or Parquet; it may hold {', '.join(SUFFIXES)} or"
            " .parquet files, in folders of its own, too."
        )
    images: RealImages = ImageRows(tables, side) if tables else Files(pictures, side)
    images[:1]
    return images


def columns(uri: str) -> list[str]:
    """The columns of the (first) Parquet file at ``uri``; none where there is no Parquet."""
    if not (storage.is_folder(uri) or uri.endswith(".parquet")) or not (tables := _inside(uri)[0]):
        return []
    with _readable(tables[0], "Parquet"), storage.reading(tables[0]) as file:
        return list(pq.ParquetFile(file).schema_arrow.names)


def has_placements(settings: EvaluateSettings) -> bool:
    """Whether the report's prompts come with the digits that they describe: then those are its real images."""
    uri = settings.captions.uri
    return uri is not None and not storage.is_folder(uri) and set(captioned.COLUMNS) <= set(columns(uri))


def _inside(uri: str) -> tuple[list[str], list[str]]:
    """The Parquet files and the image files of a folder, or the Parquet file ``uri`` itself."""
    files = _visible(uri) if storage.is_folder(uri) else {"": ""}
    tables = [storage.join(uri, name) if name else uri for name in files if (name or uri).endswith(".parquet")]
    return tables, [storage.join(uri, name) for name in files if name.lower().endswith(SUFFIXES)]


def fingerprint(uri: str) -> str:
    """SHA-256 of a file, or of the names, sizes and times of change of all files in a folder."""
    if not storage.is_folder(uri):
        return storage.sha256(uri)
    return hashlib.sha256(json.dumps(_visible(uri)).encode()).hexdigest()


def _visible(uri: str) -> dict[str, str]:
    """``storage.below`` without hidden files and folders and what systems lay beside images: nobody means those."""

    def hidden(part: str) -> bool:
        return part.startswith(".") or part.lower() in COMPANIONS

    return {name: mark for name, mark in storage.below(uri).items() if not any(map(hidden, name.split("/")))}


class Digits:
    """The 5,000 digits of the embedded default, with their labels."""

    def __len__(self) -> int:
        return DIGITS

    def __getitem__(self, rows: slice) -> tuple[Tensor, np.ndarray | None]:
        images, labels = networks.images_and_labels()
        return images[rows], labels[rows].numpy()


class Array:
    """The uint8 images [N, H, W, 3] called ``arr_0`` in an .npz file, as ADM's reference holds them beside statistics.

    ``len`` is 0 for a file without images.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.shape: tuple[int, ...] = (0, 0, 0, 3)
        with _readable(uri, ".npz"), zipfile.ZipFile(storage.local(uri)) as archive:
            if "arr_0.npy" in archive.namelist():
                with archive.open("arr_0.npy") as file:
                    self.shape = header(file)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> tuple[Tensor, np.ndarray | None]:
        """Without the two gigabytes around them."""
        start, stop, _ = rows.indices(len(self))
        size = math.prod(self.shape[1:])
        with (
            _readable(self.uri, ".npz"),
            zipfile.ZipFile(storage.local(self.uri)) as archive,
            archive.open("arr_0.npy") as file,
        ):
            header(file)
            file.seek(start * size, io.SEEK_CUR)
            data = bytearray(file.read((stop - start) * size))
            pixels = np.frombuffer(data, dtype=np.uint8).reshape(stop - start, *self.shape[1:])
        return _tensor(pixels), None


class Files:
    """Image files, in the order of their names."""

    def __init__(self, uris: list[str], side: int) -> None:
        self.uris, self.side = uris, side

    def __len__(self) -> int:
        return len(self.uris)

    def __getitem__(self, rows: slice) -> tuple[Tensor, np.ndarray | None]:
        pixels = [decoded(storage.read_bytes(uri), self.side, uri) for uri in self.uris[rows]]
        return _tensor(np.stack(pixels)), None


class RowGroup(NamedTuple):
    """A row group of a Parquet file: which one, its column of images, its rows, and how many of them have an image.

    ``first`` counts its first row among those of all files.
    """

    uri: str
    number: int
    column: str
    first: int
    rows: int
    images: int


class ImageRows:
    """One of ``IMAGE_COLUMNS`` of Parquet files: encoded images, or the Hub's structs {bytes, path} of them.

    Rows without an image are left out.
    """

    def __init__(self, uris: list[str], side: int) -> None:
        self.side = side
        self.groups: list[RowGroup] = []
        for uri in uris:
            self.groups += _row_groups(uri, self.row_count)
        self.starts = [0, *accumulate(group.images for group in self.groups)]
        self._read = lru_cache(maxsize=1)(_images_of)  # a row group serves several batches
        if not len(self):
            raise Refused(f"evaluate.reference {uris[0]} has {self.row_count:,} rows and no image in any; fetch them.")

    @property
    def row_count(self) -> int:
        """Rows of all files, those without an image among them."""
        return self.groups[-1].first + self.groups[-1].rows if self.groups else 0

    def rows(self) -> np.ndarray:
        """The row of every image among those of all files, int64 [len(self)]."""
        every = [
            np.arange(group.rows) if group.images == group.rows else [row for row, _ in _images_of(group)]
            for group in self.groups
        ]
        firsts = [group.first for group in self.groups]
        return np.concatenate([first + np.asarray(rows, np.int64) for first, rows in zip(firsts, every, strict=True)])

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, rows: slice) -> tuple[Tensor, np.ndarray | None]:
        pixels = []
        for place in range(*rows.indices(len(self))):
            i = bisect_right(self.starts, place) - 1
            row, data = self._read(self.groups[i])[place - self.starts[i]]
            name = f"row {self.groups[i].first + row} of evaluate.reference, in {self.groups[i].uri}"
            pixels.append(decoded(data, self.side, name))
        return _tensor(np.stack(pixels)), None


def _row_groups(uri: str, first: int) -> list[RowGroup]:
    """The row groups of a Parquet file, ``first`` rows behind the beginning; Refused where it holds no images."""
    out = []
    with _readable(uri, "Parquet"), storage.reading(uri) as file:
        table = pq.ParquetFile(file)
        kinds = {field.name: str(field.type) for field in table.schema_arrow}
        column = next((name for name in IMAGE_COLUMNS if name in kinds), None)
        if column is None or "binary" not in kinds[column]:
            said = f"a column {column} of {kinds[column]}" if column else f"no column {', '.join(IMAGE_COLUMNS)}"
            raise Refused(
                f"evaluate.reference {uri} has {said}; it must hold encoded images: bytes, or the Hub's structs of"
                " bytes and path."
            )
        for number in range(table.num_row_groups):
            rows = table.metadata.row_group(number).num_rows
            nulls = _nulls(table, number, column)
            out.append(RowGroup(uri, number, column, first, rows, rows - nulls))
            first += rows
    return out


def _nulls(table: pq.ParquetFile, number: int, column: str) -> int:
    """Rows of a row group without an image: as its footer says, else counted."""
    group = table.metadata.row_group(number)
    for i in range(group.num_columns):
        chunk = group.column(i)
        if chunk.path_in_schema in (column, f"{column}.bytes") and chunk.statistics and chunk.statistics.has_null_count:
            return int(chunk.statistics.null_count)
    return sum(data is None for data in _cells(table, number, column))


def _cells(table: pq.ParquetFile, number: int, column: str) -> list[bytes | None]:
    """The encoded images of a row group, None for rows without one."""
    cells = table.read_row_group(number, columns=[column]).column(column).to_pylist()
    return [value["bytes"] if isinstance(value, dict) else value for value in cells]


def _images_of(group: RowGroup) -> list[tuple[int, bytes]]:
    """(row of the group, encoded image) for every row with an image."""
    with _readable(group.uri, "Parquet"), storage.reading(group.uri) as file:
        cells = _cells(pq.ParquetFile(file), group.number, group.column)
    return [(row, data) for row, data in enumerate(cells) if data is not None]


@contextmanager
def _readable(uri: str, kind: str) -> Iterator[None]:
    """One sentence for a file that is damaged or is not of its ``kind``; what its storage says passes."""
    try:
        yield
    except (Refused, Unfinished):
        raise
    except (pa.ArrowException, zipfile.BadZipFile, zlib.error, OSError, EOFError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise Refused(f"evaluate.reference {uri} is no {kind} file or damaged ({reason}); fetch it again.") from None


def decoded(data: bytes, side: int, name: str) -> np.ndarray:
    """A PNG, JPEG, ... as RGB uint8 [side, side, 3]; ValueError, one sentence with its ``name``, if it is none."""
    try:
        return _cropped(_rgb(data, name), side)
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise what they like: OSError, SyntaxError, struct.error, ...
        reason = " ".join(str(error).split()).removeprefix(f"{name} is ") or type(error).__name__
        raise Refused(f"{name} is no readable image ({reason}); take it out or fetch it again.") from error


def _rgb(data: bytes, name: str) -> Any:
    """The first picture of an encoded image as PIL's, in RGB; of 16 bits a channel the upper 8."""
    from PIL import Image

    try:
        opened = Image.open(io.BytesIO(data))
    except Image.DecompressionBombError as error:  # a small file may unpack to fill the memory
        raise ValueError(f"{name} is too large: {error}") from None
    with opened as file:
        if file.mode.startswith("I;16"):  # PIL would cut off what is above 255
            return Image.fromarray((np.asarray(file) >> 8).astype(np.uint8)).convert("RGB")
        if file.mode in ("I", "F"):
            raise ValueError("its pixels are numbers of 32 bits, and nothing says which is white")
        return file.convert("RGB")


def _cropped(image: Any, side: int) -> np.ndarray:
    """A PIL image as ADM cuts it (guided-diffusion's ``center_crop_arr``): uint8 [side, side, 3]."""
    from PIL import Image

    while min(image.size) >= 2 * side:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = side / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return np.asarray(image)[top : top + side, left : left + side]


def _tensor(pixels: np.ndarray) -> Tensor:
    """uint8 [B, H, W, 3] -> float32 [B, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
