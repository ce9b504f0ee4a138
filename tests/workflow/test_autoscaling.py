"""Submitted jobs on a cluster that grows and shrinks: pytest -m slow tests/workflow/test_autoscaling.py"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.request import urlopen

import autoscaling
import pytest
import yaml
from autoscaling import RAY
from tiny import tiny, with_pairs

from pipeline.pairs import shards
from pipeline.recipe import Recipe

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
ROOT = Path(__file__).parents[2]
REHEARSAL = ("--cluster.gpus", "1", "--cluster.device", "cpu")


@pytest.fixture(scope="module")
def dashboard() -> Iterator[str]:
    """Of a head with no GPU, whose nodes would have one each."""
    temporary = tempfile.TemporaryDirectory(prefix="dd-", dir="/tmp", ignore_cleanup_errors=True)
    with temporary as folder, autoscaling.cluster(Path(folder), {"CPU": 2, "GPU": 1}) as address:
        yield address


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """With its file, recipe.yaml, beside its weights."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    made = with_pairs(tiny(tmp_path), count=160, shard_rows=4, batch=4, actors=2)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(made.resolved()))
    return made


def submit(dashboard: str, folder: Path, job: str, *flags: str) -> subprocess.Popen[str]:
    """The command of the README, but that the nodes have this checkout.

    They are processes with one folder for Ray's files. With --working-dir each that comes would unpack the upload there
    once more, after deleting what the job and the nodes before it run from (tests/cluster/test_two_machines.py has it).
    """
    environment = {"env_vars": {"MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"}}
    command = [RAY, "job", "submit", "--address", dashboard, "--runtime-env-json", json.dumps(environment)]
    command += ["--", "env", "--chdir", str(ROOT), "python", f"jobs/{job}.py"]
    command += ["--config", f"{folder}/recipe.yaml", *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def alive(dashboard: str) -> int:
    """Nodes beside the head, as the dashboard's interface lists them."""
    with urlopen(f"{dashboard}/api/v0/nodes", timeout=10) as answer:
        nodes = json.load(answer)["data"]["result"]["result"]
    return sum(node["state"] == "ALIVE" and not node["is_head_node"] for node in nodes)


@contextmanager
def watched(dashboard: str) -> Iterator[list[int]]:
    """The numbers of nodes that there were, one after the other."""
    seen, stop = [alive(dashboard)], threading.Event()

    def look() -> None:
        while not stop.wait(0.5):
            with suppress(OSError):
                if (now := alive(dashboard)) != seen[-1]:
                    seen.append(now)

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        yield seen
    finally:
        stop.set()
        watcher.join()


def test_nodes_come_for_a_job_and_go(dashboard: str, recipe: Recipe, tmp_path: Path) -> None:
    with watched(dashboard) as seen:
        job = submit(dashboard, tmp_path, "generate_pairs", *REHEARSAL)
        out, _ = job.communicate(timeout=240)
        assert job.returncode == 0, out
        deadline = time.monotonic() + 90
        while seen[-1] and time.monotonic() < deadline:
            time.sleep(0.5)
    print(out, seen)
    assert (seen[0], max(seen), seen[-1]) == (0, 2, 0)
    assert "Waiting for nodes: 0 of 2 replicas have a place. Each needs 1 GPU and 1 CPU on one node" in out
    assert "The cluster has a place for all 2 replicas." in out
    assert "Made 160 pairs" in out
    assert shards.verify(recipe.pairs_uri)["count"] == 160


def test_auto_takes_all_the_nodes_that_may_come(dashboard: str, recipe: Recipe, tmp_path: Path) -> None:
    """Two, by the cluster's own file; the job asks for more, and waits for one alone."""
    with watched(dashboard) as seen:
        job = submit(dashboard, tmp_path, "generate_pairs", *REHEARSAL, "--pairs.actors", "auto", "--pairs.seed", "5")
        out, _ = job.communicate(timeout=240)
        assert job.returncode == 0, out
    print(out, seen)
    assert max(seen) == 2
    assert "Waiting for nodes: 0 of 1 replicas have a place." in out
    assert "Made 160 pairs" in out
    assert shards.verify(recipe.pairs_uri)["count"] == 160


def test_a_job_that_cannot_work_says_so_and_fails(dashboard: str, recipe: Recipe, tmp_path: Path) -> None:
    job = submit(dashboard, tmp_path, "distill", *REHEARSAL)
    out, _ = job.communicate(timeout=200)
    assert job.returncode == 1
    assert re.search(r"^error: .*holds no pair set; run generate_pairs", out, re.M), out


@pytest.mark.faults("nodes that never come")
def test_a_job_whose_nodes_never_come_says_what_it_waits_for(dashboard: str, recipe: Recipe, tmp_path: Path) -> None:
    job = submit(dashboard, tmp_path, "generate_pairs", *REHEARSAL, "--cluster.cpus", "64")
    assert job.stdout
    told = ""
    for line in job.stdout:
        told += line
        if "Waiting for nodes" in line:
            break
    assert "0 of 2 replicas have a place. Each needs 1 GPU and 64 CPU on one node; the cluster has" in told
    (name,) = set(re.findall(r"raysubmit_\w+", told))
    stopped = subprocess.run([RAY, "job", "stop", "--address", dashboard, name], capture_output=True, text=True)
    assert stopped.returncode == 0, stopped.stderr
    job.communicate(timeout=60)
    status = subprocess.run([RAY, "job", "status", "--address", dashboard, name], capture_output=True, text=True)
    assert "stopped" in (status.stdout + status.stderr).lower()
