"""Paths that mean the same everywhere, and how a job finds its Ray."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray

from pipeline.files import places
from pipeline.recipe import Recipe
from pipeline.services import cluster
from pipeline.services.parts import GROWING, MOST, Crew, counted, crew_for
from pipeline.settings.cluster import ClusterSettings
from pipeline.settings.evaluate import EvaluateSettings
from pipeline.settings.pairs import PairSettings
from pipeline.settings.teacher import TeacherSettings
from pipeline.settings.train import TrainSettings


def test_a_portable_recipe_has_no_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    teacher = TeacherSettings(tokenizer="package://digits/scorer.safetensors", checkpoint="weights/var.pth")
    got = cluster.portable(
        Recipe(
            run="runs/a",
            teacher=teacher,
            pairs=PairSettings(uri="s3://bucket/pairs"),
            train=TrainSettings(uri="student"),
            evaluate=EvaluateSettings(student="s.pth", reference="r.npz"),
        )
    )
    assert got.run == str(tmp_path / "runs/a")
    assert got.teacher.tokenizer == teacher.tokenizer, "every node has its own"
    assert got.teacher.checkpoint == str(tmp_path / "weights/var.pth")
    assert (got.pairs_uri, got.student_uri) == ("s3://bucket/pairs", str(tmp_path / "student"))
    assert (got.evaluate.student, got.evaluate.reference) == (str(tmp_path / "s.pth"), str(tmp_path / "r.npz"))
    assert (got.evaluate.uri, got.evaluate.inception) == (None, None)
    assert cluster.portable(got) == got


def test_a_submitted_job_says_once_where_its_relative_paths_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    inside = tmp_path / places.JOB_FOLDER / "_ray_pkg_0123"
    inside.mkdir(parents=True)
    monkeypatch.chdir(inside)
    monkeypatch.setenv("HOME", str(tmp_path))
    got = cluster.portable(cluster.portable(Recipe(run="runs/a", train=TrainSettings(uri="student"))))
    assert got.run == str(tmp_path / "distilled-decoding/runs/a")
    said = f"Relative paths are taken from {tmp_path}/distilled-decoding: the job's working directory is deleted"
    assert capsys.readouterr().out.count(said) == 1
    cluster.portable(Recipe(run="s3://bucket/run"))
    assert capsys.readouterr().out == "", "there is no relative path"


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What ray.init was called with; nothing is started."""
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **settings: calls.append(settings))
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True}])
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 4.0})
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(cluster, "check_address", lambda: None)
    for name in ("RAY_ADDRESS", *cluster.KEEP_MEMORY):
        monkeypatch.delenv(name, raising=False)
    return calls


def test_a_local_ray_has_room_for_every_pool(started: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "5")
    recipe = Recipe(pairs=PairSettings(actors=3), cluster=ClusterSettings(cpus=1.5))
    cluster.connect(recipe)
    assert os.environ["MALLOC_MMAP_THRESHOLD_"] == cluster.KEEP_MEMORY["MALLOC_MMAP_THRESHOLD_"]
    assert os.environ["MALLOC_TRIM_THRESHOLD_"] == "5", "the user's own setting stays"
    (call,) = started
    assert call["address"] == "local"
    assert call["num_cpus"] == 5 + cluster.SPARE
    assert not call["include_dashboard"]


def test_a_submitted_job_joins_its_cluster_with_the_token(
    started: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    cluster.connect(Recipe(run="s3://bucket/run"))
    assert "address" not in started[0]
    assert "num_cpus" not in started[0]
    assert os.environ["RAY_AUTH_MODE"] == "disabled", "the user's choice stays"
    monkeypatch.delenv("RAY_AUTH_MODE")
    cluster.connect(Recipe(run="s3://bucket/run"))
    assert "RAY_AUTH_MODE" not in os.environ
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("secret")
    cluster.connect(Recipe(run="s3://bucket/run"))
    assert os.environ["RAY_AUTH_MODE"] == "token"
    assert capsys.readouterr().err == ""


def test_a_local_folder_on_several_nodes_is_warned_about(
    started: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = Recipe(run="/data/run")
    cluster.connect(recipe)
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    cluster.connect(replace(recipe, cluster=ClusterSettings(gpus=1)))
    assert "a local path, on a cluster of several nodes" in capsys.readouterr().err, "GPU nodes are still to come"
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True}] * 2)
    cluster.connect(recipe)
    assert "a local path, on a cluster of several nodes" in capsys.readouterr().err


@pytest.mark.usefixtures("started")
def test_a_machine_without_enough_gpus_is_one_sentence() -> None:
    with pytest.raises(ValueError, match=r"cluster\.gpus is 1 but Ray sees 0 GPUs on this machine; set it to 0"):
        cluster.connect(Recipe(cluster=ClusterSettings(gpus=1)))


def test_a_run_in_a_submitted_jobs_own_folder_is_warned_of(
    started: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    cluster.connect(Recipe(run="/tmp/ray/session/runtime_resources/working_dir_files/_ray_pkg_71ae/runs/demo"))
    assert "give an absolute path" in capsys.readouterr().err
    cluster.connect(Recipe(run="/shared/runs/demo"))
    assert "warning" not in capsys.readouterr().err


# ---- waiting for nodes


def node(cpus: float, gpus: float = 0, alive: bool = True) -> dict[str, Any]:
    return {"Alive": alive, "Resources": {"CPU": cpus, "GPU": gpus}}


@pytest.mark.parametrize(
    ("gpus", "cpus", "places"),
    [(0, 1, 11), (0, 2, 4), (1, 1, 3), (1, 4, 1), (0.5, 1, 6), (0, 6, 0), (1, 6, 0)],
)
def test_places_are_counted_node_by_node(
    monkeypatch: pytest.MonkeyPatch, gpus: float, cpus: float, places: int
) -> None:
    nodes = [node(3), node(3, 1), node(5, 2), node(64, 8, alive=False)]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    assert cluster.places(Recipe(cluster=ClusterSettings(gpus=gpus, cpus=cpus))) == places


def test_auto_is_what_a_machine_has_or_a_cluster_may_get(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    monkeypatch.setattr(cluster, "device_count", lambda: 4)
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    nodes = [node(3), node(3, 1), node(5, 2)]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    few, gpus = Recipe(cluster=ClusterSettings(cpus=4)), Recipe(cluster=ClusterSettings(gpus=0.5, cpus=1))

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert crew_for(Recipe(), 7, 100) == Crew(7, 7), "a number is a number"
    assert crew_for(Recipe(), 7, 3) == Crew(3, 3)
    assert crew_for(Recipe(), "auto", 100) == Crew(6, 6)
    assert crew_for(few, "auto", 100) == Crew(1, 1)
    assert crew_for(gpus, "auto", 100) == Crew(8, 8)
    assert crew_for(gpus, "auto", 2) == Crew(2, 2)

    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setattr(cluster, "connect", lambda recipe: None)
    assert crew_for(Recipe(), "auto", 1000) == Crew(MOST, 11)
    assert crew_for(few, "auto", 1000) == Crew(MOST, GROWING), "it may grow"
    assert crew_for(few, "auto", 3) == Crew(3, 3)
    recipe = Recipe(pairs=PairSettings(actors="auto"), evaluate=EvaluateSettings(actors=3))
    found = counted(recipe)
    assert (found.pairs.actors, found.evaluate.actors) == (11, 3)


def test_a_local_ray_has_room_for_auto(started: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    monkeypatch.setattr(cluster, "device_count", lambda: 8)
    cluster.connect(Recipe(pairs=PairSettings(actors="auto"), cluster=ClusterSettings(cpus=2)))
    assert started[0]["num_cpus"] == 6 + cluster.SPARE
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 32.0, "GPU": 8})
    cluster.connect(Recipe(pairs=PairSettings(actors="auto"), cluster=ClusterSettings(gpus=1, cpus=4)))
    assert started[1]["num_cpus"] == 32 + cluster.SPARE, "each GPU's replica has its four"


def test_who_waits_says_for_what(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    nodes = [node(2)]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0, "GPU": len(nodes) - 1})
    monkeypatch.setattr(cluster, "LOOK", 0.01)
    told: list[str] = []

    def following() -> str:
        """The next line that it says."""
        deadline = time.monotonic() + 10
        while not (lines := capsys.readouterr().err):
            assert time.monotonic() < deadline, told
            time.sleep(0.01)
        told.append(lines)
        return lines

    with cluster.waiting(Recipe(cluster=ClusterSettings(gpus=1)), 2):
        assert following().startswith(
            "Waiting for nodes: 0 of 2 replicas have a place. Each needs 1 GPU and 1 CPU on one node; the cluster has"
            " 0 GPU and 2 CPU on 1 node. `ray status`"
        )
        nodes.append(node(2, 1))
        assert "1 of 2 replicas have a place" in following()
        nodes.append(node(2, 1))
        assert following() == "The cluster has a place for all 2 replicas.\n"
        nodes.pop()
        assert "on 2 nodes" in following()
    assert "".join(told).count("\n") == 4, "every change once"
    with cluster.waiting(Recipe(), 1):
        time.sleep(0.1)
    assert not capsys.readouterr().err, "nothing to wait for, nothing to say"


def test_a_rehearsal_computes_on_the_cpu() -> None:
    """GPUs that Ray was told of and that are not there."""
    assert ClusterSettings(gpus=1).runs_on == "cuda"
    assert ClusterSettings(gpus=1, device="cpu").runs_on == "cpu"
    assert ClusterSettings(gpus=0).runs_on == "cpu"
