"""README's three commands on two machines that share nothing but a network: pytest -m slow tests/cluster

A head and a worker with addresses and file systems of their own, and without the checkout; a laptop that submits; an
S3 server between them. Needs Linux and root.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import machines
import pytest
import s3server
from machines import OURS, ROOT, Machine
from s3fs import S3FileSystem

BIN = Path(sys.executable).parent
SMALL = "--config jobs/recipes/digits-llamagen.yaml --pairs.count 480 --pairs.shard_rows 80 --pairs.batch 40"
SMALL += " --train.batch 32 --train.epochs 1 --train.snapshots 2 --train.workers 2 --evaluate.count 120"
SMALL += " --evaluate.batch 60 --evaluate.curve_count 0 --evaluate.timing_batches [1]"
TOKEN = "0123456789abcdef" * 4

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(not machines.POSSIBLE, reason="namespaces need Linux and root"),
    pytest.mark.skipif(s3server.PROGRAM is None, reason="no S3 server"),
]


@pytest.fixture
def environment() -> Iterator[dict[str, str]]:
    """Of all machines, with an S3 server that all of them reach."""
    with machines.network(), s3server.mini(OURS) as ports:
        kept = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
        kept["PATH"] = f"{BIN}:{kept['PATH']}"
        store = s3server.environment(AWS_ENDPOINT_URL=f"http://{OURS}:{ports['-s3.port']}")
        yield kept | store | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}


@pytest.fixture
def head(environment: dict[str, str], tmp_path: Path) -> Iterator[Machine]:
    """The head, with MLflow's server, and a worker that has joined it."""
    made = [Machine(number, environment) for number in (2, 3)]
    head, worker = made
    try:
        common = ("--disable-usage-stats", "--object-store-memory", "200000000", "--block")
        place = ("--head", "--port", "6379", "--dashboard-host", head.address, "--num-cpus", "0")
        head.start(tmp_path / "head.log", "ray", "start", "--node-ip-address", head.address, *place, *common)
        store = ("--backend-store-uri", "sqlite:////tmp/mlflow.db", "--artifacts-destination", "/tmp/artifacts")
        head.start(tmp_path / "mlflow.log", "mlflow", "server", "--host", "127.0.0.1", "--port", "5000", *store)
        wait(lambda: "Ray runtime started" in (tmp_path / "head.log").read_text())
        joined = ("--address", f"{head.address}:6379", "--node-ip-address", worker.address, "--num-cpus", "2")
        worker.start(tmp_path / "worker.log", "ray", "start", *joined, *common)
        wait(lambda: "running on port 5000" in (said := (tmp_path / "mlflow.log").read_text()) or "startup" in said)
        yield head
    finally:
        for machine in made:
            machine.end()


def wait(done: Callable[[], bool]) -> None:
    """Until something is done, within two minutes."""
    deadline = time.monotonic() + 120
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def submitted(head: Machine, environment: dict[str, str], job: str, *more: str) -> str:
    """What README's command prints on the laptop."""
    address = {"RAY_ADDRESS": f"http://{head.address}:8265", "HOME": os.environ["HOME"]}
    command = ["ray", "job", "submit", "--working-dir", "."]
    command += ["--runtime-env-json", json.dumps({"env_vars": {"MLFLOW_TRACKING_URI": "http://127.0.0.1:5000"}})]
    command += ["--", "python", f"jobs/{job}.py", *SMALL.split(), "--run", f"s3://{s3server.BUCKET}/run", *more]
    done = subprocess.run(command, cwd=ROOT, env=environment | address, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_three_commands(head: Machine, environment: dict[str, str]) -> None:
    said = submitted(head, environment, "generate_pairs")
    assert "480" in said
    assert "Nothing is missing" in submitted(head, environment, "generate_pairs")
    assert "The student is s3://distilled/run/student" in submitted(head, environment, "distill")
    assert "s3://distilled/run/report" in submitted(head, environment, "evaluate")
    store = S3FileSystem(
        key=s3server.KEY, secret=s3server.SECRET, endpoint_url=environment["AWS_ENDPOINT_URL"], skip_instance_cache=True
    )
    found = {place.removeprefix(f"{s3server.BUCKET}/run/") for place in store.find(f"{s3server.BUCKET}/run")}
    assert {"pairs/_manifest.json", "student/model.safetensors", "report/report.json", "report/report.md"} <= found
    asked = "import mlflow; print(sorted(mlflow.search_runs(search_all_experiments=True)['status']))"
    said = head.run("env", "MLFLOW_TRACKING_URI=http://127.0.0.1:5000", "python", "-c", asked)
    assert said.split("\n")[-2] == str(["FINISHED"] * said.count("FINISHED"))
    assert said.count("FINISHED") >= 3
