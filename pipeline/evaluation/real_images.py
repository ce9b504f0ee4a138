"""The real images that samples are compared with: digits, a folder, Parquet, or the images in an .npz file.

Each is a sequence whose slices are images [B, 3, H, W] with their labels. Photographs are cut as ADM's reference was:
the short side halved with a box filter while it is twice the wanted size or more, then resized bicubically to it, then
the centre taken. An image of the right size stays as it is.
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
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from pipeline import storage
from pipeline.digits import networks
from pipeline.host.errors import Refused, Unfinished
from pipeline.sampling.sample_files import header

DIGITS = 5_000  # real digits, all of them
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
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
    files = _visible(uri) if storage.is_folder(uri) else {"": ""}
    tables = [storage.join(uri, name) if name else uri for name in files if (name or uri).endswith(".parquet")]
    pictures = [storage.join(uri, name) for name in files if name.lower().endswith(SUFFIXES)]
    if not tables and not pictures:
        raise Refused(
            f"evaluate.reference {uri} is a folder without images or Parquet; it may hold {', '.join(SUFFIXES)} or"
            " .parquet files, in folders of its own, too."
        )
    images: RealImages = ImageRows(tables, side) if tables else Files(pictures, side)
    images[:1]
    return images


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


class ImageRows:
    """The column ``image`` of Parquet files: encoded images, or the Hub's structs {bytes, path} of them."""

    def __init__(self, uris: list[str], side: int) -> None:
        self.side = side
        self.groups: list[tuple[str, int]] = []  # (file, row group)
        self.starts = [0]
        for uri in uris:
            for i, count in enumerate(_group_sizes(uri)):
                self.groups.append((uri, i))
                self.starts.append(self.starts[-1] + count)
        self._read = lru_cache(maxsize=1)(_images_of)  # a row group serves several batches

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, rows: slice) -> tuple[Tensor, np.ndarray | None]:
        pixels = []
        for place in range(*rows.indices(len(self))):
            i = bisect_right(self.starts, place) - 1
            data = self._read(*self.groups[i])[place - self.starts[i]]
            pixels.append(decoded(data, self.side, f"row {place} of evaluate.reference, in {self.groups[i][0]}"))
        return _tensor(np.stack(pixels)), None


def _group_sizes(uri: str) -> list[int]:
    """Rows of each row group of a Parquet file; ValueError, one sentence, where it holds no images."""
    with _readable(uri, "Parquet"), storage.reading(uri) as file:
        table = pq.ParquetFile(file)
        kind = next((str(field.type) for field in table.schema_arrow if field.name == "image"), None)
        sizes = [table.metadata.row_group(i).num_rows for i in range(table.num_row_groups)]
    if kind is None or "binary" not in kind:
        raise Refused(
            f"evaluate.reference {uri} has {'no column image' if kind is None else f'a column image of {kind}'}; it"
            " must hold encoded images: bytes, or the Hub's structs of bytes and path."
        )
    return sizes


def _images_of(uri: str, group: int) -> list[bytes]:
    with _readable(uri, "Parquet"), storage.reading(uri) as file:
        column = pq.ParquetFile(file).read_row_group(group, columns=["image"]).column("image").to_pylist()
    return [value["bytes"] if isinstance(value, dict) else value for value in column]


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
