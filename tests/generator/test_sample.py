"""The command line that draws with a student."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from shared_student import shared
from tiny import tiny, tiny_text

from pipeline import Generator
from pipeline.generator import grid, spread
from pipeline.generator.sample import main, parser
from pipeline.sampling.samplers import FlowMatched


def run(*args: object) -> None:
    main("Draws.", ["--device", "cpu", *map(str, args)])


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
    run("--student", student, "--labels", "1,2", "--count", 6, "--seed", 5, "--first", 3, "--out", place)
    assert capsys.readouterr().out == f"6 images of DD 1 step are in {place}.\n"
    labels = [2, 1, 2, 1, 2, 1]
    expected = Generator.from_pretrained(student, "cpu").draw(labels, 5, ids=range(3, 9)).numpy()
    assert np.array_equal(np.asarray(Image.open(place)), np.asarray(grid.picture(["DD 1 step"], [expected], labels)))


def test_the_teachers_images_stand_below(student: str, tmp_path: Path) -> None:
    run("--student", student, "--count", 3, "--teacher", "true", "--out", tmp_path / "grid.png")
    generator, sampler = Generator.from_pretrained(student, "cpu", teacher=True), FlowMatched()
    rows = [generator.draw(range(3)).numpy(), generator.draw_with(sampler, range(3)).numpy()]
    expected = grid.picture(["DD 1 step", "teacher, FM"], rows, range(3))
    assert np.array_equal(np.asarray(Image.open(tmp_path / "grid.png")), np.asarray(expected))


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
        assert sorted(path.name for path in (tmp_path / folder).iterdir()) == [*names, "sample.json"]
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
        (("--device", "gpu"), "argument --device: 'gpu' is no device of torch's; --help lists what there is."),
        (("--device", "cuda"), "--device is cuda, and no GPU is found; leave it out to draw on the CPU."),
        (("--actors", "2"), "a grid is drawn without actors; give --out an .npz, or a folder."),
        (("--actors", "10001"), "argument --actors: 10001 is more than 10,000; --help lists what there is."),
        (("--steps", "2"), "unrecognized arguments: --steps 2; --help lists what there is."),
    ],
)
def test_bad_requests_are_one_sentence_and_write_nothing(
    student: str, tmp_path: Path, args: tuple[str, ...], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refusal(capsys, "--student", student, "--out", tmp_path / "x.png", *args).startswith(sentence)
    assert not (tmp_path / "x.png").exists()


def test_the_teacher_has_an_npz_of_its_own_and_both_go_on(
    student: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ("--student", student, "--count", 5, "--first", 7, "--seed", 3, "--teacher", "--out", tmp_path / "out.npz")
    run(*asked)
    assert capsys.readouterr().out.endswith(f"are in {tmp_path}/out.npz and {tmp_path}/out-teacher.npz.\n")
    with np.load(tmp_path / "out-teacher.npz") as arrays:
        found = arrays["arr_0"]
    generator = Generator.from_pretrained(student, "cpu", teacher=True)
    expected = generator.draw_with(FlowMatched(), [1, 2, 0, 1, 2], 3, range(7, 12))
    assert np.array_equal(found, expected.permute(0, 2, 3, 1))
    before = (tmp_path / "out.npz").stat().st_mtime_ns
    (tmp_path / "out-teacher.npz").unlink()
    run(*asked)
    assert "5 of 10 images are there and kept." in capsys.readouterr().err
    assert (tmp_path / "out.npz").stat().st_mtime_ns == before
    with np.load(tmp_path / "out-teacher.npz") as arrays:
        assert np.array_equal(found, arrays["arr_0"])


def test_many_images_go_to_actors(student: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line hands on what it was given; what actors do with it, ``test_spread`` knows."""
    asked: list[object] = []
    monkeypatch.setattr(spread, "make", lambda *args: asked.append(args))
    run("--student", student, "--count", 5, "--actors", 3, "--out", tmp_path / "out.npz")
    run("--student", student, "--count", 5, "--actors", 0, "--out", tmp_path / "out.npz")
    (*_, generator, actors), (*_, alone, none) = asked  # type: ignore[misc]
    assert (generator, actors) == (None, 3)
    assert isinstance(alone, Generator)
    assert none == 0


def test_the_rule_of_actors_is_in_the_help() -> None:
    said = " ".join(parser("Draws.").format_help().split())
    assert "by default 0, which is this process without Ray, below 10,000 images" in said


def test_labels_outside_write_nothing_into_a_folder(
    student: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for out in ("new", "new.npz"):
        said = refusal(capsys, "--student", student, "--labels", "0,-1", "--out", tmp_path / out)
        assert said == "label -1 was asked of a student of 3 classes, counted from 0."
        assert not (tmp_path / out).exists()


def test_a_full_folder_is_left_alone(student: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.png").touch()
    assert "is not empty" in refusal(capsys, "--student", student, "--out", tmp_path / "full")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine.png"]
