"""Exported files draw the images of the student that they are made of, and a third party scores those as we do."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from shared_student import shared
from tiny import IMAGES, tiny, tiny_text
from torch import Tensor
from torch.export import ExportedProgram

from pipeline import Generator, noise, storage
from pipeline.digits import networks
from pipeline.evaluation.rows import Reference, score
from pipeline.generator import export, folder
from pipeline.generator.graph import Interface
from pipeline.models import checkpoints
from pipeline.models.conditions import Captions, Labels, Prompts
from pipeline.models.convnet import to_uint8
from pipeline.recipe import Recipe
from pipeline.sampling.samplers import FewStep, Models
from pipeline.scoring import instruments
from pipeline.scoring.metrics import Gaussian
from pipeline.scoring.tally import Sight, Statistics
from pipeline.settings.evaluate import EvaluateSettings
from pipeline.text import encoder
from pipeline.text.prompts import PromptList

if any(importlib.util.find_spec(package) is None for package in export.PACKAGES):
    pytest.skip("onnx is not installed: pip install 'distilled-decoding[export]'", allow_module_level=True)

PAGE = Path(__file__).parents[2] / "docs" / "your-student.md"
BATCHES = (1, 3, 64)
EXACT = 1e-5  # of images in [0, 1]
ROUNDED = 1e-3  # the share of bytes that rounding may move by one


@dataclass
class Case:
    """A tiny student whose graph was captured once, for both kinds of file."""

    recipe: Recipe
    interface: Interface
    captured: ExportedProgram
    place: Path

    def file(self, ending: str) -> Path:
        """The file of a kind, written when it is asked for the first time."""
        file = self.place / f"student{ending}"
        if not file.exists():
            uri = self.recipe.student_uri
            about = export.metadata(uri, folder.read(uri), self.interface)
            export.write(self.captured, self.interface, about, file)
        return file


KINDS: dict[str, Callable[[Path], Recipe]] = {
    "llamagen": lambda place: tiny(place, "llamagen"),
    "var": lambda place: tiny(place, "var"),
    "prompts": tiny_text,
}


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    @cache
    def case(kind: str) -> Case:
        place = tmp_path_factory.mktemp(kind)
        recipe = shared(KINDS[kind](place))
        interface = export.interface_of(folder.read(recipe.student_uri), None)
        return Case(recipe, interface, export.program(interface), place)

    return case


def drawn(recipe: Recipe, count: int) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """What a file is given for ``count`` sample ids, and the pixels and images that the evaluation draws of them."""
    teacher, ids = checkpoints.teacher(recipe.teacher), np.arange(count)
    student = checkpoints.student(recipe.teacher, folder.weights(recipe.student_uri), teacher.codebook)
    prompts = PromptList.open(recipe.captions.uri, "") if recipe.captions.uri else None
    encode = encoder.conditioner(recipe.text, "cpu") if prompts else None
    models = Models(teacher, student, recipe.pairs.solver, 5, conditioning=prompts, encode=encode)
    y = models.decode(FewStep(recipe.train.split).draw(models, ids), student=True)
    layout = teacher.layout
    given = {"noise": torch.from_numpy(noise.gaussian(5, ids, layout.length, layout.code_dim)).float()}
    if prompts and encode:
        given |= right_padded(encode(Prompts(tuple(prompts(ids)))))
    else:
        given["labels"] = torch.from_numpy(ids % layout.classes)
    return given, to_uint8(y), (y + 1) / 2


def right_padded(captions: Any) -> dict[str, Tensor]:
    """Captions as an encoder leaves them, which ``Captions`` turned round."""
    assert isinstance(captions, Captions)
    lengths = captions.valid.sum(1)
    rows = [
        torch.cat([row[len(row) - n :], row[: len(row) - n]]) for row, n in zip(captions.features, lengths, strict=True)
    ]
    return {"features": torch.stack(rows), "lengths": lengths}


@pytest.mark.parametrize("ending", [".pt2", ".onnx"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_draws_the_images_of_the_evaluation(cases: Callable[[str], Case], kind: str, ending: str) -> None:
    """In small and large batches."""
    case = cases(kind)
    file = case.file(ending)
    for count in BATCHES:
        given, pixels, images = drawn(case.recipe, count)
        found_pixels, found_images = map(torch.as_tensor, export.run(file, given))
        assert (found_pixels.dtype, found_images.dtype) == (torch.uint8, torch.float32)
        assert found_images.shape == images.shape
        assert (found_images - images).abs().max() <= EXACT
        moved = (found_pixels.int() - pixels.int()).abs()
        assert moved.max() <= 1
        assert moved.sum() <= ROUNDED * moved.numel()
    assert images.std() > 0.05, "pictures that differ"


@pytest.mark.parametrize("ending", [".pt2", ".onnx"])
def test_fewer_positions_of_a_prompt_draw_the_same(cases: Callable[[str], Case], ending: str) -> None:
    """Padding is seen by nobody, so features may end with the longest prompt of the batch."""
    file = cases("prompts").file(ending)
    given, _, images = drawn(cases("prompts").recipe, 3)
    longest = int(given["lengths"].max())
    assert 1 < longest < given["features"].shape[1]

    def images_of(given: dict[str, Tensor], positions: int) -> Tensor:
        return torch.as_tensor(export.run(file, given | {"features": given["features"][:, :positions]})[1])

    assert (images_of(given, longest) - images).abs().max() <= EXACT
    one = {name: value[:1] for name, value in given.items()} | {"lengths": torch.tensor([1])}
    whole, cut = (images_of(one, positions) for positions in (longest, 1))
    assert (whole - cut).abs().max() <= EXACT
    assert (whole - images[:1]).abs().max() > EXACT, "the rest of a prompt says something"


# ---- the command line


def run(*args: object) -> None:
    export.main("Exports.", [*map(str, args)])


@pytest.fixture(scope="module")
def llamagen(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A student that no test captures just for being there."""
    return shared(tiny(tmp_path_factory.mktemp("student"), "llamagen"))


def session(file: Path) -> Any:
    import onnxruntime

    return onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])


def test_both_files_say_what_they_are(
    cases: Callable[[str], Case], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The .pt2 as the command line writes it."""
    recipe, onnx = cases("llamagen").recipe, cases("llamagen").file(".onnx")
    run("--student", recipe.student_uri, "--out", tmp_path / "new" / "student.pt2")
    said = capsys.readouterr().out
    assert "student.pt2 (1.9 MB) draws in one step from noise float32 [batch, 9, 4], labels int64 [batch]; of 3" in said
    extra = {export.METADATA: ""}
    torch.export.load(tmp_path / "new" / "student.pt2", extra_files=extra)
    about = json.loads(extra[export.METADATA])
    opened = session(onnx)
    assert opened.get_modelmeta().custom_metadata_map == about
    assert (about["format"], about["steps"]) == (export.FORMAT, "1")
    assert json.loads(about["student"]) == storage.read_json(storage.join(recipe.student_uri, folder.CONFIG))
    assert json.loads(about["weights"])["sha256"] == storage.sha256(folder.weights(recipe.student_uri))
    for group, found in (("inputs", opened.get_inputs()), ("outputs", opened.get_outputs())):
        described = json.loads(about[group])
        assert [one.name for one in found] == list(described)
        for one in found:
            assert described[one.name]["shape"] == f"[{', '.join(map(str, one.shape))}]"
            assert one.type in (f"tensor({described[one.name]['dtype']})", "tensor(float)")
    assert "pipeline.noise.gaussian" in json.loads(about["inputs"])["noise"]["meaning"]


def test_the_noise_of_a_seed_draws_the_generators_pictures(cases: Callable[[str], Case]) -> None:
    """As the metadata says of noise."""
    recipe, onnx = cases("llamagen").recipe, cases("llamagen").file(".onnx")
    layout = checkpoints.config(recipe.teacher).layout
    given = noise.gaussian(7, [4, 9], layout.length, layout.code_dim).astype(np.float32)
    (pixels,) = session(onnx).run(["pixels"], {"noise": given, "labels": np.array([2, 0])})
    expected = Generator.from_pretrained(recipe.student_uri, "cpu").draw([2, 0], 7, ids=[4, 9])
    assert np.abs(pixels.astype(int) - expected.numpy()).sum() <= 2


def test_the_example_of_the_page_runs(cases: Callable[[str], Case]) -> None:
    onnx = cases("llamagen").file(".onnx")
    (snippet,) = [code for code in PAGE.read_text().split("```python\n")[1:] if "onnxruntime" in code]
    names: dict[str, Any] = {}
    exec(snippet.partition("```")[0].replace("runs/demo/student.onnx", str(onnx)).replace("3, 7", "1, 2"), names)
    assert (names["pixels"].shape, names["pixels"].dtype) == ((2, 3, 6, 6), np.uint8)
    assert 0 <= names["images"].min() < names["images"].max() <= 1


@pytest.mark.slow
def test_large_weights_lie_beside_their_file(llamagen: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.onnx._internal.exporter import _onnx_program

    monkeypatch.setattr(_onnx_program, "_LARGE_MODEL_THRESHOLD", 1)
    run("--student", llamagen.student_uri, "--out", tmp_path / "student.onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["student.onnx", "student.onnx.data"]
    given = {"noise": np.zeros((1, 9, 4), np.float32), "labels": np.zeros(1, np.int64)}
    assert session(tmp_path / "student.onnx").run(None, given)[0].shape == (1, 3, 6, 6)


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (("--out", "x.pt"), "--out x.pt ends as neither kind of file does; name one that ends in .pt2 or .onnx."),
        (("--out", "folder.onnx"), "--out folder.onnx is a folder; name a file."),
        (("--student", "none", "--out", "x.pt2"), "there is no student at none: no config.json; give the folder that"),
        (
            ("--for", "torch-fidelity", "--out", "x.pt2"),
            "--out x.pt2 is nothing that torch-fidelity reads; for it name one that ends in .onnx.",
        ),
        (("--for", "nobody", "--out", "x.onnx"), "argument --for: invalid choice: 'nobody'"),
        (
            ("--teacher", "true", "--out", "x.onnx"),
            "unrecognized arguments: --teacher true; --help lists what there is",
        ),
        (
            ("--sampler", "{name: FlowMatched}", "--out", "x.pt2"),
            "unrecognized arguments: --sampler {name: FlowMatched}; --help lists what there is.",
        ),
    ],
)
def test_bad_requests_are_one_sentence_before_any_work(
    llamagen: Recipe,
    args: tuple[str, ...],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.onnx").mkdir()
    assert refusal(monkeypatch, capsys, "--student", llamagen.student_uri, *args).startswith(sentence)
    assert [path.name for path in tmp_path.iterdir()] == ["folder.onnx"]


def test_prompts_and_missing_packages_are_refused(
    llamagen: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = shared(tiny_text(tmp_path))
    said = refusal(
        monkeypatch, capsys, "--student", recipe.student_uri, "--for", "torch-fidelity", "--out", tmp_path / "x.onnx"
    )
    assert said == "--for torch-fidelity draws from noise alone, and this student takes prompts; leave it out."
    monkeypatch.setattr(export, "find_spec", lambda name: None if name == "onnxscript" else name)
    said = refusal(monkeypatch, capsys, "--student", llamagen.student_uri, "--out", "x.onnx")
    assert said == "--out x.onnx needs onnxscript; pip install 'distilled-decoding[export]'."


def refusal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *args: object) -> str:
    """The one sentence of a command line that ends before a student's weights are read."""
    monkeypatch.setattr(checkpoints, "student", lambda *args: pytest.fail("weights were read"))
    with pytest.raises(SystemExit) as caught:
        run(*args)
    assert caught.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line.removeprefix("error: ")


# ---- a third party


class Flat(NamedTuple):
    """A student of the digits' size as torch-fidelity reads it, and real images for it in a folder."""

    recipe: Recipe
    file: Path
    real: Path
    real_images: Tensor

    @property
    def width(self) -> int:
        """Numbers of a row of z."""
        layout = checkpoints.config(self.recipe.teacher).layout
        return layout.length * layout.code_dim + 1

    def command(self, count: int, *more: str) -> list[str]:
        """torch-fidelity's command line that scores the file."""
        model = ["--input1-model-z-size", str(self.width), "--input1-model-num-samples", str(count)]
        quiet = ["--fid", "--cpu", "--no-cache", "--save-cpu-ram", "--silent", "--json", *more]
        return ["fidelity", "--input1", str(self.file), *model, "--input2", str(self.real), *quiet]

    def scored(self, settings: EvaluateSettings, count: int, weights: Any = None) -> float:
        """The report's distance of the images of the noise that torch-fidelity draws, by the networks themselves."""
        network = instruments.features(settings, "cpu", weights)
        z = np.random.RandomState(2020).randn(count, self.width).astype(np.float32)
        layout = checkpoints.config(self.recipe.teacher).layout
        uniform = torch.special.ndtr(torch.from_numpy(z[:, -1]).double())
        tokenizer = checkpoints.tokenizer(self.recipe.teacher)
        weights_of = folder.weights(self.recipe.student_uri)
        student = checkpoints.student(self.recipe.teacher, weights_of, tokenizer.codebook)
        own = torch.from_numpy(z[:, :-1]).view(count, layout.length, layout.code_dim)
        labels = Labels((uniform * layout.classes).long())
        with torch.no_grad():
            y = tokenizer.decode(student.jump(own, own, 1, labels, self.recipe.train.split)).clamp(-1, 1)
        kept = self.real_images

        def gaussian(images: Tensor) -> Statistics:
            statistics = Statistics.empty(network, 10, 32, len(images))
            rows = np.arange(len(images))
            statistics.add(Sight.of(images, network), None, network, rows, np.full(len(rows), False), 0)
            return statistics

        reference: Gaussian = gaussian(kept).moments.gaussian()
        return score(gaussian(y), Reference(reference, None))


@pytest.fixture(scope="module")
def flat(tmp_path_factory: pytest.TempPathFactory) -> Flat:
    place = tmp_path_factory.mktemp("flat")
    recipe = shared(tiny(place, "var", **IMAGES))
    run("--student", recipe.student_uri, "--for", export.READER, "--out", place / "student.onnx")
    images = networks.images_and_labels()[0][:200]
    (place / "real").mkdir()
    for i, image in enumerate(to_uint8(images)):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(place / "real" / f"{i:03d}.png")
    return Flat(recipe, place / "student.onnx", place / "real", images)


def test_torch_fidelity_scores_the_file_as_the_report_does(
    flat: Flat, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its own command line, its own noise and its own distance, with the digits' scorer in its registry."""
    from pipeline.numerics import torchvision_ops  # noqa: F401  isort: skip  before torch_fidelity imports torchvision
    from torch_fidelity import FeatureExtractorBase, fidelity
    from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

    class Digits(FeatureExtractorBase):
        """What ``instruments.features`` calls digits, as torch-fidelity wants it."""

        def __init__(self, name: str, features: list[str], **kwargs: Any) -> None:
            super().__init__(name, features)
            self.scorer = networks.scorer()

        @staticmethod
        def get_provided_features_list() -> tuple[str, ...]:
            return ("64",)

        def forward(self, pixels: Tensor) -> tuple[Tensor]:
            assert pixels.dtype == torch.uint8
            return (self.scorer(pixels.float() / 127.5 - 1)[0],)

    monkeypatch.setitem(FEATURE_EXTRACTORS_REGISTRY, "digits", Digits)
    monkeypatch.setattr(sys, "argv", flat.command(300, "--feature-extractor", "digits", "--feature-layer-fid", "64"))
    capsys.readouterr()
    fidelity.main()
    theirs = json.loads(capsys.readouterr().out)["frechet_inception_distance"]
    assert theirs == pytest.approx(flat.scored(EvaluateSettings(), 300), rel=1e-4)
    assert theirs > 1


@pytest.mark.slow
def test_torch_fidelitys_command_scores_the_file_with_inception(flat: Flat, tmp_path: Path) -> None:
    """In a process that has of this package no more than what lets torchvision be imported beside any torch."""
    from inception_weights import weights

    count = 24
    torch.save({name: torch.from_numpy(array) for name, array in weights().items()}, tmp_path / "inception.pth")
    few = flat._replace(real=tmp_path / "real", real_images=flat.real_images[:count])
    few.real.mkdir()
    for path in sorted(flat.real.iterdir())[:count]:
        shutil.copy(path, few.real)
    command = few.command(count, "--feature-extractor-weights-path", str(tmp_path / "inception.pth"))
    program = "from pipeline.numerics import torchvision_ops\nfrom torch_fidelity.fidelity import main\nmain()"
    process = [sys.executable, "-c", program, *command[1:]]
    done = subprocess.run(process, capture_output=True, text=True, timeout=280, check=True)
    settings = EvaluateSettings(features="inception", inception="formula", reference=str(few.real))
    ours = few.scored(settings, count, weights())
    assert json.loads(done.stdout)["frechet_inception_distance"] == pytest.approx(ours, rel=1e-4)
