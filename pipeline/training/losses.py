"""What the student is trained on (Eq. 7, App. C): cross-entropy of logits, perceptual distance of images.

The logits head is told the teacher's code at every predicted token. The embedding head, which speaks for the tokens
after the split, is told through the decoder: the image of its embeddings must look like the image of the teacher's
codes.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.host.errors import Refused
from pipeline.models import convnet
from pipeline.models.base import Layout, Prediction, Tokenizer
from pipeline.settings.train import TrainSettings

# torchvision's weight files; a name ends with the beginning of the file's SHA-256
TRUNKS = {"vgg": "vgg16-397923af.pth", "alex": "alexnet-owt-7be5be79.pth"}
COLUMNS = ("samples", "cross_entropy", "perceptual", "token_accuracy")


def check(settings: TrainSettings, layout: Layout) -> None:
    """Raise ValueError, one sentence, for losses that cannot train a student of this layout.

    Start steps and split must lie inside the layout, a head must be trained if the split leaves it tokens to speak for
    (the embedding head only if), and the perceptual network's weights must be there.
    """
    steps, split, last = layout.steps, settings.split, settings.start_steps[-1]
    if last > steps:
        raise Refused(
            f"train.start_steps holds {last}, but the teacher's AR steps run from 1 to {steps}; leave it out."
        )
    if split > steps:
        raise Refused(f"train.split is {split}, but the teacher has {steps} AR steps; use 0 to {steps}.")
    if split == steps and settings.lpips > 0:
        raise Refused(
            f"train.split {split} gives every AR step to the logits, so train.lpips {settings.lpips} has no"
            f" embedding to train; set train.lpips to 0 or train.split below {steps}."
        )
    if split < steps and settings.lpips == 0:
        raise Refused(
            f"train.lpips is 0, so nothing trains the embedding head that train.split {split} uses after AR"
            f" step {split}; set train.lpips above 0 or train.split to {steps}."
        )
    if split > 0 and settings.cross_entropy == 0:
        raise Refused(
            f"train.cross_entropy is 0, so nothing trains the logits that train.split {split} uses up to AR"
            f" step {split}; set train.cross_entropy above 0 or train.split to 0."
        )
    if settings.lpips > 0 and settings.perceptual == "digits" and layout.image_size > 32:
        raise Refused(
            f"train.perceptual is digits, made for images of 32 pixels, and the teacher's have"
            f" {layout.image_size}; use vgg."
        )
    if settings.lpips > 0 and settings.perceptual in TRUNKS:
        trunk_file(settings.perceptual)


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


def perceptual(kind: str, pretrained: bool = True) -> nn.Module:
    """The frozen network of ``train.perceptual``: vgg, alex or digits; ValueError if its file is missing.

    Without ``pretrained`` the file is not needed: the network has its shape and means nothing.
    """
    if kind == "digits":
        from pipeline.digits import networks

        return networks.perceptual()
    return Lpips(kind, pretrained)


def layers(tokenizer: Tokenizer, network: nn.Module | None) -> list[nn.Module]:
    """What of the frozen networks keeps most for the backward pass: blocks of the decoder, stages of LPIPS's trunk."""
    return convnet.blocks(tokenizer) + (network.layers if isinstance(network, Lpips) else [])


def cross_entropy(logits: Tensor, tokens: Tensor, predicted: Tensor) -> Tensor:
    """Mean of -log p(token) over the predicted tokens of each sample: [B].

    logits [B, n, V], tokens [B, n] int64, predicted [B, n] bool. The mean is taken per sample, so that a sample weighs
    the same from whichever step it starts, and workers with equal shares of a batch average to the whole.
    """
    nll = F.cross_entropy(logits.float().flatten(0, 1), tokens.flatten(), reduction="none").view_as(tokens)
    return _mean(nll, predicted)


def _mean(values: Tensor, where: Tensor) -> Tensor:
    """Mean of values [B, n] over the true positions of each row: [B]."""
    return (values * where).sum(1) / where.sum(1)


class Loss:
    """cross_entropy weight * CE + lpips weight * perceptual(decode(embeddings'), decode(codes)), Eq. 7.

    The mean over samples. embeddings' are what the sampler would hand to the decoder, with one difference: up to the
    split the teacher's codes stand in for the argmax of the logits. An argmax passes no gradient, so those tokens are
    the cross-entropy's alone, and the embedding head learns to complete right tokens instead of chasing the mistakes of
    an untrained head. The paper does not say which (App. C), and its training code is not public.

    Not an nn.Module: the frozen networks stay out of the student's parameters, EMA, checkpoints, ``train()``. Their
    weights get no gradients, and the target's image and features, made once a batch, have no graph.

    Precision is the caller's autocast, with bf16 the decoder's and the trunk's convolutions too. Float32 stay, by
    torch's rules or ours: norms, the cross-entropy, VAR's sum over the scales, the comparison of features, the log.
    """

    def __init__(self, settings: TrainSettings, tokenizer: Tokenizer, network: nn.Module | None) -> None:
        """Both networks are on the training device; ``network`` is None if, and only if, train.lpips is 0."""
        if (network is None) != (settings.lpips == 0):
            raise Refused(f"train.lpips is {settings.lpips} and the perceptual network is {network}; they must agree.")
        layout, device = tokenizer.layout, tokenizer.codebook.device
        self.settings, self.tokenizer, self.network = settings, tokenizer, network
        self.starts = torch.tensor(settings.start_steps, device=device)
        self.before = torch.tensor([layout.before(t) for t in range(1, layout.steps + 2)], device=device)
        self.position = torch.arange(layout.length, device=device)
        self.coded = layout.before(settings.split + 1)

    def __call__(self, prediction: Prediction, tokens: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Prediction, teacher's tokens [B, n] int64, start steps t [B] -> (loss, sums for the log).

        The sums are float32 [len(start_steps), 4]: per start step the columns of ``COLUMNS``, each summed over samples,
        so that steps and workers add up. They stay on the device.
        """
        predicted = self.position >= self.before[t - 1, None]  # [B, n]
        entropy = cross_entropy(prediction.logits, tokens, predicted)
        distance = torch.zeros_like(entropy)
        terms = []
        if self.settings.cross_entropy > 0:
            terms.append(self.settings.cross_entropy * entropy)
        if self.network is not None:
            distance = self._distance(self.network, prediction.embeddings, tokens, predicted)
            terms.append(self.settings.lpips * distance)
        right = _mean((prediction.logits.argmax(-1) == tokens).float(), predicted)
        values = torch.stack([torch.ones_like(entropy), entropy, distance, right], dim=1).detach()
        member = (t[:, None] == self.starts).to(values.dtype)
        sums = (member[..., None] * values[:, None]).sum(0)  # no matmul: autocast would round the counts
        return torch.stack(terms).sum(0).mean(), sums

    def _distance(self, network: nn.Module, embeddings: Tensor, tokens: Tensor, predicted: Tensor) -> Tensor:
        """Perceptual distance [B]; the gradient reaches only the embedding head's tokens after the split."""
        codes = self.tokenizer.codebook[tokens]
        mixed = torch.where((predicted & (self.position >= self.coded))[..., None], embeddings.float(), codes)
        with torch.no_grad():
            target = self.tokenizer.decode(codes)
        return network(self.tokenizer.decode(mixed), target).float()


def summary(settings: TrainSettings, sums: Tensor) -> dict[str, float]:
    """Means over samples from the sums of ``Loss``: the loss and its parts, then the parts per start step."""
    rows = sums.double().cpu()
    parts = _parts(settings, rows.sum(0))
    loss = settings.cross_entropy * parts["cross_entropy"] + settings.lpips * parts.get("perceptual", 0.0)
    out = {"loss": loss} | parts
    for t, row in zip(settings.start_steps, rows, strict=True):
        if len(settings.start_steps) > 1 and row[0] > 0:
            out |= {f"t{t}/{name}": value for name, value in _parts(settings, row).items()}
    return out


def _parts(settings: TrainSettings, row: Tensor) -> dict[str, float]:
    samples, *sums = row.tolist()
    means = {name: total / samples for name, total in zip(COLUMNS[1:], sums, strict=True)}
    if settings.lpips == 0:
        del means["perceptual"]
    return means
