"""Nodes that die and come back: pytest -m slow tests/workflow/test_nodes.py; also part of `make test-faults`.

A Ray of several nodes on this machine, each with a raylet and workers of its own, which the tests kill: the raylet
alone, the whole node at once, or with the notice that a spot node gets.
"""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import faulty
import psutil
import pytest
import torch
from faults import LOGS, finish, kill, said, scores, shards, start, wait, workers
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from safetensors.torch import load_file
from tiny import IMAGES, tiny, with_pairs

from pipeline import storage
from pipeline.pairs import manifest
from pipeline.pairs import shards as pairs
from pipeline.recipe import Recipe
from pipeline.training import state

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
STORE = 100 << 20  # bytes of a node's object store
LIVELY = {  # a dead node is noticed after two seconds instead of half a minute
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 500,
    "health_check_failure_threshold": 4,
}
KINDS = ("raylet", "node", "spot")


class Nodes:
    """A head without CPUs, where drivers live, and ``size`` nodes of two CPUs that may be lost."""

    def __init__(self, folder: str, size: int = 2) -> None:
        head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": STORE, "temp_dir": folder}
        self.cluster = Cluster(initialize_head=True, head_node_args=head | {"_system_config": LIVELY})
        self.size = size
        self.fill()

    @property
    def address(self) -> str:
        return str(self.cluster.address)

    def fill(self) -> None:
        """As many nodes as there were at first."""
        for _ in range(self.size - len(self.cluster.worker_nodes)):
            self.cluster.add_node(num_cpus=2, object_store_memory=STORE)

    def lose(self, kind: str, chance: random.Random) -> None:
        """Take some node away: kill its raylet, kill all of it, or have it end what it can, as a spot node does."""
        node = chance.choice(sorted(self.cluster.worker_nodes, key=id))
        if kind == "raylet":
            (raylet,) = node.all_processes["raylet"]
            kill(raylet.process.pid)
            raylet.process.wait()
        with suppress(AssertionError):  # a raylet that is dead already
            self.cluster.remove_node(node, allow_graceful=kind == "spot")


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    import tempfile

    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(prefix="dd-", dir="/tmp") as folder:
        tests = Path(__file__).parents[1]
        patch.setenv("PYTHONPATH", f"{tests}/support:{tests.parent}")
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db")
        patch.setenv("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "0.5")
        made = Nodes(folder)
        yield made
        made.cluster.shutdown()


@pytest.fixture
def full(nodes: Nodes) -> Nodes:
    nodes.fill()
    return nodes


def committed(recipe: Recipe) -> int:
    return len(manifest.committed(recipe.pairs_uri))


def disturb(
    job: subprocess.Popen[str], nodes: Nodes, chance: random.Random, count: Callable[[], int], stride: int, losses: int
) -> Counter[str]:
    """Lose a node of some kind whenever ``count()`` has grown by up to ``stride``, and get another a moment later."""
    done: Counter[str] = Counter()
    while done.total() < losses:
        wait(job, count, count() + chance.randrange(1, stride))
        time.sleep(chance.random() * 0.3)
        if job.poll() is not None:
            break
        kind = KINDS[done.total() % len(KINDS)]
        nodes.lose(kind, chance)
        done[kind] += 1
        time.sleep(chance.random() * 2)
        nodes.fill()
    return done


@pytest.mark.faults("pairs: raylet killed", "pairs: node lost", "pairs: spot node taken away")
def test_pairs_survive_the_loss_of_nodes(
    full: Nodes, tmp_path: Path, record_property: Callable[[str, int], None]
) -> None:
    recipe = with_pairs(tiny(tmp_path, "llamagen"), count=319, shard_rows=4, batch=4, actors=2)
    recipe = replace(recipe, teacher=replace(recipe.teacher, family="faulty"))
    finish(start("generate_pairs", with_pairs(recipe, uri=str(tmp_path / "straight")), tmp_path, full.address))
    expected = shards(with_pairs(recipe, uri=str(tmp_path / "straight")))
    assert len(expected) == 80
    faulty.SLOW.touch()  # there must be time to lose something in
    try:
        job = start("generate_pairs", recipe, tmp_path, full.address)
        lost = disturb(job, full, random.Random(1), partial(committed, recipe), 6, losses=9)
        out = finish(job)
    finally:
        faulty.SLOW.unlink()
    print(out)
    record_property("kills", lost.total())
    assert min(lost[kind] for kind in KINDS) >= 2
    assert shards(recipe) == expected
    assert pairs.verify(recipe.pairs_uri)["count"] == 319
    assert not [name for name in storage.listing(recipe.pairs_uri) if name.startswith(storage.TEMPORARY)]


def steps(recipe: Recipe) -> int:
    names = state.saved(f"{recipe.student_uri}/checkpoints")
    return int(names[-1].removeprefix("step-").removesuffix(".pt")) if names else 0


def trained(recipe: Recipe, **changes: Any) -> Recipe:
    return replace(recipe, train=replace(recipe.train, **changes))


@pytest.mark.faults("student: nodes of workers lost", "student: another number of workers")
def test_a_student_survives_the_loss_of_nodes_and_other_numbers_of_workers(
    full: Nodes, tmp_path: Path, record_property: Callable[[str, int], None]
) -> None:
    """Two workers lose nodes and the driver is killed, one goes on and loses its node, the driver alone ends it."""
    recipe = with_pairs(tiny(tmp_path, "llamagen"), count=104)
    finish(start("generate_pairs", recipe, tmp_path, full.address))
    recipe = trained(recipe, epochs=150, checkpoint_every=4, log_every=1, lpips=0.0, split=9)
    finish(start("distill", trained(recipe, uri=str(tmp_path / "straight"), workers=0), tmp_path, full.address))
    chance, told, lost = random.Random(2), "", Counter[str]()
    for workers_, losses in ((2, 2), (1, 1), (0, 0)):
        job = start("distill", trained(recipe, workers=workers_), tmp_path, full.address)
        lost += disturb(job, full, chance, partial(steps, recipe), 40, losses)
        if workers_:
            wait(job, partial(steps, recipe), steps(recipe) + 8)
            kill(job.pid)
            told += said(job)
    told += finish(job)
    print(told)
    record_property("kills", lost.total() + 2)
    assert lost.total() == 3
    assert told.count("Resuming") >= 2, "each driver goes on; so do workers that are lost after the first checkpoint"
    expected, found = (load_file(f"{place}/model.safetensors") for place in (tmp_path / "straight", recipe.student_uri))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5)


def busy(nodes: Nodes, worker: str) -> Any:
    """The node with a process of that name."""
    raylets = {node.all_processes["raylet"][0].process.pid: node for node in nodes.cluster.worker_nodes}
    (found,) = {psutil.Process(process).ppid() for process in workers(worker)}
    return raylets[found]


def give_notice(nodes: Nodes, node: Any, seconds: int) -> None:
    """Tell Ray that the node is taken away in so many seconds, as a cloud does."""
    from ray.core.generated import autoscaler_pb2

    why = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    deadline = int(1000 * (time.time() + seconds))
    accepted, why_not = GcsClient(address=nodes.address).drain_node(node.node_id, why, "", deadline)
    assert accepted, why_not


@pytest.mark.faults("student: notice that a node will be taken away")
def test_no_step_is_lost_where_notice_was_given(full: Nodes, tmp_path: Path) -> None:
    """The only checkpoints of a long run are its last one, and the one of the moment of the notice."""
    recipe = with_pairs(tiny(tmp_path, "llamagen"), count=104)
    finish(start("generate_pairs", recipe, tmp_path, full.address))
    settings: dict[str, Any] = {"epochs": 100, "checkpoint_every": 10**6, "log_every": 5, "lpips": 0.0, "split": 9}
    recipe = trained(recipe, **settings, workers=1)
    finish(start("distill", trained(recipe, uri=str(tmp_path / "straight"), workers=0), tmp_path, full.address))
    job = start("distill", recipe, tmp_path, full.address)
    wait(job, lambda: LOGS[job.pid].read_text().count("steps "), 1)
    node = busy(full, "RayTrainWorker")
    give_notice(full, node, seconds=60)
    wait(job, lambda: LOGS[job.pid].read_text().count("about to be taken away"), 1)
    at = steps(recipe)
    full.cluster.remove_node(node, allow_graceful=False)
    out = finish(job)
    assert f"about to be taken away); going on from the checkpoint of step {at:,}." in out
    assert f"from step {at:,} of" in out
    expected, found = (load_file(f"{place}/model.safetensors") for place in (tmp_path / "straight", recipe.student_uri))
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.faults("student: worker hangs")
def test_a_worker_that_hangs_is_replaced(full: Nodes, tmp_path: Path) -> None:
    recipe = with_pairs(tiny(tmp_path, "llamagen"), count=104)
    finish(start("generate_pairs", recipe, tmp_path, full.address))
    settings: dict[str, Any] = {"epochs": 60, "checkpoint_every": 20, "log_every": 5, "lpips": 0.0, "split": 9}
    job = start("distill", trained(recipe, **settings, workers=2, hang_minutes=0.1), tmp_path, full.address)
    wait(job, partial(steps, recipe), 20)
    os.kill(workers("RayTrainWorker")[0], signal.SIGSTOP)
    out = finish(job)
    assert "Lost workers (" in out
    assert "Resuming" in out


@pytest.mark.faults("student: fewer nodes, and then more")
def test_workers_become_fewer_and_more_with_the_nodes(full: Nodes, tmp_path: Path) -> None:
    """Four on two nodes; two while one is gone, with what was learnt until the last checkpoint; four again after."""
    recipe = with_pairs(tiny(tmp_path, "llamagen"), count=104)
    finish(start("generate_pairs", recipe, tmp_path, full.address))
    settings: dict[str, Any] = {"epochs": 200, "checkpoint_every": 10, "log_every": 5, "lpips": 0.0, "split": 9}
    recipe = trained(recipe, **settings)
    finish(start("distill", trained(recipe, uri=str(tmp_path / "straight"), workers=0), tmp_path, full.address))
    job = start("distill", trained(recipe, workers=(1, 4)), tmp_path, full.address)

    def groups() -> list[str]:
        return re.findall(r"Training with (\d) workers, of at most 4", LOGS[job.pid].read_text())

    wait(job, partial(steps, recipe), 20)
    full.lose("node", random.Random(4))
    wait(job, lambda: len(groups()), 2)
    full.fill()
    out = finish(job)
    assert groups() == ["4", "2", "4"], out
    expected, found = (load_file(f"{place}/model.safetensors") for place in (tmp_path / "straight", recipe.student_uri))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5)


@pytest.mark.faults("report: node lost")
def test_a_report_survives_the_loss_of_a_node(full: Nodes, tmp_path: Path) -> None:
    listed = [{"name": "Autoregressive"}, {"name": "FlowMatched"}]
    recipe = tiny(tmp_path, "var", **IMAGES)
    settings = replace(recipe.evaluate, samplers=listed, count=6000, batch=250, actors=2)
    recipe = replace(recipe, evaluate=settings)
    straight = replace(recipe, evaluate=replace(settings, uri=str(tmp_path / "straight")))
    finish(start("evaluate", straight, tmp_path, full.address))
    job = start("evaluate", recipe, tmp_path, full.address)
    wait(job, lambda: len(storage.listing(f"{recipe.run}/cache")), 1)
    full.lose("node", random.Random(3))
    full.fill()
    finish(job)
    assert scores(recipe) == scores(straight)
