"""Memory that a piece of work takes, found by running it on tensors that have shapes and no content.

torch's FakeTensorMode executes the very code of a job, optimiser included, and allocates nothing, so a laptop can say
what a network of any size needs. A ``Meter`` adds up the storages that are alive at each moment.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CARDS = (24, 40, 80, 141)  # GB of common GPUs: RTX 4090 or L4, A100, H100, H200
RUNTIME = 1.5e9  # bytes for the CUDA context and the libraries' workspaces
SLACK = 1.15  # a GPU's autocast keeps a little more than the CPU's, whose kernels are traced, and memory fragments
# Bytes of the driver's for one of ``Nodes`` in a CUDA graph, which are in no allocator of torch's. Not measured here:
# vLLM counted 0.62 GiB for the 35 graphs of a Llama of 80 layers (its pull request 5515, CUDA 12), about 34,000 kernels
# at a dozen a layer, so at most 20 kB a kernel; with CUDA 11 it was 64 kB (forums.developer.nvidia.com, thread 244901).
# Counted are a CPU's operations: a GPU's RMS norm is one kernel, not five, which leaves 550 of LlamaGen-L's 746 a step.
NODE = 15_000
M = TypeVar("M", bound=nn.Module)
SIZES = (4, 16)  # samples of the two runs that a line is drawn through; with fewer, an optimiser may need the most


@dataclass(frozen=True)
class Footprint:
    """Bytes: ``fixed`` whatever the batch, and ``sample`` more for every sample in it."""

    fixed: int
    sample: int

    def bytes(self, batch: int) -> int:
        """At the moment of most memory, on a GPU, for so many samples at once."""
        return round(RUNTIME + SLACK * (self.fixed + self.sample * batch))

    def largest(self, card: float) -> int:
        """Most samples at once on a card of so many GB; 0 if not even one fits."""
        return max(0, int((card * 1e9 - RUNTIME - SLACK * self.fixed) // (SLACK * self.sample)))

    def lines(self, batch: int | None, field: str, gpu: bool) -> list[str]:
        """For a plan: the two parts, their sum at ``batch``, which the recipe's ``field`` sets, and what cards hold.

        ``batch`` is None where the card says how large it is.
        """
        parts = f"{self.fixed / 1e9:,.2f} GB and {self.sample / 1e6:,.1f} MB a sample"
        if not gpu:
            total = "" if batch is None else f"{(self.fixed + self.sample * batch) / 1e9:,.2f} GB at {batch} samples, "
            return [f"memory       {parts}: {total}in a process, beside Python and its libraries"]
        total = "" if batch is None else f": about {self.bytes(batch) / 1e9:,.1f} GB of a GPU at {batch} samples"
        cards = ", ".join(f"{self.largest(card)} on {card} GB" for card in CARDS)
        return [
            f"memory       {parts}{total}",
            f"fits         {field} of at most {cards}",
        ]


class Meter(TorchDispatchMode):
    """Bytes of the storages that operations made and that are still alive; ``peak`` is the most there were.

    Views share a storage, and it counts once. ``square`` is a sequence length: attention matrices [.., square, square]
    are left out, because the fused kernels of a GPU never write them down.
    """

    def __init__(self, square: int = 0) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.square = square
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, Tensor):
                self._add(value)
        self.peak = max(self.peak, self.live)
        return out

    def _add(self, tensor: Tensor) -> None:
        storage, key = tensor.untyped_storage(), _storage(tensor)
        if key in self.known or (self.square and tuple(tensor.shape[-2:]) == (self.square, self.square)):
            return
        self.known.add(key)
        self.live += storage.nbytes()
        weakref.finalize(storage, self._remove, key, storage.nbytes())

    def _remove(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


class Nodes(TorchDispatchMode):
    """``count`` is that of the operations that write memory, so about the nodes of a CUDA graph of them."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {_storage(value) for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)}
        made = {_storage(value) for value in tree_leaves(out) if isinstance(value, Tensor)}
        empty = func.overloadpacket.__name__ in ("empty", "empty_like", "new_empty", "empty_strided")
        self.count += func._schema.is_mutable or not (empty or made <= given)
        return out


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def hollow(module: M) -> M:
    """Give a module that was built on the meta device parameters and buffers on the CPU; for use inside ``work``."""
    for part in module.modules():
        for name, weight in list(part.named_parameters(recurse=False)):
            setattr(part, name, nn.Parameter(torch.empty(weight.shape, dtype=weight.dtype), weight.requires_grad))
        for name, constant in list(part.named_buffers(recurse=False)):
            setattr(part, name, torch.empty(constant.shape, dtype=constant.dtype))
    return module


def trace(work: Callable[[int], None], square: int = 0) -> Footprint:
    """The footprint of ``work(samples)``, which must make all that it needs itself, on the CPU.

    ``work`` may not look at the content of a tensor. ``square`` as in ``Meter``: 0 counts what a CPU needs.
    """
    peaks = [peak(work, size, square) for size in SIZES]
    sample = (peaks[1] - peaks[0]) / (SIZES[1] - SIZES[0])
    return Footprint(round(peaks[0] - SIZES[0] * sample), round(sample))


def peak(work: Callable[[int], None], samples: int, square: int = 0) -> int:
    """Bytes at the moment of most memory of ``work(samples)``, which, like ``square``, is as ``trace`` wants it."""
    with warnings.catch_warnings(), FakeTensorMode(allow_non_fake_inputs=True), Meter(square) as meter:
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")  # copy.deepcopy asks
        work(samples)
    return meter.peak
