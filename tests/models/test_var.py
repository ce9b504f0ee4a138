"""The VAR family against the official code's numbers: ``pytest tests/models/test_var.py``."""

from __future__ import annotations

from dataclasses import replace

import fill
import golden
import pytest
import torch
from torch import Tensor, nn

from pipeline.models import checkpoints
from pipeline.models.base import nearest
from pipeline.models.conditions import Captions, Labels
from pipeline.models.convnet import to_uint8
from pipeline.models.var import Config, Student, Teacher, Tokenizer
from pipeline.models.var.teacher import ScalePass, filtered, guided
from pipeline.models.var.tokenizer import phi_table
from pipeline.settings.teacher import Filter, TeacherSettings

VQVAE, VAR, DD, SAMPLING = (golden.load(name) for name in ("var_vqvae", "var", "dd_var", "sampling"))
CONFIG = Config(depth=3, width=64, heads=4, classes=10, patch_nums=(1, 2, 3, 4), vocabulary=64, code_dim=8, channels=32)
DIGITS = Config(
    depth=2, width=64, heads=4, classes=10, patch_nums=(1, 2, 3, 4, 6, 8), vocabulary=64, code_dim=4,
    channels=32, multipliers=(1, 1, 2), encoder_blocks=1, decoder_blocks=1, attention=False,
)  # fmt: skip
GROUPS = CONFIG.layout.groups
CAPTIONS = Captions(torch.zeros(2, 8, 24), torch.ones(2, 8, dtype=torch.bool))
OFF = Filter(guidance=0)
STATE = "state_dict"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return fill.fill_module(Tokenizer(CONFIG), "vqvae/").eval().requires_grad_(False)


@pytest.fixture(scope="module")
def teacher(tokenizer: Tokenizer) -> Teacher:
    made = Teacher(CONFIG, Filter(guidance=1.5, top_k=20, top_p=0.9))
    fill.fill_module(made.network, "var/")
    made.tokenizer = tokenizer
    return made.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def student(tokenizer: Tokenizer) -> Student:
    made = Student(CONFIG, tokenizer.codebook)
    return fill.fill_module(made, "dd_var/").eval().requires_grad_(False)


def with_filter(teacher: Teacher, filter: Filter, **changes: str) -> Teacher:
    """The same weights under another filter or another Config."""
    made = Teacher(replace(CONFIG, **changes), filter)
    made.tokenizer, made.network = teacher.tokenizer, teacher.network
    return made.eval()


def joined(records: list[dict]) -> Tensor:
    return torch.cat([golden.tensor(r) for r in records], dim=1)


def greedy(t: int, log_p: Tensor) -> Tensor:
    return log_p.argmax(-1)


class Forced:
    """A ``choose`` that returns given codes [B, n] (greedy without any) and remembers what it saw."""

    def __init__(self, codes: Tensor | None = None) -> None:
        self.codes, self.seen, self.steps = codes, [], []

    def __call__(self, t: int, log_p: Tensor) -> Tensor:
        self.seen.append(log_p)
        self.steps.append(t)
        return log_p.argmax(-1) if self.codes is None else self.codes[:, CONFIG.layout.span(t)]


class TestConfig:
    def test_official(self) -> None:
        config = Config(depth=20)
        assert (config.width, config.heads, config.image_size) == (1280, 20, 256)
        assert config.layout.length == 680
        assert DIGITS.image_size == 32

    @pytest.mark.parametrize(
        ("wrong", "says"),
        [
            ({"channels": 40}, "multiple of 32"),
            ({"patch_nums": [2, 3, 4]}, "begin with 1"),
            ({"patch_nums": [1, 3, 3]}, "rise"),
            ({"heads": 5}, "not a multiple of heads 5"),
            ({"depth": 0}, "depth is 0"),
            ({"decoder_blocks": 0}, "decoder_blocks is 0"),
            ({"quant_resi": 0}, "quant_resi is 0"),
            ({"scale_dropout": 1.0}, "scale_dropout is 1.0"),
            ({"share_quant_resi": 1}, "share_quant_resi is 1"),
            ({"prefix_mask": "none"}, "must be causal or released"),
        ],
    )
    def test_errors(self, wrong: dict, says: str) -> None:
        with pytest.raises(ValueError, match=says):
            Config(**wrong)

    def test_lists_become_tuples(self) -> None:
        assert Config(patch_nums=[1, 2], multipliers=[1]) == Config(patch_nums=(1, 2), multipliers=(1,))


class TestTokenizer:
    atol, outputs = VQVAE["atol"], VQVAE["outputs"]
    image = torch.from_numpy(fill.image("vqvae/image", (2, 3, 64, 64)))

    def test_state_dict(self, tokenizer: Tokenizer) -> None:
        assert golden.rows(tokenizer) == [row[:3] for row in VQVAE[STATE]]
        assert sum(p.numel() for p in tokenizer.parameters()) == VQVAE["n_parameters"]

    def test_phi(self) -> None:
        for name, table in self.outputs["phi_index_tables_share4"].items():
            scales = 10 if name.endswith("px") else len(name.split("_"))
            assert phi_table(scales, 4) == table
        assert phi_table(6, 6) == [0, 1, 2, 3, 4, 5]

    def test_encode(self, tokenizer: Tokenizer) -> None:
        golden.check(self.outputs["encoder_f"], tokenizer.features(self.image), self.atol["encoder_f"])
        codes = tokenizer.encode(self.image)
        for record, found in zip(self.outputs["img_to_idxBl"], codes.split(GROUPS, dim=1), strict=True):
            golden.check(record, found)
        _, maps = tokenizer.quantize.codes(tokenizer.features(self.image))
        for s, record in enumerate(self.outputs["fhat_per_scale_from_image"]):
            golden.check(record, maps[s], self.atol[f"fhat_per_scale_from_image[{s}]"])
        decoded = tokenizer.decode(tokenizer.codebook[codes]).clamp(-1, 1)
        golden.check(self.outputs["reconstruction"], decoded, self.atol["reconstruction"])

    def test_accumulate(self, tokenizer: Tokenizer) -> None:
        codes = joined(VQVAE["inputs"]["tokens"])
        f_hat: Tensor | float = 0.0
        for s, part in enumerate(tokenizer.codebook[codes].split(GROUPS, dim=1)):
            f_hat = f_hat + tokenizer.quantize.contribution(part, s)
            golden.check(self.outputs["f_hat_after_scale"][s], f_hat, self.atol[f"f_hat_after_scale[{s}]"])
            if s + 1 < len(GROUPS):
                side = CONFIG.patch_nums[s + 1]
                given = tokenizer.quantize.next_input(f_hat, s + 1).transpose(1, 2).unflatten(2, (side, side))
                atol = self.atol[f"next_input_after_scale[{s}]"]
                golden.check(self.outputs["next_input_after_scale"][s], given, atol)
        last, inputs = tokenizer.quantize.replay(tokenizer.codebook[codes])
        golden.check(self.outputs["f_hat_after_scale"][-1], last, 2e-5)
        golden.check(self.outputs["idxBl_to_var_input"], torch.cat(inputs, 1), self.atol["idxBl_to_var_input"])

    def test_decode(self, tokenizer: Tokenizer) -> None:
        embeddings = tokenizer.codebook[joined(VQVAE["inputs"]["tokens"])]
        raw = tokenizer.draw(tokenizer.quantize.feature_map(embeddings))
        golden.check(self.outputs["decoder_unclamped"], raw, self.atol["decoder_unclamped"])
        golden.check(self.outputs["fhat_to_img"], raw.clamp(-1, 1), self.atol["fhat_to_img"])
        assert raw.abs().max() > 1
        assert torch.equal(tokenizer.decode(embeddings), raw), "a loss sees what lies beyond the range of an image"

    def test_images_are_clamped(self, tokenizer: Tokenizer, teacher: Teacher) -> None:
        """Which changes no pixel that is shown or scored."""
        embeddings = tokenizer.codebook[joined(VQVAE["inputs"]["tokens"])]
        raw, image = tokenizer.decode(embeddings), teacher.decode(embeddings)
        assert torch.equal(image, raw.clamp(-1, 1))
        assert torch.equal(to_uint8(image), to_uint8(raw))

    def test_decode_is_differentiable(self, tokenizer: Tokenizer) -> None:
        embeddings = torch.from_numpy(fill.noise("h", (1, 30, 8))).requires_grad_()
        tokenizer.decode(embeddings).square().sum().backward()
        assert embeddings.grad is not None
        assert (embeddings.grad.abs().amax(-1) > 0).all()

    def test_wrong_size(self, tokenizer: Tokenizer) -> None:
        with pytest.raises(ValueError, match=r"takes \[B, 3, 64, 64\]"):
            tokenizer.encode(torch.zeros(1, 3, 32, 32))

    def test_training_loss(self, tokenizer: Tokenizer) -> None:
        """Against the loss as the VAR repository writes it, scale by scale."""
        reconstruction, codes, loss = tokenizer(self.image)
        assert torch.equal(codes, tokenizer.encode(self.image))
        f, quantize = tokenizer.features(self.image), tokenizer.quantize
        f_hat, expected = torch.zeros_like(f), 0.0
        for s, part in enumerate(tokenizer.codebook[codes].split(GROUPS, dim=1)):
            f_hat = f_hat + quantize.contribution(part, s)
            expected += 1.25 * (f_hat - f).square().mean() / len(GROUPS)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(reconstruction, tokenizer.draw(f_hat), atol=1e-4, rtol=0)

    def test_gradients_of_training(self) -> None:
        """The reconstruction trains encoder and decoder, the quantization loss encoder and codebook."""
        net = Tokenizer(DIGITS)
        images = torch.from_numpy(fill.image("digits", (2, 3, 32, 32)))
        reconstruction, _, loss = net(images)
        reconstruction.square().mean().backward(retain_graph=True)
        assert net.encoder.conv_in.weight.grad.abs().sum() > 0
        assert net.codebook.grad is None
        assert net.quantize.quant_resi.qresi_ls[0].weight.grad is None
        net.zero_grad()
        loss.backward()
        assert net.codebook.grad.abs().sum() > 0
        assert net.decoder.conv_in.weight.grad is None
        grads = net.quant_conv.weight.grad.clone()
        net.zero_grad()
        net.beta = 0.0
        net(images)[2].backward()
        assert net.quant_conv.weight.grad.abs().sum() == 0 < grads.abs().sum()

    def test_scale_dropout_reads_some_images_after_fewer_scales(self) -> None:
        torch.manual_seed(3)
        net = Tokenizer(replace(DIGITS, scale_dropout=0.7))
        images = torch.from_numpy(fill.image("digits", (40, 3, 32, 32)))
        f = net.features(images)
        _, maps = net.quantize.codes(f)
        shown = net._shown(f, maps)
        same = torch.stack([torch.isclose(shown, m, atol=1e-6).all(3).all(2).all(1) for m in maps])
        assert (same.sum(0) == 1).all(), "every image is read after one of the scales"
        assert same.any(1).all(), "after any of them"
        assert 5 <= same[-1].sum() <= 20, "three tenths of 40 after the last"
        chosen = same.int().argmax(0)
        (gradient,) = torch.autograd.grad((shown * torch.randn(f.shape)).sum(), f)
        coarsest, whole = gradient[chosen == 0], gradient[chosen == len(maps) - 1]
        assert torch.allclose(coarsest, coarsest[..., :1, :1].expand_as(coarsest), atol=1e-5), "one value a channel"
        assert whole.flatten(2).std(-1).min() > 0.5
        assert torch.equal(net.eval()._shown(f, maps), f + (maps[-1] - f).detach())

    def test_corrupted_codes_are_mended_by_the_scales_after(self, tokenizer: Tokenizer) -> None:
        images = torch.from_numpy(fill.image("some", (6, 3, 64, 64)))
        clean = tokenizer.encode(images)
        for codes in tokenizer.corrupted(images, 0.0, torch.Generator().manual_seed(0)):
            assert torch.equal(codes, clean)
        seen, right = tokenizer.corrupted(images, 1.0, torch.Generator().manual_seed(0))
        assert 0.05 < (seen != right).float().mean() < 0.6, "half of all are drawn anew, some the same"
        f_hat = torch.zeros_like(f := tokenizer.features(images))
        parts = zip(seen.split(GROUPS, 1), right.split(GROUPS, 1), strict=True)
        for scale, (used, wanted) in enumerate(parts):
            left = tokenizer.quantize.next_input(f - f_hat, scale)
            assert torch.equal(nearest(left, tokenizer.codebook), wanted)
            assert (used[:, None] == wanted[None]).any(1).all(), "a wrong code is another image's, same position"
            f_hat = f_hat + tokenizer.quantize.contribution(tokenizer.codebook[used], scale)

    def test_learns(self) -> None:
        torch.manual_seed(0)
        net = Tokenizer(DIGITS)
        images = torch.from_numpy(fill.image("digits", (4, 3, 32, 32))).mean((2, 3), keepdim=True)
        images = images.expand(4, 3, 32, 32)
        optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3)
        errors = []
        for _ in range(6):
            reconstruction, _, loss = net(images)
            errors.append((reconstruction - images).square().mean())
            optimizer.zero_grad()
            (errors[-1] + loss).backward()
            optimizer.step()
        assert errors[-1] < 0.7 * errors[0]


class TestTeacher:
    atol, outputs, inputs = VAR["atol"], VAR["outputs"], VAR["inputs"]
    condition = Labels(torch.tensor(VAR["inputs"]["labels"]))
    codes = joined(VAR["inputs"]["tokens"])

    def test_state_dict(self, teacher: Teacher) -> None:
        assert golden.rows(teacher.network) == [row[:3] for row in VAR[STATE]]
        assert sum(p.numel() for p in teacher.network.parameters()) == VAR["n_parameters"]
        golden.check(self.outputs["lvl_1L"], teacher.network.lvl_1L)
        allowed = (teacher.network.attn_bias_for_masking[0, 0] == 0).long()
        golden.check(self.outputs["attn_bias_for_masking_allowed"], allowed)

    def test_teacher_forcing(self, teacher: Teacher) -> None:
        logits = teacher(self.condition, self.codes)
        golden.check(self.outputs["teacher_forcing_logits"], logits, self.atol["teacher_forcing_logits"])
        null = Labels(torch.full_like(self.condition.labels, 10))
        name = "teacher_forcing_logits_null_class"
        golden.check(self.outputs[name], teacher(null, self.codes), self.atol[name])

    def test_label_is_never_dropped(self, teacher: Teacher) -> None:
        many = Labels(self.condition.labels[:1].expand(64))
        logits = teacher.train()(many, self.codes[:1].expand(64, -1))
        teacher.eval()
        assert torch.allclose(logits, logits[:1], atol=1e-4)

    def test_generate(self, teacher: Teacher) -> None:
        plain, forced = Forced(self.codes), Forced(self.codes)
        with_filter(teacher, Filter(guidance=1.5)).generate(self.condition, plain)
        codes = teacher.generate(self.condition, forced)
        assert torch.equal(codes, self.codes)
        assert forced.steps == [1, 2, 3, 4]
        for s, record in enumerate(self.outputs["ar_cfg_logits_per_stage"]):
            log_p = golden.tensor(record).log_softmax(-1)
            assert (plain.seen[s] - log_p).abs().max() < self.atol[f"ar_cfg_logits_per_stage[{s}]"]
            p = forced.seen[s].exp()
            atol = self.atol[f"ar_filtered_probs_per_stage[{s}]"]
            golden.check(self.outputs["ar_filtered_probs_per_stage"][s], p, atol)
            golden.check(self.outputs["ar_filtered_kept_count_per_stage"][s], (p > 0).sum(-1))
        image = (teacher.decode(teacher.codebook[codes]) + 1) / 2
        golden.check(self.outputs["ar_image_0_1"], image, self.atol["ar_image_0_1"])

    def test_greedy(self, teacher: Teacher) -> None:
        codes = teacher.generate(self.condition, Forced())
        for record, found in zip(self.outputs["ar_greedy_tokens_per_stage"], codes.split(GROUPS, dim=1), strict=True):
            golden.check(record, found)
        image = (teacher.decode(teacher.codebook[codes]) + 1) / 2
        golden.check(self.outputs["ar_greedy_image_0_1"], image, self.atol["ar_greedy_image_0_1"])

    def test_guided_logits(self, teacher: Teacher) -> None:
        """The cached, guided logits themselves, not only their softmax."""
        network = ScalePass(teacher.network, torch.tensor([6, 6, 10, 10]), length=30)
        _, inputs = teacher.tokenizer.quantize.replay(teacher.codebook[self.codes])
        for s, x in enumerate([torch.zeros(2, 0, 8), *inputs]):
            logits = guided(network(x, last=GROUPS[s]), 1.5, s + 1, 4)
            atol = self.atol[f"ar_cfg_logits_per_stage[{s}]"]
            golden.check(self.outputs["ar_cfg_logits_per_stage"][s], logits, atol)

    @pytest.mark.parametrize("guidance", [0, 2.5])
    def test_cached_is_uncached(self, teacher: Teacher, guidance: float) -> None:
        """generate against guidance and softmax of two teacher-forced passes."""
        condition = Labels(torch.tensor([3, 8]))
        seen = Forced(self.codes)
        with_filter(teacher, Filter(guidance=guidance)).generate(condition, seen)
        null = Labels(torch.tensor([10, 10]))
        conditional, unconditional = (teacher(c, self.codes) for c in (condition, null))
        for t in range(1, 5):
            span, w = CONFIG.layout.span(t), guidance * (t - 1) / 3
            logits = (1 + w) * conditional[:, span] - w * unconditional[:, span]
            torch.testing.assert_close(seen.seen[t - 1], logits.log_softmax(-1), atol=2e-4, rtol=0)

    def test_without_guidance_half_the_work(self, teacher: Teacher) -> None:
        widths = []
        hook = teacher.network.head.register_forward_hook(lambda m, args, out: widths.append(len(args[0])))
        with_filter(teacher, OFF).generate(self.condition, Forced(self.codes))
        teacher.generate(self.condition, Forced(self.codes))
        hook.remove()
        assert widths == [2] * 4 + [4] * 4

    @pytest.mark.parametrize("guidance", [0, 1.5])
    @pytest.mark.parametrize("first", [1, 2, 3, 4, 5])
    def test_prefix_continues(self, teacher: Teacher, first: int, guidance: float) -> None:
        model = with_filter(teacher, Filter(guidance=guidance))
        whole, rest = Forced(self.codes), Forced(self.codes)
        model.generate(self.condition, whole)
        codes = model.generate(self.condition, rest, prefix=self.codes[:, : CONFIG.layout.before(first)])
        assert torch.equal(codes, self.codes)
        assert rest.steps == list(range(first, 5))
        for found, expected in zip(rest.seen, whole.seen[first - 1 :], strict=True):
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)

    def test_stop(self, teacher: Teacher) -> None:
        codes = teacher.generate(self.condition, Forced(), stop=3)
        assert torch.equal(codes, teacher.generate(self.condition, Forced())[:, :5])
        assert teacher.generate(self.condition, Forced(), stop=1).shape == (2, 0)
        with pytest.raises(ValueError, match="inside an AR step"):
            teacher.generate(self.condition, Forced(), prefix=self.codes[:, :4])
        with pytest.raises(ValueError, match="asked to stop before AR step 2"):
            teacher.generate(self.condition, Forced(), prefix=self.codes[:, :14], stop=2)
        with pytest.raises(ValueError, match="1 rows for 2 labels"):
            teacher.generate(self.condition, Forced(), prefix=self.codes[:1, :5])

    def test_temperature(self, teacher: Teacher) -> None:
        logits = torch.from_numpy(fill.noise("logits", (2, 5, 24)))
        found = filtered(logits, Filter(temperature=2.0, top_k=4))
        torch.testing.assert_close(found, filtered(logits / 2, Filter(top_k=4)))

    @pytest.mark.parametrize("autocast", [False, True])
    def test_bf16(self, teacher: Teacher, autocast: bool) -> None:
        low = Teacher(CONFIG, Filter(guidance=1.5))
        low.network.load_state_dict(teacher.network.state_dict())
        low.tokenizer = teacher.tokenizer
        if not autocast:
            low.network.bfloat16()
        seen, exact = Forced(self.codes), Forced(self.codes)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            low.generate(self.condition, seen, prefix=self.codes[:, :5])
        with_filter(teacher, low.filter).generate(self.condition, exact, prefix=self.codes[:, :5])
        for found, expected in zip(seen.seen, exact.seen, strict=True):
            assert found.dtype == torch.float32
            assert 0 < (found - expected).abs().max() < 1

    @pytest.mark.parametrize("shared", [False, True])
    def test_a_fresh_one_learns(self, shared: bool) -> None:
        """The digits' configuration: constructs, starts near uniform, one step of AdamW lowers the loss."""
        config = replace(DIGITS, shared_aln=shared)
        made = Teacher(config, Filter(guidance=1), torch.Generator().manual_seed(0))
        same = Teacher(config, Filter(guidance=1), torch.Generator().manual_seed(0))
        assert all(torch.equal(a, b) for a, b in zip(made.network.parameters(), same.network.parameters(), strict=True))
        codes = torch.from_numpy(fill.tokens("digits", (4, config.layout.length), 64))
        condition = Labels(torch.tensor([0, 1, 2, 10]))
        optimizer = torch.optim.AdamW(made.network.parameters(), lr=1e-3)
        losses = []
        for _ in range(3):
            logits = made(condition, codes)
            losses.append(nn.functional.cross_entropy(logits.flatten(0, 1), codes.flatten()))
            optimizer.zero_grad()
            losses[-1].backward()
            optimizer.step()
        assert all(p.grad is not None for p in made.network.parameters())
        assert losses[0].item() == pytest.approx(4.16, abs=0.1)
        assert losses[-1] < losses[0]
        assert made.generate(condition, greedy).shape == codes.shape

    def test_shared_aln_is_the_layout_of_d36(self) -> None:
        """The keys of its file, and the same numbers as separate adaptive norms with equal weights."""
        plain = Teacher(CONFIG, OFF).network
        shared = Teacher(replace(CONFIG, shared_aln=True), OFF).network
        names = list(shared.state_dict())
        assert names[7:12] == ["lvl_embed.weight", "shared_ada_lin.1.weight", "shared_ada_lin.1.bias",
                               "blocks.0.ada_gss", "blocks.0.attn.scale_mul_1H11"]  # fmt: skip
        assert not [name for name in names if name.startswith("blocks") and "ada_lin" in name]
        fill.fill_module(plain, "var/")
        fill.fill_module(shared, "var/")
        with torch.no_grad():
            for block, other in zip(plain.layers, shared.layers, strict=True):
                block.ada_lin[1].load_state_dict(shared.shared_ada_lin[1].state_dict())
                block.ada_lin[1].bias += other.ada_gss.flatten()
        inputs = torch.from_numpy(fill.noise("inputs", (2, 29, 8)))
        labels = torch.tensor([1, 4])
        torch.testing.assert_close(shared(labels, inputs), plain(labels, inputs), atol=1e-4, rtol=0)

    def test_meta(self) -> None:
        """Real sizes cost nothing on the meta device, and constants are real there."""
        with torch.device("meta"):
            made = Teacher(Config(depth=16), OFF)
            small = Teacher(CONFIG, OFF)
        assert made.network.head.weight.is_meta
        real = dict(Teacher(CONFIG, OFF).named_buffers())
        for name, buffer in small.named_buffers():
            assert torch.equal(buffer, real[name]), name
        assert sum(p.numel() for p in made.network.parameters()) == 310_283_520
        assert sum(p.numel() for p in made.tokenizer.parameters()) == 108_948_355


class TestFilter:
    @pytest.mark.parametrize("case", SAMPLING["outputs"]["var"], ids=lambda c: f"{c['logits']}-{c['top_k']}")
    def test_golden(self, case: dict) -> None:
        logits = golden.tensor(SAMPLING["inputs"][case["logits"]])
        settings = Filter(top_k=case["top_k"], top_p=case["top_p"] or 1.0)  # the official 0 is our 1: off
        found = filtered(logits, settings)
        golden.check(case["probs"], found.exp(), 2e-5)
        zeros = torch.from_numpy(golden.array(case["probs"])) == 0
        assert torch.equal(torch.isneginf(found), zeros)

    def test_the_likeliest_code_stays(self) -> None:
        """Even where 1 - p rounds to 1 in float32, a probability that every cumulative sum is at most."""
        logits = torch.from_numpy(fill.noise("logits", (3, 24)))
        found = filtered(logits, Filter(top_p=1e-9))
        assert torch.equal(found.exp(), nn.functional.one_hot(logits.argmax(-1), 24).float())

    def test_input_is_untouched_and_wide_k_is_off(self) -> None:
        logits = torch.from_numpy(fill.noise("logits", (3, 24)))
        before = logits.clone()
        assert torch.equal(filtered(logits, Filter(top_k=100)), before.log_softmax(-1))
        filtered(logits, Filter(top_k=3, top_p=0.5))
        assert torch.equal(logits, before)


class TestStudent:
    atol, outputs = DD["atol"], DD["outputs"]
    condition = Labels(torch.tensor(DD["inputs"]["labels"]))
    noise = golden.tensor(DD["inputs"]["noise"])
    split = DD["inputs"]["split_t"]

    def data(self, student: Student) -> Tensor:
        return student.codebook[golden.tensor(DD["inputs"]["data_idx"])]

    def test_state_dict(self, student: Student) -> None:
        assert golden.rows(student) == [row[:3] for row in DD[STATE]]
        assert sum(p.numel() for p in student.parameters()) == DD["n_parameters"]
        golden.check(self.outputs["lvl_1L"], student.lvl_1L)
        golden.check(self.outputs["attn_bias_allowed"], (student.attn_bias_for_masking[0, 0] == 0).long())

    @pytest.mark.parametrize("case", [0, 1])
    def test_forward(self, student: Student, case: int) -> None:
        record = self.outputs["forward"][case]
        atol = {k.split(".", 1)[1]: v for k, v in self.atol.items() if k.startswith(f"forward[{case}]")}
        x, t = self.data(student), record["t"] + 1
        x_t = golden.tensor(record["x_t"])
        logits, embeddings = student(x_t, torch.full((2,), t), self.condition)
        golden.check(record["tokens"], embeddings, atol["tokens"])
        golden.check(record["logits"], logits, atol["logits"])
        whole = student.jump(x, self.noise, t, self.condition, split=0)
        golden.check(record["final_predict_tokens"], whole, atol["final_predict_tokens"])
        for split, merged in record["merged"].items():
            found = student.jump(x, self.noise, t, self.condition, int(split))
            golden.check(merged, found, atol[f"merged.{split}"])

    def test_mixed_t(self, student: Student) -> None:
        record = self.outputs["forward_mixed_t"]
        t = torch.tensor(record["t"]) + 1
        is_noise = golden.tensor(self.outputs["noise_mask"])[t - 1].bool()
        x_t = torch.where(is_noise[..., None], self.noise, self.data(student))
        logits, embeddings = student(x_t, t, self.condition)
        golden.check(record["tokens"], embeddings, self.atol["forward_mixed_t.tokens"])
        golden.check(record["logits"], logits, self.atol["forward_mixed_t.logits"])

    @pytest.mark.parametrize("name", ["one_step", "two_step"])
    def test_few_steps(self, student: Student, tokenizer: Tokenizer, name: str) -> None:
        record, x = self.outputs[name], self.noise
        for code_step in record["t_list"]:
            x = student.jump(x, self.noise, code_step + 1, self.condition, self.split)
        golden.check(record["final"], x, self.atol[f"{name}.final"])
        coded = x[:, : CONFIG.layout.before(self.split + 1)]
        golden.check(record["head_indices"], nearest(coded, student.codebook))
        image = (tokenizer.decode(x).clamp(-1, 1) + 1) / 2
        golden.check(record["image_0_1"], image, self.atol[f"{name}.image_0_1"])

    @pytest.mark.parametrize("case", [0, 1, 2])
    def test_teacher_in_the_loop(self, student: Student, teacher: Teacher, case: int) -> None:
        """Alg. 4 from its pieces: a jump, the teacher from ``start`` to ``end``, a jump."""
        record, layout = self.outputs["teacher_involved"][case], CONFIG.layout
        variant = "released" if record["variant"].startswith("official") else "causal"
        model = with_filter(teacher, Filter(guidance=record["cfg"]), prefix_mask=variant)
        start, end = record["start"] + 1, record["end"] + 1
        prefix = torch.empty(2, 0, dtype=torch.long)
        if start > 1:
            first = nearest(student.jump(self.noise, self.noise, 1, self.condition, self.split), student.codebook)
            golden.check(self.outputs["requantized_first_step"]["indices"], first)
            prefix = first[:, : layout.before(start)]
        seen = Forced()
        codes = model.generate(self.condition, seen, prefix, end)
        for s, logits in enumerate(record["teacher_cfg_logits_per_stage"]):
            log_p = golden.tensor(logits).log_softmax(-1)
            atol = self.atol[f"teacher_involved[{case}].teacher_cfg_logits_per_stage[{s}]"]
            assert (seen.seen[s] - log_p).abs().max() < atol
        golden.check(record["teacher_greedy_tokens"], codes[:, layout.before(start) :])
        x = torch.cat([student.codebook[codes], self.noise[:, codes.shape[1] :]], dim=1)
        x = student.jump(x, self.noise, end, self.condition, self.split)
        golden.check(record["final"], x, self.atol[f"teacher_involved[{case}].final"])
        image = (teacher.decode(x) + 1) / 2
        golden.check(record["image_0_1"], image, self.atol[f"teacher_involved[{case}].image_0_1"])

    def test_two_rows_are_enough(self, student: Student) -> None:
        """The layer-wise linears on two rows against the same linears on every position."""
        x_t, t = self.noise, torch.tensor([1, 3])
        e = student.n_d_embed((student.lvl_1L < t[:, None]).long())
        c = student.class_emb(self.condition.labels)
        x = torch.cat([c[:, None] + student.pos_start, student.word_embed(x_t)], 1) + student.positions() + e
        pairs = zip(student.layers, student.layerwise_n_d_embed, student.modulations(c), strict=False)
        for block, linear, by in pairs:
            x = block(x, by, student.attn_bias_for_masking, between=linear(e))
        h = (x + student.layerwise_n_d_embed[-1](e))[:, 1:]
        scale, shift = student.head_nm.modulation(c)
        expected = student.head(nn.functional.layer_norm(h, (64,), eps=1e-6) * scale + shift)
        torch.testing.assert_close(student(x_t, t, self.condition).logits, expected, atol=1e-4, rtol=0)

    def test_masks(self, student: Student) -> None:
        """Which positions move when one token of the second scale changes."""
        for mask, mates in (("released", False), ("paper", True)):
            net = fill.fill_module(Student(CONFIG, student.codebook, mask), "dd_var/").eval()
            touched = self.noise.clone()
            touched[:, 2] += 1
            t = torch.tensor([1, 1])
            with torch.no_grad():
                was, now = (net(x, t, self.condition).logits for x in (self.noise, touched))
            moved = ((now - was).abs().amax((0, 2)) > 1e-6).tolist()
            assert moved == [False, mates, True, mates, mates] + [True] * 25
        with pytest.raises(ValueError, match="one of released, paper"):
            Student(CONFIG, student.codebook, "causal")

    def test_file_decides_the_mask(self, student: Student) -> None:
        net = Student(CONFIG, student.codebook, "paper")
        net.load_state_dict(student.state_dict())
        assert torch.equal(net.attn_bias_for_masking, student.attn_bias_for_masking)

    def test_from_teacher(self, teacher: Teacher) -> None:
        made = Student.from_teacher(teacher, seed=3)
        own, old = made.state_dict(), teacher.network.state_dict()
        changed = {"lvl_embed.weight", "pos_1LC", "lvl_1L", "attn_bias_for_masking"}
        for name in old.keys() - changed:
            assert torch.equal(own[name], old[name]), name
        levels, positions = own["lvl_embed.weight"], own["pos_1LC"][0]
        for new, known in ((levels, old["lvl_embed.weight"]), (positions, old["pos_1LC"][0])):
            assert torch.equal(new[0], known[0])
            assert torch.equal(new[2:], known[1:])
            std = (3 * 64) ** -0.5
            assert 0.5 * std < new[1].std() < 1.5 * std
            assert not (new[1] == known).all(-1).any()
        assert not any(p.any() for p in made.layerwise_n_d_embed.parameters())
        assert own["n_d_embed.weight"].std() > 0
        assert own["final_layer_conti.linear.weight"].std() > 0
        again, other = (Student.from_teacher(teacher, seed=s).state_dict() for s in (3, 4))
        assert all(torch.equal(own[k], again[k]) for k in own)
        assert not torch.equal(own["n_d_embed.weight"], other["n_d_embed.weight"])
        assert not torch.equal(levels[1], other["lvl_embed.weight"][1])

    @pytest.mark.parametrize("shared", [False, True])
    def test_a_new_student_is_drawn_once_from_its_seed(self, shared: bool) -> None:
        """The new numbers are those of a student that is drawn whole; the constructor's own are never drawn."""
        config = replace(CONFIG, shared_aln=shared)
        teacher = Teacher(config, Filter())
        generator = torch.Generator().manual_seed(3)
        whole = Student(config, teacher.codebook, "released", generator).state_dict()
        before = torch.get_rng_state()
        made = Student.from_teacher(teacher, seed=3).state_dict()
        assert torch.equal(torch.get_rng_state(), before), "torch's own layers draw from the global generator"
        for name in ("n_d_embed.weight", "final_layer_conti.linear.weight", "final_layer_conti.scale_shift_table"):
            assert torch.equal(made[name], whole[name]), name
        for name in ("pos_1LC", "lvl_embed.weight"):
            width = whole[name].shape[-1]
            assert torch.equal(made[name].view(-1, width)[1], whole[name].view(-1, width)[1]), name

    def test_a_new_student_is_the_teacher(self, teacher: Teacher) -> None:
        """Its class token, with the new parts silenced, gives the teacher's logits of the first step."""
        made = Student.from_teacher(teacher, seed=3, mask="paper").eval()
        condition = Labels(torch.tensor([2, 7]))
        with torch.no_grad():
            made.n_d_embed.weight.zero_()
            c = made.class_emb(condition.labels)
            x = c[:, None] + made.pos_start + made.positions()[:, :1]
            for block, by in zip(made.layers, made.modulations(c), strict=True):
                x = block(x, by)
        network = ScalePass(teacher.network, condition.labels)
        scale, shift = made.head_nm.modulation(c)
        logits = made.head(nn.functional.layer_norm(x, (64,), eps=1e-6) * scale + shift)
        torch.testing.assert_close(network(torch.zeros(2, 0, 8)), logits, atol=1e-4, rtol=0)

    def test_learns(self, teacher: Teacher) -> None:
        """Every parameter gets a gradient, the zero layer-wise ones too; a step lowers the loss."""
        made = Student.from_teacher(teacher, seed=3)
        target = golden.tensor(DD["inputs"]["data_idx"])
        optimizer = torch.optim.AdamW(made.parameters(), lr=1e-3)
        losses = []
        for _ in range(3):
            logits, embeddings = made(self.noise, torch.tensor([1, 2]), self.condition)
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())
            losses.append(loss + (embeddings - made.codebook[target]).square().mean())
            optimizer.zero_grad()
            losses[-1].backward()
            optimizer.step()
        assert losses[-1] < losses[0]
        assert [name for name, p in made.named_parameters() if p.grad is None] == []
        assert all(linear.weight.grad.any() for linear in made.layerwise_n_d_embed)

    def test_autocast(self, student: Student) -> None:
        exact = student.jump(self.noise, self.noise, 1, self.condition, split=0)
        with torch.autocast("cpu", torch.bfloat16):
            low = student.jump(self.noise, self.noise, 1, self.condition, split=0)
        assert low.dtype == torch.float32
        assert 0 < (low - exact).abs().max() < 0.3

    def test_codebook_is_no_weight(self, student: Student, tokenizer: Tokenizer) -> None:
        assert torch.equal(student.codebook, tokenizer.codebook)
        assert student.codebook.data_ptr() != tokenizer.codebook.data_ptr()
        with torch.device("meta"):
            made = Student(Config(depth=16), torch.zeros(4096, 32, device="cpu"))
        assert sum(p.numel() for p in made.parameters()) == 328_165_664
        assert not made.codebook.is_meta


def test_var_takes_no_captions(teacher: Teacher, student: Student) -> None:
    """A recipe is told the fields that there are; who hands captions to a network is told what it wants."""
    settings = TeacherSettings(family="pipeline.models.var", config={"caption_dim": 2048})
    with pytest.raises(
        ValueError, match=r"^teacher\.config has no field 'caption_dim'; pipeline\.models\.var knows .*cl"
    ):
        checkpoints.config(settings)
    codes, x = torch.zeros(2, 30, dtype=torch.long), torch.zeros(2, 30, 8)
    for ask in (
        lambda: teacher.generate(CAPTIONS, lambda t, log_p: log_p.argmax(-1)),
        lambda: teacher(CAPTIONS, codes),
        lambda: student(x, torch.ones(2, dtype=torch.long), CAPTIONS),
    ):
        with pytest.raises(TypeError, match="network draws classes and was given Captions; give it Labels"):
            ask()
