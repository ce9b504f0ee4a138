"""The numbers that fix the shape of the LlamaGen nets."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from pipeline.host.errors import Refused
from pipeline.models.base import Layout


@dataclass(frozen=True)
class Config:
    """Shape of tokenizer, teacher and student; the defaults are LlamaGen-B for 256x256 ImageNet.

    L is ``Config(layers=24, heads=16, dim=1024)``, XL is ``Config(layers=36, heads=20, dim=1280)``.

    Attributes:
        layers, heads, dim: of the transformer.
        ffn_multiple: the SwiGLU hidden size is 8/3 dim, rounded up to a multiple of this.
        classes: of the condition; one more row of the table is the null class.
        caption_dim: of the text encoder's features in text-to-image models, 2048 for FLAN-T5-XL; 0 has classes instead.
        caption_length: positions of a caption at most.
        guidance_interval: the official ``cfg_interval``; -1 guides every token, K >= 0 only the first K + 2.
        side: tokens per row and per column.
        vocabulary, code_dim: rows and columns of the codebook.
        channels: of the tokenizer's finest level.
        multipliers: of the channels on every level, finest first; each level but the last halves the size.
        z_channels: between the convolutional nets and the 1x1 convolutions around the codes.
        encoder_blocks, decoder_blocks: residual blocks per level.
        attention: after every residual block of the coarsest level (the middle has one in any case).

    Raises ValueError for numbers that no network can have.
    """

    layers: int = 12
    heads: int = 12
    dim: int = 768
    ffn_multiple: int = 256
    classes: int = 1000
    caption_dim: int = 0
    caption_length: int = 120
    guidance_interval: int = -1
    side: int = 16
    vocabulary: int = 16_384
    code_dim: int = 8
    channels: int = 128
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    z_channels: int = 256
    encoder_blocks: int = 2
    decoder_blocks: int = 3
    attention: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "multipliers", tuple(self.multipliers))  # a list when it comes from YAML
        for name, value in vars(self).items():
            smallest = {"guidance_interval": -1, "attention": 0, "caption_dim": 0}.get(name, 1)
            numbers = value if isinstance(value, tuple) else (value,)
            if not numbers or min(numbers) < smallest:
                raise Refused(f"LlamaGen config {name} is {value}; it must be {smallest} or more.")
        if self.dim % (4 * self.heads):
            raise Refused(
                f"LlamaGen config dim is {self.dim} with {self.heads} heads; rotary positions need a"
                f" multiple of 4 channels per head, so make dim a multiple of {4 * self.heads}."
            )
        if self.channels % 32:
            raise Refused(f"LlamaGen config channels is {self.channels}; GroupNorm needs a multiple of 32.")

    @property
    def caption(self) -> tuple[int, int] | None:
        """Positions and width of the longest captions; None for a network that takes classes."""
        return (self.caption_length, self.caption_dim) if self.caption_dim else None

    @property
    def hidden(self) -> int:
        """Hidden size of the SwiGLU feed-forward."""
        return -(-int(8 * self.dim / 3) // self.ffn_multiple) * self.ffn_multiple

    @cached_property
    def layout(self) -> Layout:
        """One token per AR step, in raster order."""
        return Layout(
            groups=(1,) * self.side**2,
            vocabulary=self.vocabulary,
            code_dim=self.code_dim,
            classes=0 if self.caption_dim else self.classes,
            image_size=self.side * 2 ** (len(self.multipliers) - 1),
        )
