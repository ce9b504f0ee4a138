"""float16 in a teacher's blocks, as the official VAR samples; around them everything stays float32.

What the blocks multiply is float16, weights, keys and values among it. Float32 are the residual stream that the blocks
add to, the norms, the embeddings, what the class does to VAR's blocks, and the output layer, whose logits guidance
would amplify the rounding of. float16 rounds to 11 bits, bfloat16 to 8, but it ends at 65,504: a larger number becomes
infinite, and that is noticed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode

from pipeline.host.errors import Refused


class Float16(nn.Module):
    """Part of a teacher's network, and without effect until ``switch_on``.

    ``met`` [] bool says whether a number left float16's range since the last ``check``. It stays on the device and at
    its place, so CUDA graphs can write it and no AR step waits for it.
    """

    met: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.on = False
        self.register_buffer("met", torch.zeros((), dtype=torch.bool, device="cpu"), persistent=False)

    def switch_on(self, layers: Iterable[nn.Module]) -> None:
        """Keep the weights of ``layers`` in float16: autocast would cast them again in every AR step."""
        for layer in layers:
            layer.to(torch.float16)
        self.on = True

    @contextmanager
    def region(self, device: torch.device) -> Iterator[None]:
        """Where the blocks run. Without autocast's cache, which must not outlive the recording of a CUDA graph."""
        if not self.on:
            yield
        elif device.type != "cpu":
            with torch.autocast(device.type, torch.float16, cache_enabled=False):
                yield
        else:
            with torch.autocast("cpu", torch.float16, cache_enabled=False), OnCpu():
                yield

    def watched(self, x: Tensor) -> Tensor:
        """The residual stream x [B, m, D] after the last block, with 0 for positions that are not finite and are noted.

        Blocks only add to the stream, so it keeps an infinity of any of them, or the NaN that came of it. With 0 the
        generation goes on to its end, where ``check`` names the reason.
        """
        if not self.on:
            return x
        finite = x.isfinite().all(-1, keepdim=True)
        self.met.logical_or_(~finite.all())
        return x.where(finite, 0)

    def watch(self, keys: Tensor) -> None:
        """Note infinite keys [layers, ...], which attention may give no weight, so that nothing else shows them."""
        for layer in keys if self.on else ():
            low, high = layer.aminmax()
            self.met.logical_or_(~(low.isfinite() & high.isfinite()))

    def check(self) -> None:
        """Refused if numbers left the range since the last check; waits for the device. Once per generation."""
        if self.on and self.met.item():
            self.met.zero_()
            raise Refused(
                "teacher.precision is fp16, and in the teacher's blocks a number left float16's range, which ends at"
                " 65,504; set teacher.precision to bf16, tf32 or fp32."
            )


class OnCpu(TorchFunctionMode):
    """Products of float16 numbers through float32, rounded as a GPU rounds them.

    Few CPUs multiply float16: torch's own products there take far longer than in float32.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # A tensor without content costs no time, and what it would take is counted: as float16.
        if func not in (F.linear, F.scaled_dot_product_attention) or isinstance(args[0], FakeTensor):
            return func(*args, **kwargs)
        with torch.autocast("cpu", enabled=False):
            return func(*map(_rounded, args), **{name: _rounded(value) for name, value in kwargs.items()}).half()


def _rounded(value: Any) -> Any:
    """Numbers of a tensor as float16 holds them, in float32; anything else, a mask of bools too, as it is."""
    return value.half().float() if isinstance(value, Tensor) and value.is_floating_point() else value
