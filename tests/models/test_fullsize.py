"""The official networks at their real sizes: names and shapes on the meta device, numbers in the slow tests.

python -m pytest tests/models/test_fullsize.py          names, shapes and counts of every released network
python -m pytest tests/models/test_fullsize.py -m slow  filled weights against the official numbers (minutes; 6 GB, of
                                                        text-to-image GIGABYTES GB)
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import fill
import fullsize
import golden
import pytest
import torch
from torch import Tensor, nn

from pipeline.models import checkpoints, llamagen, var
from pipeline.models.conditions import Captions, Labels
from pipeline.models.llamagen import teacher as llamagen_teacher
from pipeline.models.var import teacher as var_teacher
from pipeline.settings.teacher import Filter
from pipeline.workflow.distill import distill
from pipeline.workflow.generate import generate

OFFICIAL = json.loads((golden.FOLDER / "state_dicts.json").read_text())
GUIDED = Filter(guidance=2.0)
BIG = var.Config(depth=36, shared_aln=True, patch_nums=(1, 2, 3, 4, 6, 9, 13, 18, 24, 32))
SIZES = {"B": (12, 12, 768), "L": (24, 16, 1024), "XL": (36, 20, 1280), "XXL": (48, 24, 1536), "3B": (24, 32, 3200)}
LABEL = Labels(torch.tensor([207]))
T2I_SIZE = {"layers": 36, "heads": 20, "dim": 1280, "caption_dim": 2048}


def gpt(size: str) -> llamagen.Config:
    layers, heads, dim = SIZES[size]
    return llamagen.Config(layers=layers, heads=heads, dim=dim)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "vae_ch160v4096z32": lambda: var.Tokenizer(var.Config()),
    **{f"var_d{d}": lambda d=d: var.Teacher(var.Config(depth=d), GUIDED).network for d in (16, 20, 24, 30)},
    "var_d36_512px_shared_aln": lambda: var.Teacher(BIG, GUIDED).network,
    **{f"dd_var_d{d}": lambda d=d: var.Student(var.Config(depth=d), torch.zeros(4096, 32)) for d in (16, 20, 24)},
    "VQ-16": lambda: llamagen.Tokenizer(llamagen.Config()),
    "VQ-8": lambda: llamagen.Tokenizer(llamagen.Config(multipliers=(1, 2, 2, 4))),
    **{f"llamagen_c2i_{size}": lambda s=size: llamagen.Teacher(gpt(s), GUIDED).network for size in SIZES},
    "llamagen_t2i_XL": lambda: llamagen.Teacher(replace(gpt("XL"), caption_dim=2048), GUIDED).network,
    **{f"dd_llamagen_{size}": lambda s=size: llamagen.Student(gpt(s), torch.zeros(16384, 8)) for size in ("B", "L")},
}


def test_every_official_network_is_covered() -> None:
    assert NETWORKS.keys() == OFFICIAL.keys()


@pytest.mark.parametrize("name", NETWORKS)
def test_state_dicts_are_the_official_ones(name: str) -> None:
    with torch.device("meta"):
        net = NETWORKS[name]()
    assert golden.rows(net) == OFFICIAL[name]["rows"]
    assert sum(p.numel() for p in net.parameters()) == OFFICIAL[name]["n_parameters"]


@pytest.mark.parametrize(("name", "network"), [("var-d16", "var_d16"), ("llamagen-l", "llamagen_L")])
def test_the_reports_count_of_parameters_is_the_official_one(name: str, network: str) -> None:
    teacher = network.replace("llamagen_", "llamagen_c2i_")
    found = checkpoints.parameters(fullsize.read(name).teacher, {"mask": "released"})
    assert found["teacher"] == OFFICIAL[teacher]["n_parameters"]
    assert found["student"] == OFFICIAL[f"dd_{network}"]["n_parameters"]


# ---- the jobs


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", ["var-d16", "llamagen-l"])
def test_the_jobs_run_at_full_size(tmp_path: Path, name: str) -> None:
    """Four pairs, and three steps of the student, which then loads from the authors' layout too."""
    recipe = fullsize.read(name, fullsize.write(name, tmp_path))
    assert "Made 4 pairs" in generate(recipe)
    recipe = replace(recipe, pairs=replace(recipe.pairs, count=9), train=replace(recipe.train, export="released"))
    assert "holds 9 pairs" in generate(recipe)
    assert "after 3 steps" in distill(recipe)
    with torch.device("meta"):
        student = checkpoints.family(recipe.teacher).Student(
            checkpoints.config(recipe.teacher), checkpoints.tokenizer(recipe.teacher).codebook
        )
    ours, theirs = (checkpoints.weights(student, f"{recipe.student_uri}/student.{s}") for s in ("safetensors", "pth"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())


# ---- numbers


class Recorder:
    """Stands in for a filter: keeps the guided logits that reach it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> None:
        self.seen: list[Tensor] = []
        self.filter = getattr(module, name)
        monkeypatch.setattr(module, name, self)

    def __call__(self, logits: Tensor, filter: Filter) -> Tensor:
        self.seen.append(logits)
        return self.filter(logits, filter)


def tokens(name: str, shape: tuple[int, int], vocabulary: int) -> Tensor:
    return torch.from_numpy(fill.tokens(name, shape, vocabulary)).long()


def noise(name: str, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(fill.noise(name, shape))


def image(name: str) -> Tensor:
    return torch.from_numpy(fill.image(name, (1, 3, 256, 256)))


def ready(net: nn.Module, salt: str) -> Any:
    return fill.fill_module(net, salt).eval().requires_grad_(False)


@pytest.mark.slow
def test_var_tokenizer() -> None:
    known = golden.load("fullsize_vqvae")
    net, shown = ready(var.Tokenizer(var.Config()), "vqvae/"), image("full/vqvae/image")
    found = net.encode(shown)
    expected = torch.cat([golden.tensor(r) for r in known["outputs"]["img_to_idxBl"]], dim=1)
    assert (found != expected).sum() <= 1, "a near-tie may flip"
    codes = torch.cat(
        [tokens(f"full/vqvae/tok{s}", (1, p * p), 4096) for s, p in enumerate(var.Config().patch_nums)], 1
    )
    golden.check(known["outputs"]["image"], net.decode(net.codebook[codes]).clamp(-1, 1), known["atol"]["image"])


@pytest.mark.slow
def test_var_d16(monkeypatch: pytest.MonkeyPatch) -> None:
    known = golden.load("fullsize_var_d16")
    teacher = var.Teacher(var.Config(depth=16), Filter(guidance=2.0))
    ready(teacher.tokenizer, "vqvae/")
    ready(teacher.network, "var/")
    layout = teacher.layout
    codes = torch.cat([tokens(f"full/var/tok{s}", (1, g), 4096) for s, g in enumerate(layout.groups)], dim=1)
    with torch.inference_mode():
        logits = teacher(LABEL, codes)
        golden.check(known["outputs"]["teacher_forcing_logits"], logits, known["atol"]["teacher_forcing_logits"])
        recorder = Recorder(monkeypatch, var_teacher, "filtered")
        teacher.generate(LABEL, lambda t, log_p: codes[:, layout.span(t)])
    for s, (record, found) in enumerate(zip(known["outputs"]["ar_cfg_logits_per_stage"], recorder.seen, strict=True)):
        golden.check(record, found, known["atol"][f"ar_cfg_logits_per_stage[{s}]"])


@pytest.mark.slow
@torch.inference_mode()
def test_dd_var_d16() -> None:
    known = golden.load("fullsize_dd_var_d16")
    config = var.Config(depth=16)
    codebook = ready(var.Tokenizer(config), "vqvae/").codebook
    net, layout = ready(var.Student(config, codebook), "dd_var/"), config.layout
    start = noise("full/dd_var/noise", (1, 680, 32))
    data = codebook[tokens("full/dd_var/data", (1, 680), 4096)]
    for i, expected in enumerate(known["outputs"]["forward"]):
        t = expected["t"] + 1
        kept = layout.before(t)
        logits, embeddings = net(torch.cat([data[:, :kept], start[:, kept:]], dim=1), torch.tensor([t]), LABEL)
        golden.check(expected["logits"], logits, known["atol"][f"forward[{i}].logits"])
        golden.check(expected["tokens"], embeddings, known["atol"][f"forward[{i}].tokens"])
        golden.check(expected["argmax_first_55"], logits[:, :55].argmax(-1))


@pytest.mark.slow
def test_llamagen_tokenizer() -> None:
    known = golden.load("fullsize_vq16")
    net = ready(llamagen.Tokenizer(llamagen.Config()), "vq/")
    codes = tokens("full/vq/codes", (1, 256), 16384)
    golden.check(known["outputs"]["decode_code"], net.decode(net.codebook[codes]), known["atol"]["decode_code"])
    found = net.encode(image("full/vq/image"))
    assert (found.flatten() != golden.tensor(known["outputs"]["encode_indices"])).sum() <= 1, "a near-tie may flip"


@pytest.mark.slow
def test_llamagen_b(monkeypatch: pytest.MonkeyPatch) -> None:
    known = golden.load("fullsize_llamagen_B")
    teacher = llamagen.Teacher(gpt("B"), GUIDED)
    ready(teacher.network, "gpt/")
    codes = tokens("full/gpt/tok", (1, 256), 16384)
    with torch.inference_mode():
        logits = teacher(LABEL, codes)
        golden.check(known["outputs"]["teacher_forcing_logits"], logits, known["atol"]["teacher_forcing_logits"])
        recorder = Recorder(monkeypatch, llamagen_teacher, "log_probabilities")
        teacher.generate(LABEL, lambda t, log_p: codes[:, t - 1 : t], stop=9)
    found = torch.cat(recorder.seen, dim=1)
    golden.check(known["outputs"]["ar_cfg_logits_first_8"], found, known["atol"]["ar_cfg_logits_first_8"])


@pytest.mark.slow
@torch.inference_mode()
def test_dd_llamagen_b() -> None:
    known = golden.load("fullsize_dd_llamagen_B")
    codebook = ready(llamagen.Tokenizer(llamagen.Config()), "vq/").codebook
    net = ready(llamagen.Student(gpt("B"), codebook), "dd/")
    start = noise("full/dd_gpt/noise", (1, 256, 8))
    data = codebook[tokens("full/dd_gpt/data", (1, 256), 16384)]
    for i, expected in enumerate(known["outputs"]["forward"]):
        t = expected["t"]
        logits, embeddings = net(torch.cat([data[:, :t], start[:, t:]], dim=1), torch.tensor([t + 1]), LABEL)
        golden.check(expected["logits"], logits, known["atol"][f"forward[{i}].logits"])
        golden.check(expected["tokens"], embeddings, known["atol"][f"forward[{i}].tokens"])
        flips = (logits.argmax(-1) != golden.tensor(expected["argmax"])).sum()
        assert flips <= (expected["margin"] < 1e-4), "a near-tie may flip"


# ---- text to image: no official numbers, but one part held against another


def captions(positions: int) -> Captions:
    """Two captions of 24 and 9 tokens."""
    features = noise("full/t2i/caption", (2, 24, 2048))
    padded = torch.nn.functional.pad(features, (0, 0, 0, positions - 24))
    return Captions.from_encoder(padded, torch.tensor([24, 9]))


def real(net: nn.Module, salt: str) -> Any:
    """A network that was built on the meta device, filled as ``ready`` does, but never drawn at random first."""
    net.load_state_dict(dict(fill.filled(net, salt)), assign=True)
    return net.eval().requires_grad_(False)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_xl_teacher_of_captions() -> None:
    """Three guided AR steps, cached and trimmed to 24 positions, against one uncached pass of all 120."""
    with torch.device("meta"):
        teacher = llamagen.Teacher(llamagen.Config(**T2I_SIZE), GUIDED)
    net, codes, shown = real(teacher.network, "t2i/"), tokens("full/t2i/tok", (2, 3), 16384), []

    def choose(t: int, log_p: Tensor) -> Tensor:
        shown.append(log_p)
        return codes[:, t - 1 : t]

    teacher.tokenizer = type("Codes", (nn.Module,), {"codebook": torch.zeros(16384, 8)})()
    assert torch.equal(teacher.generate(captions(24), choose, stop=4), codes)
    with torch.inference_mode():
        whole = captions(120)
        cond, uncond = (net(c, codes) for c in (whole, net.cls_embedding.null(whole)))
    expected = (uncond + 2 * (cond - uncond)).log_softmax(-1)
    assert expected.amax(-1).exp().lt(0.9).all(), "no code has all of p, or equality would say little"
    torch.testing.assert_close(torch.cat(shown, dim=1), expected, atol=5e-3, rtol=0)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_xl_student_of_captions() -> None:
    """One sample forward and backward through all 36 layers, in float32."""
    with torch.device("meta"):
        net = llamagen.Student(llamagen.Config(**T2I_SIZE), torch.zeros(16384, 8, device="cpu"))
    real(net, "dd_t2i/").requires_grad_(True)
    caption, start = captions(24).split(1)[1], noise("full/dd_t2i/noise", (1, 256, 8))
    logits, embeddings = net(start, torch.tensor([1]), caption)
    assert logits.shape == (1, 256, 16384)
    target = tokens("full/dd_t2i/tok", (1, 256), 16384)
    loss = torch.nn.functional.cross_entropy(logits[0], target[0]) + embeddings.square().mean()
    loss.backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name
    with torch.no_grad():
        last = Captions(caption.features[:, -9:], caption.valid[:, -9:])
        found = net(start, torch.tensor([1]), last)
    torch.testing.assert_close(found.logits, logits.detach(), atol=5e-3, rtol=0)
    torch.testing.assert_close(found.embeddings, embeddings.detach(), atol=5e-3, rtol=0)
