"""A teacher in fp16 is nearer to the exact one than in bf16, and says when fp16 ends."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from step import error, stirred
from tape import Tapes
from tiny import CONFIG, Family, tiny
from torch._dynamo.testing import CompileCounterWithBackend

from pipeline.flow import matching
from pipeline.host.errors import Refused
from pipeline.models import checkpoints
from pipeline.models.base import Teacher, nearest
from pipeline.models.conditions import Labels
from pipeline.models.float16 import Float16
from pipeline.models.graphs import Graphs
from pipeline.models.var.transformer import unit
from pipeline.numerics.compilation import compiled
from pipeline.numerics.precision import products
from pipeline.pairs.facts import PairFacts
from pipeline.pairs.memory import trace_replica
from pipeline.pairs.replica import Replica
from pipeline.recipe import Recipe
from pipeline.sampling.samplers import Autoregressive, Models
from pipeline.settings.teacher import Filter, TeacherSettings
from pipeline.settings.train import TrainSettings
from tests.models.test_graphs import Drawn, assert_equal

FAMILIES = pytest.mark.parametrize("family", list(CONFIG))
LAST = {"var": "blocks.1.ffn.fc2.weight", "llamagen": "layers.1.feed_forward.w1.weight"}
FIRST = {"var": "blocks.0.ffn.fc1.weight", "llamagen": "layers.0.feed_forward.w1.weight"}
QKV = {"var": "blocks.0.attn.mat_qkv.weight", "llamagen": "layers.0.attention.wqkv.weight"}


def in_(recipe: Recipe, precision: Any) -> Recipe:
    return replace(recipe, teacher=replace(recipe.teacher, precision=precision))


def with_large(recipe: Recipe, name: str) -> Recipe:
    """The teacher's file with one weight multiplied, so that it stays in float16's range and its products do not."""
    weights = load_file(recipe.teacher.checkpoint)
    weights[name] *= 60_000 / weights[name].abs().max()
    checkpoints.save(weights, recipe.teacher.checkpoint, {})
    return recipe


# ---- the same numbers, nearly


def logits_in(recipe: Recipe, precision: str, device: str = "cpu") -> torch.Tensor:
    """What the teacher says of three images, its weights well stirred."""
    teacher = checkpoints.teacher(in_(recipe, precision).teacher)
    stirred(teacher.network)
    teacher, layout = teacher.to(device), teacher.layout
    codes = torch.randint(layout.vocabulary, (3, layout.length), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        out = teacher(Labels(torch.arange(3, device=device)), codes.to(device))
    teacher.check()
    assert teacher.codebook.dtype == torch.float32
    return out.cpu()


@FAMILIES
def test_fp16_is_several_times_nearer_than_bf16(tmp_path: Path, family: Family) -> None:
    recipe = tiny(tmp_path, family)
    logits = {precision: logits_in(recipe, precision) for precision in ("fp32", "fp16", "bf16")}
    assert logits["fp16"].dtype == torch.float32
    low, lower = (error(logits[precision], logits["fp32"]) for precision in ("fp16", "bf16"))
    assert 1e-6 < low < lower / 5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@FAMILIES
def test_fp16_on_a_gpu(tmp_path: Path, family: Family) -> None:
    """By a GPU's own products of float16, which a CPU makes through float32."""
    recipe = tiny(tmp_path, family)
    exact = logits_in(recipe, "fp32")
    low, lower = (error(logits_in(recipe, precision, "cuda"), exact) for precision in ("fp16", "bf16"))
    assert low < lower / 3
    assert low < 3 * error(logits_in(recipe, "fp16"), exact)


@FAMILIES
def test_what_is_float16_and_what_is_float32(tmp_path: Path, family: Family) -> None:
    teacher = checkpoints.teacher(in_(tiny(tmp_path, family), "fp16").teacher)
    seen: dict[torch.dtype, set[str]] = {torch.float16: set(), torch.float32: set()}
    for name, part in teacher.network.named_modules():
        # A closure's default binds the name.
        part.register_forward_hook(lambda _, args, out, name=name: seen[out.dtype].add(name.rsplit(".", 1)[-1]))
    Drawn(teacher, 0)
    products_of_blocks = {
        "attn",
        "ffn",
        "proj",
        "fc1",
        "fc2",
        "attention",
        "feed_forward",
        "wqkv",
        "wo",
        "w1",
        "w2",
        "w3",
    }
    assert seen[torch.float16] <= products_of_blocks
    assert {"0", "1", "head" if family == "var" else "output"} <= seen[torch.float32], "blocks hand on float32"
    assert teacher.network.cache(1, 1).dtype == torch.float16
    assert all(tensor.dtype == torch.float32 for tensor in teacher.tokenizer.state_dict().values())


def test_flow_matching_stays_in_full_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    noise, codebook = torch.randn(300, 8, generator=generator), torch.randn(64, 8, generator=generator)
    log_p = torch.randn(300, 64, generator=generator).log_softmax(-1)
    exact, closest = matching.match(noise, log_p, codebook), nearest(noise, codebook)
    with torch.autocast("cpu", torch.float16):
        assert (noise @ codebook.T).dtype == torch.float16
        assert torch.equal(matching.match(noise, log_p, codebook), exact)
        assert torch.equal(nearest(noise, codebook), closest)


def test_products_of_float16_have_float32_sums() -> None:
    switch = torch.backends.cuda.matmul
    before = switch.allow_fp16_reduced_precision_reduction
    switch.allow_fp16_reduced_precision_reduction = True  # torch's default
    with products("fp16"):
        assert not switch.allow_fp16_reduced_precision_reduction
        assert torch.get_float32_matmul_precision() == "highest"
    assert switch.allow_fp16_reduced_precision_reduction
    switch.allow_fp16_reduced_precision_reduction = before


@FAMILIES
def test_a_plan_counts_float16(tmp_path: Path, family: Family) -> None:
    recipe = tiny(tmp_path, family)
    plain, low = (trace_replica(in_(recipe, precision)) for precision in ("fp32", "fp16"))
    assert low.fixed < plain.fixed, "the weights of the blocks"
    assert low.sample < plain.sample, "keys and values"


# ---- recorded and compiled


@pytest.mark.parametrize(
    ("family", "config"), [("var", {}), ("llamagen", {}), ("llamagen", {"caption_dim": 8, "caption_length": 16})]
)
def test_recorded_steps_draw_the_same_and_notice_the_same(tmp_path: Path, family: Family, config: dict) -> None:
    eager = checkpoints.teacher(in_(tiny(tmp_path, family, **config), "fp16").teacher)
    stirred(eager.network)
    recorded = copy.deepcopy(eager)
    recorded.graphs = Graphs(lambda: Tapes(recorded), "cpu")
    for seed in range(4):
        assert_equal(Drawn(recorded, seed), Drawn(eager, seed))
        recorded.check()
    recorded.network.get_parameter(LAST[family]).fill_(60_000)  # in place: the recording reads it
    Drawn(recorded, 4)
    with pytest.raises(Refused, match=r"teacher\.precision is fp16"):
        recorded.check()


@FAMILIES
def test_blocks_compiled_in_float16(tmp_path: Path, family: Family) -> None:
    torch._dynamo.reset()
    plain = checkpoints.teacher(in_(tiny(tmp_path, family), "fp16").teacher)
    stirred(plain.network)
    fast = copy.deepcopy(plain)
    counter = CompileCounterWithBackend("eager")
    compiled(fast.network, dynamic=True, backend=counter)
    found, expected = Drawn(fast, 0, 4), Drawn(plain, 0, 4)
    assert counter.frame_count == 2, "of the first and of later positions"
    assert_equal(found, expected)
    torch._dynamo.reset()


# ---- where float16 ends


@pytest.mark.faults("teacher: overflow in fp16")
@FAMILIES
@pytest.mark.parametrize("names", [FIRST, LAST, QKV], ids=["first feed-forward", "last feed-forward", "attention"])
def test_numbers_beyond_float16_are_noticed(tmp_path: Path, family: Family, names: dict[Family, str]) -> None:
    """By whoever makes pairs and whoever draws for a report; bf16 holds the same numbers."""
    recipe = with_large(tiny(tmp_path, family), names[family])
    made = Replica(in_(recipe, "fp16"), PairFacts.of(in_(recipe, "fp16")))
    with pytest.raises(Refused, match=r"precision is fp16, and in the teacher's blocks a number left float16's"):
        made.rows(0, 4)
    models = Models(made.teacher, None, matching.Solver(), 0, teacher_precision="fp16")
    with pytest.raises(Refused, match=r"set teacher\.precision to bf16, tf32 or fp32"):
        Autoregressive().draw(models, range(2))
    Replica(in_(recipe, "bf16"), PairFacts.of(in_(recipe, "bf16"))).rows(0, 4)


@FAMILIES
def test_a_check_forgets_what_it_has_said(tmp_path: Path, family: Family) -> None:
    teacher = checkpoints.teacher(in_(tiny(tmp_path, family), "fp16").teacher)
    kept = teacher.network.get_parameter(LAST[family]).clone()
    teacher.network.get_parameter(LAST[family]).fill_(60_000)
    Drawn(teacher, 0)
    with pytest.raises(Refused):
        teacher.check()
    teacher.network.get_parameter(LAST[family]).copy_(kept)
    Drawn(teacher, 0)
    teacher.check()


def test_a_length_beyond_float16_is_no_overflow() -> None:
    """64 channels of 60,000 are within the range and their length of 480,000 is not: as infinity it made them 0."""
    torch.testing.assert_close(unit(torch.full((1, 64), 60_000.0).half()), torch.full((1, 64), 0.125))


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_infinite_keys_are_noticed(value: float) -> None:
    """A key of minus infinity may just get no weight: what attention says is then finite and wrong."""
    watch = Float16()
    watch.switch_on([])
    keys = torch.zeros(2, 3, 4, dtype=torch.float16)
    watch.watch(keys)
    watch.check()
    keys[1, 2, 3] = value
    watch.watch(keys)
    with pytest.raises(Refused):
        watch.check()


@pytest.fixture
def unwritten_is_nan() -> Iterator[None]:
    """Memory that nobody wrote holds NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("condition", [{}, {"caption_dim": 8, "caption_length": 16}], ids=["classes", "captions"])
@pytest.mark.parametrize("interval", [-1, 0, 3])
def test_keys_that_nobody_wrote_are_not_looked_at(
    tmp_path: Path, interval: int, condition: dict, unwritten_is_nan: None
) -> None:
    recipe = tiny(tmp_path, "llamagen", guidance_interval=interval, **condition)
    settings = replace(in_(recipe, "fp16").teacher, filter=Filter(2.0))
    teacher = checkpoints.teacher(settings)
    assert teacher.network.cache(1, 1).isnan().all()
    recorded = copy.deepcopy(teacher)
    recorded.graphs = Graphs(lambda: Tapes(recorded), "cpu")
    whole = Drawn(teacher, 0)
    for how in ({}, {"stop": 3}, {"prefix": whole.codes[:, :4]}, {"prefix": whole.codes[:, :2], "stop": 3}):
        Drawn(teacher, 1, **how)
        teacher.check()
    for stop in (3, 3, None):
        Drawn(recorded, 2, stop=stop)
        recorded.check()


def keys_of(teacher: Teacher) -> torch.Tensor:
    """The rows of the last layer's weight that make keys, but not queries and values."""
    dim = teacher.config.dim
    return teacher.network.get_parameter("layers.1.attention.wqkv.weight")[dim : 2 * dim]


def test_infinite_keys_end_a_generation(tmp_path: Path) -> None:
    """Of one label's image alone, in one channel: enough to be named."""
    teacher = checkpoints.teacher(in_(tiny(tmp_path, "llamagen"), "fp16").teacher)
    keys_of(teacher).fill_(30_000)
    Drawn(teacher, 0)
    with pytest.raises(Refused):
        teacher.check()


# ---- settings


def test_fp16_is_for_teachers() -> None:
    assert TeacherSettings(precision="fp16")
    with pytest.raises(Refused, match=r"train\.precision is fp16, whose gradients vanish or overflow without loss"):
        TrainSettings(precision="fp16")
    with pytest.raises(Refused, match=r"evaluate\.precision is fp16, which only teachers know"):
        replace(Recipe().evaluate, precision="fp16")


def test_a_family_that_knows_no_float16_is_refused(tmp_path: Path) -> None:
    teacher = checkpoints.teacher(tiny(tmp_path).teacher)
    teacher.network = torch.nn.Linear(1, 1)
    with pytest.raises(Refused, match=r"teacher\.precision is fp16, which my\.family does not know"):
        checkpoints.cast(teacher, TeacherSettings(family="my.family", precision="fp16"))
    teacher.check()
