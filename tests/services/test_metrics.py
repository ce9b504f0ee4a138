"""The names that Prometheus gets, those that the dashboard asks for, and how often a job tells anything."""

from __future__ import annotations

import json
import re
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import faulty
import pytest
import ray
from tiny import tiny, with_pairs

from pipeline.host.progress import Progress
from pipeline.pairs import manifest, passes
from pipeline.pairs.facts import PairFacts
from pipeline.pairs.manifest import Gap
from pipeline.pairs.passes import ReplicaWorker
from pipeline.pairs.replica import Replica
from pipeline.recipe import Recipe
from pipeline.services import cluster, metrics
from pipeline.services.metrics import COUNTERS, GAUGES, Recorder
from pipeline.training import loop
from pipeline.training.observer import Message

BOARD = Path(__file__).parents[2] / "cluster" / "grafana.json"
PATIENCE = 60.0  # seconds for what takes a few
UNITS = ("total", "seconds", "ratio", "per_second", "step", "loss", "norm", "rate")  # a loss and its like have none


# ---- names


def panels() -> list[dict[str, Any]]:
    return [panel for panel in json.loads(BOARD.read_text())["panels"] if panel["type"] != "row"]


def test_the_dashboard_asks_for_what_is_exported_and_for_all_of_it() -> None:
    queries = [target["expr"] for panel in panels() for target in panel["targets"]]
    asked = {name for query in queries for name in re.findall(r"\b(?:ray_)?(dd_\w+)", query)}
    assert asked == COUNTERS.keys() | GAUGES.keys()
    for query in queries:
        exported = re.findall(r"\bray_(dd_\w+){experiment=~\"\$experiment\", run=~\"\$run\"}", query)
        assert len(exported) == query.count("dd_"), f"each name as Ray exports it, of the run that is chosen: {query}"
        assert query.startswith("max by") == (exported[0] in GAUGES), f"a counter is summed, a gauge is not: {query}"


def test_the_dashboard_can_be_imported() -> None:
    """Its ids are its own, panels do not overlap, and the data source is the reader's to choose."""
    board = json.loads(BOARD.read_text())
    assert {"title", "uid", "schemaVersion", "panels", "templating", "time"} <= board.keys()
    assert "id" not in board, "Grafana gives one"
    variables = {variable["name"]: variable for variable in board["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert variables["datasource"]["query"] == "prometheus"
    used = {
        name for panel in panels() for target in panel["targets"] for name in re.findall(r"\$(\w+)", target["expr"])
    }
    assert used == {"experiment", "run", "window"}
    assert used | {"datasource"} == variables.keys()
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        place = panel["gridPos"]
        across, down = (range(place[at], place[at] + place[size]) for at, size in (("x", "w"), ("y", "h")))
        cells = {(x, y) for x in across for y in down}
        assert max(x for x, _ in cells) < 24
        assert not cells & taken, panel["title"]
        taken |= cells
    sources = [part["datasource"]["uid"] for panel in panels() for part in (panel, *panel["targets"])]
    assert set(sources) == {"${datasource}"}


def test_names_are_as_prometheus_wants_them() -> None:
    assert not COUNTERS.keys() & GAUGES.keys()
    for name in COUNTERS | GAUGES:
        assert re.fullmatch(r"dd_(pairs|train|evaluation)_[a-z_]+", name)
        assert name.endswith(UNITS), name
        assert name.endswith("_total") == (name in COUNTERS)
    assert "job" not in metrics.OF_EVALUATION, "Prometheus sets that one"
    assert set(loop.GAUGES.values()) | {"dd_train_step"} == GAUGES.keys()


# ---- how often


class Told(list[dict[str, float]]):
    """Stands for a ``Recorder``: keeps what it is told."""

    def __call__(self, values: Mapping[str, float], **tags: str) -> None:
        self.append(dict(values))


def test_a_replica_tells_three_numbers_a_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So a shard costs three records for each of its batches, and its commit two."""
    told = Told()
    nobody: Any = None
    monkeypatch.setattr(passes, "Recorder", lambda recipe: told)
    recipe = with_pairs(tiny(tmp_path), shard_rows=16, batch=6)
    worker = ReplicaWorker(Replica, recipe, PairFacts.of(recipe), {}, nobody, nobody)
    begun = time.perf_counter()
    worker.replica.rows(0, 16)
    seconds = time.perf_counter() - begun
    assert [values["dd_pairs_drawn_total"] for values in told] == [6, 6, 4]
    assert {len(values) for values in told} == {3}
    parts = [values[f"dd_pairs_{part}_seconds_total"] for values in told for part in ("teacher", "flow")]
    assert min(parts) > 0
    assert sum(parts) < seconds


def test_training_tells_once_a_message_what_it_logs() -> None:
    told, sent = Told(), list[Message]()
    report = loop.recorded(sent.append, told)
    messages = [
        Message(3, {"loss": 2.0, "lr": 1e-3, "t1/cross_entropy": 1.0, "seconds": 9.0}, []),
        Message(3, {"held_out/loss": 1.5, "held_out/t1/cross_entropy": 1.0}, []),
        Message(3, {}, [], line="Resuming."),
        Message(4, {}, [], machine={"cpu_utilization_percentage": 3.0}),
    ]
    for message in messages:
        report(message)
    assert sent == messages
    first = {"dd_train_step": 3, "dd_train_loss": 2.0, "dd_train_learning_rate": 1e-3}
    both = first | {"dd_train_held_out_loss": 1.5}
    assert told == [first, both, both, both], "again with every message, for Ray forgets a gauge"


# ---- on Ray


def test_nothing_is_told_where_there_is_no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """``train.workers`` 0, for instance, trains in the driver, which needs no Ray."""

    def touched(*args: Any) -> None:
        raise AssertionError("there is nobody to hear it")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(metrics, "_series", touched)
    Recorder(Recipe())({"dd_train_loss": 1.0})


def exported() -> str:
    """What the agent of the session's only node hands to Prometheus."""
    (node,) = (node for node in ray.nodes() if node["Alive"])
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(address, timeout=10) as answer:
        return str(answer.read().decode())


def in_a_worker(record: Recorder) -> None:
    """What training and an evaluation tell from their workers."""
    record(dict.fromkeys(GAUGES, 0.25))
    record({"dd_evaluation_images_total": 7, "dd_evaluation_seconds_total": 0.5}, sampler="DD 1 step")
    record({"dd_evaluation_images_total": 0}, sampler="DD 1 step")


@pytest.fixture
def slow_teacher(tmp_path: Path) -> Iterator[Recipe]:
    """Pairs whose replica lives as long as its numbers need to be heard of."""
    recipe = with_pairs(tiny(tmp_path, "llamagen"), count=30, shard_rows=3, batch=1)
    faulty.SLOW.touch()
    yield replace(recipe, name="scraped", teacher=replace(recipe.teacher, family="faulty"))
    faulty.SLOW.unlink()


def test_a_job_on_ray_exports_the_names_of_the_dashboard(ray_cluster: str, slow_teacher: Recipe) -> None:
    recipe, wanted = slow_teacher, {f"ray_{name}" for name in COUNTERS | GAUGES}
    facts = PairFacts.of(recipe)
    manifest.claim(recipe.pairs_uri, facts, recipe)
    found: dict[str, float] = {}
    with cluster.session(recipe, 1):
        worker = ray.remote(in_a_worker).options(num_cpus=0)
        with closing(passes.commits(recipe, Gap.among((), facts, 30), Progress(10, "shards"))) as outcomes:
            assert next(outcomes).shard
            deadline = time.monotonic() + PATIENCE
            while found.keys() < wanted and time.monotonic() < deadline:
                ray.get(worker.remote(Recorder(recipe)))
                time.sleep(0.5)
                ours = [line for line in exported().splitlines() if 'experiment="scraped"' in line]
                found = {line.partition("{")[0]: float(line.rpartition(" ")[2]) for line in ours}
    assert found.keys() == wanted
    assert found["ray_dd_pairs_committed_total"] % 3 == 0
    assert found["ray_dd_pairs_teacher_seconds_total"] > 0.5 * found["ray_dd_pairs_drawn_total"]
    assert found["ray_dd_evaluation_images_total"] % 7 == 0
    assert found["ray_dd_train_loss"] == 0.25
    assert all(f'run="{recipe.run}"' in line for line in ours)
    assert all('sampler="DD 1 step"' in line for line in ours if "evaluation" in line)
