"""Weights as closed formulas, so that no download and no library version matters: networks that mean nothing, in their
real shapes.

    u(key, i) = 2 frac(gain(key) sin(13301/1024 i + phase(key))) - 1      in [-1, 1), float64
    phase = crc32(key) mod 1000,    gain = 43758.546875 + (crc32(key) // 1000) mod 1000

A tensor of a state_dict is u(salt + name, 0, 1, ...) * scale + offset in float32: ``scale_and_offset``.
u has mean 0 and variance 1/3, so sqrt(3 / fan_in) keeps the variance of what flows through a layer. The golden figures
of the tests are of these weights.
"""

from __future__ import annotations

import math
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from pipeline import storage
from pipeline.models import checkpoints
from pipeline.settings.teacher import TeacherSettings

CONSTANTS = {  # what a constructor computes is never overwritten
    "zero_k_bias", "lvl_1L", "attn_bias_for_masking", "ema_vocab_hit_SV", "codebook_used",
    "freqs_cis", "causal_mask", "k_cache", "v_cache", "noise_mask",
}  # fmt: skip
BIASES = {"bias", "q_bias", "v_bias"}
TABLES = (  # lookup tables; for the student of LlamaGen tok_embeddings is a linear layer and still counts
    "quantize.embedding.weight", "class_emb.weight", "lvl_embed.weight", "n_d_embed.weight",
    "tok_embeddings.weight", "embedding_table.weight", "uncond_embedding", "pos_start", "pos_1LC",
)  # fmt: skip
MODULATIONS = {"ada_gss", "scale_shift_table"}


def unit(key: str, count: int) -> np.ndarray:
    """u(key, 0 .. count - 1), float64."""
    checksum = zlib.crc32(key.encode())
    gain, phase = 43758.546875 + checksum // 1000 % 1000, checksum % 1000
    out = np.empty(count)
    for start in range(0, count, 1 << 20):  # real checkpoints have tensors of 10^8 elements
        i = np.arange(start, min(start + (1 << 20), count), dtype=np.float64)
        y = gain * np.sin(i * (13301 / 1024) + phase)
        out[start : start + len(i)] = 2 * (y - np.floor(y)) - 1
    return out


def scale_and_offset(name: str, shape: tuple[int, ...]) -> tuple[float, float] | None:
    """(scale, offset) of one entry of a state_dict; None for a constant, which stays as it was built."""
    leaf = name.split(".")[-1]
    fan_in = max(1, math.prod(shape[1:])) if shape else 1
    if leaf in CONSTANTS:
        return None
    if leaf == "scale_mul_1H11":
        return 0.5, 1.4
    if leaf == "weight" and len(shape) == 1:  # the gain of a norm
        return 0.1, 1.0
    if leaf in BIASES:
        return 0.1, 0.0
    if name.endswith(TABLES):
        return 1.0, 0.0
    if leaf in MODULATIONS:
        return 0.5, 0.0
    scale = math.sqrt(3 / fan_in)
    if f".{name}".endswith((".head.weight", ".output.weight")):  # logits with a spread of 3
        return 3 * scale, 0.0
    if name.endswith("decoder.conv_out.weight"):  # images that seldom leave [-1, 1]
        return 0.5 * scale, 0.0
    return scale, 0.0


def filled(module: nn.Module, salt: str) -> dict[str, Tensor]:
    """The value of every tensor of the state_dict but the constants, float32; the module may be on the meta device."""
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    named = [(name, shape, rule) for name, shape in shapes.items() if (rule := scale_and_offset(name, shape))]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # NumPy's loops let the other threads run
        values = pool.map(lambda one: _value(one[0], one[1], one[2], salt), named)
        return {name: value for (name, _, _), value in zip(named, values, strict=True)}


def _value(name: str, shape: tuple[int, ...], rule: tuple[float, float], salt: str) -> Tensor:
    value = (unit(salt + name, math.prod(shape)) * rule[0] + rule[1]).astype(np.float32)
    if name.endswith("blocks.0.attn.scale_mul_1H11"):
        value[0] = 5.0  # above log(100), where the official code clamps
    return torch.from_numpy(value).view(shape)


def write(settings: TeacherSettings, folder: Path) -> dict[str, str]:
    """Files with the weights of both networks of a recipe's teacher in ``folder``, unless they are there already.

    Returns their paths under the names of the recipe's fields, "tokenizer" and "checkpoint". Raises Refused or
    Unfinished, one sentence, for a folder that cannot be written.
    """
    with torch.device("meta"):
        teacher = checkpoints.family(settings).Teacher(checkpoints.config(settings), settings.filter)
    out = {}
    for field, module in (("tokenizer", teacher.tokenizer), ("checkpoint", teacher.network)):
        out[field] = str(folder / f"{field}.safetensors")
        if not storage.exists(out[field]):  # a file is whole or not there at all
            checkpoints.save(filled(module, f"{field}/"), out[field], {})
    return out
