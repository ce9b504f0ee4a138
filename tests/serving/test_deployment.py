"""One real Ray Serve, started as its user would by jobs/serve.py: batches, bounds, and how it ends."""

from __future__ import annotations

import asyncio
import base64
import gc
import io
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest
import ray
import requests
from PIL import Image
from ray.exceptions import ActorDiedError
from shared_student import shared
from tiny import tiny

from pipeline import Generator
from pipeline.serving import deployment
from pipeline.serving.service import Service

JOB = Path(__file__).parents[2] / "jobs" / "serve.py"
BATCH, QUEUE = 2, 8
JSON = {"Accept": "application/json"}


@dataclass
class Running:
    """The job, where it answers, and what it prints."""

    process: subprocess.Popen[str]
    address: str
    log: Path
    student: str


@pytest.fixture(scope="module")
def running(ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("served")
    student, log = shared(tiny(folder, "llamagen")).student_uri, folder / "log"
    port = free_port()
    command = [sys.executable, str(JOB), "--student", student, "--teacher", "true", "--port", str(port)]
    command += ["--batch", str(BATCH), "--queue", str(QUEUE)]
    env = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    with log.open("w") as out:
        process = subprocess.Popen(command, env=env, stdout=out, stderr=subprocess.STDOUT, text=True)
    try:
        while "Ctrl-C stops it" not in log.read_text():
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        yield Running(process, f"http://127.0.0.1:{port}", log, student)
    finally:
        process.terminate()  # and not killed: Serve would stay on the session's Ray
        process.wait()


def test_no_collection_stops_a_process_that_answers(tmp_path: Path) -> None:
    """Over the modules of torch and Ray one takes 0.2 seconds; those of before are exempted, in replica and server."""
    student = shared(tiny(tmp_path, "llamagen")).student_uri
    gc.unfreeze()
    try:
        deployment.PainterReplica(Service(student, device="cpu", batch=1), teacher=False)
        assert gc.get_freeze_count() > 100_000
    finally:
        gc.unfreeze()


def pixels(answer: requests.Response, place: int = 0) -> np.ndarray:
    """uint8 [3, H, W] of an image in a JSON answer."""
    assert answer.status_code == 200, answer.text
    png = base64.b64decode(answer.json()["images"][place]["png"])
    return np.asarray(Image.open(io.BytesIO(png))).transpose(2, 0, 1)


def test_requests_of_many_go_together_and_come_out_as_the_generators(running: Running) -> None:
    def ask(seed: int) -> requests.Response:
        wanted = {"labels": [seed % 3], "seeds": [seed], "ids": [seed]}
        return requests.post(f"{running.address}/images", json=wanted, headers=JSON, timeout=120)

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(8)))
    generator = Generator.from_pretrained(running.student, "cpu")
    for seed, answer in enumerate(answers):
        expected = generator.draw([seed % 3] * BATCH, [seed] * BATCH, ids=[seed] * BATCH)[0]
        assert np.array_equal(pixels(answer), expected), seed
    many = requests.post(f"{running.address}/images", json={"labels": [1], "n": 8}, headers=JSON, timeout=120)
    assert Counter(image["in_batch"] for image in many.json()["images"])[BATCH] >= 6
    assert requests.get(f"{running.address}/health", timeout=60).json()["takes"] == "labels"


def test_the_teacher_draws_the_same_noise(running: Running) -> None:
    wanted = {"labels": [1], "seeds": [5], "model": "teacher"}
    found = requests.post(f"{running.address}/images", json=wanted, headers=JSON, timeout=120)
    student = requests.post(f"{running.address}/images", json={"labels": [1], "seeds": [5]}, headers=JSON, timeout=120)
    assert found.json()["model"] == "teacher"
    assert not np.array_equal(pixels(found), pixels(student))


def test_bad_input_and_other_routes_are_one_sentence(running: Running) -> None:
    bad = requests.post(f"{running.address}/images", json={"labels": [7], "model": "teacher"}, timeout=60)
    assert bad.status_code == 422
    assert bad.json() == {"error": "label 7 was asked of a student of 3 classes, counted from 0."}
    assert requests.post(f"{running.address}/images", json=3, timeout=60).status_code == 400
    assert requests.get(f"{running.address}/nothing", timeout=60).status_code == 404


@pytest.mark.parametrize(("model", "images"), [("student", 32), ("teacher", 4)])
def test_what_is_too_much_is_refused_at_once(running: Running, model: str, images: int) -> None:
    def ask(_: int) -> requests.Response:
        wanted = {"labels": [1], "n": images, "model": model}
        return requests.post(f"{running.address}/images", json=wanted, timeout=240)

    with ThreadPoolExecutor(40) as pool:
        answers = list(pool.map(ask, range(40)))
    statuses = Counter(answer.status_code for answer in answers)
    assert set(statuses) == {200, 503}, statuses
    for answer in answers:
        if answer.status_code == 503:
            assert answer.headers["retry-after"] == "1"
            assert answer.json()["error"].endswith("images wait to be drawn already; try again.")


@pytest.mark.faults("serving: a replica that dies under a request")
def test_a_replica_that_dies_is_said_and_replaced(running: Running) -> None:
    """Who was with it gets 503 in our words, and those after it are answered by its successor."""
    (replica,) = (
        process
        for process in psutil.process_iter(["cmdline"])
        if "ray::ServeReplica:student:student" in " ".join(process.info["cmdline"] or [])
    )

    gone = "the process that was to draw this is gone, and another is started; try again."
    deadline, said = time.monotonic() + 60, set[str]()

    def ask_on(_: int) -> None:
        while gone not in said and time.monotonic() < deadline:
            answer = requests.post(f"{running.address}/images", json={"labels": [1], "n": 64}, timeout=240)
            if answer.status_code != 200:
                assert answer.status_code == 503
                said.add(answer.json()["error"])

    with ThreadPoolExecutor(4) as pool:  # so many that it has something to draw at any moment
        asking = [pool.submit(ask_on, i) for i in range(4)]
        time.sleep(0.5)
        replica.suspend()  # so that what it draws, or is given next, is with it when it dies
        time.sleep(2)
        replica.kill()
        for one in asking:
            one.result()
    assert gone in said
    again = requests.post(f"{running.address}/images", json={"labels": [1]}, timeout=240)
    assert again.status_code == 200, again.text


def test_a_task_of_serves_that_asked_the_dead_is_not_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any other task that fails unseen is."""

    async def fail_unseen(error: Exception) -> None:
        async def fail() -> None:
            raise error

        task = asyncio.ensure_future(fail())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        del task
        gc.collect()

    log, records = logging.Logger("asyncio's"), list[logging.LogRecord]()
    monkeypatch.setattr("asyncio.base_events.logger", log)
    log.addFilter(deployment.without_the_gone)
    log.addFilter(lambda record: records.append(record) or True)
    asyncio.run(fail_unseen(ActorDiedError()))
    assert not records
    asyncio.run(fail_unseen(KeyError("ours")))
    assert "never retrieved" in records[0].getMessage()


@pytest.mark.faults("signals: SIGTERM while a student is served")
def test_it_ends_with_the_signals_status_and_leaves_no_serve(running: Running) -> None:
    """The last test of the module; a second server is refused before, and ends nothing."""
    env = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    second = [sys.executable, str(JOB), "--student", running.student, "--port", str(free_port())]
    done = subprocess.run(second, env=env, capture_output=True, text=True, timeout=240, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert done.stderr.startswith("error: Ray Serve runs on this cluster already")
    assert requests.get(f"{running.address}/health", timeout=60).status_code == 200
    running.process.send_signal(signal.SIGTERM)
    assert running.process.wait(timeout=120) == 143, running.log.read_text()
    said = running.log.read_text()
    assert said.count("Stopped by SIGTERM") == 1
    assert "Traceback" not in said
    with pytest.raises(ValueError, match="SERVE_CONTROLLER_ACTOR"):
        ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])
