"""The teacher of captions: its start, its training with the encoder, and what ships of it."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from pipeline import noise
from pipeline.command_line import parse
from pipeline.digits import captioned, captions, networks, pretrain_captions, text_encoder
from pipeline.digits.agreement import agreement
from pipeline.digits.pretrain_captions import CaptionPlan
from pipeline.models import checkpoints
from pipeline.models.base import Teacher
from pipeline.models.conditions import Captions, Condition
from pipeline.models.convnet import to_uint8
from pipeline.sampling.samplers import inverse_cdf
from pipeline.settings.teacher import TeacherSettings

pytest.importorskip("transformers", reason="the extra 'text'")
ROOT = Path(__file__).parents[2]
ASSETS = ROOT / "pipeline" / "assets" / "digits"
SHIPPED = "package://digits/llamagen-text-teacher.safetensors"


def of_classes() -> TeacherSettings:
    return parse(None, ["--config", str(ROOT / "jobs" / "recipes" / "digits-llamagen.yaml")]).teacher


def of_captions() -> TeacherSettings:
    return dataclasses.replace(pretrain_captions.captioned_settings(of_classes()), checkpoint=SHIPPED)


def started() -> Teacher:
    """A teacher as training starts from it."""
    settings, source = of_captions(), checkpoints.teacher(of_classes())
    torch.manual_seed(2)
    teacher: Teacher = checkpoints.family(settings).Teacher(checkpoints.config(settings), settings.filter)
    teacher.tokenizer = source.tokenizer
    pretrain_captions.warm_start(teacher.network, source.network)
    return teacher


@pytest.fixture
def few_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    images, truth = networks.training_split()
    monkeypatch.setattr(networks, "training_split", lambda: (images[::50], truth[::50]))


@pytest.fixture
def read(tmp_path: Path) -> text_encoder.Reader:
    text_encoder.write_tokenizer(str(tmp_path))
    return text_encoder.Reader(str(tmp_path))


def test_everything_but_the_condition_is_the_class_teachers() -> None:
    source = checkpoints.teacher(of_classes()).network.state_dict()
    own = started().network.state_dict()
    new = {"cls_embedding.uncond_embedding", "cls_embedding.cap_proj.fc1.weight", "cls_embedding.cap_proj.fc2.weight"}
    assert own.keys() - source.keys() == new
    assert all(torch.equal(own[name], value) for name, value in source.items() if name in own)
    parameters = own.keys() - {"cls_embedding.uncond_embedding"}
    assert sum(own[name].numel() for name in parameters) == 1_246_848


def test_a_dropped_caption_keeps_its_mask() -> None:
    given = Captions(torch.ones(3, 4, 2), torch.arange(4) >= torch.tensor([[3], [1], [0]]))
    null = Captions(torch.full((3, 4, 2), 7.0), given.valid)
    found = pretrain_captions.with_null(given, null, torch.tensor([False, True, False]))
    assert found.features[:, 0, 0].tolist() == [1, 7, 1]
    assert torch.equal(found.valid, given.valid)


@pytest.mark.usefixtures("few_digits")
def test_a_teacher_learns_from_captions_of_what_it_is_shown(
    read: text_encoder.Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, encoder = started(), text_encoder.new()
    before = {name: value.clone() for name, value in encoder.named_parameters()}
    null = teacher.network.cls_embedding.uncond_embedding
    asked: list[tuple[Condition, torch.Tensor]] = []
    texts: list[str] = []
    forward, composed = teacher.forward, captions.composed

    def watched(condition: Condition, codes: torch.Tensor) -> torch.Tensor:
        asked.append((condition, codes))
        return forward(condition, codes)

    def noted(*given: object) -> list[str]:
        texts.extend(found := composed(*given))  # type: ignore[arg-type]
        return found

    monkeypatch.setattr(teacher, "forward", watched)
    monkeypatch.setattr(captions, "composed", noted)
    monkeypatch.setattr(pretrain_captions, "KEPT_EVERY", 2)
    plan = CaptionPlan(steps=5, batch=16)
    yielded = list(pretrain_captions.train(teacher, encoder, read, plan, report=print))
    assert len(yielded) == 3, "after steps 2, 4 and 5"
    assert len(set(texts)) > 40, "new captions in every step"
    given = [condition for condition, _ in asked]
    assert all(isinstance(condition, Captions) for condition in given)
    valid = torch.cat([condition.valid for condition in given])  # type: ignore[attr-defined]
    assert valid.sum(1).tolist() == [len(text.split()) + 1 for text in texts], "a dropped caption keeps its mask"
    features = torch.cat([condition.features for condition in given])  # type: ignore[attr-defined]
    dropped = (features == null).all(2).all(1)
    assert 2 <= dropped.sum() <= 20, "about a tenth of 80"
    decoded = teacher.decode(teacher.codebook[torch.cat([codes for _, codes in asked])])
    logits = networks.scorer()(decoded)[1].detach().numpy()
    assert agreement(to_uint8(decoded).numpy(), logits, texts).all_named().mean() > 0.8, "captions fit their images"
    average = yielded[-1].encoder.state_dict()
    moved = [name for name, value in before.items() if not torch.equal(average[name], value)]
    assert "encoder.block.0.layer.0.SelfAttention.q.weight" in moved, "the encoder is trained, too"
    assert torch.equal(yielded[-1].network.cls_embedding.uncond_embedding, null), "the null caption is not"


@pytest.mark.usefixtures("few_digits")
def test_the_same_command_writes_the_same_files(tmp_path: Path) -> None:
    plan = CaptionPlan(steps=2, batch=8, pairs=30, unseen=20)
    threads = torch.get_num_threads()
    folders = [tmp_path / name for name in "ab"]
    for folder in folders:
        folder.mkdir()
        for name in ("tokenizer", "teacher"):
            shutil.copy(ASSETS / f"llamagen-{name}.safetensors", folder)
        pretrain_captions.make_captions("llamagen", of_classes(), plan, str(folder))
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)
    files, again = ({p.relative_to(f): p.read_bytes() for p in f.rglob("*") if p.is_file()} for f in folders)
    assert files == again
    assert {str(name) for name in files} == {
        "captions.parquet",
        "llamagen-teacher.safetensors",
        "llamagen-text-teacher.safetensors",
        "llamagen-tokenizer.safetensors",
        "text-encoder/config.json",
        "text-encoder/model.safetensors",
        "text-encoder/tokenizer.json",
        "text-encoder/tokenizer_config.json",
        "unseen.parquet",
    }
    made = dataclasses.replace(of_captions(), checkpoint=f"{folders[0]}/llamagen-text-teacher.safetensors")
    source = checkpoints.teacher(of_classes()).network.state_dict()
    assert not torch.equal(checkpoints.teacher(made).network.state_dict()["output.weight"], source["output.weight"])
    assert pq.read_table(folders[0] / "captions.parquet").num_rows == 30
    assert pq.read_table(folders[0] / "unseen.parquet").num_rows == 20
    assert "2 steps of 8 images" in plan.description()


def test_shipped_captions_for_pairs_reveal_nothing_that_is_held_out() -> None:
    texts = pq.read_table(ASSETS / "captions.parquet")["caption"].to_pylist()
    assert len(texts) == 20_000
    named = np.stack([captions.named_by(text) for text in texts])
    assert not captions.reveals(named).any()
    unseen = pq.read_table(ASSETS / "unseen.parquet")["caption"].to_pylist()
    assert len(unseen) == 5_000
    assert captions.reveals(np.stack([captions.named_by(text) for text in unseen])).all()
    assert not set(texts) & set(unseen)
    assert captioned.training_captions(CaptionPlan(1).seed, 200)["caption"].to_pylist() == texts[:200]


@torch.no_grad()
def test_the_shipped_teacher_draws_what_unseen_captions_ask_for() -> None:
    teacher, ids = checkpoints.teacher(of_captions()), np.arange(60)
    texts = pq.read_table(ASSETS / "unseen.parquet")["caption"].to_pylist()[: len(ids)]
    encoder, read = text_encoder.new(), text_encoder.Reader(str(ASSETS / "text-encoder"))
    encoder.load_state_dict(load_file(ASSETS / "text-encoder" / "model.safetensors"), strict=False)
    given = text_encoder.features(encoder, *read(texts))
    uniform = torch.from_numpy(noise.uniform(9, ids, teacher.layout.length))
    codes = teacher.generate(given, lambda t, log_p: inverse_cdf(log_p, uniform[:, teacher.layout.span(t)]))
    images = to_uint8(teacher.decode(teacher.codebook[codes]))
    logits = networks.scorer()(images / 127.5 - 1)[1].numpy()
    drawn, shuffled = (agreement(images.numpy(), logits, asked).shares() for asked in (texts, texts[1:] + texts[:1]))
    assert drawn["digit"] > 0.8
    assert drawn["all"] > 0.5
    assert shuffled["all"] < 0.1
