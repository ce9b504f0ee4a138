"""Compiled blocks say what plain ones say, and are compiled for few forms of input.

inductor itself makes the kernels of the tests against the plain networks; forms are counted without making any.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from step import error, step, stirred
from tiny import Family, tiny
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from pipeline.evaluation import plan
from pipeline.models import checkpoints
from pipeline.models.base import Teacher
from pipeline.models.conditions import Captions, Labels
from pipeline.numerics import compilation
from pipeline.numerics.compilation import FORMS, compiled
from pipeline.recipe import Recipe
from pipeline.settings.teacher import Filter, TeacherSettings
from pipeline.training import plan as training_plan
from pipeline.workflow import generate

# Relative errors, |found - plain| / |plain|. The kernels add in another order, which moves the last of 24 bits (6e-8)
# a few times: 3e-7 found in what a student says, 3e-6 in its gradients. Under bf16 they round in fewer places.
SAYS, GRADIENT, SAYS_BF16 = 1e-5, 1e-4, 0.03
FAMILIES = pytest.mark.parametrize("family", ["var", pytest.param("llamagen", marks=pytest.mark.slow)])


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """Compiled forms are kept per function, for all networks of a process."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def pair(settings: TeacherSettings) -> tuple[Teacher, Teacher]:
    """The same teacher twice, its weights well stirred: plain, and to be compiled."""
    plain = checkpoints.teacher(settings)
    stirred(plain.network)
    return plain, copy.deepcopy(plain)


def greedy(teacher: Teacher, batch: int, prefix: Tensor | None = None, stop: int | None = None) -> Tensor:
    condition = Labels(torch.arange(batch) % teacher.layout.classes)
    return teacher.generate(condition, most_likely, prefix, stop)


def most_likely(t: int, log_p: Tensor) -> Tensor:
    return log_p.argmax(-1)


# ---- the same answers


@FAMILIES
def test_a_compiled_teacher_draws_the_same_codes(tmp_path: Path, family: Family) -> None:
    """Guided, over all AR steps, in two batch sizes; only the forms of the first and of later positions are made."""
    settings = tiny(tmp_path, family).teacher
    plain, fast = checkpoints.teacher(settings), checkpoints.teacher(replace(settings, compile=True))
    torch._dynamo.utils.counters.clear()
    for batch in (6, 4):
        codes = greedy(plain, batch)
        assert len(codes.unique()) > 5
        assert torch.equal(greedy(fast, batch), codes)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    assert fast.state_dict().keys() == plain.state_dict().keys()


@FAMILIES
def test_a_compiled_student_learns_the_same(tmp_path: Path, family: Family) -> None:
    recipe = tiny(tmp_path, family)
    plain, fast = step(recipe), step(recipe, compiled)
    for found, expected in zip(fast.prediction, plain.prediction, strict=True):
        assert 0 < error(found, expected) < SAYS
    assert abs(fast.loss - plain.loss) < SAYS * plain.loss
    assert error(fast.gradient, plain.gradient) < GRADIENT


@FAMILIES
def test_autocast_and_the_plain_attention_are_compiled(tmp_path: Path, family: Family) -> None:
    recipe = tiny(tmp_path, family)
    recipe = replace(recipe, train=replace(recipe.train, precision="bf16"))
    counter = CompileCounterWithBackend("aot_eager")
    plain, fast = step(recipe), step(recipe, lambda student: compiled(student, backend=counter))
    assert counter.frame_count == 1
    for found, expected in zip(fast.prediction, plain.prediction, strict=True):
        assert error(found, expected) < SAYS_BF16


# ---- few forms


@FAMILIES
def test_a_teacher_needs_few_forms(tmp_path: Path, family: Family) -> None:
    """Any batch, prefix and stop, as Alg. 4 and the report's timing ask for them."""
    plain, fast = pair(tiny(tmp_path, family).teacher)
    counter = CompileCounterWithBackend("eager")
    compiled(fast.network, dynamic=True, backend=counter)
    for batch in (6, 4, 8, 1):
        assert torch.equal(greedy(fast, batch), greedy(plain, batch))
    assert counter.frame_count == 2
    layout, codes = plain.layout, greedy(plain, 4)
    for first, stop in ((2, None), (3, None), (2, 3), (1, 3), (layout.steps, None)):
        prefix = codes[:, : layout.before(first)]
        assert torch.equal(greedy(fast, 4, prefix, stop), greedy(plain, 4, prefix, stop))
    plain.filter = fast.filter = Filter(guidance=float(family == "llamagen"))
    for batch in (6, 1):  # a single row is a form of its own, which guidance never has
        assert torch.equal(greedy(fast, batch), greedy(plain, batch))
    assert counter.frame_count <= FORMS // 3, "teacher and student share a limit where they share the block's class"


@FAMILIES
def test_a_student_needs_few_forms(tmp_path: Path, family: Family) -> None:
    recipe = tiny(tmp_path, family)
    teacher = checkpoints.teacher(recipe.teacher)
    counter = CompileCounterWithBackend("eager")
    for _ in range(2):  # a student of the curve, and the next
        plain: Any = stirred(checkpoints.family(recipe.teacher).Student.from_teacher(teacher, 0)).eval()
        fast = copy.deepcopy(plain)
        compiled(fast, backend=counter)
        with torch.no_grad():
            for batch in (1, 4, 16, 3):
                x = torch.randn(batch, plain.layout.length, plain.layout.code_dim)
                condition = Labels(torch.zeros(batch, dtype=torch.long))
                for t in (1, 2):
                    found, expected = (net.jump(x, x, t, condition, 0) for net in (fast, plain))
                    assert error(found, expected) < SAYS
    assert counter.frame_count <= 3


def test_captions_need_few_forms(tmp_path: Path) -> None:
    """Of a teacher and of its student, whatever the positions and lengths of captions."""
    settings = tiny(tmp_path, "llamagen", caption_dim=8, caption_length=24).teacher
    plain, fast = pair(settings)
    counter = CompileCounterWithBackend("eager")
    compiled(fast.network, dynamic=True, backend=counter)
    student: Any = stirred(checkpoints.new_student(settings, plain, {}, 0)).eval()
    quick = copy.deepcopy(student)
    compiled(quick, backend=counter)
    x = torch.randn(6, plain.layout.length, plain.layout.code_dim)
    for batch, positions in ((6, 8), (4, 16), (2, 24), (6, 16)):
        lengths = torch.arange(batch) + positions - batch
        captions = Captions.from_encoder(torch.randn(batch, positions, 8), lengths)
        whole = plain.generate(captions, most_likely)
        assert torch.equal(fast.generate(captions, most_likely), whole)
        assert torch.equal(fast.generate(captions, most_likely, prefix=whole[:, :4]), whole)
        with torch.no_grad():
            found, expected = (net.jump(x[:batch], x[:batch], 3, captions, 0) for net in (quick, student))
        assert error(found, expected) < SAYS
    assert counter.frame_count <= FORMS // 4


# ---- in place


def test_names_copies_and_pickles_stay_plain() -> None:
    network = nn.Module()
    network.layers = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    names = list(network.state_dict())
    compiled(network)
    assert list(network.state_dict()) == names
    assert all(block._compiled_call_impl is not None for block in network.layers)
    for made in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert all(block._compiled_call_impl is None for block in made.layers)


# ---- the compiler


@pytest.mark.parametrize(
    ("device", "variable", "usual"), [("cpu", "CXX", r"C\+\+ compiler"), ("cuda", "CC", "C compiler")]
)
def test_a_machine_without_a_compiler(device: str, variable: str, usual: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(variable, raising=False)
    compilation.check("train.compile", device)
    monkeypatch.setenv(variable, "no-such-compiler")
    with pytest.raises(ValueError, match=rf"train.compile is true, but .* no {usual} \(no-such-compiler\)"):
        compilation.check("train.compile", device)
    monkeypatch.delenv(variable)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ValueError, match=f"install one, name it in {variable}, or set train.compile to false"):
        compilation.check("train.compile", device)


@pytest.mark.parametrize(
    ("name", "job"), [("teacher", generate.generate), ("train", training_plan.check), ("evaluate", plan.prepare)]
)
def test_every_job_asks_before_it_works(
    name: str, job: Callable[[Recipe], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny(tmp_path)
    recipe = replace(
        recipe, dry_run=name != "teacher", evaluate=replace(recipe.evaluate, samplers=[{"name": "Autoregressive"}])
    )
    monkeypatch.setattr(plan.instruments, "check", lambda *args: {})
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match=rf"{name}\.compile is true"):
        job(replace(recipe, **{name: replace(getattr(recipe, name), compile=True)}))
