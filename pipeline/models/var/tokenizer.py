"""VAR's multi-scale VQVAE: images to ten grids of codes, coarse to fine, and back.

A scale's codes are upsampled, passed through one of the convolutions phi and added to the feature map f_hat,
which is what the decoder reads. f_hat averaged down to the next scale's grid is what the transformer reads.
Names and order of the modules are those of the official file.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.host.errors import Refused
from pipeline.models import base
from pipeline.models.convnet import Down, FusedAttention, ResBlock, Up, norm, to_map, widths
from pipeline.models.var.config import Config


class Tokenizer(base.TrainableTokenizer):
    """The encoder, the residual quantizer and the decoder."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.layout = config.layout
        self.beta = config.beta
        self.scale_dropout = config.scale_dropout
        self.encoder = VarEncoder(config)
        self.decoder = VarDecoder(config)
        self.quantize = ResidualQuantizer(config)
        self.quant_conv = nn.Conv2d(config.code_dim, config.code_dim, 3, padding=1)
        self.post_quant_conv = nn.Conv2d(config.code_dim, config.code_dim, 3, padding=1)

    @property
    def codebook(self) -> Tensor:
        return self.quantize.embedding.weight

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        return self.quantize.codes(self.features(images))[0]

    def decode(self, embeddings: Tensor) -> Tensor:
        return self.draw(self.quantize.feature_map(embeddings))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The loss is the mean over the scales of |f_hat - sg(f)|^2 + beta |sg(f_hat) - f|^2, f_hat being the map
        after that scale, as VAR trains it.
        """
        f = self.features(images).float()
        codes, maps = self.quantize.codes(f)
        losses = [F.mse_loss(m, f.detach()) + self.beta * F.mse_loss(f, m.detach()) for m in maps]
        return self.draw(self._shown(f, maps)), codes, torch.stack(losses).mean()

    def _shown(self, f: Tensor, maps: list[Tensor]) -> Tensor:
        """What the decoder reads in training, [B, C, side, side]: f_hat, with f's gradient.

        Under ``scale_dropout`` some images are read after fewer scales. The gradient of a coarse f_hat reaches
        only what its grid can say of f.
        """
        if not (self.training and self.scale_dropout):
            return f + (maps[-1] - f).detach()
        count, size = len(f), f.shape[-2:]
        fewer, whole = torch.randint(len(maps) - 1, (count,)), torch.full((count,), len(maps) - 1)
        last = torch.where(torch.rand(count) < self.scale_dropout, fewer, whole)
        at = (last.to(f.device), torch.arange(count, device=f.device))
        sides = self.quantize.sides[:-1]
        coarse = [F.interpolate(F.adaptive_avg_pool2d(f, side), size, mode="bicubic") for side in sides]
        through, f_hat = torch.stack([*coarse, f])[at], torch.stack(maps)[at]
        return through + (f_hat - through).detach()

    @torch.no_grad()
    def searched(self, images: Tensor) -> Tensor:
        f = self.features(images).float()
        _, maps = self.quantize.codes(f)
        rests = [f, *(f - m for m in maps[:-1])]
        seen = [self.quantize.next_input(rest, scale) for scale, rest in enumerate(rests)]
        return torch.cat(seen, dim=1).flatten(0, 1)

    @torch.no_grad()
    def corrupted(self, images: Tensor, rate: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Self-correction (Infinity, Han et al. 2024): a code may be that of another of the images, same position.

        Up to ``rate`` of an image's codes are. Later scales code what is then left, so the right codes mend it.
        """
        rest = self.features(images).float()
        share = rate * torch.rand(len(images), 1, generator=generator)
        seen, right = [], []
        for scale in range(len(self.quantize.sides)):
            found = base.nearest(self.quantize.next_input(rest, scale), self.codebook)
            donors = torch.randint(len(images), found.shape, generator=generator)
            used = found.gather(0, donors).where(torch.rand(found.shape, generator=generator) < share, found)
            rest = rest - self.quantize.contribution(self.quantize.embedding(used), scale)
            seen.append(used)
            right.append(found)
        return torch.cat(seen, dim=1), torch.cat(right, dim=1)

    def features(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> f [B, C, side, side], before quantization."""
        size = self.layout.image_size
        if images.shape[1:] != (3, size, size):
            raise Refused(f"images are {list(images.shape)}; this tokenizer takes [B, 3, {size}, {size}].")
        return self.quant_conv(self.encoder(images))

    def draw(self, quantized: Tensor) -> Tensor:
        """f_hat [B, C, side, side] -> images [B, 3, H, W], not clamped."""
        return self.decoder(self.post_quant_conv(quantized))


class ResidualQuantizer(nn.Module):
    """The codebook, the convolutions phi, and the residual sum over the scales."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.sides = config.patch_nums
        self.ratio = config.quant_resi
        self.phi_of = phi_table(len(self.sides), config.share_quant_resi)
        # Usage counts, in the official file but read by nothing. Not on meta, so that a file may lack it.
        hits = torch.zeros(len(self.sides), config.vocabulary, device="cpu")
        self.register_buffer("ema_vocab_hit_SV", hits)
        self.quant_resi = Shared(config.share_quant_resi, config.code_dim)
        self.embedding = nn.Embedding(config.vocabulary, config.code_dim)

    def phi(self, h: Tensor, scale: int) -> Tensor:
        """(1 - r) h + r conv(h) with the convolution of this scale, h [B, C, side, side]."""
        return torch.lerp(h, self.quant_resi.qresi_ls[self.phi_of[scale]](h), self.ratio)

    def contribution(self, h: Tensor, scale: int) -> Tensor:
        """What scale ``scale`` (from 0) adds to f_hat: h [B, p * p, C] upsampled first, then phi.

        float32 under autocast too: f_hat adds up all scales.
        """
        with torch.autocast(h.device.type, enabled=False):
            grid = to_map(h.float())
            if scale < len(self.sides) - 1:
                grid = F.interpolate(grid, size=(self.sides[-1],) * 2, mode="bicubic")
            return self.phi(grid, scale)

    def next_input(self, f_hat: Tensor, scale: int) -> Tensor:
        """What the transformer reads to draw scale ``scale``: f_hat averaged to its grid, [B, p * p, C]."""
        return F.adaptive_avg_pool2d(f_hat, self.sides[scale]).flatten(2).transpose(1, 2)

    def replay(self, embeddings: Tensor) -> tuple[Tensor | None, list[Tensor]]:
        """Embeddings [B, m, C] of the leading scales -> f_hat after them, inputs of scales 1, 2, ...

        The last input belongs to the scale that comes after the embeddings; none comes after the last scale.
        """
        f_hat, inputs, start = None, [], 0
        for scale, side in enumerate(self.sides):
            if start == embeddings.shape[1]:
                break
            added = self.contribution(embeddings[:, start : start + side * side], scale)
            f_hat = added if f_hat is None else f_hat + added
            start += side * side
            if scale + 1 < len(self.sides):
                inputs.append(self.next_input(f_hat, scale + 1))
        return f_hat, inputs

    def feature_map(self, embeddings: Tensor) -> Tensor:
        """Embeddings [B, n, C] of all scales -> f_hat [B, C, side, side]; differentiable."""
        first, *rest = embeddings.split([side * side for side in self.sides], dim=1)
        f_hat = self.contribution(first, 0)
        for scale, h in enumerate(rest, start=1):
            f_hat = f_hat + self.contribution(h, scale)
        return f_hat

    def codes(self, f: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Features f [B, C, side, side] -> codes [B, n] and f_hat after every scale.

        Each scale codes what the coarser ones left. f_hat is differentiable in codebook and phi, not in f.
        """
        with torch.autocast(f.device.type, enabled=False):
            rest = f.detach().float()
            codes: list[Tensor] = []
            maps: list[Tensor] = []
            for scale in range(len(self.sides)):
                found = base.nearest(self.next_input(rest, scale), self.embedding.weight.detach())
                added = self.contribution(self.embedding(found), scale)
                rest = rest - added.detach()
                codes.append(found)
                maps.append(maps[-1] + added if maps else added)
        return torch.cat(codes, dim=1), maps


def phi_table(scales: int, phis: int) -> list[int]:
    """Which phi each scale uses: the nearest of evenly spaced ticks to s / (S - 1).

    In float64 with numpy, because its rounding settles the ties of real arithmetic. The ticks of 4 phis lie
    elsewhere than those of any other number, as in the official code.
    """
    margin = 1 / 3 / phis if phis == 4 else 1 / 2 / phis
    ticks = np.linspace(margin, 1 - margin, phis)
    return [int(np.argmin(np.abs(ticks - s / (scales - 1)))) for s in range(scales)]


class Shared(nn.Module):
    """The convolutions of phi."""

    def __init__(self, count: int, channels: int) -> None:
        super().__init__()
        self.qresi_ls = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(count))


class VarLevel(nn.Module):
    """One resolution: residual blocks, attention after each at the coarsest, then a change of resolution."""

    def __init__(
        self, inside: int, outside: int, blocks: int, attention: bool, down: bool = False, up: bool = False
    ) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResBlock(outside if j else inside, outside) for j in range(blocks))
        self.attn = nn.ModuleList(FusedAttention(outside) for _ in range(blocks if attention else 0))
        if down:
            self.downsample = Down(outside)
        if up:
            self.upsample = Up(outside)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, inside, H, W] -> [B, outside, H, W], at half or twice the size where the level changes it."""
        for j, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[j](x)
        if hasattr(self, "downsample"):
            return self.downsample(x)
        return self.upsample(x) if hasattr(self, "upsample") else x


class Middle(nn.Module):
    """Two residual blocks around attention, at the coarsest resolution."""

    def __init__(self, channels: int, attention: bool) -> None:
        super().__init__()
        self.block_1 = ResBlock(channels, channels)
        self.attn_1 = FusedAttention(channels) if attention else nn.Identity()
        self.block_2 = ResBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class VarEncoder(nn.Module):
    """Images [B, 3, H, W] -> [B, C, side, side]."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width = widths(config.channels, config.multipliers)
        coarsest = len(width) - 1
        self.conv_in = nn.Conv2d(3, config.channels, 3, padding=1)
        self.down = nn.ModuleList(
            VarLevel(inside, outside, config.encoder_blocks, config.attention and i == coarsest, down=i < coarsest)
            for i, (inside, outside) in enumerate(zip([config.channels, *width[:-1]], width, strict=True))
        )
        self.mid = Middle(width[-1], config.attention)
        self.norm_out = norm(width[-1])
        self.conv_out = nn.Conv2d(width[-1], config.code_dim, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class VarDecoder(nn.Module):
    """[B, C, side, side] -> images [B, 3, H, W]; ``up`` is indexed by level, so it runs from its end."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width = widths(config.channels, config.multipliers)
        coarsest = len(width) - 1
        self.conv_in = nn.Conv2d(config.code_dim, width[-1], 3, padding=1)
        self.mid = Middle(width[-1], config.attention)
        self.up = nn.ModuleList(
            VarLevel(inside, outside, config.decoder_blocks, config.attention and i == coarsest, up=i > 0)
            for i, (inside, outside) in enumerate(zip([*width[1:], width[-1]], width, strict=True))
        )
        self.norm_out = norm(width[0])
        self.conv_out = nn.Conv2d(width[0], 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.conv_in(x))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))
