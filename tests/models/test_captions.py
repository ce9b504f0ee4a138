"""LlamaGen on captions (a room's own subject): trimmed, masked, recorded, and the student, against slow oracles."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import fill
import golden
import pytest
import torch
from golden import check
from step import error, stirred
from tiny import tiny
from torch import Tensor, nn

from pipeline.models import checkpoints
from pipeline.models.base import Prediction, nearest
from pipeline.models.conditions import Captions, Condition, Labels, Prompts
from pipeline.models.llamagen import Config, Student, Teacher
from pipeline.models.llamagen.captions import CaptionEmbedding, caption_columns, caption_mask
from pipeline.models.llamagen.teacher import RasterPass
from pipeline.models.llamagen.transformer import rotary
from pipeline.numerics.precision import autocast
from pipeline.settings.teacher import Filter
from tests.models.test_llamagen import (
    CAPTIONED,
    GUIDED,
    PLAIN,
    SMALL,
    T2I,
    Forced,
    assert_log_p,
    captioned,
    captions,
    greedy,
    tokenizer,
)

LONGEST = 31  # of the golden captions, which have 7 and 31 tokens
POSITIONS = pytest.mark.parametrize("positions", [31, 32, 40, 119])
TOKENS = golden.tensor(T2I["inputs"]["tokens"])
XL = Config(layers=36, heads=20, dim=1280, caption_dim=2048)
SAME = {"atol": 2e-5, "rtol": 1e-5}  # what rounding in another order of the same sums leaves, by processor


def trimmed(whole: Captions, positions: int) -> Captions:
    return Captions(whole.features[:, -positions:], whole.valid[:, -positions:])


# ---- the teacher


@POSITIONS
def test_trimmed_captions_give_the_official_logits(positions: int) -> None:
    net, few = captioned(PLAIN), trimmed(captions(), positions)
    logits = net(few, TOKENS)
    check(T2I["outputs"]["teacher_forcing_logits"], logits, T2I["atol"]["teacher_forcing_logits"])
    torch.testing.assert_close(logits, net(captions(), TOKENS), **SAME)
    null = net.network.cls_embedding.null
    torch.testing.assert_close(net(null(few), TOKENS), net(null(captions()), TOKENS), **SAME)


@POSITIONS
@pytest.mark.parametrize("name", ["ar_cfg_logits", "ar_no_cfg_logits", "ar_cfg_interval"])
def test_trimmed_captions_are_drawn_as_officially(positions: int, name: str) -> None:
    record, interval = T2I["outputs"][name], T2I["config"]["cfg_interval"] if name == "ar_cfg_interval" else -1
    guidance = 1.0 if name == "ar_no_cfg_logits" else T2I["config"]["cfg_scale"]
    net = captioned(Filter(guidance=guidance), replace(CAPTIONED, guidance_interval=interval))
    few, whole = Forced(TOKENS), Forced(TOKENS)
    net.generate(trimmed(captions(), positions), few)
    net.generate(captions(), whole)
    torch.testing.assert_close(few.all, whole.all, **SAME)
    atol = T2I["atol"]["ar_cfg_interval.logits" if interval >= 0 else name]
    assert_log_p(record["logits"] if interval >= 0 else record, few.all, atol)


@pytest.mark.parametrize("interval", [-1, 5])
@pytest.mark.parametrize("kept", [0, 1, 7, 8, 15])
def test_a_prefix_after_trimmed_captions(kept: int, interval: int) -> None:
    """As the whole generation from there on; what a guided prefix gives does not depend on the positions."""
    net = captioned(Filter(guidance=3.0), replace(CAPTIONED, guidance_interval=interval))
    few, whole, rest = trimmed(captions(), LONGEST), Forced(TOKENS), Forced(TOKENS)
    net.generate(captions(), whole)
    codes = net.generate(few, rest, prefix=TOKENS[:, :kept])
    assert torch.equal(codes, TOKENS)
    assert rest.steps == list(range(kept + 1, 17))
    torch.testing.assert_close(rest.all, whole.all[:, kept:], atol=1e-4, rtol=0)


def test_trimming_makes_the_sequence_shorter() -> None:
    net, seen = captioned(GUIDED), []
    net.network.layers[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
    net(trimmed(captions(), 32), TOKENS)
    net.generate(trimmed(captions(), 32), greedy)
    assert seen == [32 + 15, 32, *[1] * 15]


def test_a_bf16_teacher_of_trimmed_captions_is_near_the_exact_one() -> None:
    few, exact, rough = trimmed(captions(), 32), Forced(TOKENS), Forced(TOKENS)
    captioned(GUIDED).generate(few, exact)
    net = captioned(GUIDED)
    net.network.bfloat16()
    net.generate(few, rough)
    assert rough.all.dtype == torch.float32
    assert (rough.all - exact.all).abs().mean() < 0.3  # logits have a spread of 3 and bf16 8 bits


def test_the_mask_position_by_position() -> None:
    """Padding is seen by itself alone: a row that saw nothing would have no softmax."""
    valid = torch.tensor([[False, True], [True, True]])
    mask = caption_mask(caption_columns(Captions(torch.zeros(2, 2, 24), valid), 2))
    seen = [[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0, 1, 1, 1]]
    assert mask.exp().tolist() == [[seen], [torch.ones(4, 4).tril().tolist()]]


# ---- what is refused


def networks_of_captions() -> list[nn.Module]:
    return [captioned(GUIDED), Student(CAPTIONED, tokenizer().codebook)]


def asked(net: nn.Module, condition: Condition) -> None:
    """Everything that a network can be asked; every question has to be refused for the same reason."""
    if isinstance(net, Teacher):
        for question in (lambda: net(condition, TOKENS), lambda: net.generate(condition, greedy)):
            with pytest.raises((TypeError, ValueError)) as refusal:
                question()
        raise refusal.value
    assert isinstance(net, Student)
    net(torch.zeros(2, 16, 8), torch.ones(2, dtype=torch.long), condition)


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize(
    ("shape", "sentence"),
    [
        ((2, 121, 24), r"fill 121 positions, and the network has 1 to 120 \(teacher\.config\.caption_length\)"),
        ((2, 0, 24), "captions fill 0 positions"),
        ((2, 8, 25), r"features of width 25, and the network takes 24 \(teacher\.config\.caption_dim\)"),
    ],
)
def test_captions_of_another_shape_are_refused(which: int, shape: tuple[int, ...], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        asked(networks_of_captions()[which], Captions(torch.zeros(shape), torch.ones(shape[:2], dtype=torch.bool)))


@pytest.mark.parametrize("condition", [Labels(torch.tensor([0, 1])), Prompts(("a", "b"))])
def test_other_conditions_are_refused(condition: Condition) -> None:
    for net in networks_of_captions():
        with pytest.raises(TypeError, match=f"draws captions and was given {type(condition).__name__}; give it Capt"):
            asked(net, condition)
    classes = Teacher(SMALL, GUIDED)
    for net in (classes, Student(SMALL, classes.codebook)):
        with pytest.raises(TypeError, match="draws classes and was given Captions; give it Labels"):
            asked(net, captions())


def test_a_file_for_other_captions_names_the_fields(tmp_path: Path) -> None:
    net = captioned(PLAIN).network
    checkpoints.save(net, str(tmp_path / "t2i.safetensors"), {})
    with torch.device("meta"):
        other = Teacher(replace(CAPTIONED, caption_dim=16, caption_length=60), PLAIN).network
    with pytest.raises(
        checkpoints.CheckpointError,
        match=r"set teacher\.config\.caption_dim to 24 \(it is 16\) and teacher\.config\.caption_length to 120 \(it is",
    ):
        checkpoints.load(other, str(tmp_path / "t2i.safetensors"))


# ---- the student's shape


def test_the_student_of_xl_has_the_parameters_of_the_papers_table() -> None:
    with torch.device("meta"):
        teacher, student = Teacher(XL, GUIDED).network, Student(XL, torch.zeros(16_384, 8))
    assert sum(p.numel() for p in teacher.parameters()) == 777_678_080
    assert sum(b.numel() for _, b in teacher.named_buffers() if b.dim()) == 245_760
    assert sum(p.numel() for p in student.parameters()) == 756_733_448
    names = ["cls_embedding.uncond_embedding", "cls_embedding.cap_proj.fc1.weight", "cls_embedding.cap_proj.fc2.weight"]
    names += ["tok_embeddings.weight", "tok_embeddings.bias"]
    names += [name for name in teacher.state_dict() if name.startswith("layers.")]
    names += ["norm.weight", "output.weight", "final_layer_conti.scale_shift_table", "final_layer_conti.linear.weight"]
    names += ["final_layer_conti.linear.bias", "n_d_embed.weight"]
    assert list(student.state_dict()) == names
    assert sum(name.startswith("layers.") for name in names) == 36 * 7


# ---- the student's answers


@cache
def student() -> Student:
    """With weights that make every part count: n_d_embed and the head's modulation among them."""
    net = fill.fill_module(Student(CAPTIONED, tokenizer().codebook), "dd/")
    return net.eval().requires_grad_(False)


def noise(batch: int = 2) -> Tensor:
    return torch.randn(batch, 16, 8, generator=torch.Generator().manual_seed(batch))


def at(*steps: int) -> Tensor:
    return torch.tensor(steps)


def assert_same(found: Prediction, expected: Prediction) -> None:
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, **SAME)


def alone(net: Student, x_t: Tensor, t: int, features: Tensor) -> Prediction:
    """The student of one image x_t [n, C] and a caption [T, D] without padding: nothing to mask, plainly causal."""
    caption = net.cls_embedding.cap_proj(features)
    h = torch.cat([caption, net.tok_embeddings(x_t)])
    data = len(caption) + t - 1
    kinds = torch.tensor([1] * data + [0] * (len(h) - data))
    h = (h + net.n_d_embed(kinds))[None]
    for layer in net.layers:
        h = layer(h, rotary(net.config, h.device, len(caption)), causal=True)
    h = h[:, len(caption) :]
    return Prediction(net.output(net.norm(h)), net.final_layer_conti(h, caption.mean(0)[None, None]))


@pytest.mark.parametrize("positions", [31, 40, 120])
@pytest.mark.parametrize("steps", [(1, 1), (1, 9), (16, 4)])
def test_a_batch_of_padded_captions_is_every_caption_alone(positions: int, steps: tuple[int, int]) -> None:
    """Masked padding, positions of tokens, marks of data and noise, the head's mean, and a t for every image."""
    batch = trimmed(captions(), positions)
    found = student()(noise(), at(*steps), batch)
    for i, t in enumerate(steps):
        expected = alone(student(), noise()[i], t, batch.features[i][batch.valid[i]])
        assert_same(Prediction(found.logits[i : i + 1], found.embeddings[i : i + 1]), expected)


def test_the_first_token_that_is_noise_is_seen() -> None:
    """The marks count at all, or the test before would not notice where they are."""
    for mine, other in zip(*(student()(noise(), at(t, t), captions()) for t in (1, 2)), strict=True):
        assert (mine - other).abs().mean() > 0.01


@pytest.mark.parametrize("positions", [1, 8])
def test_a_caption_of_one_token_is_a_class(positions: int) -> None:
    """A class student whose row is the token's projection says the same, its head too, exactly but for rounding."""
    net, features = student(), captions().features[:, -1]
    classes = Student(replace(CAPTIONED, caption_dim=0, classes=2), net.codebook).eval().requires_grad_(False)
    state = {name: value for name, value in net.state_dict().items() if not name.startswith("cls_embedding")}
    rows = torch.cat([net.cls_embedding.cap_proj(features), torch.zeros(1, 64)])
    classes.load_state_dict(state | {"cls_embedding.embedding_table.weight": rows})
    one = Captions.from_encoder(features[:, None].repeat(1, positions, 1), at(1, 1))
    for steps in ((1, 1), (3, 12)):
        expected = classes(noise(), at(*steps), Labels(torch.tensor([0, 1])))
        assert_same(net(noise(), at(*steps), one), expected)


@POSITIONS
def test_trimmed_captions_are_the_same_to_the_student(positions: int) -> None:
    expected = student()(noise(), at(1, 6), captions())
    assert_same(student()(noise(), at(1, 6), trimmed(captions(), positions)), expected)


def test_what_stands_in_the_padding_is_irrelevant() -> None:
    """Whoever makes Captions otherwise than from_encoder need not put zeros there."""
    clean = trimmed(captions(), 40)
    garbage = 50 * torch.randn(clean.features.shape, generator=torch.Generator().manual_seed(0))
    other = Captions(clean.features.where(clean.valid[..., None], garbage), clean.valid)
    assert not torch.equal(other.features, clean.features)
    found, expected = (student()(noise(), at(1, 6), condition) for condition in (other, clean))
    assert_same(found, expected)
    net = captioned(PLAIN)
    torch.testing.assert_close(net(other, TOKENS), net(clean, TOKENS), **SAME)


def test_other_captions_give_other_answers() -> None:
    first, other = captions(), Captions(captions().features.flip(0), captions().valid.flip(0))
    for mine, theirs in zip(*(student()(noise(), at(1, 1), c) for c in (first, other)), strict=True):
        assert (mine - theirs).abs().mean() > 0.01


def test_the_null_caption_says_nothing_to_a_student() -> None:
    net = Student(CAPTIONED, tokenizer().codebook).eval().requires_grad_(False)
    net.load_state_dict(student().state_dict())
    net.cls_embedding.uncond_embedding.fill_(torch.nan)
    assert_same(net(noise(), at(1, 6), captions()), student()(noise(), at(1, 6), captions()))


@pytest.mark.parametrize("split", [0, 6, 16])
def test_a_jump_after_some_tokens(split: int) -> None:
    """Alg. 4: what is known stays, the rest is predicted from it alone; trimmed captions give the same."""
    net, known = student(), tokenizer().codebook[TOKENS]
    few = trimmed(captions(), 32)
    out = net.jump(known, noise(), 6, few, split)
    assert torch.equal(out[:, :5], known[:, :5])
    unknown = torch.cat([known[:, :5], noise(2).flip(0)[:, 5:]], dim=1)
    assert torch.equal(net.jump(unknown, noise(), 6, few, split), out), "what x holds from step t on is not looked at"
    x_t = torch.cat([known[:, :5], noise()[:, 5:]], dim=1)
    logits, embeddings = net(x_t, at(6, 6), captions())
    expected = torch.cat([net.codebook[logits[:, 5:split].argmax(-1)], embeddings[:, max(split, 5) :]], dim=1)
    torch.testing.assert_close(out[:, 5:], expected, **SAME)


def test_the_teacher_in_the_loop() -> None:
    """Student, teacher from a prefix, student: with captions cut to 32 positions as with all 120."""
    net, teacher, images = student(), captioned(Filter(guidance=3.0)), []
    for condition in (captions(), trimmed(captions(), 32)):
        first = net.jump(noise(), noise(), 1, condition, 6)
        prefix = nearest(first, net.codebook)[:, :4]
        codes = teacher.generate(condition, greedy, prefix, stop=9)
        assert codes.shape == (2, 8)
        assert torch.equal(codes[:, :4], prefix)
        assert torch.equal(teacher.generate(condition, greedy, codes[:, :6], stop=9), codes)
        x = torch.cat([net.codebook[codes], noise()[:, 8:]], dim=1)
        images.append(net.jump(x, noise(), 9, condition, 6))
    torch.testing.assert_close(*images, **SAME)


# ---- the student's beginning, file and training


def test_a_student_of_captions_starts_from_its_teacher() -> None:
    teacher = captioned(GUIDED)
    teacher.tokenizer = tokenizer()
    teacher.network.bfloat16()
    net, taught = Student.from_teacher(teacher, 5), teacher.network.state_dict()
    new = {"tok_embeddings.weight", "tok_embeddings.bias", "n_d_embed.weight"}
    copied = [name for name in net.state_dict() if name not in new and not name.startswith("final_layer_conti")]
    assert copied[:2] == ["cls_embedding.uncond_embedding", "cls_embedding.cap_proj.fc1.weight"]
    assert copied[-2:] == ["norm.weight", "output.weight"]
    for name in copied:
        assert net.state_dict()[name].dtype == torch.float32
        assert torch.equal(net.state_dict()[name], taught[name].float()), name
    assert set(dict(net.named_parameters())) == set(net.state_dict()) - {"cls_embedding.uncond_embedding"}
    with torch.no_grad():
        net.cls_embedding.cap_proj.fc1.weight.zero_()
        net.cls_embedding.uncond_embedding.zero_()
    assert taught["cls_embedding.cap_proj.fc1.weight"].any()
    assert taught["cls_embedding.uncond_embedding"].any()


def test_new_parameters_are_drawn_as_those_of_a_class_student() -> None:
    """The seed's draws have an order, which conditions do not change."""
    config = replace(CAPTIONED, caption_dim=0)
    students = [Student.from_teacher(Teacher(c, GUIDED), 5).state_dict() for c in (CAPTIONED, config)]
    for name in ("scale_shift_table", "linear.weight", "linear.bias"):
        mine, other = (state[f"final_layer_conti.{name}"] for state in students)
        assert torch.equal(mine, other)
    assert torch.equal(*(state["n_d_embed.weight"] for state in students))


def test_a_students_file_may_lack_the_null_caption(tmp_path: Path) -> None:
    state = dict(student().state_dict())
    for missing in (False, True):
        if missing:
            del state["cls_embedding.uncond_embedding"]
        checkpoints.save(state, str(tmp_path / "student.safetensors"), {})
        with torch.device("meta"):
            net = Student(CAPTIONED, tokenizer().codebook)
        checkpoints.load(net, str(tmp_path / "student.safetensors"))
        assert net.cls_embedding.uncond_embedding.any() != missing
        assert_same(net(noise(), at(1, 6), captions()), student()(noise(), at(1, 6), captions()))
    del state["cls_embedding.cap_proj.fc2.weight"]
    checkpoints.save(state, str(tmp_path / "student.safetensors"), {})
    with pytest.raises(checkpoints.CheckpointError, match=r"lacks cls_embedding\.cap_proj\.fc2\.weight \(1 in all\)"):
        checkpoints.load(net, str(tmp_path / "student.safetensors"))


def test_a_student_whose_weights_are_to_come(tmp_path: Path) -> None:
    """As a worker makes it that is to be given rank 0's: its null caption has memory too."""
    settings = tiny(tmp_path, "llamagen", caption_dim=8, caption_length=12).teacher
    teacher = checkpoints.teacher(settings)
    full = checkpoints.new_student(settings, teacher, {}, 0)
    empty = checkpoints.unfilled_student(settings, teacher.codebook, {}, torch.device("cpu"))
    assert [(n, v.shape) for n, v in empty.state_dict().items()] == [(n, v.shape) for n, v in full.state_dict().items()]
    empty.load_state_dict(full.state_dict())
    assert torch.equal(empty.cls_embedding.uncond_embedding, teacher.network.cls_embedding.uncond_embedding)


def test_a_student_learns_from_captions() -> None:
    torch.manual_seed(0)
    teacher = Teacher(replace(CAPTIONED, caption_length=40), GUIDED)
    net, batch = Student.from_teacher(teacher, 0), trimmed(captions(), 32)
    null = net.cls_embedding.uncond_embedding.clone()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        logits, embeddings = net(noise(), at(1, 3), batch)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), TOKENS.flatten())
        loss = loss + (embeddings - net.codebook[TOKENS]).square().mean()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.99 * losses[0]
    assert torch.equal(net.cls_embedding.uncond_embedding, null)


def test_what_moves_the_head_is_the_mean_of_the_filled_places() -> None:
    """And what it teaches the projection reaches them alone."""
    embedding = student().cls_embedding
    assert isinstance(embedding, CaptionEmbedding)
    h = torch.randn(2, 40, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    few = trimmed(captions(), 40)
    pooled = embedding.pooled(h, few)
    assert pooled.shape == (2, 1, 64)
    for i, length in enumerate(T2I["config"]["caption_len"]):
        torch.testing.assert_close(pooled[i, 0], h[i, -length:].mean(0))
    pooled.sum().backward()
    assert torch.equal(h.grad.any(-1), few.valid)


def test_a_student_under_bf16_is_near_the_exact_one() -> None:
    """As it trains on a GPU; the mean is taken in float32 whatever the products are."""
    net, few = student(), trimmed(captions(), 32)
    exact = net(noise(), at(1, 6), few)
    with autocast("bf16", "cpu"):
        rough = net(noise(), at(1, 6), few)
        pooled = net.cls_embedding.pooled(net.cls_embedding(few), few)
    assert pooled.dtype == torch.float32
    for found, expected in zip(rough, exact, strict=True):
        assert 1e-4 < error(found, expected) < 0.05


def test_the_unconditional_half_is_not_one_row() -> None:
    """The null caption is masked by the length of the sample's own, as officially: no other row can stand for it."""
    net, condition = captioned(GUIDED), captions()
    sequence = RasterPass(net, condition, length=1)
    with torch.no_grad():
        halves = [condition, net.network.cls_embedding.null(condition)]
        sequence.begin(1, net.network.embed(halves, TOKENS[:2, :0]))
    last = sequence.cache[:, 1, 2:, :, sequence.conditions - 1]  # values of the last position, under 7 and 31 tokens
    first, second = last.unbind(1)
    torch.testing.assert_close(first[0], second[0], **SAME)
    assert (first[1] - second[1]).abs().max() > 0.01 * first[1].abs().max()


# ---- float16


def test_fp16_teachers_of_captions(tmp_path: Path) -> None:
    """Several times nearer than bf16, whatever the padding; an overflow is noticed."""
    recipe = tiny(tmp_path, "llamagen", caption_dim=8, caption_length=12)
    condition = Captions.from_encoder(torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(0)), at(1, 5, 8))
    log_p = {}
    for precision in ("fp32", "fp16", "bf16"):
        teacher = checkpoints.teacher(replace(recipe.teacher, precision=precision, filter=Filter(2.0)))
        stirred(teacher.network)
        forced = Forced(torch.arange(27).view(3, 9) % 24)
        teacher.generate(condition, forced)
        teacher.check()
        log_p[precision] = forced.all
        if precision == "fp16":
            half = teacher
    low, lower = (error(log_p[precision], log_p["fp32"]) for precision in ("fp16", "bf16"))
    assert 1e-6 < low < lower / 4
    half.network.get_parameter("layers.1.feed_forward.w1.weight").fill_(60_000)
    half.generate(condition, greedy)
    with pytest.raises(ValueError, match=r"teacher\.precision is fp16"):
        half.check()
