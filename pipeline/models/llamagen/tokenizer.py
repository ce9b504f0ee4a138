"""LlamaGen's VQ tokenizer (arXiv 2406.06525): one token per cell of a grid.

Attribute names and their order are those of the official files (``vq_ds16_c2i.pt``).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.host.errors import Refused
from pipeline.models import base
from pipeline.models.convnet import Down, ResBlock, SplitAttention, Up, norm, to_map, widths
from pipeline.models.llamagen.config import Config

COMMITMENT = 0.25
USAGE_WINDOW = 65_536  # length of the official usage statistics, whatever the vocabulary


class GridLevel(nn.Module):
    """Residual blocks of one resolution, each followed by attention where ``attention`` is set."""

    def __init__(self, inside: int, outside: int, blocks: int, attention: bool) -> None:
        super().__init__()
        self.res = nn.ModuleList(ResBlock(outside if j else inside, outside) for j in range(blocks))
        self.attn = nn.ModuleList(SplitAttention(outside) for _ in range(blocks if attention else 0))

    def forward(self, x: Tensor) -> Tensor:
        for j, block in enumerate(self.res):
            x = block(x)
            if self.attn:
                x = self.attn[j](x)
        return x


class DownLevel(GridLevel):
    def __init__(self, inside: int, outside: int, blocks: int, attention: bool, last: bool) -> None:
        super().__init__(inside, outside, blocks, attention)
        self.downsample = nn.Identity() if last else Down(outside)

    def forward(self, x: Tensor) -> Tensor:
        return self.downsample(super().forward(x))


class UpLevel(GridLevel):
    def __init__(self, inside: int, outside: int, blocks: int, attention: bool, last: bool) -> None:
        super().__init__(inside, outside, blocks, attention)
        self.upsample = nn.Identity() if last else Up(outside)

    def forward(self, x: Tensor) -> Tensor:
        return self.upsample(super().forward(x))


def _middle(width: int) -> nn.Sequential:
    return nn.Sequential(ResBlock(width, width), SplitAttention(width), ResBlock(width, width))


class GridEncoder(nn.Module):
    """Images [B, 3, H, W] -> features [B, z, side, side]."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width = widths(config.channels, config.multipliers)
        before = [config.channels, *width[:-1]]
        last = len(width) - 1
        self.conv_in = nn.Conv2d(3, before[0], 3, padding=1)
        self.conv_blocks = nn.Sequential(
            *(
                DownLevel(before[i], width[i], config.encoder_blocks, config.attention and i == last, i == last)
                for i in range(len(width))
            )
        )
        self.mid = _middle(width[-1])
        self.norm_out = norm(width[-1])
        self.conv_out = nn.Conv2d(width[-1], config.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.mid(self.conv_blocks(self.conv_in(x)))
        return self.conv_out(F.silu(self.norm_out(h)))


class GridDecoder(nn.Module):
    """Features [B, z, side, side] -> images [B, 3, H, W]; ``conv_blocks`` runs from coarse to fine."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width = widths(config.channels, config.multipliers)[::-1]
        before = [width[0], *width[:-1]]
        last = len(width) - 1
        self.conv_in = nn.Conv2d(config.z_channels, width[0], 3, padding=1)
        self.mid = _middle(width[0])
        self.conv_blocks = nn.Sequential(
            *(
                UpLevel(before[k], width[k], config.decoder_blocks, config.attention and k == 0, k == last)
                for k in range(len(width))
            )
        )
        self.norm_out = norm(width[-1])
        self.conv_out = nn.Conv2d(width[-1], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.conv_blocks(self.mid(self.conv_in(z)))
        return self.conv_out(F.silu(self.norm_out(h)))


class GridQuantizer(nn.Module):
    """The codebook before normalisation, and the official usage statistics, which nothing here uses."""

    codebook_used: Tensor

    def __init__(self, vocabulary: int, code_dim: int) -> None:
        super().__init__()
        self.register_buffer("codebook_used", torch.zeros(USAGE_WINDOW, device="cpu"))
        self.embedding = nn.Embedding(vocabulary, code_dim)
        nn.init.uniform_(self.embedding.weight, -1 / vocabulary, 1 / vocabulary)


class Tokenizer(base.TrainableTokenizer):
    """VQ tokenizer with an l2-normalised codebook: images in [-1, 1] <-> codes in raster order."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.layout = config.layout
        self.encoder = GridEncoder(config)
        self.decoder = GridDecoder(config)
        self.quantize = GridQuantizer(config.vocabulary, config.code_dim)
        self.quant_conv = nn.Conv2d(config.z_channels, config.code_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.code_dim, config.z_channels, 1)

    @property
    def codebook(self) -> Tensor:
        """Codes [V, C] of length 1, the normalised rows of the stored table; differentiable."""
        return F.normalize(self.quantize.embedding.weight, dim=-1)

    def features(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> vectors [B, n, C] of length 1, to be replaced by their nearest codes."""
        size = self.layout.image_size
        if images.shape[1:] != (3, size, size):
            raise Refused(f"the tokenizer got images of shape {list(images.shape)}; it takes [B, 3, {size}, {size}].")
        z = self.quant_conv(self.encoder(images))
        return F.normalize(z.flatten(2).transpose(1, 2), dim=-1)

    def encode(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] float32 in [-1, 1] -> codes [B, n] int64; ValueError for another size."""
        return base.nearest(self.features(images), self.codebook)

    def decode(self, embeddings: Tensor) -> Tensor:
        return self.draw(to_map(embeddings))

    @torch.no_grad()
    def searched(self, images: Tensor) -> Tensor:
        return self.features(images).flatten(0, 1)

    def draw(self, quantized: Tensor) -> Tensor:
        """The decoder alone: feature map [B, C, side, side] -> images [B, 3, H, W], not clamped."""
        return self.decoder(self.post_quant_conv(quantized))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The loss is the official one, code + 0.25 commitment; its entropy term has weight 0 in all official
        trainings and is left out.
        """
        z, codebook = self.features(images), self.codebook
        codes = base.nearest(z.detach(), codebook.detach())
        chosen = codebook[codes]
        loss = F.mse_loss(chosen, z.detach()) + COMMITMENT * F.mse_loss(z, chosen.detach())
        return self.draw(to_map(z + (chosen - z).detach())), codes, loss
