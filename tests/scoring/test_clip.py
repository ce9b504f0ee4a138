"""CLIP score against transformers' own calls, one image and one prompt at a time; folders that are no CLIP model."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_clip import LENGTH, SIDE, tiny_clip, transformers, write

from pipeline import storage
from pipeline.evaluation.artist import look_at
from pipeline.evaluation.draws import Draw
from pipeline.evaluation.rows import Entry, Reference, numbers
from pipeline.host.errors import Missing, Refused
from pipeline.scoring import clip, instruments
from pipeline.scoring.clip import Clip, ClipSums
from pipeline.scoring.tally import Statistics
from pipeline.settings.evaluate import EvaluateSettings

PROMPTS = ["a bold three", "a zero at the top left", "", "unheard words " * 20, "five"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def model(folder: Path) -> Clip:
    return clip.load(str(folder), "cpu")


def some_pixels(count: int, side: int = 30) -> torch.Tensor:
    """Of a few coarse fields each, noise over them, so that they differ when they are small, too."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(count, 3, 3, 3, generator=generator) * 255
    fine = torch.rand(count, 3, side, side, generator=generator) * 40
    return (torch.nn.functional.interpolate(coarse, size=(side, side)) + fine).clamp(0, 255).to(torch.uint8)


def cosines(folder: Path, pixels: torch.Tensor, prompts: list[str]) -> np.ndarray:
    """Of transformers' features, image by image and prompt by prompt, through its own processors: [prompts, images]."""
    network = transformers.CLIPModel.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    processor = transformers.CLIPImageProcessorPil.from_pretrained(folder)
    out = np.zeros((len(prompts), len(pixels)))
    with torch.no_grad():
        for i, prompt in enumerate(prompts):
            tokens = tokenizer([prompt], truncation=True, max_length=LENGTH, return_tensors="pt")
            text = network.get_text_features(tokens.input_ids, tokens.attention_mask).pooler_output
            for j, image in enumerate(pixels):
                seen = processor(image.permute(1, 2, 0).numpy(), return_tensors="pt").pixel_values
                out[i, j] = torch.cosine_similarity(text, network.get_image_features(seen).pooler_output).item()
    return out


@pytest.mark.parametrize("side", [SIDE, 30, 7])
def test_scores_are_those_of_transformers_one_by_one(folder: Path, model: Clip, side: int) -> None:
    pixels = some_pixels(len(PROMPTS), side)
    expected, seen = cosines(folder, pixels, PROMPTS), model.of_images(pixels)
    assert (model.of_texts(PROMPTS) @ seen.T).numpy() == pytest.approx(expected, abs=1e-5)
    assert np.ptp(expected) > 0.5, "the model tells images and prompts apart"
    scores = 100 * np.maximum(expected, 0)
    own, others = model.scores(seen.numpy(), np.array(PROMPTS, dtype=object))
    assert own == pytest.approx(np.diag(scores), abs=1e-3)
    assert others == pytest.approx([scores[i - 1, i] for i in range(len(PROMPTS))], abs=1e-3)
    assert max(own.max(), others.max()) > 0


def test_an_angle_beyond_a_right_one_scores_nothing(model: Clip) -> None:
    opposite = -model.of_texts(PROMPTS).numpy()
    own, _ = model.scores(opposite, np.array(PROMPTS, dtype=object))
    assert own.tolist() == [0] * len(PROMPTS)


def test_neighbours_and_batches_do_not_matter(model: Clip, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = some_pixels(6)
    apart = torch.cat([model.of_images(one) for one in pixels.split(1)])
    torch.testing.assert_close(model.of_images(pixels), apart, atol=1e-6, rtol=0)
    apart = torch.cat([model.of_texts([prompt]) for prompt in PROMPTS])
    torch.testing.assert_close(model.of_texts(PROMPTS), apart, atol=1e-6, rtol=0)
    monkeypatch.setattr(clip, "TEXTS", 2)
    torch.testing.assert_close(model.of_texts(PROMPTS), apart, atol=1e-6, rtol=0)


def test_pixels_are_resized_as_pil_does(model: Clip) -> None:
    from PIL import Image

    (image,) = some_pixels(1, 31)
    seen = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    mean, deviation = model.preparation.mean, model.preparation.deviation
    expected = (np.asarray(seen) / 255 - mean) / deviation
    found = model.preparation(image[None])[0].permute(1, 2, 0).numpy()
    assert found == pytest.approx(expected, abs=1e-5)


def test_sums_of_parts_are_those_of_the_whole() -> None:
    rng = np.random.default_rng(0)
    own, others = rng.uniform(0, 40, 50), rng.uniform(0, 40, 50)
    whole, parts = ClipSums(), ClipSums()
    whole.add(own, others)
    for rows in np.array_split(np.arange(50), 4):
        part = ClipSums()
        part.add(own[rows], others[rows])
        parts.merge(part)
    for found in (whole, parts):
        assert found.mean() == pytest.approx(own.mean())
        assert found.error() == pytest.approx(own.std(ddof=1) / np.sqrt(50))
        assert found.floor() == pytest.approx(others.mean())
    assert (ClipSums().mean(), ClipSums().error(), ClipSums().floor()) == (None, None, None)


def test_a_single_image_has_no_other_prompt(model: Clip) -> None:
    own, others = model.scores(model.of_images(some_pixels(1)).numpy(), np.array(["a zero"], dtype=object))
    assert (own.shape, others.shape) == ((1,), (0,))
    sums = ClipSums()
    sums.add(own, others)
    assert (sums.mean(), sums.error(), sums.floor()) == (own[0], None, None)


# ---- in the statistics of a report


def looked_at(folder: Path, prompts: list[str] | None, parts: list[int], batch: int) -> Statistics:
    """Statistics of as many images as PROMPTS, in parts that are sent through bytes and merged."""
    network = replace(instruments.features(EvaluateSettings(clip=str(folder)), "cpu"), satisfied=None)
    images = some_pixels(sum(parts), 32).float() / 127.5 - 1
    column = None if prompts is None else np.array(prompts, dtype=object)
    out, start = None, 0
    for size in parts:
        part = Statistics.empty(network, 1, 32, len(images))
        places = np.arange(start, start + size)
        draw = Draw(None, len(images))
        look_at(
            part, network, draw, places, batch, lambda _, some: (images[some], None if column is None else column[some])
        )
        part = Statistics.unpack(part.pack())
        if out is None:
            out = part
        else:
            out.merge(part)
        start += size
    assert out is not None
    return out


def test_statistics_carry_the_scores_of_images_whose_prompts_are_known(folder: Path, model: Clip) -> None:
    whole, parts = looked_at(folder, PROMPTS, [5], 5), looked_at(folder, PROMPTS, [3, 2], 2)
    seen = model.of_images(some_pixels(5, 32)).numpy()
    own, others = model.scores(seen, np.array(PROMPTS, dtype=object))
    assert whole.clip is not None
    assert parts.clip is not None
    assert (whole.clip.mean(), whole.clip.floor()) == (pytest.approx(own.mean()), pytest.approx(others.mean()))
    assert parts.clip.mean() == pytest.approx(own.mean(), rel=1e-5)
    assert parts.clip.sums[3] == 5, "each part gives its prompts to its own images"
    row = numbers([Entry("DD 1 step", "FewStep", {}, 1, whole)], Reference(whole.moments.gaussian(), parts))
    assert [one["clip_score"] for one in row] == pytest.approx([own.mean(), own.mean()], rel=1e-5)
    assert row[1]["clip_score_std"] == pytest.approx(own.std(ddof=1) / np.sqrt(5))
    assert row[1]["clip_score_of_others"] == pytest.approx(others.mean())


def test_images_without_prompts_have_no_clip_score(folder: Path) -> None:
    without = looked_at(folder, None, [3, 2], 2)
    assert without.clip is not None
    assert without.clip.mean() is None
    rows = numbers([Entry("DD 1 step", "FewStep", {}, 1, without)], Reference(without.moments.gaussian(), None))
    assert "clip_score" not in rows[0]


def test_statistics_from_before_there_was_a_clip_score_are_read() -> None:
    network = instruments.features(EvaluateSettings(), "cpu")
    assert Statistics.unpack(Statistics.empty(network, 10, 32, 4).pack()).clip is None


def test_the_model_is_among_what_scores(folder: Path, tmp_path: Path) -> None:
    plain, beside = (instruments.check(EvaluateSettings(clip=uri), 32, 0) for uri in (None, str(folder)))
    assert beside == plain | clip.check(str(folder))
    with pytest.raises(Refused, match="and the teacher takes classes, which are no words; leave it out"):
        instruments.check(EvaluateSettings(clip=str(folder)), 32, 10)
    with pytest.raises(Missing, match=r"evaluate.clip .*nowhere is no folder or is empty"):
        instruments.check(EvaluateSettings(clip=str(tmp_path / "nowhere")), 32, 0)


# ---- folders


def test_what_a_score_depends_on_is_in_its_facts(folder: Path, tmp_path: Path) -> None:
    before = clip.check(str(folder))
    assert before["clip"] == storage.sha256(str(folder / "model.safetensors"))
    other = shutil.copytree(folder, tmp_path / "clip")
    assert clip.check(str(other)) == before, "wherever it lies"
    (other / "README.md").write_text("words")
    assert clip.check(str(other)) == before
    for name in ("tokenizer.json", "preprocessor_config.json", "tokenizer_config.json"):
        content = storage.read_json(str(other / name))
        write(other / name, content | {"note": 1})
        changed = clip.check(str(other))
        assert changed["clip reads"] != before["clip reads"], name
        write(other / name, content)


def test_a_model_in_several_files_is_the_same(folder: Path, model: Clip, tmp_path: Path) -> None:
    parts = tiny_clip(tmp_path / "parts", "10kB")
    assert len(list(parts.glob("model-*.safetensors"))) > 1
    assert clip.check(str(parts))["clip"] != clip.check(str(folder))["clip"]
    assert torch.equal(clip.load(str(parts), "cpu").of_texts(PROMPTS), model.of_texts(PROMPTS))


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def changed(name: str, **content: Any) -> Callable[[Path], None]:
    return lambda folder: write(folder / name, storage.read_json(str(folder / name)) | content)


def headless(folder: Path) -> None:
    transformers.CLIPModel.from_pretrained(folder).text_model.save_pretrained(folder / "text")
    shutil.copy(folder / "text" / "model.safetensors", folder / "model.safetensors")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (shutil.rmtree, "is no folder or is empty; give one in Hugging Face's layout"),
        (without("config.json"), "lacks config.json; give a CLIP model's whole folder"),
        (without("model.safetensors"), r"lacks model\.safetensors"),
        (without("tokenizer.json"), r"lacks tokenizer\.json"),
        (without("preprocessor_config.json"), r"lacks preprocessor_config\.json"),
        (changed("config.json", model_type="t5"), "holds a model of type t5, not clip"),
        (changed("config.json", projection_dim=9), r"has text_projection.weight of \[8, 16\], and its config"),
        (changed("preprocessor_config.json", size=20), "and its model sees 12; fetch both again"),
        (changed("preprocessor_config.json", resample=2), "resample 2; only bicubic, 3, is known here"),
        (changed("preprocessor_config.json", image_mean=None), "three numbers are wanted of each"),
        (headless, "holds no CLIP model: "),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"?" * 99), "no safetensors file or damaged"),
        (lambda folder: (folder / "config.json").write_text("{"), "is not JSON"),
    ],
)
def test_a_folder_that_is_no_clip_model_is_one_sentence(
    folder: Path, tmp_path: Path, spoil: Callable[[Path], None], said: str
) -> None:
    copy = shutil.copytree(folder, tmp_path / "clip")
    spoil(copy)
    with pytest.raises((Missing, Refused), match=said) as refusal:
        clip.check(str(copy))
    assert "\n" not in str(refusal.value)


def test_tensors_that_are_missing_are_no_random_ones(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "clip")
    config = storage.read_json(str(copy / "config.json"))
    config["text_config"]["num_hidden_layers"] = 3
    write(copy / "config.json", config)
    with pytest.raises(Refused, match=r"lacks 16 tensors that its config.json asks for, text_model"):
        clip.load(str(copy), "cpu")


def test_without_transformers_the_command_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clip.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Missing, match=r"pip install 'distilled-decoding\[text\]'"):
        clip.check(str(folder))


def test_checking_does_not_import_transformers(folder: Path) -> None:
    code = "import sys; from pipeline.scoring import clip; clip.check(sys.argv[1]); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    assert "torch" in done.stdout.split()
    assert "transformers" not in done.stdout.split()
