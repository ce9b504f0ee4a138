"""CUDA graphs: what the GPU does in an AR step, a jump or in decoding is recorded once, then replayed by one launch.

A step of LlamaGen is hundreds of small kernels, and launching them takes longer than running them. Every AR step has a
graph of its own, so lengths are exact and the kernels are those of eager execution. A graph repeats kernels and
addresses, never Python: what differs between two generations must be copied to where the graph reads it. That is a
step's input, done here, and whatever of the condition outlives a step, done by the family in the ``memory`` that it
keeps with the recording. A student's jump and decoding are functions of tensors alone, whose inputs are all copied.
Weights must stay where they are, precision switches as they are, and the cache of autocast off.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from pipeline.numerics.precision import casting_anew, switches

Step = Callable[[int, Tensor], Tensor]
"""(AR step t from 1, its input) -> log-probabilities [B, g, V] float32. Twice in a row is as good as once."""

Capture = Callable[[Callable[[], object]], Callable[[], None]]
"""Records what a function does on the device; returns what does that again, on the same memory."""


def eagerly(t: int, step: Step, given: Tensor) -> Tensor:
    """What a ``Recording`` does, without one."""
    return step(t, given)


class Cuda:
    """``Capture`` by torch.cuda.CUDAGraph. All graphs share one memory pool: they are never replayed side by side, and
    none leaves in it what another needs.
    """

    def __init__(self) -> None:
        self.pool, self.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()

    def __call__(self, function: Callable[[], object]) -> Callable[[], None]:
        # Once before the capture and on another stream, as torch demands: libraries set themselves up and
        # torch.compile makes kernels at the first call, and neither may happen in a capture.
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            function()
        torch.cuda.current_stream().wait_stream(self.stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
            function()
        return graph.replay


class Recording:
    """The AR steps of one teacher at one batch size, each recorded when it is drawn for the first time.

    ``shapes`` are those of what the steps return. ``memory`` is the family's: tensors that the steps read and write
    beside their input, and that later generations use again.
    """

    def __init__(self, capture: Capture, memory: Any, shapes: Sequence[tuple[int, ...]], device: torch.device) -> None:
        self.capture, self.memory, self.shapes = capture, memory, shapes
        self.room = torch.empty(max(map(math.prod, shapes)), device=device)
        self.steps: dict[int, tuple[Tensor, Tensor, Callable[[], None]]] = {}

    def __call__(self, t: int, step: Step, given: Tensor) -> Tensor:
        """``step(t, given)`` as a tensor of its own; from the second time on ``step`` is not called any more."""
        if t not in self.steps:
            mine, shape = given.clone(), self.shapes[t - 1]
            out = self.room[: math.prod(shape)].view(shape)
            self.steps[t] = mine, out, self.capture(lambda: out.copy_(step(t, mine)))
        mine, out, replay = self.steps[t]
        mine.copy_(given)
        replay()
        return out.clone()  # the next step writes to the same room


class Graphs:
    """The recording of a teacher, if there is one: of a batch size, and of so many positions of captions, that came
    twice in a row.

    So the first generation runs eagerly, which warms up, and a last, smaller batch now and then neither costs a
    recording nor loses the one there is. Only one is kept: its cache and its graphs fill the memory of a full batch.
    ``on`` is the type of the devices that ``backend`` records on; elsewhere a teacher draws eagerly.
    """

    def __init__(self, backend: Callable[[], Capture] = Cuda, on: str = "cuda") -> None:
        self.backend, self.on = backend, on
        self.recording: Recording | None = None
        self.recorded: Hashable = None
        self.last: Hashable = None

    def find(self, kind: Hashable, begin: Callable[[Capture], Recording]) -> Recording | None:
        """The recording for generations of this ``kind``, begun here where it is time; None says: run eagerly.

        ``kind`` names the batch and all else that shapes a step and is no tensor.
        """
        again, self.last = kind == self.last, kind
        if kind == self.recorded:
            return self.recording
        if not again:
            return None
        self.recording = self.recorded = None  # free its memory before the next one takes as much
        self.recording, self.recorded = begin(self.backend()), kind
        return self.recording


class Replay:
    """One recorded call: ``given`` are the tensors that it reads, ``out`` the one that it writes."""

    def __init__(
        self, capture: Capture, function: Callable[..., Tensor], given: Sequence[Tensor], returned: Tensor
    ) -> None:
        """``returned``, which may be on the meta device, has the form of what ``function`` returns."""
        self.given = [tensor.clone() for tensor in given]
        self.out = torch.empty_like(returned, device=self.given[0].device)
        with casting_anew():
            self.replay = capture(lambda: self.out.copy_(function(*self.given)))

    def __call__(self, *given: Tensor) -> Tensor:
        """``function(*given)`` as a tensor of its own."""
        for mine, new in zip(self.given, given, strict=True):
            mine.copy_(new)
        self.replay()
        return self.out.clone()


class Replays:
    """A function of tensors that is called again and again: replayed where tensors of the same shapes come again.

    What it depends on beside tensors is a call's ``part``, such as the AR step that a student jumps from, and the
    switches of precision. Each part has a graph of its own, recorded when it comes for the second time and no call of
    other shapes came between: so every part runs eagerly once, which warms up, and a last, smaller batch now and then
    neither costs a recording nor loses the ones there are. Graphs of one set of shapes are kept, in one memory pool;
    ``on`` is as in ``Graphs``.
    """

    def __init__(self, backend: Callable[[], Capture] = Cuda, on: str = "cuda") -> None:
        self.backend, self.on = backend, on
        self.kept: dict[Hashable, Replay] = {}
        self.capture: Capture | None = None  # of all that are kept
        self.recorded: Hashable = None
        self.last: Hashable = None
        self.returned: dict[Hashable, Tensor] = {}  # without content, of each part since other shapes came

    def __call__(self, part: Hashable, function: Callable[..., Tensor], *given: Tensor) -> Tensor:
        """``function(*given)``, a tensor of its own; no gradient flows through a replay.

        ``given`` are one tensor or more, and all that differs between two calls of one ``part``.
        """
        device = given[0].device
        if device.type != self.on:
            return function(*given)
        shapes = tuple((tuple(tensor.shape), tensor.dtype) for tensor in given)
        part = (part, switches(device))
        if shapes != self.last:
            self.last, self.returned = shapes, {}
        if shapes == self.recorded and part in self.kept:
            return self.kept[part](*given)
        if part not in self.returned:
            out = function(*given)
            self.returned[part] = torch.empty_like(out, device="meta")
            return out
        if self.capture is None or shapes != self.recorded:
            self.kept, self.capture = {}, None  # free their memory before the next ones take as much
            self.capture, self.recorded = self.backend(), shapes
        self.kept[part] = Replay(self.capture, function, given, self.returned[part])
        return self.kept[part](*given)
