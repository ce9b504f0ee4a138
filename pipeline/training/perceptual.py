"""The frozen network that ``train.perceptual`` names: LPIPS on VGG's or AlexNet's trunk, or the one of the digits."""

from __future__ import annotations

import hashlib
import os
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from pipeline.host.errors import Refused

# torchvision's weight files; a name ends with the beginning of the file's SHA-256
TRUNKS = {"vgg": "vgg16-397923af.pth", "alex": "alexnet-owt-7be5be79.pth"}


def trunk_file(kind: str) -> Path:
    """The torchvision file with the trunk of LPIPS; ValueError where it is missing or is another file.

    torchvision would download it in the middle of a run, and accept any file of that name.
    """
    name = TRUNKS[kind]
    folder = Path(torch.hub.get_dir(), "checkpoints")
    path = folder / name
    if not path.is_file():
        home = os.environ.get("TORCH_HOME", "not set")
        raise Refused(
            f"train.perceptual is {kind}, whose weights {path} are missing (TORCH_HOME is {home}); fetch"
            f" https://download.pytorch.org/models/{name} into {folder} on every machine that trains."
        )
    expected = path.stem.rsplit("-", 1)[1]
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if not found.startswith(expected):
        raise Refused(
            f"{path} is damaged or another file: its SHA-256 starts with {found[:8]}, not {expected}; fetch"
            f" it again from https://download.pytorch.org/models/{name}."
        )
    return path


class Lpips(nn.Module):
    """The lpips package's LPIPS 0.1 (Zhang et al. 2018), frozen.

    Images [B, 3, H, W] in [-1, 1] -> distance [B]. ``pretrained=False`` draws the trunk at random, for tests.

    Channels lie last in memory: on a CPU that saves time, most in bfloat16. On a GPU, where nothing was measured, it is
    the layout of the tensor cores that tf32 and bf16 use. The decoders stay as they are: a GPU's GroupNorm puts
    channels first again, and on a CPU VAR's gains nothing in float32.
    """

    def __init__(self, kind: str, pretrained: bool = True) -> None:
        super().__init__()
        if pretrained:
            trunk_file(kind)
        from pipeline.numerics import torchvision_ops  # noqa: F401  isort: skip  before lpips imports torchvision
        import lpips

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # lpips 0.1.4 calls torchvision the way of 2021
            self.net = lpips.LPIPS(net=kind, pnet_rand=not pretrained, verbose=False)
        self.eval().requires_grad_(False)  # its linear layers come unfrozen and with dropout
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @property
    def layers(self) -> list[nn.Module]:
        """The stages of the trunk, each with the convolutions between two of the maps that are compared."""
        return list(self.net.net.children())

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.net(a, b).flatten()


def network(kind: str, pretrained: bool = True) -> nn.Module:
    """The frozen network of ``train.perceptual``: vgg, alex or digits; ValueError if its file is missing.

    Without ``pretrained`` the file is not needed: the network has its shape and means nothing.
    """
    if kind == "digits":
        from pipeline.digits import networks

        return networks.perceptual()
    return Lpips(kind, pretrained)
