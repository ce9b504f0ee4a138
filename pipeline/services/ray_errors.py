"""What Ray raises, as one of our errors with one sentence; and which errors leave a process of no use."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from pipeline.host.errors import Refused, Unfinished

OURS = (Refused, Unfinished)
FROM_RAY = ("RayError", "RayTrainError", "ExecutionTimeoutError")  # families without a common ancestor
GOES_ON = "what is finished is kept, and the same command goes on"
# Of a device whose context is lost for this process: whatever it does next on it fails, too.
LOST = re.compile(
    r"CUDA error|CUDA driver error|HIP error|cuBLAS|CUBLAS_STATUS|cuDNN|CUDNN_STATUS|cuSOLVER|CUSOLVER_STATUS|cuFFT"
    r"|NCCL|device-side assert|illegal memory access|uncorrectable ECC|unspecified launch failure|Xid",
    re.IGNORECASE,
)
PLACE = re.compile(r'File "([^"]+)", line (\d+)')  # in a traceback
NOTE = re.compile(r"\nFailed to .* attempts \(total backoff.*", re.DOTALL)  # that Ray Data appends to any message
LONGEST = 600  # characters of what a worker raised
FULL = re.compile("out of memory", re.IGNORECASE)


class Lost(Unfinished):
    """A worker raised something that is no sentence of ours, or is gone; ``reason`` says what, and where."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"a worker failed: {reason}; {GOES_ON}.")
        self.reason = reason


def device_error(error: BaseException) -> bool:
    """Whether the process has lost its device's context, and with it all later work; out of memory is none."""
    import torch

    if isinstance(error, torch.OutOfMemoryError) or FULL.search(str(error)):
        return False
    return isinstance(error, torch.AcceleratorError) or (
        isinstance(error, RuntimeError) and bool(LOST.search(str(error)))
    )


def end_process(error: BaseException) -> NoReturn:
    """End this worker's process, so that Ray starts another with a sound device and gives it the same work again."""
    print(f"This process ends, its device is lost: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
    os._exit(1)


@contextmanager
def translated() -> Iterator[None]:
    """What Ray raises in the body, as ``translation`` has it."""
    try:
        yield
    except Exception as error:
        if not is_ray(error):
            raise
        raise translation(error) from None


def is_ray(error: BaseException) -> bool:
    """Whether Ray raised it, on its own behalf or on a worker's."""
    return any(kind.__name__ in FROM_RAY for kind in type(error).__mro__)


def translation(error: BaseException) -> Refused | Unfinished:
    """A worker's own Refused or Unfinished; else Lost, which names what was raised, and where."""
    root, text = _root(error)
    if root.args and isinstance(root.args[0], str):
        root.args = (NOTE.sub("", root.args[0]), *root.args[1:])
    if isinstance(root, OURS):
        return root
    said, place = _raised(root, text)
    kind, _, sentence = said.partition(": ")
    if ours := _kind(kind):
        return ours(sentence)
    return Lost(f"{said[:LONGEST]}{place}")


def _root(error: BaseException) -> tuple[BaseException, str]:
    """(what a worker raised, the text that has its traceback) of what Ray made of it."""
    failures = getattr(error, "worker_failures", None)  # Ray Train's, by rank
    if failures:
        roots = [_root(failure) for failure in failures.values()]
        return next((found for found in roots if isinstance(found[0], OURS)), roots[0])
    for name in ("controller_failure", "_base_exc", "cause"):  # Ray Train's, its wrapper's, a task's
        inner = getattr(error, name, None)
        if isinstance(inner, BaseException) and inner is not error:
            root, text = _root(inner)
            return root, text if PLACE.search(text) else str(error)
    return error, str(error)


def _raised(root: BaseException, text: str) -> tuple[str, str]:
    """("ValueError: what it says", " (file.py:12)"); the place is the last one in our code, empty where none is known.

    A constructor's error is known by the text alone: Ray keeps no more of it.
    """
    places = PLACE.findall(text)
    ours = [place for place in places if "/pipeline/" in place[0]] or places
    place = f" ({Path(ours[-1][0]).name}:{ours[-1][1]})" if ours else ""
    if places and is_ray(root):
        after = text[text.rindex(f'File "{places[-1][0]}", line {places[-1][1]}') :].splitlines()[1:]
        said = [line for line in after if line.strip() and not line.startswith("    ")]
    else:
        lines = str(root).splitlines()
        said = [f"{type(root).__name__}:", *(line for line in lines if line.strip() and not line.startswith("\t"))]
    return " ".join(" ".join(said).split()), place


def _kind(name: str) -> type[Refused] | type[Unfinished] | None:
    """The class of ours that a traceback calls ``name``."""
    module, _, kind = name.rpartition(".")
    found = getattr(sys.modules.get(module), kind, None)
    return found if isinstance(found, type) and issubclass(found, OURS) else None
