"""Many images: the same bytes whoever draws them, kept where a job was stopped, made again where an actor died."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import mortal
import numpy as np
import pytest
from shared_student import shared
from tiny import tiny

from pipeline import Generator
from pipeline.generator import spread
from pipeline.generator.generator import BATCH
from pipeline.generator.request import Request
from pipeline.generator.targets import targets
from pipeline.host.errors import Refused, Unfinished
from pipeline.sampling.samplers import FewStep, FlowMatched

COUNT = 2 * BATCH + 10


@pytest.fixture
def request_(tmp_path: Path) -> Request:
    """The student's images in an .npz and the teacher's in a folder, in parts of a batch."""
    student = shared(tiny(tmp_path, "llamagen")).student_uri
    places = (str(tmp_path / "out" / "images.npz"), str(tmp_path / "out" / "pictures"))
    (tmp_path / "out").mkdir()
    samplers = (FewStep(1), FlowMatched())
    return Request(student, True, samplers, places, [2, 1, 0, 0], 5, 7, COUNT, "cpu", part=BATCH)


def moved(request: Request, folder: Path) -> Request:
    folder.mkdir()
    return replace(request, places=(str(folder / "images.npz"), str(folder / "pictures")))


def made(request: Request, actors: int = 0) -> Request:
    places = targets(request)
    generator = None if actors else Generator.from_pretrained(request.student, "cpu", teacher=request.teacher)
    spread.make(request, places, spread.missing(places), generator, actors)
    return request


def images(request: Request) -> dict[str, str]:
    """Digest of the pixels of the .npz and of every picture's bytes."""
    with np.load(request.places[0]) as arrays:
        out = {"npz": hashlib.sha256(arrays["arr_0"].tobytes()).hexdigest()}
    return out | {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in Path(request.places[1]).glob("*.png")
    }


@pytest.mark.faults("images: an actor that dies when it has made a part")
def test_actors_and_parts_change_no_byte_and_a_dead_ones_part_is_made_again(
    ray_cluster: str, request_: Request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = images(made(request_))
    assert len(expected) == 1 + COUNT
    assert images(made(replace(moved(request_, tmp_path / "large"), part=2 * BATCH))) == expected
    monkeypatch.setattr(spread, "SamplingActor", mortal.Mortal)
    spread_out = made(moved(request_, tmp_path / "actors"), actors=2)
    assert images(spread_out) == expected
    assert (tmp_path / "actors" / "died").exists()
    done = [path.name.split("-")[1:3] for path in (tmp_path / "actors").glob("made-*")]
    assert sorted(done) == [[draw, item] for draw in "01" for item in "012"], "each once, but for what died"
    assert len({path.name.split("-")[3] for path in (tmp_path / "actors").glob("made-*")}) >= 2, "two processes"


def test_images_are_those_of_one_call(request_: Request) -> None:
    """The oracle: everything at once, without parts and files."""
    generator = Generator.from_pretrained(request_.student, "cpu", teacher=True)
    ids = range(7, 7 + COUNT)
    wanted = [[2, 1, 0, 0][i % 4] for i in ids]
    made(request_)
    with np.load(request_.places[0]) as arrays:
        found = arrays["arr_0"]
    assert np.array_equal(found, generator.draw(wanted, 5, ids=ids).permute(0, 2, 3, 1))
    assert sorted(path.name for path in Path(request_.places[1]).glob("*.png")) == [f"{i:03d}.png" for i in ids]


@pytest.mark.faults("images: a job that is stopped between and within parts")
def test_a_stopped_job_goes_on(
    request_: Request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = images(made(moved(request_, tmp_path / "whole")))
    drawn, original = list[tuple[int, int]](), spread._drawn

    def stopping(request: Request, generator: Generator, draw: int, item: int) -> Iterator[np.ndarray]:
        if len(drawn) == 4:
            raise KeyboardInterrupt
        drawn.append((draw, item))
        return original(request, generator, draw, item)

    monkeypatch.setattr(spread, "_drawn", stopping)
    with pytest.raises(KeyboardInterrupt):
        made(request_)
    assert drawn == [(0, 0), (0, 1), (0, 2), (1, 0)]
    Path(request_.places[1], ".tmp-x").touch()  # of a writer that was killed
    drawn.clear()
    monkeypatch.setattr(spread, "_drawn", lambda *args: drawn.append(args[2:]) or original(*args))
    assert images(made(request_)) == expected
    assert {(1, 1), (1, 2)} <= set(drawn) <= {(1, 0), (1, 1), (1, 2)}, "of the student nothing is drawn again"
    left = sum(len(request_.ids(item)) for _, item in drawn)
    assert f"{2 * COUNT - left:,} of {2 * COUNT:,} images are there and kept." in capsys.readouterr().err
    assert not list(Path(request_.places[1]).glob(".tmp*"))
    drawn.clear()
    made(request_)
    assert not drawn, "and what is finished is left as it is"


def test_one_missing_picture_is_drawn_again(request_: Request) -> None:
    expected = images(made(request_))
    Path(request_.places[1], "075.png").unlink()
    places = targets(request_)
    assert spread.missing(places) == [(1, 1)]
    assert images(made(request_)) == expected


@pytest.mark.faults("images: actors that write to another disk")
def test_parts_that_do_not_arrive_are_missed(request_: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spread, "_by_actors", lambda request, places, units, actors: iter(units[:-1]))
    with pytest.raises(Unfinished, match=r"6 of 6 parts were made and are not at --out as this process sees it"):
        made(request_, actors=2)


def test_another_draw_is_not_mixed_in(request_: Request) -> None:
    """A folder is refused; an .npz is replaced once the other one is whole, and parts of neither are left."""
    made(request_)
    other = replace(request_, seed=6)
    with pytest.raises(
        Refused, match=r"holds pictures of another draw: its sample.json has another seed; name another"
    ):
        spread.missing(targets(other))
    alone = replace(other, samplers=other.samplers[:1], places=other.places[:1])
    Path(f"{alone.places[0]}.part-{'0' * 24}-00000").touch()  # of a job with yet other settings, killed
    made(alone)
    with np.load(alone.places[0]) as arrays:
        generator = Generator.from_pretrained(alone.student, "cpu")
        assert np.array_equal(arrays["arr_0"][:3], generator.draw([0, 2, 1], 6, ids=[7, 8, 9]).permute(0, 2, 3, 1))
    assert not list(Path(alone.places[0]).parent.glob("*.part-*"))


@pytest.mark.parametrize(
    ("actors", "device", "count", "gpus", "cores", "expected"),
    [
        (None, None, spread.MANY - 1, 8, 4, (0, "cuda")),
        (None, None, spread.MANY, 8, 4, (8, "cuda")),
        (None, None, spread.MANY, 1, 4, (0, "cuda")),
        (None, None, spread.MANY, 0, 4, (4, "cpu")),
        (None, None, spread.MANY, 0, 1, (0, "cpu")),
        (None, "cpu", spread.MANY, 8, 4, (4, "cpu")),
        (0, None, 10**6, 8, 4, (0, "cuda")),
        (3, None, 10, 0, 4, (3, "cpu")),
        (3, "cuda:1", 10, 2, 4, (3, "cuda")),
        (None, "cuda:1", 10, 2, 4, (0, "cuda:1")),
    ],
)
def test_how_many_actors_there_are_by_default(
    actors: int | None,
    device: str | None,
    count: int,
    gpus: int,
    cores: int,
    expected: tuple[int, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(spread.torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(spread.os, "sched_getaffinity", lambda process: set(range(cores)))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert spread.plan(actors, device, count, "/nowhere") == expected


def test_a_cluster_is_asked_for_its_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    room = {"cuda": 0, "cpu": 12}
    monkeypatch.setattr(spread, "_room", lambda place, device: room[device])
    monkeypatch.setattr(spread.torch.cuda, "device_count", lambda: 0)
    assert spread.plan(None, None, spread.MANY, "/nowhere") == (12, "cpu")
    room["cuda"] = 5
    assert spread.plan(None, None, spread.MANY, "/nowhere") == (5, "cuda")
    assert spread.plan(2, "cpu", spread.MANY, "/nowhere") == (2, "cpu")
    room["cuda"] = 0
    with pytest.raises(Refused, match="--device is cuda, and no GPU is found"):
        spread.plan(2, "cuda", 10, "/nowhere")
