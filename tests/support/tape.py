"""A CUDA graph without CUDA: replays torch's own operations as they were recorded, on the memory of the recording.

As on a GPU, no Python runs in a replay and every number in it is that of the recording. What a GPU would have
overwritten meanwhile is filled with NaN before a replay, integers with numbers out of range: the intermediate results
of all tapes, which share a pool, and whatever tensor from outside nobody holds any more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Tapes:
    """A ``graphs.Capture``. ``holder`` is the object whose tensors are still there when a tape is replayed."""

    def __init__(self, holder: Any) -> None:
        self.holder, self.tapes = holder, []

    def __call__(self, function: Callable[[], object]) -> Callable[[], None]:
        tape = Tape()
        function()  # warms up, as on a GPU
        with tape:
            function()
        self.tapes.append(tape)

        def replay() -> None:
            alive = {key(tensor) for tensor in held(self.holder, set())}
            for other in self.tapes:
                other.spoil(alive)
            tape.replay()

        return replay


class Tape(TorchDispatchMode):
    """The operations of one function, with the very tensors that they read and wrote."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor]]] = []
        self.inside: dict[int, Tensor] = {}  # first tensor on each piece of memory: made here
        self.outside: dict[int, Tensor] = {}  # and found here

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given, kwargs = tensors((args, kwargs)), kwargs or {}
        for tensor in given:
            if key(tensor) not in self.inside:
                self.outside.setdefault(key(tensor), tensor)
        out = func(*args, **kwargs)
        for tensor in tensors(out):
            if key(tensor) not in self.outside:
                self.inside.setdefault(key(tensor), tensor)
        self.operations.append((func, args, kwargs, tensors(out)))
        return out

    def spoil(self, alive: set[int]) -> None:
        """Overwrite what was made here, and what was found here and is not ``alive``."""
        for tensor in [*self.inside.values(), *(t for k, t in self.outside.items() if k not in alive)]:
            whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
            whole.fill_(torch.nan if tensor.is_floating_point() else 1 if tensor.dtype == torch.bool else 10**6)

    def replay(self) -> None:
        with torch.autocast("cpu", enabled=False):  # what it cast is on the tape as cast, and nothing is cast again
            for func, args, kwargs, before in self.operations:
                for old, new in zip(before, tensors(func(*args, **kwargs)), strict=True):
                    if key(old) != key(new):  # else a view, or written in place
                        old.copy_(new)


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def key(tensor: Tensor) -> int:
    """Of the memory that the tensor is a view of."""
    return tensor.untyped_storage()._cdata


def held(thing: Any, seen: set[int]) -> Iterator[Tensor]:
    """All tensors that can be reached from an object, but for those inside of functions."""
    if id(thing) in seen or isinstance(thing, (str, bytes, int, float, type(None), Tapes)):
        return
    seen.add(id(thing))
    if isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, dict):
        for value in thing.values():
            yield from held(value, seen)
    elif isinstance(thing, (list, tuple, set)):
        for value in thing:
            yield from held(value, seen)
    elif isinstance(thing, nn.Module) or type(thing).__module__.startswith("pipeline."):
        yield from held(vars(thing), seen)
