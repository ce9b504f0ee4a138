"""Whole jobs on the session's Ray, one of them killed half-way."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import faulty
import numpy as np
import pytest
import ray
import torch
import yaml
from tiny import tiny, tiny_text, with_pairs

from pipeline import storage
from pipeline.host import events
from pipeline.host.errors import Unfinished
from pipeline.models import checkpoints
from pipeline.pairs import completion, manifest
from pipeline.pairs import shards as pairs
from pipeline.pairs.commits import write_owned
from pipeline.pairs.facts import PairFacts
from pipeline.pairs.manifest import Gap
from pipeline.pairs.passes import Outcome
from pipeline.pairs.replica import Replica
from pipeline.pairs.rows import Rows
from pipeline.recipe import Recipe
from pipeline.services import cluster
from pipeline.settings.cluster import ClusterSettings
from pipeline.workflow import verification
from pipeline.workflow.generate import generate

JOB = Path(__file__).parents[2] / "jobs" / "generate_pairs.py"


@pytest.fixture(autouse=True)
def _one_store(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """One MLflow store for all tests: a fresh SQLite costs seconds."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path_factory.getbasetemp()}/mlflow.db")


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(recipe: Recipe) -> None:
        raise AssertionError("this was to be refused before Ray is started")

    monkeypatch.setattr(cluster, "connect", connect)


def contents(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).glob("shard-*")}


def start_job(recipe: Recipe, folder: Path, *flags: str, **environment: str) -> subprocess.Popen[str]:
    """The job in a process of its own, with the recipe as a file."""
    config = folder / "recipe.yaml"
    config.write_text(yaml.safe_dump(recipe.resolved()))
    command = [sys.executable, str(JOB), "--config", str(config), *flags]
    env = os.environ | environment
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.faults("pairs: driver killed")
def test_a_killed_job_goes_on_and_ends_with_the_same_bytes(ray_cluster: None, tmp_path: Path) -> None:
    """SIGKILL for the driver half-way; also one replica against two, and a folder per run against each other.

    The pairs are of prompts, whose encoder every replica holds.
    """
    recipe = with_pairs(tiny_text(tmp_path), count=119, shard_rows=4, batch=4)
    address = ray.get_runtime_context().gcs_address
    job = start_job(recipe, tmp_path, RAY_ADDRESS=address)
    deadline = time.monotonic() + 400
    while len(manifest.committed(recipe.pairs_uri)) < 3 and time.monotonic() < deadline and job.poll() is None:
        time.sleep(0.02)
    job.send_signal(signal.SIGKILL)
    _, errors = job.communicate()
    before = contents(recipe.pairs_uri)
    assert 3 <= len(before) < 30, f"the job was to be killed half-way: {errors[-2000:]}"
    assert not Path(recipe.pairs_uri, "_manifest.json").exists()
    Path(recipe.pairs_uri, f"{storage.TEMPORARY}shard-00028.parquet-0123").write_bytes(b"half a shard")

    assert "Made" in generate(with_pairs(recipe, actors=1))
    straight = with_pairs(recipe, actors=2, uri=str(tmp_path / "straight"))
    generate(straight)

    after = contents(recipe.pairs_uri)
    assert len(after) == 30
    assert after == contents(straight.pairs_uri)
    assert {name: after[name] for name in before} == before
    assert storage.listing(recipe.pairs_uri) == sorted([*after, "_README.md", "_manifest.json", "_recipe.json"])
    one, other = pairs.verify(recipe.pairs_uri), pairs.verify(straight.pairs_uri)
    assert [shard | {"host": ""} for shard in one["shards"]] == [shard | {"host": ""} for shard in other["shards"]]
    assert {shard["host"] for shard in other["shards"]} == {socket.gethostname()}
    assert one["count"] == 119
    assert one["made"][0]["rows"] < 119, "what the killed job had committed was not made again"


@pytest.mark.usefixtures("one_process", "in_process")
def test_a_set_of_prompts_grows_is_mended_and_is_verified(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = with_pairs(tiny_text(tmp_path), count=20, shard_rows=8, batch=4)
    assert "Made 20 pairs" in generate(recipe)
    assert "60 prompts in " in capsys.readouterr().out
    small = contents(recipe.pairs_uri)
    lost = Path(recipe.pairs_uri, "shard-00001.parquet")
    lost.unlink()
    assert "Made 8 pairs" in generate(recipe)
    assert contents(recipe.pairs_uri) == small, "the same bytes, whoever the neighbours were"
    grown = with_pairs(recipe, count=70)  # more than there are prompts, which come again with other noise
    assert "Made 54 pairs" in generate(grown)
    rows = Rows.join(
        [
            pairs.read_shard(recipe.pairs_uri, PairFacts.of(grown), name)
            for name in sorted(contents(recipe.pairs_uri))
            if "-4." not in name
        ]
    )
    assert rows.conditions[60:].tolist() == rows.conditions[:10].tolist()
    assert not np.array_equal(rows.tokens[60:], rows.tokens[:10])
    assert "Verified" in generate(with_pairs(grown, verify=True))


@pytest.mark.usefixtures("one_process")
def test_events_tell_of_each_shard_and_of_none_that_is_there(tmp_path: Path) -> None:
    recipe, log = with_pairs(tiny(tmp_path), count=20, shard_rows=8, batch=4), tmp_path / "events.jsonl"
    with events.written(str(log), job="generate_pairs", run=recipe.run):
        generate(recipe)
        generate(with_pairs(recipe, count=24))
        generate(with_pairs(recipe, count=24))
    told = [json.loads(line) for line in log.read_text().splitlines()]
    assert {line["folder"] for line in told} == {recipe.pairs_uri}
    assert [line.get("number") for line in told] == [None, 0, 1, 2, None, 2]
    assert [(line["done"], line["total"]) for line in told] == [(0, 3), (1, 3), (2, 3), (3, 3), (2, 3), (3, 3)]
    assert told[0]["fingerprint"] == PairFacts.of(recipe).fingerprint
    assert [line["rows"] for line in told if line["event"] == "shard"] == [8, 8, 4, 8]


@pytest.mark.usefixtures("one_process", "in_process")
def test_a_set_grows_is_verified_and_has_a_run(tmp_path: Path) -> None:
    recipe = with_pairs(tiny(tmp_path, "llamagen"), count=20, noise="derived")
    assert "Made 20 pairs" in generate(recipe)
    small = contents(recipe.pairs_uri)
    assert set(small) == {"shard-00000.parquet", "shard-00001-4.parquet"}
    assert generate(recipe).startswith("Nothing is missing")
    first = pairs.read_shard(recipe.pairs_uri, PairFacts.of(recipe), "shard-00001-4.parquet")

    assert "Made 16 pairs" in generate(with_pairs(recipe, count=32, batch=5)), "another batch is legal"
    large = contents(recipe.pairs_uri)
    assert set(large) == {"shard-00000.parquet", "shard-00001.parquet"}
    assert large["shard-00000.parquet"] == small["shard-00000.parquet"]
    whole = pairs.read_shard(recipe.pairs_uri, PairFacts.of(recipe), "shard-00001.parquet")
    for a, b in zip(first, whole, strict=True):
        assert a is not None
        assert b is not None
        assert np.array_equal(a, b[:4])
    assert "holds 32 pairs" in generate(recipe), "a smaller count takes nothing away"

    assert "100.00% of the codes of 32 random rows of 2 of them" in generate(with_pairs(recipe, verify=True))
    found = manifest.read(recipe.pairs_uri)
    assert [made["rows"] for made in found["made"]] == [20, 16]
    assert len({made["mlflow_run"] for made in found["made"]}) == 2

    Path(recipe.pairs_uri, "shard-00001.parquet").unlink()
    generate(recipe)
    assert contents(recipe.pairs_uri) == large, "a shard that was deleted is made anew, bit for bit"


@pytest.mark.faults("pairs: a truncated shard")
def test_a_truncated_shard_of_a_killed_run_is_named(tmp_path: Path, no_ray: None) -> None:
    recipe = with_pairs(tiny(tmp_path), count=16)
    facts = PairFacts.of(recipe)
    manifest.claim(recipe.pairs_uri, facts, recipe)
    made = pairs.table(facts, Replica(recipe, facts).rows(0, 16))
    place = Path(recipe.pairs_uri, pairs.write_shard(recipe.pairs_uri, facts, made).name)
    data = place.read_bytes()
    place.write_bytes(data[:-7])
    with pytest.raises(ValueError, match=r"shard-00000\.parquet is damaged .*; delete it and run generate_pairs again"):
        generate(recipe)
    assert not Path(recipe.pairs_uri, "_manifest.json").exists()
    place.write_bytes(data)
    assert "holds 16 pairs" in generate(recipe), "only the manifest was missing"


@pytest.mark.faults("pairs: a shard that raises", "pairs: a shard that takes its process down")
def test_failed_shards_are_named_and_a_later_run_makes_only_them(
    ray_cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two shards raise, with either replica, and one takes its process down every time."""
    monkeypatch.setattr("pipeline.pairs.passes.DEATHS", 0)
    good = with_pairs(tiny(tmp_path, "llamagen"), count=5, shard_rows=1, actors=2)
    recipe = replace(good, teacher=replace(good.teacher, family="faulty"))  # class 1: shards 1 and 4; class 2: shard 2
    faulty.ILL.touch()
    try:
        with pytest.raises(RuntimeError, match=r"3 of 5 shards were not made \(1, 2, 4\)"):
            generate(recipe)
    finally:
        faulty.ILL.unlink()
    printed = capsys.readouterr().err
    assert "shard 4 failed: ArithmeticError: this class cannot be drawn (faulty.py:" in printed
    assert "shard 2 failed: its process or its node died 1 times in each of" in printed
    before = {path.name: path.stat().st_mtime_ns for path in Path(recipe.pairs_uri).glob("shard-*")}
    assert set(before) == {"shard-00000.parquet", "shard-00003.parquet"}
    assert not Path(recipe.pairs_uri, "_manifest.json").exists()
    assert "Made 3 pairs" in generate(recipe)
    after = {path.name: path.stat().st_mtime_ns for path in Path(recipe.pairs_uri).glob("shard-*")}
    assert len(after) == 5
    assert before.items() <= after.items(), "what was there was not touched"
    assert pairs.verify(recipe.pairs_uri)["count"] == 5


class Stopped(Exception):
    pass


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """What Ray's workers do, here; "shards" of the fixture's value is after how many of them the job is stopped."""
    stop = {"shards": 10**9}

    def commits(recipe: Recipe, gap: Gap, *rest: Any) -> Iterator[Outcome]:
        replica = Replica(recipe, gap.facts)
        for done, number in enumerate(gap.missing):
            if done == stop["shards"]:
                raise Stopped
            table = pairs.table(gap.facts, replica.rows(number, gap.rows_of(number)))
            yield Outcome(number, write_owned(recipe.pairs_uri, gap.facts, "here", table))

    monkeypatch.setattr(completion, "commits", commits)
    monkeypatch.setattr(cluster, "session", lambda recipe, replicas: nullcontext())
    monkeypatch.setattr(cluster, "on_one_machine", lambda recipe: True)  # which else asks Ray
    return stop


def test_what_was_recorded_is_not_read_again(
    tmp_path: Path, one_process: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that goes on reads only what a killed driver had no time to record; a set that grows reads nothing."""
    read: list[str] = []
    inspect = pairs.inspect_shard

    def noted(uri: str, facts: PairFacts, name: str, sha256: str | None = None, *rest: Any) -> manifest.Shard:
        if sha256 is None:  # else it is verify's
            read.append(name)
        return inspect(uri, facts, name, sha256, *rest)

    monkeypatch.setattr(pairs, "inspect_shard", noted)
    recipe = with_pairs(tiny(tmp_path), count=24, shard_rows=6)
    one_process["shards"] = 2
    with pytest.raises(Stopped):
        generate(recipe)
    ledger = Path(recipe.pairs_uri, "_ledger.json")
    lines = json.loads(ledger.read_text())
    assert [shard["name"] for shard in lines["shards"]] == ["shard-00000.parquet", "shard-00001.parquet"]
    ledger.write_text(json.dumps(lines | {"shards": lines["shards"][:1]}))
    one_process["shards"] = 99
    generate(recipe)
    assert read == ["shard-00001.parquet"]
    assert not ledger.exists()
    assert pairs.verify(recipe.pairs_uri)["count"] == 24
    generate(with_pairs(recipe, count=30))
    assert len(read) == 1
    assert pairs.verify(recipe.pairs_uri)["count"] == 30


@pytest.mark.faults("pairs: a truncated shard")
def test_a_record_of_another_size_counts_for_nothing(tmp_path: Path, one_process: dict[str, int]) -> None:
    recipe = with_pairs(tiny(tmp_path), count=12, shard_rows=6)
    one_process["shards"] = 1
    with pytest.raises(Stopped):
        generate(recipe)
    place = Path(recipe.pairs_uri, "shard-00000.parquet")
    place.write_bytes(place.read_bytes()[:-7])
    one_process["shards"] = 99
    with pytest.raises(ValueError, match=r"shard-00000\.parquet is damaged"):
        generate(recipe)


@pytest.mark.faults("pairs: driver killed between the manifest and the cleaning")
def test_what_a_killed_driver_did_not_clean_up_goes_later(tmp_path: Path, one_process: dict[str, int]) -> None:
    """A short shard beside the whole one: whoever reads all there is would see its rows twice."""
    recipe = with_pairs(tiny(tmp_path), count=8, shard_rows=6)
    generate(recipe)
    place = Path(recipe.pairs_uri)
    short = (place / "shard-00001-2.parquet").read_bytes()
    generate(with_pairs(recipe, count=12))
    files = storage.listing(recipe.pairs_uri)
    (place / "shard-00001-2.parquet").write_bytes(short)
    (place / "_ledger.json").write_text("{}")
    (place / f"{storage.TEMPORARY}shard-00001.parquet-0123").write_bytes(b"half")
    assert "rows         12; 0 in 0 shards are left" in generate(replace(recipe, dry_run=True))
    assert len(storage.listing(recipe.pairs_uri)) == len(files) + 3, "a plan changes nothing"
    assert generate(recipe).startswith("Nothing is missing")
    assert storage.listing(recipe.pairs_uri) == files


def test_a_start_that_fails_leaves_the_folder_free(
    tmp_path: Path, one_process: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray is not there, and then the first shard is not made: another recipe may have the folder."""
    recipe = with_pairs(tiny(tmp_path), count=12, shard_rows=6)

    def gone(recipe: Recipe, replicas: int) -> None:
        raise Unfinished("no Ray at all")

    with monkeypatch.context() as patch, pytest.raises(Unfinished, match="no Ray at all"):
        patch.setattr(cluster, "session", gone)
        generate(recipe)
    assert storage.listing(recipe.pairs_uri) == []
    one_process["shards"] = 0
    with pytest.raises(Stopped):
        generate(recipe)
    assert "_recipe.json" in storage.listing(recipe.pairs_uri)
    one_process["shards"] = 99
    assert "holds 12 pairs" in generate(with_pairs(recipe, seed=5))
    with pytest.raises(ValueError, match="seed is 5 there and 1 here"):
        generate(recipe)


def test_a_failure_does_not_wait_for_what_is_still_read(
    tmp_path: Path, one_process: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 12 shards that nobody recorded, one is checked, two are being read: one is recorded."""
    recipe = with_pairs(tiny(tmp_path), count=78, shard_rows=6)
    one_process["shards"] = 12
    with pytest.raises(Stopped):
        generate(recipe)
    ledger = Path(recipe.pairs_uri, "_ledger.json")
    ledger.unlink()
    inspect, held, third, asked = pairs.inspect_shard, threading.Event(), threading.Event(), []

    def slow(uri: str, facts: PairFacts, name: str) -> manifest.Shard:
        asked.append(name)
        if len(asked) == 3:
            third.set()  # by the thread that is done with the first
        if name != "shard-00000.parquet":
            held.wait(60)
        return inspect(uri, facts, name)

    def stop(*args: Any) -> Iterator[Outcome]:
        assert third.wait(60)
        raise Stopped
        yield

    monkeypatch.setattr(pairs, "inspect_shard", slow)
    monkeypatch.setattr(pairs, "CHECKERS", 2)
    monkeypatch.setattr(completion, "commits", stop)
    with pytest.raises(Stopped):
        generate(recipe)
    held.set()
    assert len(asked) == 3
    assert [shard["name"] for shard in json.loads(ledger.read_text())["shards"]] == ["shard-00000.parquet"]


def test_verify_looks_at_every_machine_and_at_each_shard_alone(
    tmp_path: Path, one_process: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One machine of ten made other codes: a tenth of all, and nearly all of its own."""
    hosts = [f"node-{k // 4}" for k in range(40)]
    shards = [manifest.Shard(f"shard-{k:05d}.parquet", k, 6, 1, "", host) for k, host in enumerate(hosts)]
    for seed in range(20):
        chosen = verification._sample(shards, random.Random(seed))
        assert {shard.host for shard in chosen} == set(hosts)
        assert len(verification._sample(shards[:8], random.Random(seed))) == 8

    recipe = with_pairs(tiny(tmp_path), count=60, shard_rows=6)
    generate(recipe)
    uri = recipe.pairs_uri
    found = manifest.read(uri)
    lines = [line | {"host": f"node-{line['number']}"} for line in found["shards"]]
    Path(uri, "_manifest.json").write_text(json.dumps(found | {"shards": lines}))

    def shares(recipe: Recipe, cls: type, args: Any, method: str, parts: list[Rows]) -> list[float]:
        assert method == "agreements"
        return [0.4 if part.ids[0] // 6 == 7 else 1.0 for part in parts]

    monkeypatch.setattr(cluster, "on_actor", shares)
    with pytest.raises(ValueError, match=r"only 40\.0% of the codes of .*shard-00007\.parquet, made on node-7,"):
        generate(with_pairs(recipe, verify=True))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True).returncode:
        pytest.skip("only root may mount a small file system")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.mark.faults("pairs: disk full")
def test_a_disk_that_fills_up_costs_nothing_that_was_made(ray_cluster: None, tmp_path: Path, small_disk: Path) -> None:
    """Somebody else's file takes the room while the shards are made; without it the same command ends the set."""
    recipe = with_pairs(tiny(tmp_path), count=40, shard_rows=2, batch=2, uri=str(small_disk / "pairs"))
    generate(with_pairs(recipe, uri=str(tmp_path / "straight")))
    ballast = small_disk / "film.mkv"
    ballast.write_bytes(bytes((1 << 20) - (40 << 10)))
    with pytest.raises(Unfinished, match=r"No space left on device\); free some space or choose another folder\.$"):
        generate(recipe)
    kept = contents(recipe.pairs_uri)
    assert 0 < len(kept) < 20
    ballast.unlink()
    generate(recipe)
    assert contents(recipe.pairs_uri) == contents(str(tmp_path / "straight"))
    assert kept.items() <= contents(recipe.pairs_uri).items()


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replica in the test's own process, in the place of a Ray actor."""

    def on_actor(recipe: Recipe, cls: type, args: tuple[Any, ...], method: str, *more: Any) -> Any:
        return getattr(cls(*args), method)(*more)

    monkeypatch.setattr(cluster, "on_actor", on_actor)


@pytest.mark.usefixtures("in_process")
def test_a_dry_run_shows_the_plan_and_writes_nothing(tmp_path: Path) -> None:
    text = generate(replace(tiny(tmp_path), dry_run=True))
    for part in ("name: tiny-var", "40 in 3 shards are left", "one batch    6 rows in", "storage      at most"):
        assert part in text
    assert "GPU-hours" not in text
    assert not Path(tmp_path, "run").exists()


def test_the_price_of_a_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """4 of 60 rows a second on each of 2 replicas with half a GPU each."""
    monkeypatch.setattr(cluster, "on_actor", lambda *args: (60, 15.0))
    settings = ClusterSettings(gpus=0.5, usd_per_gpu_hour=3.0)
    recipe = replace(with_pairs(tiny(tmp_path), batch=60, shard_rows=600, count=14_400, actors=2), cluster=settings)
    text = generate(replace(recipe, dry_run=True))
    assert "time         about 30 min with 2 replicas" in text
    assert "GPU-hours    0.50, $1.50 at $3 an hour" in text


@pytest.mark.faults("dry run: a batch does not fit")
def test_a_batch_that_cannot_be_timed_costs_nothing_else_of_the_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def on_actor(*args: Any) -> float:
        raise Unfinished("an actor died.")

    monkeypatch.setattr(cluster, "on_actor", on_actor)
    text = generate(replace(tiny(tmp_path), dry_run=True))
    assert "40 in 3 shards are left" in text
    assert "time         not measured: an actor died." in text
    assert "Measuring the time of pairs (generate_pairs), from one batch of its work." in capsys.readouterr().err


# ---- what is refused before any work


@pytest.mark.usefixtures("no_ray")
def test_bad_input_is_refused_before_any_work(tmp_path: Path) -> None:
    recipe = tiny(tmp_path)
    teacher = recipe.teacher

    def refused(changed: Recipe, sentence: str, kind: type[Exception] = ValueError) -> None:
        with pytest.raises(kind, match=sentence):
            generate(changed)
        assert not Path(recipe.run).exists()

    refused(replace(recipe, teacher=replace(teacher, checkpoint="")), r"teacher\.checkpoint is not set")
    gone = replace(teacher, checkpoint=f"{tmp_path}/gone.safetensors")
    refused(replace(recipe, teacher=gone), "gone.safetensors could not be read", FileNotFoundError)
    refused(replace(recipe, teacher=replace(teacher, family="pipeline.models.dalle")), "there is no such package")
    refused(replace(recipe, teacher=replace(teacher, config={"depht": 2})), "has no field 'depht'")
    deeper = replace(teacher, config=teacher.config | {"depth": 3})
    refused(replace(recipe, teacher=deeper), r"set teacher.config.depth to 2 \(it is 3\)")
    many = replace(teacher, config=teacher.config | {"vocabulary": 70_000})
    refused(replace(recipe, teacher=many), "the teacher has 70000 codes")
    refused(with_pairs(recipe, verify=True), "holds no pair set", FileNotFoundError)


@pytest.mark.usefixtures("no_ray")
def test_folders_of_others_are_refused(tmp_path: Path) -> None:
    recipe = tiny(tmp_path)
    place = Path(recipe.pairs_uri)
    place.mkdir(parents=True)
    (place / "thesis.doc").write_text("precious")
    with pytest.raises(ValueError, match=r"is not empty \(thesis\.doc\)"):
        generate(recipe)
    (place / "thesis.doc").unlink()
    facts = PairFacts.of(recipe)
    manifest.claim(str(place), facts, recipe)
    pairs.write_shard(str(place), facts, pairs.table(facts, Replica(recipe, facts).rows(0, 16)))
    with pytest.raises(ValueError, match="holds a pair set made otherwise: seed is 1 there and 4 here"):
        generate(with_pairs(recipe, seed=4))
    assert sorted(path.name for path in place.iterdir()) == ["_recipe.json", "shard-00000.parquet"]


@pytest.mark.usefixtures("in_process")
def test_verify_notices_another_teacher(tmp_path: Path) -> None:
    """Rows made by other weights under a manifest that says otherwise: every checksum fits, the codes do not."""
    recipe = with_pairs(tiny(tmp_path), count=16)
    facts = PairFacts.of(recipe)
    replica = Replica(recipe, facts)
    with torch.no_grad():
        replica.teacher.network.get_parameter("head.weight").neg_()
    manifest.claim(recipe.pairs_uri, facts, recipe)
    shard = pairs.write_shard(recipe.pairs_uri, facts, pairs.table(facts, replica.rows(0, 16)))
    manifest.finish(recipe.pairs_uri, facts, [shard], {"rows": 16, "seconds": 1.0, "device": "cpu"})
    with pytest.raises(ValueError, match=r"only .*% of the codes of rows of .*shard-00000\.parquet were found"):
        generate(with_pairs(recipe, verify=True))


def test_the_command_line_ends_with_one_sentence(tmp_path: Path) -> None:
    recipe = tiny(tmp_path)
    job = start_job(recipe, tmp_path, "--teacher.checkpoint", f"{tmp_path}/gone.pth")
    out, err = job.communicate(timeout=120)
    assert (job.returncode, out) == (2, "")
    assert err == f"error: {tmp_path}/gone.pth could not be read: there is no such file; check the path.\n"


def test_weights_are_checked_without_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check builds on the meta device: no tensor of the teacher is allocated in the driver."""
    recipe, built = tiny(tmp_path), []
    weights = checkpoints.weights
    monkeypatch.setattr(checkpoints, "weights", lambda net, *rest: built.append(net) or weights(net, *rest))
    checkpoints.check(recipe.teacher)
    assert {parameter.device.type for net in built for parameter in net.parameters()} == {"meta"}
