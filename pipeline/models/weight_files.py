"""A file of weights as a dictionary of tensors: safetensors, or what ``torch.save`` wrote, before its 1.6 too.

The content decides, not the name: a file of the Hub's cache has none. What is no weight file is called what it is.
"""

from __future__ import annotations

import argparse
import codecs
import json
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from pipeline.host.errors import Refused

KINDS = {  # of safetensors, in the order in which a file has them
    torch.int64: "I64", torch.float64: "F64", torch.float32: "F32", torch.int32: "I32", torch.bfloat16: "BF16",
    torch.float16: "F16", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
NESTED = ("ema", "ema_parameters", "trainer", "model", "var_wo_ddp", "module", "state_dict")
HEAD = 512  # bytes that tell what a file is
ZIP, PICKLE = b"PK\x03\x04", b"\x80"
LEGACY = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the number that torch.save wrote first, before 1.6
HARMLESS: list[Any] = [argparse.Namespace]  # the arguments of a training run, a plain bag of values
TEXTS = {  # beginnings in small letters, after white space
    b"version https://git-lfs": "a Git LFS pointer",
    b"<!doctype": "a web page",
    b"<html": "a web page",
    b"<?xml": "an XML document, as a bucket answers that refuses",
    b"<error": "an XML document, as a bucket answers that refuses",
    b"{": "a JSON document",
    b"[": "a JSON document",
}
BINARIES = {
    b"\x1f\x8b": "compressed by gzip",
    b"BZh": "compressed by bzip2",
    b"\xfd7zXZ": "compressed by xz",
    b"\x28\xb5\x2f\xfd": "compressed by zstd",
    b"7z\xbc\xaf": "a 7z archive",
    b"Rar!": "a RAR archive",
    b"\x89PNG": "a picture",
    b"\xff\xd8\xff": "a picture",
    b"GIF8": "a picture",
    b"RIFF": "a picture, a sound or a film",
    b"%PDF": "a PDF document",
    b"\x93NUMPY": "a numpy array",
    b"PAR1": "a Parquet table",
    b"\x89HDF": "an HDF5 file",
    b"GGUF": "a GGUF file",
    b"SQLite format 3": "an SQLite database",
    b"\x7fELF": "a program",
}


class CheckpointError(Refused):
    """A weight file that cannot be read, or that does not fit the model of the recipe; one sentence."""


def read(path: Path, uri: str, unpickle: bool = False) -> dict[str, Any]:
    """The tensors of a file, with what else stands beside them; memory-mapped where the format allows it.

    ``unpickle`` reads files that hold more than tensors and plain values, which runs code in them. Raises
    CheckpointError, one sentence with the ``uri``, for a file that is none, is damaged or holds no weights.
    """
    with path.open("rb") as file:
        head = file.read(HEAD)
    if not head:
        raise CheckpointError(f"{uri} is empty; fetch it again.")
    check_kind(path, uri)
    if _is_safetensors(head):
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise unreadable(uri, error) from error
    return _inside(_unpickled(path, uri, head, unpickle), uri)


def check_kind(path: Path, uri: str) -> None:
    """CheckpointError for a file that is of another kind, which it names."""
    with path.open("rb") as file:
        head = file.read(HEAD)
    if found := _foreign(head, path):
        raise CheckpointError(f"{uri} is {found}, not weights; fetch the file itself, or check the path.")


def _is_safetensors(head: bytes) -> bool:
    """Whether a file begins as safetensors do: the length of a JSON header, then that header."""
    return head[8:9] == b"{" and 0 < int.from_bytes(head[:8], "little") < 1 << 30


def unreadable(uri: str, error: Exception) -> CheckpointError:
    """What to raise for safetensors that cannot be read."""
    return CheckpointError(f"{uri} is not a readable safetensors file ({error}); fetch or write it again.")


def _foreign(head: bytes, path: Path) -> str:
    """What a file is that neither safetensors nor torch wrote, by how it begins; "" where it may be weights."""
    if _is_safetensors(head):  # first: the number that such a file begins with may look like anything
        return ""
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for start, what in TEXTS.items():
        if text.startswith(start):
            return what
    for start, what in BINARIES.items():
        if head.startswith(start):
            return what
    if head[257:262] == b"ustar":
        return "a tar archive"
    if head.startswith(ZIP):
        return _foreign_zip(path)
    if head.startswith(PICKLE):
        return "" if LEGACY in head[:40] else "a pickle that torch.save did not write"
    return "a text" if _is_text(head) else "a file of unknown kind"


def _foreign_zip(path: Path) -> str:
    """What a zip archive is that torch.save did not write; "" for one that is torch's, or damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return ""
    if any(name.endswith("/constants.pkl") for name in names):
        return "a TorchScript program"
    if any(name.rpartition("/")[2] == "data.pkl" for name in names):
        return ""
    return "numpy's .npz" if names and all(name.endswith(".npy") for name in names) else "a zip archive"


def _is_text(head: bytes) -> bool:
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)  # the last letter may be cut in two
    except UnicodeDecodeError:
        return False
    return b"\0" not in head


def _unpickled(path: Path, uri: str, head: bytes, unpickle: bool) -> Any:
    """What ``torch.load`` makes of a file; CheckpointError where it makes nothing."""
    try:
        with torch.serialization.safe_globals(HARMLESS):
            # Only the archives that torch has written since 1.6 can be mapped.
            return torch.load(path, map_location="cpu", weights_only=not unpickle, mmap=head.startswith(ZIP))
    except Exception as error:  # whatever a damaged pickle makes the unpickler stumble over
        # torch's own sentence about what it does not unpickle stands below a long story about trust.
        lines = str(error).strip().splitlines() or [type(error).__name__]
        first = next((line for line in lines if "Unsupported" in line), lines[0]).strip()[:200]
        more = isinstance(error, pickle.UnpicklingError) and "Unsupported" in first
        if unpickle and isinstance(error, ImportError | AttributeError):
            advice = "it needs code that is not installed here"
        elif more and not unpickle:
            advice = "it holds more than tensors: if you trust it, set teacher.unpickle to true"
        else:
            advice = "it is damaged, fetch it again"
        raise CheckpointError(f"{uri} could not be read as a PyTorch weight file ({first}); {advice}.") from error


def _inside(content: Any, uri: str) -> dict[str, Any]:
    """The innermost dictionary with tensors of what a training run saved, its moving average before its weights."""
    while isinstance(content, dict) and not any(isinstance(value, Tensor) for value in content.values()):
        inside = next((content[key] for key in NESTED if key in content), None)
        if not isinstance(inside, dict):
            raise CheckpointError(f"{uri} holds no weights: its keys are {sorted(map(str, content))[:6]}.")
        content = inside
    if not isinstance(content, dict):
        raise CheckpointError(f"{uri} holds a {type(content).__name__}, not a dictionary of weights.")
    return content


def write_safetensors(file: IO[bytes], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """The bytes of safetensors' own ``save``, one tensor after the other.

    That one holds all weights twice more in memory, which a student of gigabytes has not beside its training.
    """
    order = list(KINDS)
    names = sorted(tensors, key=lambda name: (order.index(tensors[name].dtype), name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in names:
        tensor, begin = tensors[name], end
        end += tensor.numel() * tensor.element_size()
        header[name] = {"dtype": KINDS[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name in names:
        file.write(tensors[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
