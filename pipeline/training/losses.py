"""What the student is trained on (Eq. 7, App. C): cross-entropy of logits, perceptual distance of images.

The logits head is told the teacher's code at every predicted token. The embedding head, which speaks for the tokens
after the split, is told through the decoder: the image of its embeddings must look like the image of the teacher's
codes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.host.errors import Refused
from pipeline.models.base import Prediction, Tokenizer
from pipeline.settings.train import TrainSettings

COLUMNS = ("samples", "cross_entropy", "perceptual", "token_accuracy")


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
