"""Which numbers are multiplied how, and how far that moves the networks.

What needs TF32 runs where there is a GPU; a CPU sees the switches alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray
import torch
from step import error, step, stirred, with_precision
from tiny import Family, tiny

from pipeline.evaluation import plan
from pipeline.evaluation.artist import Artist
from pipeline.flow import matching
from pipeline.models import checkpoints
from pipeline.models.base import nearest
from pipeline.models.conditions import Labels
from pipeline.numerics.precision import autocast, full_precision, products, quick_at_bf16, set_products
from pipeline.pairs.facts import PairFacts
from pipeline.pairs.replica import Replica
from pipeline.recipe import Recipe
from pipeline.sampling.samplers import FewStep, Models, WithTeacher
from pipeline.scoring import instruments
from pipeline.settings.cluster import ClusterSettings
from pipeline.settings.train import TrainSettings
from pipeline.training import step as training_step

# Relative errors, |found - exact| / |exact|. bfloat16 has 8 bits, so a rounding is 0.004 at most: a few of them in a
# row in what a network says (0.003 to 0.011 found), their mean in a loss (0.001 to 0.002), more in gradients, which
# go through all of it twice and cancel (0.05).
SAYS_BF16, LOSS_BF16, GRADIENT_BF16 = 0.03, 0.01, 0.15
# TF32 has 11 bits: an eighth of that.
SAYS_TF32, LOSS_TF32, GRADIENT_TF32 = 0.004, 0.002, 0.02
FAMILIES = pytest.mark.parametrize("family", ["var", "llamagen"])


@pytest.fixture(autouse=True)
def untouched() -> Iterator[None]:
    """The process's switches as they were, whatever a test does."""
    before = torch.backends.cudnn.benchmark
    with products("fp32"):
        yield
    torch.backends.cudnn.benchmark = before


def switches() -> tuple[bool, bool]:
    """Whether products and convolutions may be TF32, by every name that torch has for it; none may raise."""
    backends = torch.backends
    found = {backends.cuda.matmul.allow_tf32, backends.cuda.matmul.fp32_precision == "tf32"}
    found |= {torch.get_float32_matmul_precision() == "high", torch._C._get_cublas_allow_tf32()}
    convolutions = {backends.cudnn.allow_tf32, backends.cudnn.conv.fp32_precision == "tf32"}
    assert len(found) == len(convolutions) == 1
    return found.pop(), convolutions.pop()


def test_contexts_nest_and_leave_what_they_found() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of mixing torch's two sets of switches
        assert switches() == (False, False)
        with products("tf32"):
            assert switches() == (True, True)
            for precision in ("fp32", "bf16"):
                with products(precision):
                    assert switches() == (False, False)
            with full_precision(torch.device("cpu")):
                assert torch.backends.cuda.matmul.fp32_precision == "ieee"
            assert switches() == (True, True)
            with pytest.raises(ZeroDivisionError), products("fp32"):
                _ = 1 / 0
            assert switches() == (True, True)
        assert switches() == (False, False)


def test_fp32_switches_off_what_torch_leaves_on() -> None:
    torch.backends.cudnn.allow_tf32 = True  # torch's default
    with products("fp32"):
        assert switches() == (False, False)
    assert torch.backends.cudnn.allow_tf32
    set_products("fp32")
    assert switches() == (False, False)


def test_a_search_of_codes_is_exact_whatever_is_around() -> None:
    generator = torch.Generator().manual_seed(0)
    x, codebook = torch.randn(500, 8, generator=generator), torch.randn(256, 8, generator=generator)
    exact = torch.cdist(x.double(), codebook.double()).argmin(-1)
    assert torch.equal(nearest(x, codebook), exact)
    with products("tf32"), autocast("bf16", "cpu"):
        assert (x @ codebook.T).dtype == torch.bfloat16, "which would find other codes"
        assert torch.equal(nearest(x, codebook), exact)
        assert torch.equal(nearest(x.bfloat16(), codebook), nearest(x.bfloat16().float(), codebook))


# ---- who sets what


@pytest.mark.parametrize(("mine", "others"), [(True, True), (True, False), (False, True), (False, False)])
def test_auto_is_the_same_on_all_workers(monkeypatch: pytest.MonkeyPatch, mine: bool, others: bool) -> None:
    def least(value: torch.Tensor, operation: Any) -> None:
        assert operation == torch.distributed.ReduceOp.MIN
        value.clamp_(max=int(others))

    monkeypatch.setattr(training_step, "quick_at_bf16", lambda device: mine)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", least)
    settings, cpu = TrainSettings(precision="auto"), torch.device("cpu")
    wanted = "bf16" if mine and others else "fp32"
    assert training_step.settled(settings, cpu) == replace(settings, precision=wanted)
    for said in ("fp32", "bf16"):
        assert training_step.settled(replace(settings, precision=said), cpu).precision == said


@pytest.mark.parametrize(
    ("capabilities", "quick"),
    [({"avx512_bf16": True}, True), ({"avx2": True, "avx512_f": True, "avx512_bf16": False}, False), ({}, False)],
)
def test_a_cpu_is_quick_at_bf16_if_it_has_instructions(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], quick: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert quick_at_bf16(torch.device("cpu")) is quick


@pytest.mark.parametrize("name", ["teacher", "train", "evaluate"])
def test_tf32_needs_a_gpu(name: str) -> None:
    settings = {name: replace(getattr(Recipe(), name), precision="tf32")}
    sentence = f"{name}.precision is tf32 and cluster.gpus is 0, but only GPUs have TF32 products; set {name}.precision"
    with pytest.raises(ValueError, match=sentence):
        Recipe(**settings)
    assert Recipe(**settings, cluster=ClusterSettings(gpus=0.5))


def test_every_process_sets_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny(tmp_path)
    recipe = replace(recipe, evaluate=replace(recipe.evaluate, samplers=[{"name": "Autoregressive"}]))
    monkeypatch.setattr(plan.instruments, "check", lambda *args: {})
    features = instruments.Features(4, 3, 0, False, lambda pixels: pytest.fail("nothing is scored"))
    monkeypatch.setattr("pipeline.workflow.evaluate.instruments.features", lambda *args: features)
    for enter in (
        lambda: Replica(recipe, PairFacts.of(recipe)),
        lambda: training_step.device_of(recipe),
        lambda: Artist(plan.prepare(recipe), [], None),
    ):
        set_products("tf32")
        enter()
        assert switches() == (False, False)
    monkeypatch.setattr(ray.train.torch, "get_device", lambda: torch.device("cuda"))
    assert not torch.backends.cudnn.benchmark
    training_step.device_of(with_precision(replace(recipe, cluster=ClusterSettings(gpus=1)), "tf32"))
    assert switches() == (True, True)
    assert torch.backends.cudnn.benchmark


@pytest.mark.parametrize(("teacher", "student"), [("tf32", "fp32"), ("bf16", "tf32"), ("fp32", "bf16")])
def test_each_network_works_in_its_own(tmp_path: Path, teacher: Any, student: Any) -> None:
    """Alg. 4 asks both; the decoder follows the student, or the teacher where that drew alone."""
    made = checkpoints.teacher(tiny(tmp_path).teacher)
    seen: dict[str, tuple[bool, bool, bool]] = {}
    tuned: dict[str, bool] = {}

    def watched(name: str, call: Any) -> Any:
        def run(*args: Any) -> Any:
            seen[name] = (*switches(), torch.is_autocast_enabled("cpu"))
            tuned[name] = torch.backends.cudnn.benchmark
            return call(*args)

        return run

    layout = made.layout
    embeddings = torch.randn(2, layout.length, layout.code_dim)
    generate, decode = watched("teacher", made.generate), watched("decoder", made.decode)
    given = SimpleNamespace(generate=generate, decode=decode, layout=layout, codebook=made.codebook, check=lambda: None)
    jump = watched("student", lambda *args: embeddings)
    models: Any = Models(given, SimpleNamespace(jump=jump), matching.Solver(), 0, None, "cpu", teacher, student)
    set_products("fp32")
    WithTeacher(2, 3, 1).draw(models, range(2))
    tf32 = {"fp32": (False, False), "tf32": (True, True), "bf16": (False, False)}
    assert seen["teacher"] == (*tf32[teacher], False), "its weights are bfloat16 already"
    assert seen["student"] == (*tf32[student], student == "bf16")
    for drew, precision in ((True, student), (False, teacher)):
        models.decode(embeddings, drew)
        assert seen["decoder"] == (*tf32[precision], False)
    assert tuned == {"teacher": False, "student": False, "decoder": True}, "the codes must not depend on the process"
    assert not torch.backends.cudnn.benchmark
    assert switches() == (False, False)


# ---- how far it moves the networks


@FAMILIES
def test_a_step_of_training_in_bf16(tmp_path: Path, family: Family) -> None:
    recipe = tiny(tmp_path, family)
    exact, found = step(recipe), step(with_precision(recipe, "bf16"))
    for rounded, plain in zip(found.prediction, exact.prediction, strict=True):
        assert 1e-4 < error(rounded, plain) < SAYS_BF16
    assert abs(found.loss - exact.loss) < LOSS_BF16 * exact.loss
    assert error(found.gradient, exact.gradient) < GRADIENT_BF16


@FAMILIES
def test_a_teacher_in_bf16(tmp_path: Path, family: Family) -> None:
    recipe = tiny(tmp_path, family)
    logits = []
    for settings in (recipe.teacher, with_precision(recipe, "bf16").teacher):
        teacher = checkpoints.teacher(settings)
        condition, layout = Labels(torch.arange(3)), teacher.layout
        codes = torch.randint(layout.vocabulary, (3, layout.length), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            logits.append(teacher(condition, codes))
        assert teacher.codebook.dtype == torch.float32
    assert logits[1].dtype == torch.bfloat16
    assert 1e-4 < error(logits[1], logits[0]) < SAYS_BF16


@FAMILIES
def test_a_student_samples_in_bf16_and_answers_in_float32(tmp_path: Path, family: Family) -> None:
    """With split 0 all tokens are embeddings; with the last AR step as split all are codes of the codebook."""
    settings = tiny(tmp_path, family).teacher
    teacher = checkpoints.teacher(settings)
    student: Any = stirred(checkpoints.family(settings).Student.from_teacher(teacher, 0))
    exact, low = (Models(teacher, student, matching.Solver(), 0, None, "cpu", "fp32", p) for p in ("fp32", "bf16"))
    found, plain = (FewStep(0, (1, 2)).draw(models, np.arange(4)) for models in (low, exact))
    assert found.dtype == torch.float32
    assert 1e-4 < error(found, plain) < SAYS_BF16
    codes = FewStep(teacher.layout.steps, (1, 2)).draw(low, np.arange(4))
    assert torch.equal(teacher.codebook[nearest(codes, teacher.codebook)], codes), "not one bit of a code is lost"
    assert low.decode(found, student=True).dtype == torch.float32


@FAMILIES
def test_logits_are_float32_where_nothing_is_trained(tmp_path: Path, family: Family) -> None:
    """In bfloat16 the best of many codes is shared by several, of which argmax would take the first."""
    settings = tiny(tmp_path, family, vocabulary=4_000).teacher
    teacher = checkpoints.teacher(settings)
    student: Any = stirred(checkpoints.family(settings).Student.from_teacher(teacher, 0))
    x = torch.randn(40, teacher.layout.length, teacher.layout.code_dim, generator=torch.Generator().manual_seed(0))
    given = x, torch.ones(40, dtype=torch.long), Labels(torch.zeros(40, dtype=torch.long))
    with autocast("bf16", "cpu"):
        assert student(*given).logits.dtype == torch.bfloat16, "in training"
        with torch.no_grad():
            logits = student(*given).logits
    assert logits.dtype == torch.float32
    shared = [((x == x.amax(-1, keepdim=True)).sum(-1) > 1).float().mean() for x in (logits.bfloat16(), logits)]
    assert shared[0] > 0.02
    assert shared[1] == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CPU has no TF32")
@FAMILIES
def test_tf32_and_bf16_on_a_gpu(tmp_path: Path, family: Family) -> None:
    recipe = replace(tiny(tmp_path, family), cluster=ClusterSettings(gpus=1))
    tolerances = {
        "fp32": (1e-4, 1e-5, 1e-3),
        "tf32": (SAYS_TF32, LOSS_TF32, GRADIENT_TF32),
        "bf16": (SAYS_BF16, LOSS_BF16, GRADIENT_BF16),
    }
    exact = step(recipe)
    teacher = checkpoints.teacher(recipe.teacher)
    codes = teacher.codebook[torch.arange(teacher.layout.length) % 24][None]
    image = teacher.decode(codes)
    for precision, (says, loss, gradient) in tolerances.items():
        with products(precision):
            found = step(with_precision(recipe, precision), device="cuda")
            drawn = teacher.cuda().decode(codes.cuda()).cpu()
        for rounded, plain in zip(found.prediction, exact.prediction, strict=True):
            assert error(rounded.cpu(), plain) < says, precision
        assert abs(found.loss.cpu() - exact.loss) < loss * exact.loss, precision
        assert error(found.gradient.cpu(), exact.gradient) < gradient, precision
        assert error(drawn, image) < (SAYS_TF32 if precision == "tf32" else 1e-4), "convolutions follow the products"
