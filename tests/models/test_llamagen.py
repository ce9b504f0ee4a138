"""LlamaGen against the official code's numbers and against slow oracles.  pytest tests/models/test_llamagen.py"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from pathlib import Path

import fill
import golden
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.models import checkpoints
from pipeline.models.base import Choose, nearest
from pipeline.models.conditions import Captions, Labels
from pipeline.models.llamagen import Config, Student, Teacher, Tokenizer
from pipeline.models.llamagen.student import fit_embeddings
from pipeline.models.llamagen.teacher import log_probabilities
from pipeline.models.llamagen.transformer import LlamaNetwork, rotary
from pipeline.settings.teacher import Filter, TeacherSettings
from pipeline.settings.train import TrainSettings

VQ = golden.load("llamagen_vq")
GPT = golden.load("llamagen_gpt_c2i")
DD = golden.load("dd_llamagen")
SAMPLING = golden.load("sampling")
PLAIN = Filter(guidance=1.0)
GUIDED = Filter(guidance=2.0)
SMALL = Config(
    layers=3, heads=4, dim=64, classes=10, side=4, vocabulary=64, code_dim=8, channels=32, z_channels=32
)  # fmt: skip
DIGITS = Config(
    layers=2, heads=4, dim=32, ffn_multiple=32, classes=10, side=8, vocabulary=64, code_dim=4, channels=32,
    multipliers=(1, 1, 2), z_channels=64, encoder_blocks=1, decoder_blocks=1, attention=False,
)  # fmt: skip
LABELS = Labels(torch.tensor(GPT["inputs"]["labels"]))
TOKENS = golden.tensor(GPT["inputs"]["tokens"])


@cache
def tokenizer() -> Tokenizer:
    return fill.fill_module(Tokenizer(SMALL), VQ["config"]["salt_vq"]).eval().requires_grad_(False)


def make_teacher(filter: Filter, config: Config = SMALL) -> Teacher:
    teacher = Teacher(config, filter).eval().requires_grad_(False)
    fill.fill_module(teacher.network, GPT["config"]["salt_gpt"])
    teacher.tokenizer = tokenizer()
    return teacher


@cache
def student() -> Student:
    net = fill.fill_module(Student(SMALL, tokenizer().codebook), DD["config"]["salt_dd"])
    return net.eval().requires_grad_(False)


class Forced:
    """Feeds given codes whatever the probabilities say and keeps the log-probabilities of every step."""

    def __init__(self, codes: Tensor) -> None:
        self.codes, self.steps, self.log_p = codes, [], []

    def __call__(self, t: int, log_p: Tensor) -> Tensor:
        self.steps.append(t)
        self.log_p.append(log_p)
        return self.codes[:, t - 1 : t]

    @property
    def all(self) -> Tensor:
        return torch.cat(self.log_p, dim=1)


def greedy(t: int, log_p: Tensor) -> Tensor:
    return log_p.argmax(-1)


def assert_log_p(record: dict, found: Tensor, atol: float) -> None:
    """Golden logits hold raw numbers and ``choose`` sees log-probabilities: compare after log_softmax."""
    torch.testing.assert_close(found, golden.tensor(record).log_softmax(-1), atol=atol, rtol=0)


# --- shapes and names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (lambda: Tokenizer(SMALL), VQ),
        (lambda: LlamaNetwork(SMALL), GPT),
        (lambda: Student(SMALL, torch.zeros(64, 8)), DD),
    ],
    ids=["tokenizer", "teacher", "student"],
)
def test_state_dict_is_the_official_one(build, expected):
    net = build()
    assert golden.rows(net) == expected["state_dict"]
    assert sum(p.numel() for p in net.parameters()) == expected["n_parameters"]


@pytest.mark.parametrize(
    ("config", "teacher", "student"),
    [
        (Config(), 110_888_448, 98_321_672),
        (Config(layers=24, heads=16, dim=1024), 342_910_976, 326_155_272),
        (Config(layers=36, heads=20, dim=1280), 774_699_520, None),
    ],
    ids=["B", "L", "XL"],
)
def test_real_sizes_on_the_meta_device(config, teacher, student):
    with torch.device("meta"):
        built = Teacher(config, GUIDED)
        distilled = Student(config, torch.zeros(16_384, 8))
    assert sum(p.numel() for p in built.network.parameters()) == teacher
    assert sum(p.numel() for p in built.tokenizer.parameters()) == 71_883_403
    assert student is None or sum(p.numel() for p in distilled.parameters()) == student


def test_layout():
    layout = Config().layout
    assert (layout.length, layout.steps, layout.image_size) == (256, 256, 256)
    assert (layout.vocabulary, layout.code_dim, layout.classes) == (16_384, 8, 1000)
    assert DIGITS.layout.image_size == 32
    assert not [k for k in Tokenizer(DIGITS).state_dict() if ".attn." in k]
    assert Config(multipliers=[1, 2]) == Config(multipliers=(1, 2))


@pytest.mark.parametrize(
    ("numbers", "sentence"),
    [
        ({"layers": 0}, "layers is 0"),
        ({"multipliers": ()}, r"multipliers is \(\)"),
        ({"guidance_interval": -2}, "guidance_interval is -2"),
        ({"dim": 100}, "multiple of 48"),
        ({"channels": 48}, "multiple of 32"),
    ],
)
def test_impossible_numbers_are_refused(numbers, sentence):
    with pytest.raises(ValueError, match=sentence):
        Config(**numbers)


# --- tokenizer ----------------------------------------------------------------------------------------------


def test_tokenizer_golden():
    outputs, atol, net = VQ["outputs"], VQ["atol"], tokenizer()
    images = torch.from_numpy(fill.image("vq/image", (2, 3, 64, 64)))
    codes = golden.tensor(VQ["inputs"]["codes"])

    def to_map(x: Tensor) -> Tensor:
        return x.reshape(2, 4, 4, 8).permute(0, 3, 1, 2)

    golden.check(outputs["codebook_entry"], to_map(net.codebook[codes]), atol["codebook_entry"])
    golden.check(outputs["decode_code"], net.decode(net.codebook[codes]), atol["decode_code"])
    golden.check(outputs["encoder_z"], net.quant_conv(net.encoder(images)), atol["encoder_z"])
    found = net.encode(images)
    golden.check(outputs["encode_indices"], found.flatten())
    golden.check(outputs["encode_quant"], to_map(net.codebook[found]), atol["encode_quant"])
    reconstruction, codes, _ = net(images)
    golden.check(outputs["reconstruction"], reconstruction, atol["reconstruction"])
    assert torch.equal(codes, found)


def test_tokenizer_refuses_other_image_sizes():
    with pytest.raises(ValueError, match=r"it takes \[B, 3, 64, 64\]"):
        tokenizer().encode(torch.zeros(1, 3, 32, 32))


def test_decode_is_differentiable():
    embeddings = torch.randn(1, 16, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    tokenizer().decode(embeddings).square().sum().backward()
    assert embeddings.grad.abs().amin(-1).min() > 0


def test_vq_training_loss_and_straight_through_gradient():
    torch.manual_seed(0)
    net = Tokenizer(DIGITS)
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    z = net.features(images)
    z.retain_grad()
    net.features = lambda _: z  # the same graph, so that the gradient at z can be read
    reconstruction, codes, loss = net(images)
    chosen = net.codebook[codes]
    assert torch.equal(codes, torch.cdist(z, net.codebook[None]).argmin(-1))
    torch.testing.assert_close(z.norm(dim=-1), torch.ones(2, 64))
    assert loss.item() == pytest.approx(1.25 * (chosen - z).square().mean().item(), rel=1e-5)

    direction = torch.randn_like(reconstruction)
    (reconstruction * direction).sum().backward(retain_graph=True)
    at_code = chosen.detach().requires_grad_()
    (net.decode(at_code) * direction).sum().backward()
    torch.testing.assert_close(z.grad, at_code.grad, atol=1e-3, rtol=0)
    assert at_code.grad.abs().mean() > 0.1
    assert net.quantize.embedding.weight.grad is None  # the code is copied through: only the VQ loss moves it

    z.grad = None
    loss.backward()
    torch.testing.assert_close(z.grad, 0.25 * 2 * (z - chosen).detach() / z.numel())
    code_loss = F.mse_loss(net.codebook[codes], z.detach())
    (expected,) = torch.autograd.grad(code_loss, net.quantize.embedding.weight)
    torch.testing.assert_close(net.quantize.embedding.weight.grad, expected)
    assert net.encoder.conv_in.weight.grad.abs().sum() > 0


# --- teacher ------------------------------------------------------------------------------------------------


def test_rotary_golden():
    rotations = rotary(SMALL, torch.device("cpu"), 1)
    golden.check(GPT["outputs"]["freqs_cis"], rotations, GPT["atol"]["freqs_cis"])


def test_teacher_forced_golden():
    logits = make_teacher(PLAIN)(LABELS, TOKENS)
    golden.check(GPT["outputs"]["teacher_forcing_logits"], logits, GPT["atol"]["teacher_forcing_logits"])


@pytest.mark.parametrize("name", ["ar_cfg_logits", "ar_no_cfg_logits"])
def test_cached_generation_golden(name):
    forced = Forced(TOKENS)
    codes = make_teacher(GUIDED if name == "ar_cfg_logits" else PLAIN).generate(LABELS, forced)
    assert torch.equal(codes, TOKENS)
    assert forced.steps == list(range(1, 17))
    assert_log_p(GPT["outputs"][name], forced.all, GPT["atol"][name])


def test_guidance_interval_golden():
    record = GPT["outputs"]["ar_cfg_interval"]
    forced = Forced(TOKENS)
    make_teacher(GUIDED, replace(SMALL, guidance_interval=record["cfg_interval"])).generate(LABELS, forced)
    assert_log_p(record["logits"], forced.all, GPT["atol"]["ar_cfg_interval.logits"])


def test_filtered_probabilities_golden():
    top_k, top_p = GPT["config"]["filter"]
    forced = Forced(TOKENS)
    filter = Filter(guidance=2.0, temperature=GPT["config"]["temperature"], top_k=top_k, top_p=top_p)
    make_teacher(filter).generate(LABELS, forced)
    assert forced.all.dtype == torch.float32
    golden.check(GPT["outputs"]["ar_filtered_probs"], forced.all.exp(), GPT["atol"]["ar_filtered_probs"])
    golden.check(GPT["outputs"]["ar_filtered_kept_count"], forced.all.isfinite().sum(-1))


def test_greedy_golden():
    golden.check(GPT["outputs"]["ar_greedy_tokens"], make_teacher(GUIDED).generate(LABELS, greedy))


# --- text to image ------------------------------------------------------------------------------------------

T2I = golden.load("llamagen_gpt_t2i")
CAPTIONED = replace(SMALL, layers=2, caption_dim=24)


def captioned(filter: Filter, config: Config = CAPTIONED) -> Teacher:
    net = Teacher(config, filter).eval().requires_grad_(False)
    fill.fill_module(net.network, T2I["config"]["salt_gpt"])
    return net


def captions() -> Captions:
    features = torch.from_numpy(fill.noise("gpt/caption", (2, 120, 24)))
    return Captions.from_encoder(features, torch.tensor(T2I["config"]["caption_len"]))


def test_captions_state_dict_golden():
    net = captioned(PLAIN).network
    assert golden.rows(net) == [row[:3] for row in T2I["state_dict"]]
    assert sum(p.numel() for p in net.parameters()) == T2I["n_parameters"]


def test_captions_are_padded_on_the_left():
    golden.check(T2I["outputs"]["cond_left_padded"], captions().features, T2I["atol"]["cond_left_padded"])
    assert captions().valid.sum(1).tolist() == [7, 31]
    assert captions().valid[:, -7:].all()


def test_captions_rotary_golden():
    rotations = rotary(CAPTIONED, torch.device("cpu"), 120)
    golden.check(T2I["outputs"]["freqs_cis"], rotations, T2I["atol"]["freqs_cis"])


def test_captions_teacher_forced_golden():
    tokens = golden.tensor(T2I["inputs"]["tokens"])
    logits = captioned(PLAIN)(captions(), tokens)
    golden.check(T2I["outputs"]["teacher_forcing_logits"], logits, T2I["atol"]["teacher_forcing_logits"])


@pytest.mark.parametrize("name", ["ar_cfg_logits", "ar_no_cfg_logits", "ar_cfg_interval"])
def test_captions_cached_generation_golden(name: str):
    tokens, record = golden.tensor(T2I["inputs"]["tokens"]), T2I["outputs"][name]
    config = replace(CAPTIONED, guidance_interval=T2I["config"]["cfg_interval"]) if name == "ar_cfg_interval" else None
    guidance = 1.0 if name == "ar_no_cfg_logits" else T2I["config"]["cfg_scale"]
    forced = Forced(tokens)
    captioned(Filter(guidance=guidance), config or CAPTIONED).generate(captions(), forced)
    atol = T2I["atol"]["ar_cfg_interval.logits" if config else name]
    assert_log_p(record["logits"] if config else record, forced.all, atol)


def test_captions_filtered_and_greedy_golden():
    top_k, top_p = T2I["config"]["filter"]
    forced = Forced(golden.tensor(T2I["inputs"]["tokens"]))
    filter = Filter(T2I["config"]["cfg_scale"], T2I["config"]["temperature"], top_k, top_p)
    captioned(filter).generate(captions(), forced)
    golden.check(T2I["outputs"]["ar_filtered_probs"], forced.all.exp(), T2I["atol"]["ar_filtered_probs"])
    golden.check(T2I["outputs"]["ar_filtered_kept_count"], forced.all.isfinite().sum(-1))
    guided = captioned(Filter(guidance=T2I["config"]["cfg_scale"]))
    golden.check(T2I["outputs"]["ar_greedy_tokens"], guided.generate(captions(), greedy))


def test_a_prefix_after_captions_changes_nothing():
    net = captioned(Filter(guidance=3.0))
    whole = net.generate(captions(), greedy)
    assert torch.equal(net.generate(captions(), greedy, prefix=whole[:, :5]), whole)
    assert torch.equal(net.generate(captions(), greedy, stop=4), whole[:, :3])
    first, second = captions().split(1)
    assert torch.equal(torch.cat([net.generate(first, greedy), net.generate(second, greedy)]), whole)


def test_the_null_caption_must_be_in_the_file(tmp_path: Path):
    """It is a buffer, and not one that a constructor could make."""
    state = dict(captioned(PLAIN).network.state_dict())
    with torch.device("meta"):
        net = LlamaNetwork(CAPTIONED)
    torch.save({"model": state}, tmp_path / "t2i.pt")
    checkpoints.load(net, str(tmp_path / "t2i.pt"))
    assert torch.equal(net.cls_embedding.uncond_embedding, state.pop("cls_embedding.uncond_embedding"))
    torch.save({"model": state}, tmp_path / "t2i.pt")
    with torch.device("meta"):
        net = LlamaNetwork(CAPTIONED)
    with pytest.raises(checkpoints.CheckpointError, match=r"lacks cls_embedding\.uncond_embedding \(1 in all\)"):
        checkpoints.load(net, str(tmp_path / "t2i.pt"))


@pytest.mark.parametrize("case", range(len(SAMPLING["outputs"]["llamagen"])))
def test_filter_golden(case):
    expected = SAMPLING["outputs"]["llamagen"][case]
    logits = golden.tensor(SAMPLING["inputs"][expected["logits"]])
    filter = Filter(temperature=expected["temperature"], top_k=expected["top_k"], top_p=expected["top_p"])
    log_p = log_probabilities(logits, filter)
    assert log_p.isfinite().sum(-1).tolist() == expected["kept"]
    golden.check(expected["probs"], log_p.exp(), SAMPLING["atol"][f"llamagen[{case}].probs"])


def test_top_p_keeps_the_code_that_reaches_p_exactly():
    p = torch.tensor([0.125, 0.5, 0.25, 0.125])
    kept = log_probabilities(p.log(), Filter(top_p=0.5)).isfinite()
    assert kept.tolist() == [False, True, True, False]  # "exceeds": 0.5 is not above 0.5, so one more stays


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_cached_equals_uncached(guidance):
    teacher, forced = make_teacher(Filter(guidance=guidance)), Forced(TOKENS)
    teacher.generate(LABELS, forced)
    cond = teacher(LABELS, TOKENS)
    uncond = teacher(Labels(torch.full_like(LABELS.labels, SMALL.classes)), TOKENS)
    expected = (uncond + guidance * (cond - uncond)).log_softmax(-1)
    torch.testing.assert_close(forced.all, expected, atol=1e-4, rtol=0)


def test_teacher_is_causal():
    teacher, other = make_teacher(PLAIN), TOKENS.clone()
    other[:, 7] = (other[:, 7] + 1) % 64
    same = (teacher(LABELS, TOKENS) == teacher(LABELS, other)).all(-1).all(0)
    assert same[:8].all()
    assert not same[8:].any()


@pytest.mark.parametrize("interval", [-1, 5])
@pytest.mark.parametrize("kept", [0, 1, 7, 8, 15, 16])
def test_prefix_equals_continuation(kept, interval):
    teacher = make_teacher(GUIDED, replace(SMALL, guidance_interval=interval))
    whole, rest = Forced(TOKENS), Forced(TOKENS)
    teacher.generate(LABELS, whole)
    codes = teacher.generate(LABELS, rest, prefix=TOKENS[:, :kept])
    assert torch.equal(codes, TOKENS)
    assert rest.steps == list(range(kept + 1, 17))
    if rest.steps:
        torch.testing.assert_close(rest.all, whole.all[:, kept:], atol=1e-4, rtol=0)


def test_stop_ends_before_its_step():
    teacher, forced = make_teacher(GUIDED), Forced(TOKENS)
    assert torch.equal(teacher.generate(LABELS, forced, prefix=TOKENS[:, :4], stop=6), TOKENS[:, :5])
    assert forced.steps == [5]
    with pytest.raises(ValueError, match="stop before AR step 3"):
        teacher.generate(LABELS, forced, prefix=TOKENS[:, :4], stop=3)


@pytest.mark.parametrize(
    ("guidance", "interval", "prefix", "rows"),
    [
        (1.0, -1, 0, [2] * 16),
        (2.0, -1, 0, [4] * 16),
        (2.0, 5, 0, [4] * 7 + [2] * 9),
        (2.0, 5, 10, [2] * 6),
    ],
)
def test_the_null_half_runs_only_where_it_counts(guidance, interval, prefix, rows):
    teacher = make_teacher(Filter(guidance=guidance), replace(SMALL, guidance_interval=interval))
    seen = []
    teacher.network.layers[0].register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    teacher.generate(LABELS, Forced(TOKENS), prefix=TOKENS[:, :prefix])
    assert seen == rows


def test_generation_keeps_no_graph():
    teacher, forced = make_teacher(GUIDED), Forced(TOKENS)
    teacher.network.requires_grad_(True)
    teacher.generate(LABELS, forced)
    assert not forced.all.requires_grad


def test_official_initialisation():
    torch.manual_seed(0)
    net = LlamaNetwork(SMALL)
    assert not net.output.weight.any()
    for name, parameter in net.named_parameters():
        if parameter.dim() > 1 and name != "output.weight":
            assert parameter.std().item() == pytest.approx(0.02, rel=0.1), name


def test_guidance_below_one_is_refused():
    with pytest.raises(ValueError, match="so give 1 or more"):
        Teacher(SMALL, Filter(guidance=0.5))


def test_bf16_network_gives_float32_probabilities_near_the_exact_ones():
    exact, rough = Forced(TOKENS), Forced(TOKENS)
    make_teacher(GUIDED).generate(LABELS, exact)
    teacher = make_teacher(GUIDED)
    teacher.network.bfloat16()
    teacher.generate(LABELS, rough)
    assert rough.all.dtype == torch.float32
    torch.testing.assert_close(rough.all.exp().sum(-1), torch.ones(2, 16))
    assert (rough.all - exact.all).abs().mean() < 0.3  # logits have a spread of 3 and bf16 8 bits


# --- student ------------------------------------------------------------------------------------------------

DD_LABELS = Labels(torch.tensor(DD["inputs"]["labels"]))
NOISE = golden.tensor(DD["inputs"]["noise"])
DATA = golden.tensor(DD["inputs"]["data_idx"])


def data() -> Tensor:
    return tokenizer().codebook[DATA]


def assert_image(record: dict, embeddings: Tensor, atol: float) -> None:
    golden.check(record, (tokenizer().decode(embeddings) + 1) / 2, atol)


@pytest.mark.parametrize("case", [0, 1])
def test_student_golden(case):
    expected, atol, net = DD["outputs"]["forward"][case], DD["atol"], student()
    t, at = expected["t"], f"forward[{case}]"
    x_t = torch.cat([data()[:, :t], NOISE[:, t:]], dim=1)
    golden.check(expected["x_t"], x_t, atol[f"{at}.x_t"])
    logits, embeddings = net(x_t, torch.full((2,), t + 1), DD_LABELS)
    golden.check(expected["logits"], logits, atol[f"{at}.logits"])
    golden.check(expected["tokens"], embeddings, atol[f"{at}.tokens"])
    for split, record in expected["merged"].items():
        merged = net.jump(data(), NOISE, t + 1, DD_LABELS, int(split))
        golden.check(record, merged, atol[f"{at}.merged.{split}"])


def test_student_with_different_t_in_a_batch_golden():
    expected, atol = DD["outputs"]["forward_mixed_t"], DD["atol"]
    t = torch.tensor(expected["t"])
    x_t = torch.where(torch.arange(16)[:, None] < t[:, None, None], data(), NOISE)
    logits, embeddings = student()(x_t, t + 1, DD_LABELS)
    golden.check(expected["logits"], logits, atol["forward_mixed_t.logits"])
    golden.check(expected["tokens"], embeddings, atol["forward_mixed_t.tokens"])


@pytest.mark.parametrize("name", ["one_step", "two_step"])
def test_few_steps_golden(name):
    expected, x = DD["outputs"][name], NOISE
    for t in expected["t_list"]:
        x = student().jump(x, NOISE, t + 1, DD_LABELS, DD["inputs"]["split_t"])
    golden.check(expected["final"], x, DD["atol"][f"{name}.final"])
    golden.check(expected["head_indices"], nearest(x[:, :6], tokenizer().codebook))
    assert_image(expected["image_0_1"], x, DD["atol"][f"{name}.image_0_1"])


def few_steps_with_teacher(net: Student, teacher: Teacher, choose: Choose, start: int, end: int) -> Tensor:
    """Alg. 4: the student, the teacher for the tokens start to end - 1 (counted from 0), the student."""
    split, prefix = DD["inputs"]["split_t"], None
    if start:
        first = net.jump(NOISE, NOISE, 1, DD_LABELS, split)
        prefix = nearest(first, net.codebook)[:, :start]
    codes = teacher.generate(DD_LABELS, choose, prefix, stop=end + 1)
    x = torch.cat([net.codebook[codes], NOISE[:, end:]], dim=1)
    return net.jump(x, NOISE, end + 1, DD_LABELS, split)


@pytest.mark.parametrize("case", [0, 1])
def test_teacher_in_the_loop_golden(case):
    expected, at = DD["outputs"]["teacher_involved"][case], f"teacher_involved[{case}]"
    seen = []

    def choose(t: int, log_p: Tensor) -> Tensor:
        seen.append(log_p)
        return log_p.argmax(-1)

    teacher = make_teacher(Filter(guidance=expected["cfg_scale"]))
    x = few_steps_with_teacher(student(), teacher, choose, expected["start"], expected["end"])
    assert_log_p(expected["teacher_cfg_logits"], torch.cat(seen, 1), DD["atol"][f"{at}.teacher_cfg_logits"])
    golden.check(expected["sequence_indices"], nearest(x[:, : expected["end"]], tokenizer().codebook))
    golden.check(expected["final"], x, DD["atol"][f"{at}.final"])
    assert_image(expected["image_0_1"], x, DD["atol"][f"{at}.image_0_1"])


def test_student_starts_from_its_teacher():
    teacher = make_teacher(GUIDED)
    teacher.network.bfloat16()  # a student trains in float32 whatever its teacher's precision
    before = torch.random.get_rng_state()
    first, again, other = (Student.from_teacher(teacher, seed) for seed in (5, 5, 6))
    assert torch.equal(before, torch.random.get_rng_state())
    copied = set(teacher.network.state_dict()) - {"tok_embeddings.weight"}
    new = {"final_layer_conti.scale_shift_table", "final_layer_conti.linear.weight", "n_d_embed.weight"}
    taught, redrawn = teacher.network.state_dict(), other.state_dict()
    for name, value in first.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, again.state_dict()[name])
        assert torch.equal(value, redrawn[name]) == (name not in new), name
        if name in copied:
            assert torch.equal(value, taught[name].float())
    assert first.n_d_embed.weight.std().item() == pytest.approx(0.02, rel=0.25)
    assert first.final_layer_conti.linear.weight.std().item() == pytest.approx(0.02, rel=0.25)
    assert first.final_layer_conti.scale_shift_table.std().item() == pytest.approx(1 / 8, rel=0.25)
    assert not first.final_layer_conti.linear.bias.any()
    assert all(p.requires_grad for p in first.parameters())
    assert torch.equal(first.codebook, tokenizer().codebook)


def test_student_owns_its_weights():
    teacher = make_teacher(PLAIN)
    net = Student.from_teacher(teacher, 0)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    assert all(p.any() for p in teacher.network.parameters())


def test_input_layer_is_the_least_squares_fit():
    codebook, table = tokenizer().codebook, make_teacher(PLAIN).network.tok_embeddings.weight
    weight, bias = fit_embeddings(codebook, table)
    design = torch.cat([codebook, torch.ones(64, 1)], dim=1).double()
    expected = torch.linalg.lstsq(design, table.double()).solution.float()
    torch.testing.assert_close(weight, expected[:-1].T, atol=1e-4, rtol=0)
    torch.testing.assert_close(bias, expected[-1], atol=1e-4, rtol=0)
    few = torch.eye(8)[:5]  # fewer codes than unknowns: solvable, and the fit is exact
    torch.testing.assert_close(F.linear(few, *fit_embeddings(few, table[:5])), table[:5], atol=1e-3, rtol=0)


def test_llamagen_has_no_choice_of_mask():
    settings = TeacherSettings(family="pipeline.models.llamagen")
    assert checkpoints.student_options(settings, TrainSettings().student_options) == {}
    sentence = "train.mask is paper; LlamaGen students are causal and have no such choice, use released."
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        checkpoints.student_options(settings, {"mask": "paper"})


# --- the small configuration of the embedded default --------------------------------------------------------


def test_small_nets_learn():
    torch.manual_seed(0)
    teacher = Teacher(DIGITS, GUIDED)
    images, condition = torch.rand(8, 3, 32, 32) * 2 - 1, Labels(torch.arange(8))

    def reconstruct() -> Tensor:
        reconstruction, _, loss = teacher.tokenizer(images)
        return F.mse_loss(reconstruction, images) + loss

    codes = teacher.tokenizer.encode(images)

    def predict() -> Tensor:
        return F.cross_entropy(teacher(condition, codes).flatten(0, 1), codes.flatten())

    student = Student.from_teacher(teacher, 0)
    noise = torch.randn(8, 64, 4)

    def distil() -> Tensor:
        logits, embeddings = student(noise, torch.ones(8, dtype=torch.long), condition)
        target = student.codebook[codes]
        return F.cross_entropy(logits.flatten(0, 1), codes.flatten()) + F.mse_loss(embeddings, target)

    for module, loss in ((teacher.tokenizer, reconstruct), (teacher.network, predict), (student, distil)):
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
        before = loss()
        for _ in range(5):
            optimizer.zero_grad()
            loss().backward()
            assert all(p.grad is not None for p in module.parameters())
            optimizer.step()
        assert loss() < 0.99 * before
