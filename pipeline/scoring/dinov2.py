"""The DINOv2 network behind FD-DINOv2: Meta's ViT-L/14 as torch-fidelity's "dinov2-vit-l-14" uses it.

Its flavour: TensorFlow 1's bilinear resize to 224 pixels, ImageNet's mean and deviation, and the 1,024 features of the
class token after the last normalisation, without a head. torch-fidelity takes network and weights from torch.hub at
run time. Here the body is transformers', and the weights are Meta's file ``dinov2_vitl14_pretrain.pth`` under their own
names. Its positions are a grid of 37 x 37, for 518 pixels. Meta's code interpolates them to 16 x 16 at every call,
bicubically by the factor 16.1 / 37; that is done once here, since transformers' own factor is another.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline import storage
from pipeline.host.errors import Missing, Refused
from pipeline.settings.evaluate import FORMULA

FILE = "dinov2_vitl14_pretrain.pth"
SIDE, PATCH = 224, 14  # pixels that the body sees across, and those of a patch
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's channels, on a scale of 1
FLAVOUR = (
    "DINOv2 ViT-L/14 after TensorFlow 1's bilinear resize to 224 pixels and ImageNet's mean and deviation, the 1,024"
    " features of the class token (torch-fidelity's dinov2-vit-l-14)"
)
OFFSET = 0.1  # that Meta's code adds to the wanted side before it takes the factor of interpolation


@dataclass(frozen=True)
class Shape:
    """A vision transformer of Meta's: features, blocks, heads, and positions across."""

    width: int
    depth: int
    heads: int
    positions: int


VIT_L = Shape(1024, 24, 16, 37)
FEATURES = VIT_L.width


class DinoV2(nn.Module):
    """uint8 images [B, 3, H, W] -> features float32 [B, 1024].

    ``weights`` are tensors under Meta's names, which must be all of ``shape`` and no others.
    """

    def __init__(self, weights: Mapping[str, Tensor], shape: Shape = VIT_L) -> None:
        super().__init__()
        self.body = _blank(shape)
        self.body.load_state_dict(_renamed(weights, shape), assign=True)
        self.requires_grad_(False).eval()

    def forward(self, pixels: Tensor) -> Tensor:
        """The class token's features: what the class says."""
        from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

        resized = interpolate_bilinear_2d_like_tensorflow1x(pixels.float(), size=(SIDE, SIDE), align_corners=False)
        mean, deviation = (255 * torch.tensor(values, device=pixels.device) for values in (MEAN, DEVIATION))
        seen = (resized - mean[:, None, None]) / deviation[:, None, None]
        out: Tensor = self.body(pixel_values=seen).pooler_output
        return out


def check(uri: str) -> str:
    """SHA-256 of the weights at ``uri``, or "formula".

    Raises Missing or Refused, one sentence, where a package or the file is missing, or its tensors are others.
    """
    for package, extra in (("torch_fidelity", "fid"), ("transformers", "text")):
        if importlib.util.find_spec(package) is None:
            raise Missing(f"evaluate.dinov2 needs {package}; pip install 'distilled-decoding[{extra}]'.")
    if uri == FORMULA:
        return FORMULA
    if not storage.exists(uri) or storage.is_folder(uri):
        raise Missing(
            f"evaluate.dinov2 {uri} is no file; fetch {FILE} from Meta's dinov2, or set it to {FORMULA} for a rehearsal"
            " with random weights."
        )
    _read(uri)
    return storage.sha256(uri)


def load(uri: str) -> DinoV2:
    """The network with the weights at ``uri``, which must be those of the official file, or those of ``formula``."""
    return DinoV2(formula(VIT_L) if uri == FORMULA else _read(uri))


def formula(shape: Shape) -> dict[str, Tensor]:
    """Random weights that anybody can make again, for tests and rehearsals: with them, no number is an FD-DINOv2.

    Tensor i of the names in alphabetical order is drawn from torch's generator with seed 2000 + i: N(0, 1 / 50) of
    weights and tokens, N(1, 1 / 50) of normalisations' weights and of layers' scales.
    """
    out = {}
    for i, (name, size) in enumerate(sorted(_shapes(shape).items())):
        noise = torch.randn(size, generator=torch.Generator().manual_seed(2000 + i)) / 50
        out[name] = noise + (1.0 if name.endswith("gamma") or ("norm" in name and name.endswith("weight")) else 0.0)
    return out


def _read(uri: str) -> dict[str, Tensor]:
    """The tensors of the official file, memory-mapped; Refused, one sentence, for a file that holds others."""
    try:
        found: Any = torch.load(storage.local(uri), map_location="cpu", weights_only=True, mmap=True)
    except MemoryError:
        raise
    except Exception as error:  # whatever a damaged file makes torch stumble over
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise Refused(f"evaluate.dinov2 {uri} could not be read ({reason}); fetch {FILE} again.") from None
    sizes = {key: tuple(value.shape) for key, value in found.items() if isinstance(value, Tensor)} if found else {}
    wanted = _shapes(VIT_L)
    wrong = sorted(key for key in sizes.keys() | wanted.keys() if sizes.get(key) != wanted.get(key))
    if wrong:
        name = wrong[0]
        raise Refused(
            f"evaluate.dinov2 {uri} is not DINOv2's ViT-L/14: {name} is {sizes.get(name, 'not there')} and should be"
            f" {wanted.get(name, 'not there')} ({len(wrong)} such tensors); fetch {FILE}."
        )
    return dict(found)


def _shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of Meta's file, by its name."""
    d = shape.width
    out: dict[str, tuple[int, ...]] = {"cls_token": (1, 1, d), "mask_token": (1, d)}
    out |= {"pos_embed": (1, 1 + shape.positions**2, d)}
    out |= {"patch_embed.proj.weight": (d, 3, PATCH, PATCH), "patch_embed.proj.bias": (d,)}
    out |= {"norm.weight": (d,), "norm.bias": (d,)}
    linears = {"attn.qkv": (3 * d, d), "attn.proj": (d, d), "mlp.fc1": (4 * d, d), "mlp.fc2": (d, 4 * d)}
    for i in range(shape.depth):
        for name, size in linears.items():
            out |= {f"blocks.{i}.{name}.weight": size, f"blocks.{i}.{name}.bias": size[:1]}
        for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "ls1.gamma", "ls2.gamma"):
            out[f"blocks.{i}.{name}"] = (d,)
    return out


RENAMED = {  # of a block: Meta's name -> transformers'
    "norm1": "norm1",
    "attn.proj": "attention.o_proj",
    "ls1.gamma": "layer_scale1.lambda1",
    "norm2": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "ls2.gamma": "layer_scale2.lambda1",
}


def _renamed(weights: Mapping[str, Tensor], shape: Shape) -> dict[str, Tensor]:
    """Meta's tensors under transformers' names, queries, keys and values apart, positions for 224 pixels."""
    out = {
        "embeddings.cls_token": weights["cls_token"],
        "embeddings.mask_token": weights["mask_token"],
        "embeddings.position_embeddings": interpolated(weights["pos_embed"], shape.positions),
        "embeddings.patch_embeddings.projection.weight": weights["patch_embed.proj.weight"],
        "embeddings.patch_embeddings.projection.bias": weights["patch_embed.proj.bias"],
        "layernorm.weight": weights["norm.weight"],
        "layernorm.bias": weights["norm.bias"],
    }
    for i in range(shape.depth):
        block, layer = f"blocks.{i}", f"encoder.layer.{i}"
        for kind in ("weight", "bias"):
            parts = weights[f"{block}.attn.qkv.{kind}"].chunk(3)
            names = (f"{layer}.attention.{name}_proj.{kind}" for name in "qkv")
            out |= dict(zip(names, parts, strict=True))
        for old, new in RENAMED.items():
            kinds = [""] if old.endswith("gamma") else [".weight", ".bias"]
            out |= {f"{layer}.{new}{kind}": weights[f"{block}.{old}{kind}"] for kind in kinds}
    return out


def interpolated(positions: Tensor, side: int) -> Tensor:
    """Position embeddings [1, 1 + side^2, D] as Meta's code makes them for 224 pixels, [1, 257, D]."""
    wanted = SIDE // PATCH
    token, grid = positions[:, :1].float(), positions[:, 1:].float()
    grid = grid.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    factor = (wanted + OFFSET) / side
    grid = F.interpolate(grid, scale_factor=(factor, factor), mode="bicubic")
    return torch.cat([token, grid.permute(0, 2, 3, 1).reshape(1, wanted**2, -1)], dim=1)


def _blank(shape: Shape) -> nn.Module:
    """transformers' network without weights, on the meta device."""
    from pipeline.numerics import torchvision_ops  # noqa: F401  isort: skip  before transformers imports torchvision
    from transformers import Dinov2Config, Dinov2Model

    sizes: Any = {"hidden_size": shape.width, "num_hidden_layers": shape.depth, "num_attention_heads": shape.heads}
    config: Any = Dinov2Config(**sizes, image_size=SIDE, patch_size=PATCH, mlp_ratio=4)
    with torch.device("meta"):
        model: Any = Dinov2Model(config)
    return model
