"""The command line that draws with a student."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from shared_student import shared
from tiny import tiny, tiny_text

from pipeline import Generator
from pipeline.generator.sample import GAP, main


def run(*args: object) -> None:
    main("Draws.", [*map(str, args), "--device", "cpu"])


@pytest.fixture
def student(tmp_path: Path) -> str:
    return shared(tiny(tmp_path, "llamagen")).student_uri


def refusal(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    with pytest.raises(SystemExit) as caught:
        run(*args)
    assert caught.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line.removeprefix("error: ")


def test_a_grid_is_of_labels_in_turn(student: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = tmp_path / "grid.png"
    run("--student", student, "--labels", "1,2", "--count", 6, "--seed", 5, "--out", place)
    assert capsys.readouterr().out == f"6 images of DD 1 step are in {place}.\n"
    expected = Generator.from_pretrained(student, "cpu")([1, 2, 1, 2, 1, 2], seeds=5)
    sheet, side = np.asarray(Image.open(place)), expected[0].width
    for i, image in enumerate(expected):
        top, left = i // 2 * (side + GAP), i % 2 * (side + GAP)
        assert np.array_equal(sheet[top : top + side, left : left + side], image), i


def test_the_teachers_images_stand_below(student: str, tmp_path: Path) -> None:
    run("--student", student, "--count", 3, "--teacher", "true", "--out", tmp_path / "grid.png")
    one = Generator.from_pretrained(student, "cpu")([0, 1, 2])[0]
    sheet = np.asarray(Image.open(tmp_path / "grid.png"))
    assert sheet.shape[0] == 4 * one.height + 3 * GAP, "two columns, two lines, a row of each sampler"
    assert np.array_equal(sheet[: one.height, : one.width], one)
    assert not np.array_equal(sheet[one.height + GAP :][: one.height, : one.width], one)


def test_an_npz_is_that_of_evaluators_and_begins_where_it_is_told(student: str, tmp_path: Path) -> None:
    place = tmp_path / "images.npz"
    run("--student", student, "--count", 5, "--first", 7, "--out", place, "--sampler", "{name: FewStep, steps: [1, 2]}")
    with np.load(place) as arrays:
        found = arrays["arr_0"]
    expected = Generator.from_pretrained(student, "cpu").draw([1, 2, 0, 1, 2], 0, (1, 2), range(7, 12))
    assert np.array_equal(found, expected.permute(0, 2, 3, 1))
    assert sorted(path.name for path in tmp_path.glob("images*")) == ["images.npz"]


def test_a_folder_has_a_picture_of_each_id(student: str, tmp_path: Path) -> None:
    run("--student", student, "--count", 11, "--teacher", "--out", tmp_path / "out")
    names = [f"{i:02d}.png" for i in range(11)]
    for folder in ("out", "out-teacher"):
        assert sorted(path.name for path in (tmp_path / folder).iterdir()) == names
    third = Generator.from_pretrained(student, "cpu")(range(3))[2]
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / "02.png")), third)


def test_prompts_come_from_a_file_or_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = shared(tiny_text(tmp_path))
    run("--student", recipe.student_uri, "--prompts", recipe.captions.uri, "--out", tmp_path / "many.npz")
    run("--student", recipe.student_uri, "--prompt", "zero one", "--count", 4, "--out", tmp_path / "one.png")
    assert capsys.readouterr().out.startswith("60 images of DD 1 step")
    said = refusal(capsys, "--student", recipe.student_uri, "--out", tmp_path / "x.png")
    assert said == "this student draws from prompts; give --prompt TEXT or --prompts FILE."


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (("--labels", "three"), "--labels is three; write classes with commas between them, as 3,7."),
        (("--labels", "1", "--prompt", "x"), "--labels and --prompt are both given; give one of them."),
        (("--labels", "7"), "label 7 was asked of a student of 3 classes, counted from 0."),
        (("--count", "5000"), "a grid of 5,000 images is none to look at; give --out an .npz, or a folder."),
        (
            ("--count", "few"),
            "argument --count: 'few' is no whole number from 0 to 2^63 - 1; --help",
        ),
        (("--teacher", "maybe"), "argument --teacher: 'maybe' is neither true nor false; --help lists what there is."),
        (("--sampler", "{name: FewStep"), "--sampler is {name: FewStep, which is no YAML; write it as"),
        (
            ("--sampler", "{name: OneStepStar}"),
            "--sampler {name: OneStepStar} draws from a pair set's token frequencies",
        ),
        (("--sampler", "FewStep"), "evaluate.samplers holds 'FewStep'; an entry needs a name out of"),
        (("--steps", "2"), "unrecognized arguments: --steps 2; --help lists what there is."),
    ],
)
def test_bad_requests_are_one_sentence_and_write_nothing(
    student: str, tmp_path: Path, args: tuple[str, ...], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refusal(capsys, "--student", student, "--out", tmp_path / "x.png", *args).startswith(sentence)
    assert not (tmp_path / "x.png").exists()


def test_a_full_folder_is_left_alone(student: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.png").touch()
    assert "is not empty" in refusal(capsys, "--student", student, "--out", tmp_path / "full")
