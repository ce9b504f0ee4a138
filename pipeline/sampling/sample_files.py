"""A sampler's images as one .npz, which OpenAI's evaluator reads: ``arr_0``, uint8 [N, H, W, 3], in the order of ids.

Ten gigabytes are never in one memory. Actors write parts of a thousand images, the driver copies them one after the
other into the .npz and deletes them. The file names the draw that it holds, so that a rerun knows whether it is the
one that it wants.
"""

from __future__ import annotations

import io
import shutil
import zipfile
from typing import Any

import numpy as np

from pipeline import storage
from pipeline.host.errors import Refused, Unfinished
from pipeline.report.names import metric_name

BLOCK = 4 << 20
PART = ".part-"


def file_name(name: str) -> str:
    """The file of a sampler: "DD 2 steps (1, 6)" -> DD_2_steps_1_6.npz."""
    return f"{metric_name(name)}.npz"


def part(uri: str, key: str, item: int) -> str:
    """Where part ``item`` of the draw ``key`` waits to be joined into the .npz at ``uri``."""
    return f"{uri}{PART}{key[:24]}-{item:05d}"


def write_part(uri: str, key: str, item: int, pixels: np.ndarray) -> None:
    """uint8 images [B, 3, H, W]; whoever makes a part again writes the same bytes."""
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(pixels.transpose(0, 2, 3, 1)))
    storage.write_bytes(part(uri, key, item), buffer.getvalue())


def join(uri: str, key: str, items: int) -> None:
    """Make the .npz at ``uri`` out of its parts, which are deleted once it is there, whoever made it."""
    parts = [part(uri, key, item) for item in range(items)]
    if not holds(uri, key):
        try:
            _write(uri, key, parts)
        except FileNotFoundError:  # a second driver may have been faster
            if not holds(uri, key):
                raise
    for place in parts:
        storage.remove(place)


def _write(uri: str, key: str, parts: list[str]) -> None:
    shapes = [_shape(place) for place in parts]
    whole = {"shape": (sum(shape[0] for shape in shapes), *shapes[0][1:]), "fortran_order": False, "descr": "|u1"}
    with storage.replacing(uri) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as images:
            np.lib.format.write_array_header_1_0(images, whole)
            for place in parts:
                with storage.reading(place) as source:
                    header(source)
                    shutil.copyfileobj(source, images, BLOCK)
        with archive.open("key.npy", "w") as name:
            np.save(name, np.array(key))


def holds(uri: str, key: str) -> bool:
    """Whether the .npz at ``uri`` is there and holds the images of the draw ``key``; reads a few of its bytes."""
    if not storage.exists(uri):
        return False
    try:
        with storage.reading(uri) as file, np.load(file, allow_pickle=False) as arrays:
            return "key" in arrays.files and str(arrays["key"]) == key
    except (Refused, Unfinished):
        raise
    except (ValueError, OSError, EOFError, zipfile.BadZipFile):
        return False


def header(file: Any) -> tuple[int, ...]:
    """Shape of an open .npy of uint8 images; leaves ``file`` at the first pixel."""
    version = np.lib.format.read_magic(file)
    reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = reader(file)
    if dtype != np.uint8 or fortran or len(shape) != 4 or shape[3] != 3:
        raise Refused(f"the reference's arr_0 is {dtype} of shape {shape}; it must be uint8 [N, H, W, 3].")
    return shape


def _shape(uri: str) -> tuple[int, ...]:
    with storage.reading(uri) as file:
        return header(file)
