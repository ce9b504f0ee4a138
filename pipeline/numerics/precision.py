"""How float32 numbers are multiplied, and where float16 or bfloat16 stand in for them.

fp32 is float32 throughout. tf32 keeps float32 numbers and multiplies them, in products and convolutions alike, as TF32:
ten bits of mantissa instead of 23, on a GPU several times as fast. bf16 is bfloat16 for the network at hand and float32
for all around it. fp16 is for teachers alone: float16 in the blocks of the transformer (``models.float16``). The
switches belong to the whole process, and torch's defaults are neither: on a GPU it rounds the convolutions to TF32 and
leaves the products alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

Precision = Literal["fp32", "tf32", "fp16", "bf16"]
Wanted = Literal[Precision, "auto"]
"""As a recipe says it; auto is bf16 where devices have it in hardware, else fp32, and settled before networks run."""


def set_products(precision: Wanted) -> None:
    """From here on this process multiplies float32 numbers as TF32 with tf32, and in full with the others.

    float16 numbers are multiplied with float32 sums: cuBLAS may else add parts of a product in float16.

    Through torch's older switches: inductor asks one of them, which raises once products were set by the newer alone,
    while these set both.
    """
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


@contextmanager
def products(precision: Precision) -> Iterator[None]:
    """``set_products`` for as long as the context lasts."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    sums = torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction
    try:
        set_products(precision)
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = sums


def switches(device: torch.device) -> tuple[object, ...]:
    """What the process is set to and ``products`` and ``autocast`` change: where it is equal, so are the kernels."""
    multiplied = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    return *multiplied, torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)


@contextmanager
def casting_anew() -> Iterator[None]:
    """Autocast, where it is on, casts weights whenever they are used and keeps no copy: a copy that it keeps is gone
    when it ends, and a CUDA graph would go on reading there.
    """
    before = torch.is_autocast_cache_enabled()
    try:
        torch.set_autocast_cache_enabled(False)
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


@contextmanager
def tuned_convolutions() -> Iterator[None]:
    """cuDNN tries its algorithms for every new shape and keeps the fastest: for decoders, whose shapes are few.

    Not for what draws codes: which algorithm wins may differ between processes, and with it the rounding.
    """
    before = torch.backends.cudnn.benchmark
    try:
        torch.backends.cudnn.benchmark = True
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def emulates_bf16() -> bool:
    """Whether this machine's CPU multiplies bfloat16 without instructions for it: slower than float32, not faster.

    Asked of oneDNN, which is what multiplies; a torch that cannot tell is taken to have them.
    """
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return supported is not None and not supported()


def quick_at_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 in hardware, which is about twice as fast as float32 or more.

    GPUs do since Ampere; CPUs with AVX512-BF16 (AMD since Zen 4, Intel's servers), AMX, or Arm's BF16.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    found = torch.cpu.get_capabilities()
    return any(found.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Matrix products in full float32, whatever is set around: for the search of a code.

    TF32 would change 0.07 to 0.35 % of flow matching's codes, bfloat16 up to 1.9 %.
    """
    switches = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]  # type: ignore[attr-defined]
    before = [(switch, switch.fp32_precision) for switch in switches]
    lowered = [(switch, setting) for switch, setting in before if setting not in ("none", "ieee")]
    try:
        for switch, _ in lowered:
            switch.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for switch, setting in lowered:
            switch.fp32_precision = setting


def autocast(precision: Wanted, device: torch.device | str) -> torch.autocast:
    """bfloat16 autocast with bf16, else none; weights, gradients and optimiser stay float32."""
    assert precision != "auto", "it was to be settled"
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bf16")
