"""Random kills, which `make test-faults` does: a hundred and more.

Whatever dies and whenever, the same command run again ends with the bytes of a run that nothing disturbed.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import faulty
import pytest
import ray
import torch
from faults import finish, kill, scores, shards, start, wait, workers
from safetensors.torch import load_file
from tiny import IMAGES, tiny, tiny_text, with_pairs

from pipeline import storage
from pipeline.pairs import shards as pairs
from pipeline.training import state
from pipeline.workflow.distill import distill
from pipeline.workflow.evaluate import evaluate
from pipeline.workflow.generate import generate

OF_PROMPTS, LONG = 6, 44  # kills


@pytest.fixture(autouse=True)
def _one_store(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path_factory.getbasetemp()}/mlflow.db")


@pytest.fixture
def slow() -> Iterator[Path]:
    """A file; as long as it exists, the faulty family's batches take half a second."""
    yield faulty.SLOW
    faulty.SLOW.unlink(missing_ok=True)


def address() -> str:
    """Of the session's Ray."""
    return ray.get_runtime_context().gcs_address


@pytest.mark.faults("pairs: driver killed", "pairs: replica killed")
@pytest.mark.slow
@pytest.mark.parametrize("kills", [OF_PROMPTS, LONG])
@pytest.mark.timeout(3000)
def test_pairs_survive_kills_of_driver_and_replicas(
    ray_cluster: None, slow: Path, tmp_path: Path, kills: int, record_property: Callable[[str, int], None]
) -> None:
    """A set is begun again whenever one is complete; who dies, dies at some moment after the first replica appeared.

    With few kills the pairs are of prompts, with many of classes.
    """
    small = tiny_text(tmp_path) if kills == OF_PROMPTS else tiny(tmp_path, "llamagen")
    recipe = with_pairs(small, count=79, shard_rows=4, batch=4, actors=2)
    recipe = replace(recipe, teacher=replace(recipe.teacher, family="faulty"))
    generate(recipe)
    expected, chance = shards(recipe), random.Random(kills)
    assert len(expected) == 20
    done, round_ = {"driver": 0, "replica": 0}, 0
    slow.touch()  # half a second a shard, so that a kill finds somebody at work
    while sum(done.values()) < kills:
        round_ += 1
        again = with_pairs(recipe, uri=str(tmp_path / f"set-{round_}"))
        while True:
            job = start("generate_pairs", again, tmp_path, address())
            target = min(done, key=lambda victim: done[victim])  # the moment is random, not who
            wait(job, lambda: len(workers("Replica")), 1)
            time.sleep(chance.random() * 5)  # of the ten batches of each replica
            victims = [job.pid] if target == "driver" else workers("Replica")
            if sum(done.values()) == kills or job.poll() is not None or not victims:
                finish(job)
                break
            if kill(chance.choice(victims)):
                done[target] += 1
            if target == "replica":
                finish(job)  # Ray makes another one, and the driver does not even notice
                break
            job.wait()
            assert not Path(again.pairs_uri, "_manifest.json").exists() or len(shards(again)) == 20
        assert shards(again) == expected
        assert pairs.verify(again.pairs_uri)["count"] == 79
        assert not [name for name in storage.listing(again.pairs_uri) if name.startswith(storage.TEMPORARY)]
    record_property("kills", sum(done.values()))
    assert min(done.values()) == kills // 2


@pytest.mark.faults("pairs: two drivers in one folder")
@pytest.mark.slow
def test_two_drivers_in_one_folder_do_no_harm(ray_cluster: None, tmp_path: Path) -> None:
    recipe = with_pairs(tiny(tmp_path), count=40, shard_rows=4, batch=4)
    generate(with_pairs(recipe, uri=str(tmp_path / "straight")))
    first, second = (start("generate_pairs", recipe, tmp_path, address()) for _ in range(2))
    finish(first)
    finish(second)
    assert shards(recipe) == shards(with_pairs(recipe, uri=str(tmp_path / "straight")))
    assert pairs.verify(recipe.pairs_uri)["count"] == 40
    assert not [name for name in storage.listing(recipe.pairs_uri) if name.startswith(storage.TEMPORARY)]


@pytest.mark.faults("student: driver killed")
@pytest.mark.slow
@pytest.mark.parametrize("kills", [LONG])
@pytest.mark.timeout(3000)
def test_a_student_survives_kills_of_its_driver(
    ray_cluster: None, tmp_path: Path, kills: int, record_property: Callable[[str, int], None]
) -> None:
    """Killed before its first checkpoint, between two, or in the middle of one."""
    recipe = with_pairs(tiny(tmp_path, "llamagen"), count=104)
    generate(recipe)
    settings = replace(recipe.train, epochs=8, checkpoint_every=3, log_every=1, lpips=0.0, split=9)
    recipe = replace(recipe, train=settings)
    straight = replace(recipe, train=replace(settings, uri=str(tmp_path / "straight")))
    distill(straight)
    expected, chance = load_file(f"{straight.student_uri}/model.safetensors"), random.Random(kills)
    done, round_, total = 0, 0, 96
    while done < kills:
        round_ += 1
        again = replace(recipe, train=replace(settings, uri=str(tmp_path / f"student-{round_}")))
        place = f"{again.student_uri}/checkpoints"
        while True:
            before = newest_step(place)
            job = start("distill", again, tmp_path, address())
            wanted = before + chance.randrange(0, total // 2)
            wait(job, partial(newest_step, place), wanted)
            time.sleep(chance.random() * 0.3)
            if done == kills or job.poll() is not None:
                finish(job)
                break
            done += kill(job.pid)
            job.wait()
        found = load_file(f"{again.student_uri}/model.safetensors")
        assert found.keys() == expected.keys()
        assert all(torch.equal(value, found[name]) for name, value in expected.items())
        assert [name for name in storage.listing(place) if name.startswith(storage.TEMPORARY)] == []
    record_property("kills", done)


@pytest.mark.faults("report: driver killed", "report: actor killed")
@pytest.mark.parametrize("kills", [pytest.param(13, marks=pytest.mark.slow)])
@pytest.mark.timeout(3000)
def test_a_report_survives_kills_of_driver_and_actors(
    ray_cluster: None, tmp_path: Path, kills: int, record_property: Callable[[str, int], None]
) -> None:
    """And what a sampler's images gave is never made again once it is there."""
    listed = [{"name": "Autoregressive"}, {"name": "Skip", "n": 1}, {"name": "FlowMatched"}][: min(3, 1 + kills)]
    recipe = tiny(tmp_path, "var", **IMAGES)
    settings = replace(recipe.evaluate, samplers=listed, count=2000, batch=250, actors=2)
    recipe = replace(recipe, evaluate=settings)
    straight = replace(recipe, evaluate=replace(settings, uri=str(tmp_path / "straight")))
    evaluate(straight)
    chance, done, round_ = random.Random(kills), {"driver": 0, "actor": 0}, 0
    while sum(done.values()) < kills:
        round_ += 1
        again = replace(recipe, evaluate=replace(settings, uri=str(tmp_path / f"report-{round_}")))
        cache = Path(again.report_uri, "cache")
        before: dict[str, int] = {}
        while True:
            job, target = start("evaluate", again, tmp_path, address()), chance.choice(sorted(done))
            wait(job, partial(written, cache), len(before) + chance.randrange(1, 3))
            time.sleep(chance.random() * 0.5)
            victims = [job.pid] if target == "driver" else workers("Artist")
            if sum(done.values()) == kills or job.poll() is not None or not victims:
                finish(job)
                break
            done[target] += kill(chance.choice(victims))
            if target == "actor":
                finish(job)
                break
            job.wait()
            now = {path.name: path.stat().st_mtime_ns for path in cache.iterdir() if not path.name.startswith(".")}
            assert before.items() <= now.items()
            before = now
        assert scores(again) == scores(straight)
    record_property("kills", sum(done.values()))


def written(folder: Path) -> int:
    return sum(not path.name.startswith(storage.TEMPORARY) for path in folder.glob("*"))


def newest_step(place: str) -> int:
    names = state.saved(place)
    return int(names[-1].removeprefix("step-").removesuffix(".pt")) if names else 0
