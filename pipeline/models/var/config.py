"""The numbers that fix the shape of the VAR nets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pipeline.host.errors import Refused
from pipeline.models.base import Layout


@dataclass(frozen=True)
class Config:
    """Shape of VAR's tokenizer, transformer and student; ``Config(depth=16)`` is the official d16, 256 px.

    Attributes:
        depth: blocks of the transformer.
        width: channels of the transformer; 0 is the official 64 * depth.
        heads: attention heads; 0 is the official depth.
        mlp_ratio: hidden channels of a feed-forward layer over width.
        shared_aln: one adaptive-norm layer for all blocks instead of one each (only the official d36).
        classes: class labels; the label ``classes`` is the null class of guidance.
        patch_nums: side of every scale's token grid, from 1 up; scale s is AR step s + 1.
        vocabulary: codes, V.
        code_dim: channels of a code, C.
        quant_resi: weight r of the convolution in phi(h) = (1 - r) h + r conv(h).
        share_quant_resi: how many phi the scales share.
        beta: weight of the commitment loss when a tokenizer is trained.
        scale_dropout: share of the images that a tokenizer in training decodes after a random number of scales
            (quantizer dropout, SoundStream, Zeghidour et al. 2021), so that coarse scales say what they can.
        channels: channels of the tokenizer's finest level.
        multipliers: channels of every level over ``channels``, finest first; each level has half the
            resolution of the one before.
        encoder_blocks: residual blocks of an encoder level.
        decoder_blocks: residual blocks of a decoder level.
        attention: whether the tokenizer's coarsest level and its middle have attention.
        prefix_mask: how ``Teacher.generate`` reads a prefix. "causal" is how it was trained; "released" lets
            early scales see later ones, as the released teacher-in-the-loop sampler (Alg. 4) does.
    """

    depth: int = 16
    width: int = 0
    heads: int = 0
    mlp_ratio: int = 4
    shared_aln: bool = False
    classes: int = 1000
    patch_nums: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    vocabulary: int = 4096
    code_dim: int = 32
    quant_resi: float = 0.5
    share_quant_resi: int = 4
    beta: float = 0.25
    scale_dropout: float = 0.0
    channels: int = 160
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    encoder_blocks: int = 2
    decoder_blocks: int = 3
    attention: bool = True
    prefix_mask: Literal["causal", "released"] = "causal"

    def __post_init__(self) -> None:
        for name in ("patch_nums", "multipliers"):  # YAML gives lists
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.depth >= 1:
            object.__setattr__(self, "width", self.width or 64 * self.depth)
            object.__setattr__(self, "heads", self.heads or self.depth)
        for name in ("depth", "heads", "mlp_ratio", "classes", "vocabulary", "code_dim", "encoder_blocks"):
            _check(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; it must be 1 or more")
        _check(self.decoder_blocks >= 1, f"decoder_blocks is {self.decoder_blocks}; it must be 1 or more")
        _check(
            self.width % self.heads == 0,
            f"width {self.width} is not a multiple of heads {self.heads}; change one of them",
        )
        sides = list(self.patch_nums)
        _check(
            len(sides) >= 2 and sides[0] == 1 and sides == sorted(set(sides)),
            f"patch_nums is {sides}; it must be two or more sides that begin with 1 and rise",
        )
        levels = [self.channels * m for m in self.multipliers]
        _check(
            bool(levels) and all(c > 0 and c % 32 == 0 for c in levels),
            f"channels {self.channels} and multipliers {list(self.multipliers)} give levels of {levels}"
            " channels; each must be a multiple of 32, the groups of a GroupNorm",
        )
        _check(0 < self.quant_resi <= 1, f"quant_resi is {self.quant_resi}; it must be above 0 and at most 1")
        _check(0 <= self.scale_dropout < 1, f"scale_dropout is {self.scale_dropout}; it must be at least 0 and below 1")
        _check(
            self.share_quant_resi >= 2,
            f"share_quant_resi is {self.share_quant_resi}; it must be 2 or more, and 4 is official",
        )
        _check(
            self.prefix_mask in ("causal", "released"),
            f"prefix_mask is {self.prefix_mask!r}; it must be causal or released",
        )

    @property
    def image_size(self) -> int:
        """Pixels of an image's side."""
        return self.patch_nums[-1] * 2 ** (len(self.multipliers) - 1)

    @property
    def layout(self) -> Layout:
        groups = tuple(side * side for side in self.patch_nums)
        return Layout(groups, self.vocabulary, self.code_dim, self.classes, self.image_size)


def _check(good: bool, sentence: str) -> None:
    if not good:
        raise Refused(f"teacher.config: {sentence}.")
