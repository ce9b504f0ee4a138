"""AdamW alone, and Muon beside it, on tiny students of both families."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from tiny import Family, tiny
from torch import Tensor

from pipeline.models import checkpoints
from pipeline.models.base import Student
from pipeline.settings.train import TrainSettings
from pipeline.training.muon import Muon, shared_out
from pipeline.training.optimizers import MUON, Optimizers, blocks_matrices
from pipeline.training.state import TrainingState

MUON_SETTINGS = TrainSettings(optimizer="muon", lr=1e-2, weight_decay=0.1, warmup=0)


def student(folder: Path, family: Family = "var") -> Student:
    recipe = tiny(folder, family)
    return checkpoints.family(recipe.teacher).Student.from_teacher(checkpoints.teacher(recipe.teacher), 0)


def give_gradients(network: Student, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def named(network: Student, optimizer: torch.optim.Optimizer) -> list[set[str]]:
    """The names of the parameters in each of its groups."""
    names = {id(p): name for name, p in network.named_parameters()}
    return [{names[id(p)] for p in group["params"]} for group in optimizer.param_groups]


def test_only_matrices_decay(tmp_path: Path) -> None:
    network = student(tmp_path)
    (adamw,) = Optimizers(network, TrainSettings()).parts.values()
    decayed, spared = named(network, adamw)
    assert decayed | spared == {name for name, _ in network.named_parameters()}
    assert not decayed & spared
    assert {"head.weight", "word_embed.weight", "blocks.0.attn.mat_qkv.weight"} <= decayed
    assert {"class_emb.weight", "pos_1LC", "lvl_embed.weight", "head.bias", "n_d_embed.weight"} <= spared
    assert {"blocks.0.attn.scale_mul_1H11", "final_layer_conti.scale_shift_table"} <= spared


@pytest.mark.parametrize("family", ["var", "llamagen"])
def test_muon_has_the_matrices_of_the_blocks_and_adamw_all_else(tmp_path: Path, family: Family) -> None:
    network = student(tmp_path, family)
    adamw, muon = Optimizers(network, MUON_SETTINGS).parts.values()
    (ours,), theirs = named(network, muon), set().union(*named(network, adamw))
    assert not ours & theirs
    assert ours | theirs == {name for name, _ in network.named_parameters()}
    matrices = {name for name, p in network.named_parameters() if p.ndim == 2 and name.endswith("weight")}
    assert ours == {name for name in matrices if name.startswith(("blocks.", "layers.")) and "norm" not in name}
    assert not any(word in name for name in ours for word in ("head", "emb", "final"))


@pytest.mark.parametrize("family", ["var", "llamagen"])
def test_a_step_is_along_the_orthogonalised_momentum(tmp_path: Path, family: Family) -> None:
    """Against the singular value decomposition: the same directions, lengths within the iteration's 0.5 to 1.5.

    Those whose singular value is a small part of the largest have not grown to that by its fifth round.
    """
    network = student(tmp_path, family)
    optimizers = Optimizers(network, replace(MUON_SETTINGS, weight_decay=0.0))
    before = [matrix.detach().clone() for matrix in blocks_matrices(network)]
    give_gradients(network, 0)
    gradients: list[Tensor] = [matrix.grad.clone() for matrix in blocks_matrices(network)]  # type: ignore[union-attr]
    optimizers.step(keep_gradients=False)
    for old, matrix, gradient in zip(before, blocks_matrices(network), gradients, strict=True):
        step = (old - matrix.detach()) / (1e-2 * 0.2 * max(matrix.shape) ** 0.5)
        left, values, right = torch.linalg.svd(gradient, full_matrices=False)  # of the first momentum, too
        rotated = left.T @ step @ right.T
        lengths = rotated.diagonal()
        grown = lengths[values > values[0] / 5]
        assert 0.5 < grown.min() <= grown.max() < 1.5
        assert (rotated - lengths.diag()).abs().max() < 0.05


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_muon_is_that_of_torch_in_the_precision_of_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: Literal["fp32", "bf16"]
) -> None:
    """Bit for bit; for float32 torch's cast to bfloat16 is left out."""
    if precision == "fp32":
        monkeypatch.setattr(Tensor, "bfloat16", lambda tensor: tensor.clone())
    networks = student(tmp_path), student(tmp_path)
    ours = Optimizers(networks[0], replace(MUON_SETTINGS, precision=precision)).parts[MUON]
    theirs = torch.optim.Muon(blocks_matrices(networks[1]), lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for seed in range(3):
        for network, optimizer in zip(networks, (ours, theirs), strict=True):
            give_gradients(network, seed)
            optimizer.step()
    for one, other in zip(*map(blocks_matrices, networks), strict=True):
        assert torch.equal(one, other)
    found, expected = ours.state_dict()["state"], theirs.state_dict()["state"]
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[i]["momentum_buffer"], expected[i]["momentum_buffer"]) for i in expected)


def test_its_steps_are_as_large_as_those_of_adamw(tmp_path: Path) -> None:
    """The rule by which one learning rate serves both: a root mean square of about 0.2 times the rate."""
    network = student(tmp_path)
    before = [matrix.detach().clone() for matrix in blocks_matrices(network)]
    optimizers = Optimizers(network, replace(MUON_SETTINGS, weight_decay=0.0))
    give_gradients(network, 0)
    optimizers.step(keep_gradients=False)
    for old, matrix in zip(before, blocks_matrices(network), strict=True):
        size = (old - matrix.detach()).square().mean().sqrt() / 1e-2
        assert 0.1 < size < 0.3


def test_one_rate_and_one_decay_serve_both(tmp_path: Path) -> None:
    network = student(tmp_path)
    optimizers = Optimizers(network, MUON_SETTINGS)
    optimizers.rate = 0.25
    groups = [group for part in optimizers.parts.values() for group in part.param_groups]
    assert {group["lr"] for group in groups} == {0.25} == {optimizers.rate}
    before = {name: value.detach().clone() for name, value in network.named_parameters()}
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizers.step(keep_gradients=True)
    decayed = {name for name, value in network.named_parameters() if not torch.equal(value, before[name])}
    (ours,) = named(network, optimizers.parts[MUON])
    assert ours < decayed
    assert "class_emb.weight" not in decayed
    for name in decayed:
        assert torch.allclose(dict(network.named_parameters())[name], before[name] * (1 - 0.25 * 0.1))


@pytest.mark.parametrize("settings", [TrainSettings(), MUON_SETTINGS])
def test_a_checkpoint_goes_on_bit_for_bit(tmp_path: Path, settings: TrainSettings) -> None:
    state = TrainingState(student(tmp_path), settings)
    give_gradients(state.student, 0)
    state.advance(4)
    content = copy.deepcopy(state.content())
    other = TrainingState(student(tmp_path), settings)
    other._take(content)
    assert_the_same_next_step(state, other)


@pytest.mark.parametrize("settings", [TrainSettings(), MUON_SETTINGS])
def test_workers_take_the_state_of_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: TrainSettings
) -> None:
    """By two states in one process, between which a list carries what ranks would send."""
    first, second = TrainingState(student(tmp_path), settings), TrainingState(student(tmp_path), settings)
    for seed in range(2):
        give_gradients(first.student, seed)
        first.advance(4)
    said: list[Any] = []
    sent: list[Tensor] = []
    for rank, state in enumerate((first, second)):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        tell = (lambda value: said.append(value) or value) if rank == 0 else (lambda value: said.pop(0))
        give = (lambda tensor, _: sent.append(tensor)) if rank == 0 else (lambda tensor, _: tensor.copy_(sent.pop(0)))
        monkeypatch.setattr(torch.distributed, "broadcast", give)
        state.share(tell)
    assert not sent
    assert second.step == 2
    assert_the_same_next_step(first, second)


class Ranks:
    """torch.distributed for threads of this process: who calls it has the rank of its thread."""

    def __init__(self, world: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.world, self.rank = world, threading.local()
        self.meeting, self.said = threading.Barrier(world, timeout=60), torch.zeros(0)
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: world)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda: self.rank.value)
        monkeypatch.setattr(torch.distributed, "broadcast", self.broadcast)

    def broadcast(self, tensor: Tensor, owner: int) -> None:
        if self.rank.value == owner:
            self.said = tensor.clone()
        self.meeting.wait()
        tensor.copy_(self.said)
        self.meeting.wait()

    def run(self, work: Callable[[int], None]) -> None:
        def ranked(rank: int) -> None:
            self.rank.value = rank
            work(rank)

        with ThreadPoolExecutor(self.world) as pool:
            list(pool.map(ranked, range(self.world)))


@pytest.mark.parametrize("world", [2, 3, 40])
def test_workers_share_the_orthogonalisation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: int) -> None:
    """Weights, momenta and gradients of every worker are those of one alone; no matrix is done twice."""
    alone = student(tmp_path)
    single = Optimizers(alone, MUON_SETTINGS)
    for seed in range(3):
        give_gradients(alone, seed)
        single.step(keep_gradients=True)
    networks = [student(tmp_path) for _ in range(world)]
    workers = [Optimizers(network, MUON_SETTINGS) for network in networks]
    done: list[int] = []
    move = Muon._move
    monkeypatch.setattr(Muon, "_move", lambda *args: done.append(1) or move(*args))
    ranks = Ranks(world, monkeypatch)

    def work(rank: int) -> None:
        for seed in range(3):
            give_gradients(networks[rank], seed)
            gradients = [p.grad for p in networks[rank].parameters()]
            workers[rank].step(keep_gradients=True)
            assert all(p.grad is kept for p, kept in zip(networks[rank].parameters(), gradients, strict=True))

    ranks.run(work)
    assert len(done) == 3 * len(blocks_matrices(alone))
    expected = single.parts[MUON].state_dict()["state"]
    for network, optimizers in zip(networks, workers, strict=True):
        for one, other in zip(alone.parameters(), network.parameters(), strict=True):
            assert torch.equal(one, other)
        found = optimizers.parts[MUON].state_dict()["state"]
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[i]["momentum_buffer"], expected[i]["momentum_buffer"]) for i in expected)


def test_shares_are_about_equal() -> None:
    matrices = [torch.zeros(shape) for shape in [(384, 128), (128, 128), (352, 128), (352, 128), (128, 352)] * 6]
    shares = shared_out(matrices, 4)
    assert sorted(id(p) for share in shares for p in share) == sorted(map(id, matrices))
    work = [sum(2 * 128 * 128 * (p.numel() // 128) + 128**3 for p in share) for share in shares]
    assert max(work) < 1.1 * min(work)


def assert_the_same_next_step(one: TrainingState, other: TrainingState) -> None:
    for state in (one, other):
        give_gradients(state.student, 9)
        state.advance(4)
    for mine, theirs in zip(one.student.parameters(), other.student.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    for mine, theirs in zip(one.average.parameters(), other.average.parameters(), strict=True):
        assert torch.equal(mine, theirs)
