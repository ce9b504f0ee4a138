"""Recorded jumps and decoding make the images of eager ones; ``tape`` stands in for CUDA, as for AR steps."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from step import stirred
from tape import Tapes
from tiny import Family, tiny, tiny_text
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from pipeline.command_line import parse
from pipeline.flow.matching import Solver
from pipeline.host.errors import Refused
from pipeline.models import checkpoints
from pipeline.models.conditions import Captions, Labels, Prompts, tensors_of
from pipeline.models.graphs import Graphs, Replays
from pipeline.numerics.precision import Precision
from pipeline.pairs.facts import conditioning
from pipeline.recipe import Recipe
from pipeline.sampling.samplers import FewStep, Inputs, Models, Sampler
from pipeline.settings.cluster import ClusterSettings
from pipeline.settings.evaluate import EvaluateSettings
from pipeline.settings.teacher import TeacherSettings
from pipeline.text import encoder
from tests.models.test_graphs import CAPTIONS, GPU, Drawn, condition_of, condition_without_numbers

NETWORKS = pytest.mark.parametrize(("family", "config"), [("var", {}), ("llamagen", {}), ("llamagen", CAPTIONS)])
ONE, TWO, CODES = FewStep(1, (1,)), FewStep(1, (1, 2)), FewStep(3, (1, 3))
RECIPES = Path(__file__).parents[2] / "jobs" / "recipes"


def both(folder: Path, family: Family, config: dict[str, Any], precision: Precision = "fp32") -> tuple[Models, Models]:
    return twice(tiny(folder, family, **config).teacher, precision)


def twice(settings: TeacherSettings, precision: Precision = "fp32") -> tuple[Models, Models]:
    """The same networks twice: eager, and with jumps and decoding recorded on tape.

    The student is one that could be trained: autocast keeps casts of such weights alone.
    """
    teacher = checkpoints.teacher(settings)
    student = stirred(checkpoints.new_student(settings, teacher, {}, 0)).eval()
    eager = Models(teacher, student, Solver(), 0, student_precision=precision)  # type: ignore[arg-type]
    recorded = copy.deepcopy(eager)
    recorded.student.jumps = Replays(lambda: Tapes(recorded.student), "cpu")
    recorded.teacher.decodes = Replays(lambda: Tapes(recorded.teacher), "cpu")
    return eager, recorded


def drawn(models: Models, sampler: Sampler, seed: int, batch: int = 3, positions: int = 8) -> tuple[Tensor, Tensor]:
    """Embeddings and images of a batch: other conditions and other noise for every ``seed``."""
    random, layout = torch.Generator().manual_seed(seed), models.layout
    noise = torch.randn(batch, layout.length, layout.code_dim, generator=random).to(models.device)
    condition = condition_of(models.teacher, batch, random, positions)
    with torch.no_grad():
        embeddings = sampler.sample(models, Inputs(condition, noise, torch.empty(0)))
        return embeddings, models.decode(embeddings, sampler.student)


def assert_equal(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    for mine, other in zip(found, expected, strict=True):
        assert torch.equal(mine, other)
        assert mine.stride() == other.stride(), "what comes after it runs the same kernels"


def size_of(replays: Replays | None) -> int | None:
    """The batch whose graphs are kept."""
    assert replays is not None
    return len(next(iter(replays.kept.values())).out) if replays.kept else None


# ---- the same images


@NETWORKS
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_recorded_jumps_and_decoding_draw_the_same(
    tmp_path: Path, family: Family, config: dict[str, Any], precision: Precision
) -> None:
    """In one step and in two, codes and embeddings, with other inputs than those that were recorded."""
    eager, recorded = both(tmp_path, family, config, precision)
    asked = [(sampler, seed) for seed in range(4) for sampler in (ONE, TWO, CODES)]
    expected = [drawn(eager, *one) for one in asked]
    found = [drawn(recorded, *one) for one in asked]
    assert len(recorded.student.jumps.kept) == 4, "from step 1 and 2, and with another split from 1 and 3"
    assert len(recorded.teacher.decodes.kept) == 1
    for mine, other in zip(found, expected, strict=True):  # after all of them: nothing was overwritten
        assert_equal(mine, other)
    assert len({tuple(embeddings.flatten().tolist()) for embeddings, _ in found}) == len(found)


@NETWORKS
def test_only_the_second_of_a_size_in_a_row_is_recorded(tmp_path: Path, family: Family, config: dict[str, Any]) -> None:
    eager, recorded = both(tmp_path, family, config)
    kept = []
    for seed, batch in enumerate((2, 4, 4, 4, 1, 4, 2, 2, 4)):
        assert_equal(drawn(recorded, ONE, seed, batch), drawn(eager, ONE, seed, batch))
        kept.append((size_of(recorded.student.jumps), size_of(recorded.teacher.decodes)))
    assert kept == [(size, size) for size in (None, None, 4, 4, 4, 4, 4, 2, 2)]


def test_two_steps_of_a_last_batch_are_not_two_batches(tmp_path: Path) -> None:
    """Both jumps of a generation are of one size, and neither comes twice."""
    eager, recorded = both(tmp_path, "var", {})
    for seed, batch in enumerate((4, 4, 4, 1, 4)):
        assert_equal(drawn(recorded, TWO, seed, batch), drawn(eager, TWO, seed, batch))
        assert size_of(recorded.student.jumps) in (None, 4)


def test_captions_of_other_positions_are_other_graphs(tmp_path: Path) -> None:
    eager, recorded = both(tmp_path, "llamagen", CAPTIONS)
    for seed, positions in enumerate((8, 8, 8, 16, 8, 16, 16, 16)):
        assert_equal(drawn(recorded, TWO, seed, 3, positions), drawn(eager, TWO, seed, 3, positions))
    (first, *_) = recorded.student.jumps.kept.values()
    assert first.given[2].shape == (3, 16, CAPTIONS["caption_dim"])


def test_prompts_are_encoded_and_then_replayed(tmp_path: Path) -> None:
    recipe = tiny_text(tmp_path)
    encode = encoder.conditioner(recipe.text, "cpu")
    eager, recorded = (
        replace(models, conditioning=conditioning(recipe), encode=encode) for models in twice(recipe.teacher)
    )
    for start in range(0, 16, 4):
        ids = range(start, start + 4)
        found, expected = (TWO.draw(models, ids) for models in (recorded, eager))
        assert torch.equal(found, expected)
    assert len(recorded.student.jumps.kept) == 2


@NETWORKS
def test_replays_run_no_python_of_the_networks(tmp_path: Path, family: Family, config: dict[str, Any]) -> None:
    _, recorded = both(tmp_path, family, config)
    for seed in range(2):
        drawn(recorded, TWO, seed)
    calls: list[str] = []
    recorded.student.layers[0].register_forward_hook(lambda *_: calls.append("jump"))
    recorded.teacher.tokenizer.decoder.register_forward_hook(lambda *_: calls.append("decode"))
    drawn(recorded, TWO, 2)
    assert not calls
    drawn(recorded, TWO, 3, 2)
    assert calls == ["jump", "jump", "decode"], "another size runs"


def test_another_precision_is_another_graph(tmp_path: Path) -> None:
    """Rows of the teacher and rows of the student are decoded in their own."""
    eager, recorded = both(tmp_path, "var", {})
    x = torch.randn(3, eager.layout.length, eager.layout.code_dim)
    recorded = replace(recorded, student_precision="tf32")
    with torch.no_grad():
        for _ in range(3):
            for student in (True, False):
                recorded.decode(x, student)
        assert torch.equal(recorded.decode(x, False), eager.decode(x, False))
    assert len(recorded.teacher.decodes.kept) == 2


# ---- where there is nothing to record


def test_on_a_cpu_nothing_is_recorded(tmp_path: Path) -> None:
    """A student may be drawn with elsewhere than its recipe ran; its teacher's ``graphs`` come along."""
    eager, elsewhere = both(tmp_path, "var", {})
    elsewhere.student.jumps, elsewhere.teacher.decodes = Replays(), Replays()
    elsewhere.teacher.graphs = Graphs()
    for seed in range(3):
        assert_equal(drawn(elsewhere, TWO, seed), drawn(eager, TWO, seed))
        assert torch.equal(Drawn(elsewhere.teacher, seed).codes, Drawn(eager.teacher, seed).codes)
    assert not elsewhere.student.jumps.kept
    assert not elsewhere.teacher.decodes.kept
    assert elsewhere.teacher.graphs.recording is None


def test_a_condition_is_its_tensors_or_is_not_recorded(tmp_path: Path) -> None:
    labels, captions = Labels(torch.arange(3)), Captions(torch.ones(3, 2, 4), torch.ones(3, 2, dtype=torch.bool))
    for condition in (labels, captions):
        again = type(condition)(*tensors_of(condition))
        assert all(a is b for a, b in zip(tensors_of(again), tensors_of(condition), strict=True))
    assert tensors_of(Prompts(("a", "b"))) == ()
    _, recorded = both(tmp_path, "var", {})
    x = torch.zeros(2, recorded.layout.length, recorded.layout.code_dim)
    for _ in range(3):
        with pytest.raises(TypeError, match="was given Prompts"):
            recorded.student.jump(x, x, 1, Prompts(("a", "b")), 0)
    assert not recorded.student.jumps.returned


@NETWORKS
def test_nothing_asks_what_was_computed(tmp_path: Path, family: Family, config: dict[str, Any]) -> None:
    """Tensors without numbers jump and are decoded, so no GPU is waited for."""
    models, _ = both(tmp_path, family, config)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        noise = torch.zeros(3, models.layout.length, models.layout.code_dim)
        embeddings = TWO.sample(models, Inputs(condition_without_numbers(config), noise, noise))
        assert isinstance(models.decode(embeddings, True), FakeTensor)


# ---- settings


def test_auto_is_settled_by_where_the_models_run() -> None:
    both_auto: dict[str, Any] = {
        "teacher": TeacherSettings(graphs="auto"),
        "evaluate": EvaluateSettings(graphs="auto"),
    }
    for cluster, on in (
        (ClusterSettings(), False),
        (ClusterSettings(gpus=1, device="cpu"), False),
        (ClusterSettings(gpus=0.5), True),
    ):
        recipe = Recipe(cluster=cluster, **both_auto)
        assert (recipe.records("teacher"), recipe.records("evaluate")) == (on, on)
        assert recipe.resolved()["teacher"]["graphs"] == "auto", "as it was written"
    plain, on = Recipe(), Recipe(cluster=ClusterSettings(gpus=1), evaluate=EvaluateSettings(graphs=True))
    assert (plain.records("teacher"), plain.records("evaluate")) == (False, False)
    assert (on.records("teacher"), on.records("evaluate")) == (False, True)
    with pytest.raises(Refused, match=r"evaluate\.graphs is true, but the models run on the CPU"):
        Recipe(evaluate=EvaluateSettings(graphs=True))
    with pytest.raises(Refused, match=r"teacher\.graphs is 'maybe'; it must be true or false, or auto\."):
        TeacherSettings(graphs="maybe")  # type: ignore[arg-type]
    for word, value in (("auto", "auto"), ("true", True), ("false", False)):
        given = parse(None, ["--evaluate.graphs", word, "--cluster.gpus", "1"])
        assert given.evaluate.graphs is value or given.evaluate.graphs == value == "auto"


def test_recipes_of_gpus_record() -> None:
    whole = [path for path in RECIPES.glob("*.yaml") if not path.stem.endswith("-released")]  # which lie over others
    of_gpus = [recipe for path in whole if (recipe := parse(None, ["--config", str(path)])).cluster.gpus]
    assert len(of_gpus) == 6
    for recipe in of_gpus:
        wanted = False if recipe.captions.uri else "auto"  # of prompts, positions differ from batch to batch
        assert (recipe.teacher.graphs, recipe.evaluate.graphs) == (wanted, wanted), recipe.name


# ---- on a GPU


@GPU
@NETWORKS
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_cuda_graphs_draw_what_eager_jumps_draw(
    tmp_path: Path, family: Family, config: dict[str, Any], precision: Precision
) -> None:
    eager, recorded = (
        replace(models, teacher=models.teacher.cuda(), student=models.student.cuda(), device="cuda")
        for models in both(tmp_path, family, config, precision)
    )
    recorded.student.jumps, recorded.teacher.decodes = Replays(), Replays()
    for seed, batch in enumerate((4, 4, 4, 1, 4, 2, 2, 2)):
        found, expected = (drawn(models, TWO, seed, batch) for models in (recorded, eager))
        assert torch.equal(found[0], expected[0])
        # cuDNN may choose other convolutions for the second of two networks.
        torch.testing.assert_close(found[1], expected[1], atol=1e-3, rtol=1e-3)
    assert size_of(recorded.student.jumps) == size_of(recorded.teacher.decodes) == 2
