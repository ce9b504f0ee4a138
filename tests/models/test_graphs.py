"""Recorded AR steps draw the codes of eager ones, whatever changed since the recording.

``tape`` stands in for CUDA: it replays what was recorded, operation for operation, and spoils all other memory.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from step import stirred
from tape import Tapes
from tiny import CONFIG, Family, tiny
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode

from pipeline.flow import matching
from pipeline.models import checkpoints
from pipeline.models.base import Teacher
from pipeline.models.conditions import Captions, Condition, Labels
from pipeline.models.graphs import Cuda, Graphs
from pipeline.numerics.compilation import compiled
from pipeline.recipe import Recipe
from pipeline.settings.cluster import ClusterSettings
from pipeline.settings.teacher import Filter, TeacherSettings

FAMILIES = pytest.mark.parametrize("family", ["var", "llamagen"])
FILTERS = {
    "var": [Filter(0.0), Filter(1.5), Filter(1.5, 0.8, 9, 0.9)],
    "llamagen": [Filter(1.0), Filter(2.0), Filter(2.0, 0.8, 9, 0.9)],
}
CASES = [(family, filter, {}) for family, filters in FILTERS.items() for filter in filters]
CAPTIONS = {"caption_dim": 8, "caption_length": 16}
CASES += [("llamagen", Filter(2.0), {"guidance_interval": k}) for k in (0, 3)] + [
    ("var", Filter(1.5), {"shared_aln": True})
]
CASES += [("llamagen", filter, CAPTIONS) for filter in FILTERS["llamagen"]]
CASES += [("llamagen", Filter(2.0), CAPTIONS | {"guidance_interval": 3})]
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def pair(settings: TeacherSettings) -> tuple[Teacher, Teacher]:
    """The same teacher twice, its weights well stirred: eager, and recorded on tape."""
    eager = checkpoints.teacher(settings)
    stirred(eager.network)
    recorded = copy.deepcopy(eager)
    recorded.graphs = Graphs(lambda: Tapes(recorded), "cpu")
    return eager, recorded


def condition_of(teacher: Teacher, batch: int, random: torch.Generator, positions: int = 8) -> Condition:
    """Labels, or captions of 1 to ``positions`` tokens in as many positions, as the teacher wants them."""
    device, width = teacher.codebook.device, getattr(teacher.config, "caption_dim", 0)
    if not width:
        return Labels(torch.randint(teacher.layout.classes, (batch,), generator=random).to(device))
    features = torch.randn(batch, positions, width, generator=random)
    lengths = torch.randint(1, positions + 1, (batch,), generator=random)
    return Captions.from_encoder(features, lengths).to(device)


class Drawn:
    """A generation: other conditions and noise for every ``seed``, codes by flow matching; keeps what it was shown."""

    def __init__(self, teacher: Teacher, seed: int, batch: int = 3, positions: int = 8, **how: int | Tensor) -> None:
        random, layout = torch.Generator().manual_seed(seed), teacher.layout
        device = teacher.codebook.device
        noise = torch.randn(batch, layout.length, layout.code_dim, generator=random).to(device)
        condition = condition_of(teacher, batch, random, positions)
        self.shown: list[Tensor] = []

        def choose(t: int, log_p: Tensor) -> Tensor:
            self.shown.append(log_p)
            return matching.match(noise[:, layout.span(t)], log_p, teacher.codebook)

        self.codes = teacher.generate(condition, choose, **how)


def assert_equal(found: Drawn, expected: Drawn) -> None:
    """Codes and every log-probability, bit for bit, the earliest that were shown among them."""
    assert torch.equal(found.codes, expected.codes)
    for mine, other in zip(found.shown, expected.shown, strict=True):
        assert torch.equal(mine, other)


# ---- the same codes


@pytest.mark.parametrize(("family", "filter", "config"), CASES)
def test_recorded_steps_draw_the_same(tmp_path: Path, family: Family, filter: Filter, config: dict) -> None:
    eager, recorded = pair(replace(tiny(tmp_path, family, **config).teacher, filter=filter))
    expected = [Drawn(eager, seed) for seed in range(5)]
    found = [Drawn(recorded, seed) for seed in range(5)]
    assert recorded.graphs is not None
    assert recorded.graphs.recording is not None
    assert len(recorded.graphs.recording.steps) == eager.layout.steps
    for mine, other in zip(found, expected, strict=True):  # after all of them: nothing shown was overwritten
        assert_equal(mine, other)
    assert len({tuple(drawn.codes.flatten().tolist()) for drawn in found}) == 5


@FAMILIES
def test_only_the_second_of_a_batch_size_in_a_row_is_recorded(tmp_path: Path, family: Family) -> None:
    eager, recorded = pair(tiny(tmp_path, family).teacher)
    graphs, kept = recorded.graphs, []
    for seed, batch in enumerate((2, 4, 4, 4, 1, 4, 2, 2, 4)):
        assert_equal(Drawn(recorded, seed, batch), Drawn(eager, seed, batch))
        kept.append(graphs.recording and graphs.recording.shapes[0][0])
    assert kept == [None, None, 4, 4, 4, 4, 4, 2, 2]


@FAMILIES
def test_other_filters_prefixes_and_stops(tmp_path: Path, family: Family) -> None:
    eager, recorded = pair(tiny(tmp_path, family).teacher)
    layout, codes = eager.layout, Drawn(eager, 0).codes
    for seed in range(3):
        assert_equal(Drawn(recorded, seed, stop=3), Drawn(eager, seed, stop=3))
    steps = recorded.graphs.recording.steps
    assert list(steps) == [1, 2]
    for how in ({"prefix": codes[:, : layout.before(2)]}, {"prefix": codes[:, : layout.before(3)], "stop": 3}):
        assert_equal(Drawn(recorded, 7, **how), Drawn(eager, 7, **how))
    assert recorded.graphs.recording.steps is steps
    assert_equal(Drawn(recorded, 8), Drawn(eager, 8))
    assert len(steps) == layout.steps, "the others are recorded when they are drawn"
    recorded.filter = eager.filter = Filter(3.0, top_k=5)
    for seed in range(3):
        assert_equal(Drawn(recorded, seed), Drawn(eager, seed))
    assert recorded.graphs.recording.steps is not steps


@FAMILIES
def test_replays_run_no_python_of_the_network(tmp_path: Path, family: Family) -> None:
    _, recorded = pair(tiny(tmp_path, family).teacher)
    for seed in range(2):
        Drawn(recorded, seed)
    calls: list[int] = []
    recorded.network.layers[0].register_forward_hook(lambda *_: calls.append(1))
    Drawn(recorded, 2)
    assert not calls


def test_bfloat16(tmp_path: Path) -> None:
    for family in CONFIG:
        eager, recorded = pair(replace(tiny(tmp_path, family).teacher, precision="bf16"))
        for seed in range(3):
            assert_equal(Drawn(recorded, seed), Drawn(eager, seed))


@FAMILIES
def test_compiled_blocks_need_no_other_forms(tmp_path: Path, family: Family) -> None:
    """A tape cannot look into a compiled block; here a replay calls the step again."""
    torch._dynamo.reset()
    eager, fast = pair(tiny(tmp_path, family).teacher)
    counter = CompileCounterWithBackend("eager")
    compiled(fast.network, dynamic=True, backend=counter)

    def again(function: Callable[[], object]) -> Callable[[], object]:
        function()
        return function

    fast.graphs = Graphs(lambda: again, "cpu")
    for seed in range(3):
        assert torch.equal(Drawn(fast, seed, 4).codes, Drawn(eager, seed, 4).codes)
    assert fast.graphs.recording is not None
    assert counter.frame_count == 2, "of the first and of later positions"
    torch._dynamo.reset()


def test_captions_of_other_positions_are_another_recording(tmp_path: Path) -> None:
    """And other captions of as many positions, with their own padding, are not."""
    eager, recorded = pair(tiny(tmp_path, "llamagen", **CAPTIONS).teacher)
    graphs, kept = recorded.graphs, []
    for seed, positions in enumerate((8, 8, 16, 8, 16, 16, 16, 8, 8)):
        assert_equal(Drawn(recorded, seed, 3, positions), Drawn(eager, seed, 3, positions))
        kept.append(graphs.recording and graphs.recording.memory.conditions)
    assert kept == [None, 8, 8, 8, 8, 16, 16, 16, 8]


def test_a_prefix_after_captions_is_not_recorded(tmp_path: Path) -> None:
    eager, recorded = pair(tiny(tmp_path, "llamagen", **CAPTIONS).teacher)
    codes = Drawn(eager, 0).codes
    for seed in range(3):
        assert_equal(Drawn(recorded, seed, stop=4), Drawn(eager, seed, stop=4))
        assert_equal(Drawn(recorded, seed, prefix=codes[:, :2]), Drawn(eager, seed, prefix=codes[:, :2]))
    assert list(recorded.graphs.recording.steps) == [1, 2, 3]


# ---- nothing waits for a GPU


def condition_without_numbers(config: dict) -> Condition:
    if "caption_dim" not in config:
        return Labels(torch.zeros(3, dtype=torch.long))
    return Captions(torch.zeros(3, 8, config["caption_dim"]), torch.ones(3, 8, dtype=torch.bool))


@pytest.mark.parametrize(("family", "filter", "config"), CASES)
def test_no_step_asks_what_was_computed(tmp_path: Path, family: Family, filter: Filter, config: dict) -> None:
    """Tensors without numbers do: no item, no bool, no index by a mask."""
    teacher = checkpoints.teacher(replace(tiny(tmp_path, family, **config).teacher, filter=filter))
    with FakeTensorMode(allow_non_fake_inputs=True):
        with pytest.raises(DataDependentOutputException):
            bool(torch.zeros(3).any())
        condition = condition_without_numbers(config)
        codes = teacher.generate(condition, lambda t, log_p: log_p.argmax(-1))
        assert isinstance(codes, FakeTensor)
        teacher.generate(condition, lambda t, log_p: log_p.argmax(-1), codes[:, : teacher.layout.before(3)])


# ---- the tape itself


def test_a_tape_sees_what_a_graph_sees() -> None:
    """New contents of held memory, not new objects, new numbers or memory that nobody holds."""
    layer = torch.nn.Linear(2, 2, bias=False).requires_grad_(False)
    layer.weight.copy_(torch.eye(2))
    here, factor, lost = torch.ones(1, 2), [2.0], torch.ones(1, 2)
    out, other = torch.zeros(1, 2), torch.zeros(1, 2)
    capture = Tapes([layer, here, out, other])
    replay = capture(lambda: out.copy_(layer(here) * factor[0]))
    here.copy_(torch.tensor([[3.0, 4.0]]))
    factor[0] = 100.0
    replay()
    assert out.tolist() == [[6.0, 8.0]]
    capture(lambda: other.copy_(here + lost))()
    assert other.isnan().all()
    escaped = []
    kept, again = capture(lambda: escaped.append(here + 1)), capture(lambda: other.copy_(here + 2))
    kept()
    assert escaped[1].tolist() == [[4.0, 5.0]]
    again()
    assert escaped[1].isnan().all(), "the pool is shared"


# ---- settings


def test_graphs_need_a_gpu(tmp_path: Path) -> None:
    settings = TeacherSettings(graphs=True)
    for cluster in (ClusterSettings(), ClusterSettings(gpus=1, device="cpu")):
        with pytest.raises(ValueError, match=r"teacher\.graphs is true"):
            Recipe(teacher=settings, cluster=cluster)
    Recipe(teacher=settings, cluster=ClusterSettings(gpus=1))
    tiny_settings = tiny(tmp_path).teacher
    assert checkpoints.teacher(tiny_settings).graphs is None
    assert checkpoints.teacher(replace(tiny_settings, graphs=True)).graphs.backend is Cuda


# ---- on a GPU


@GPU
@pytest.mark.parametrize(("family", "config"), [("var", {}), ("llamagen", {}), ("llamagen", CAPTIONS)])
@pytest.mark.parametrize(
    "how", [{}, {"precision": "fp16"}, {"precision": "bf16"}, {"compile": True}, {"compile": True, "precision": "bf16"}]
)
def test_cuda_graphs_draw_what_eager_steps_draw(tmp_path: Path, family: Family, config: dict, how: dict) -> None:
    settings = replace(tiny(tmp_path, family, **config).teacher, **how)
    eager, recorded = checkpoints.teacher(settings), checkpoints.teacher(replace(settings, graphs=True))
    for teacher in (eager, recorded):
        stirred(teacher.network)
        teacher.cuda()
    for seed, batch in enumerate((4, 4, 4, 1, 4, 2, 2, 2)):
        assert_equal(Drawn(recorded, seed, batch), Drawn(eager, seed, batch))
    assert len(recorded.graphs.recording.steps) == eager.layout.steps


@GPU
@FAMILIES
def test_a_step_does_not_wait_for_the_gpu(tmp_path: Path, family: Family) -> None:
    teacher = checkpoints.teacher(tiny(tmp_path, family).teacher).cuda()
    condition = Labels(torch.arange(3, device="cuda"))
    teacher.generate(condition, lambda t, log_p: log_p.argmax(-1))
    torch.cuda.set_sync_debug_mode("error")
    try:
        teacher.generate(condition, lambda t, log_p: log_p.argmax(-1))
    finally:
        torch.cuda.set_sync_debug_mode("default")
