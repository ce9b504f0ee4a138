"""What each head is trained on, and by how much."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny import tiny
from torch import Tensor, nn

from pipeline.models.base import Layout, Prediction, Tokenizer
from pipeline.models.conditions import Labels
from pipeline.settings.train import TrainSettings
from pipeline.training import step as training_step
from pipeline.training.losses import Loss, cross_entropy, summary

LAYOUT = Layout(groups=(1, 4, 9), vocabulary=11, code_dim=3, classes=2, image_size=16)
SETTINGS = TrainSettings(start_steps=(1, 2), split=2, cross_entropy=0.1, lpips=1.0)


class Decoder(Tokenizer):
    """A tokenizer whose image depends on every token, and that counts how often it decodes."""

    def __init__(self) -> None:
        super().__init__()
        self.layout = LAYOUT
        generator = torch.Generator().manual_seed(0)
        self.codes = torch.randn(LAYOUT.vocabulary, LAYOUT.code_dim, generator=generator)
        self.mix = torch.randn(LAYOUT.length * LAYOUT.code_dim, 3 * 256, generator=generator)
        self.decoded = 0

    @property
    def codebook(self) -> Tensor:
        return self.codes

    def decode(self, embeddings: Tensor) -> Tensor:
        self.decoded += 1
        return torch.tanh(0.1 * embeddings.flatten(1) @ self.mix).view(-1, 3, 16, 16)


class SquaredError(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return (a - b).square().mean((1, 2, 3))


def batch(size: int = 6) -> tuple[Prediction, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    n, v, c = LAYOUT.length, LAYOUT.vocabulary, LAYOUT.code_dim
    logits = torch.randn(size, n, v, generator=generator).requires_grad_()
    embeddings = torch.randn(size, n, c, generator=generator).requires_grad_()
    tokens = torch.randint(0, v, (size, n), generator=generator)
    return Prediction(logits, embeddings), tokens, torch.tensor([1, 2] * (size // 2))


def test_cross_entropy_is_the_mean_over_predicted_tokens_of_each_sample() -> None:
    prediction, tokens, t = batch()
    predicted = torch.arange(LAYOUT.length) >= torch.tensor([LAYOUT.before(int(s)) for s in t])[:, None]
    found = cross_entropy(prediction.logits, tokens, predicted)
    for i, step in enumerate(t.tolist()):
        picked = range(LAYOUT.before(step), LAYOUT.length)
        log_p = prediction.logits[i].log_softmax(-1)
        assert found[i].item() == pytest.approx(-sum(log_p[j, tokens[i, j]].item() for j in picked) / len(picked))
    found.sum().backward()
    gradient = prediction.logits.grad
    assert gradient[1, 0].abs().sum() == 0, "a token that step 2 was given is not predicted"
    assert gradient[0, 0].abs().sum() > 0


def test_loss_is_the_weighted_sum_and_the_log_adds_up() -> None:
    prediction, tokens, t = batch()
    tokenizer, network = Decoder(), SquaredError()
    loss, sums = Loss(SETTINGS, tokenizer, network)(prediction, tokens, t)
    assert tokenizer.decoded == 2, "one decode of the student's image, one of the teacher's"

    entropies, distances, hits = [], [], []
    codes = tokenizer.codebook[tokens]
    for i, step in enumerate(t.tolist()):
        kept = LAYOUT.before(step)
        entropies.append(F.cross_entropy(prediction.logits[i, kept:], tokens[i, kept:]))
        mixed = codes[i].clone()
        mixed[LAYOUT.before(3) :] = prediction.embeddings[i, LAYOUT.before(3) :]
        distances.append(network(tokenizer.decode(mixed[None]), tokenizer.decode(codes[i][None]))[0])
        hits.append((prediction.logits[i, kept:].argmax(-1) == tokens[i, kept:]).float().mean())
    expected = 0.1 * torch.stack(entropies).mean() + torch.stack(distances).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)

    found = summary(SETTINGS, sums)
    assert found["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert found["token_accuracy"] == pytest.approx(torch.stack(hits).mean().item(), rel=1e-5)
    assert found["t2/cross_entropy"] == pytest.approx(torch.stack(entropies[1::2]).mean().item(), rel=1e-5)
    assert found["t1/perceptual"] == pytest.approx(torch.stack(distances[0::2]).mean().item(), rel=1e-5)
    halves = [
        Loss(SETTINGS, tokenizer, network)(Prediction(*(x[i::2] for x in prediction)), tokens[i::2], t[i::2])
        for i in (0, 1)
    ]
    assert torch.allclose(halves[0][1] + halves[1][1], sums), "workers' sums add up"
    assert halves[0][0].item() + halves[1][0].item() == pytest.approx(2 * loss.item(), rel=1e-5)


def test_the_image_trains_only_embeddings_after_the_split() -> None:
    prediction, tokens, t = batch()
    t = torch.full_like(t, 3)
    settings = replace(SETTINGS, start_steps=(1, 3), split=1, cross_entropy=0.1)
    Loss(settings, Decoder(), SquaredError())(prediction, tokens, t)[0].backward()
    per_token = prediction.embeddings.grad.abs().sum((0, 2))
    assert per_token[: LAYOUT.before(3)].sum() == 0, "before step 3 the tokens are data"
    assert (per_token[LAYOUT.before(3) :] > 0).all()

    prediction, tokens, t = batch()
    Loss(SETTINGS, Decoder(), SquaredError())(prediction, tokens, t)[0].backward()
    per_token = prediction.embeddings.grad.abs().sum((0, 2))
    assert per_token[: LAYOUT.before(3)].sum() == 0, "up to the split the cross-entropy speaks"
    assert (per_token[LAYOUT.before(3) :] > 0).all()


def test_the_teachers_own_embeddings_cost_nothing() -> None:
    _, tokens, t = batch()
    tokenizer = Decoder()
    perfect = Prediction(30.0 * F.one_hot(tokens, LAYOUT.vocabulary).float(), tokenizer.codebook[tokens])
    loss, sums = Loss(SETTINGS, tokenizer, SquaredError())(perfect, tokens, t)
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert summary(SETTINGS, sums)["token_accuracy"] == 1


def test_nothing_is_decoded_without_a_perceptual_loss() -> None:
    prediction, tokens, t = batch()
    tokenizer = Decoder()
    settings = replace(SETTINGS, lpips=0.0, split=3)
    loss, sums = Loss(settings, tokenizer, None)(prediction, tokens, t)
    loss.backward()
    assert tokenizer.decoded == 0
    assert prediction.embeddings.grad is None
    assert "perceptual" not in summary(settings, sums)
    assert "t1/perceptual" not in summary(settings, sums)
    with pytest.raises(ValueError, match="must agree"):
        Loss(settings, tokenizer, SquaredError())


def test_counts_survive_autocast() -> None:
    prediction, tokens, t = batch(600)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, sums = Loss(SETTINGS, Decoder(), SquaredError())(prediction, tokens, t)
    assert sums[:, 0].tolist() == [300, 300]


def test_frozen_networks_have_no_gradients_and_targets_no_graph(tmp_path: Path) -> None:
    """Of a real tokenizer and its perceptual network, in a step of training."""
    recipe = tiny(tmp_path)
    student, loss = training_step.build(recipe, torch.device("cpu"))
    frozen = [loss.tokenizer, loss.network]
    assert not any(p.requires_grad for net in frozen for p in net.parameters())
    assert not any(m.training for net in frozen for m in net.modules())
    assert not loss.tokenizer.codebook.requires_grad
    decoded: list[Tensor] = []
    loss.tokenizer.decoder.register_forward_hook(lambda module, args, out: decoded.append(out))
    tokens = torch.zeros(2, loss.tokenizer.layout.length, dtype=torch.long)
    x, t = loss.tokenizer.codebook[tokens], torch.tensor([1, 2])
    loss(student(x, t, Labels(torch.zeros(2, dtype=torch.long))), tokens, t)[0].backward()
    assert [image.requires_grad for image in decoded] == [False, True], "the teacher's, then the student's"
    assert all(p.grad is None for net in frozen for p in net.parameters())
