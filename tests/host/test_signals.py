"""A job that is told to stop says one line and is KILLED in MLflow."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import faulty
import mlflow
import psutil
import pytest
import ray
from faults import said, start, wait
from tiny import IMAGES, tiny, with_pairs

from pipeline.host import signals
from pipeline.recipe import Recipe


@pytest.fixture
def slow() -> Iterator[None]:
    """Every batch of the faulty family takes half a second."""
    faulty.SLOW.touch()
    yield
    faulty.SLOW.unlink()


def stop(job: str, recipe: Recipe, folder: Path, number: int, line: str) -> None:
    """Start a job, send it a signal once it has printed ``line``, and look at how it ends."""
    running = start(job, recipe, folder, ray.get_runtime_context().gcs_address)
    (log,) = folder.glob("*.log")
    wait(running, lambda: line in log.read_text(), True)
    running.send_signal(number)
    out, name = said(running), signal.Signals(number).name
    assert running.returncode == 128 + number, out
    assert out.count(f"Stopped by {name}; what is finished is kept, and the same command goes on.") == 1
    assert "Traceback" not in out
    assert "***" not in out, "no crash report of Ray's"


def stop_run(job: str, recipe: Recipe, folder: Path, number: int, line: str) -> None:
    """``stop`` a job at work, whose MLflow run then says that it was killed."""
    stop(job, recipe, folder, number, line)
    client = mlflow.MlflowClient(f"sqlite:///{recipe.run}/mlflow.db")
    experiment = client.get_experiment_by_name(recipe.name)
    newest = client.search_runs([experiment.experiment_id], order_by=["start_time DESC"])[0]
    assert newest.info.status == "KILLED"


@pytest.mark.faults("signals: SIGTERM")
def test_pairs(ray_cluster: None, tmp_path: Path, slow: None) -> None:
    recipe = with_pairs(tiny(tmp_path, "llamagen"), count=200, shard_rows=4, batch=4)
    recipe = replace(recipe, teacher=replace(recipe.teacher, family="faulty"))
    stop_run("generate_pairs", recipe, tmp_path, signal.SIGTERM, "shards 1/50")


@pytest.mark.slow
@pytest.mark.faults("signals: SIGINT while waiting for nodes")
def test_pairs_that_wait_for_nodes(ray_cluster: None, tmp_path: Path) -> None:
    recipe = tiny(tmp_path)
    recipe = replace(recipe, cluster=replace(recipe.cluster, cpus=64))
    stop("generate_pairs", recipe, tmp_path, signal.SIGINT, "Waiting for nodes")
    assert not Path(recipe.run).exists(), "nothing is claimed before the nodes are there"


@pytest.mark.faults("signals: SIGINT")
def test_a_report(ray_cluster: None, tmp_path: Path) -> None:
    recipe = tiny(tmp_path, "var", **IMAGES)
    settings = replace(recipe.evaluate, samplers=[{"name": "Autoregressive"}], count=200_000, batch=50)
    stop_run("evaluate", replace(recipe, evaluate=settings), tmp_path, signal.SIGINT, "parts 1/")


def long_training(folder: Path, workers: int) -> Recipe:
    from pipeline.workflow.generate import generate

    recipe = tiny(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/other.db")
        generate(recipe)
    return replace(recipe, train=replace(recipe.train, epochs=100_000, log_every=1, workers=workers))


@pytest.mark.faults("signals: SIGHUP")
def test_a_student_in_the_drivers_process(ray_cluster: None, tmp_path: Path) -> None:
    stop_run("distill", long_training(tmp_path, 0), tmp_path, signal.SIGHUP, "steps 1/")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_student_on_workers(ray_cluster: None, tmp_path: Path, number: int) -> None:
    stop_run("distill", long_training(tmp_path, 1), tmp_path, number, "steps 1/")


LINGERING = """
import sys
from lab import linger
from tiny import tiny
from pathlib import Path
from pipeline.host import signals
from pipeline.services import cluster
signals.install()
cluster.on_worker(tiny(Path(sys.argv[1])), linger, sys.argv[2])
"""


@pytest.mark.faults("signals: SIGTERM while a worker's answer is waited for")
def test_a_call_on_a_worker_is_not_waited_for(ray_cluster: None, tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    env = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    command = [sys.executable, "-c", LINGERING, str(tmp_path), str(begun)]
    with subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True) as running:
        wait(running, begun.exists, True)
        running.send_signal(signal.SIGTERM)
        _, errors = running.communicate(timeout=60)
    assert running.returncode == 143, errors
    assert errors.count("Stopped by SIGTERM") == 1


@pytest.mark.faults("signals: SIGTERM during the imports")
def test_the_imports(tmp_path: Path) -> None:
    """Torch is replaced by a package that waits: the signal comes while it is imported."""
    (tmp_path / "torch.py").write_text("import sys\nprint('importing', flush=True)\nsys.stdin.read()\n")
    job = Path(__file__).parents[2] / "jobs" / "generate_pairs.py"
    env = os.environ | {"PYTHONPATH": f"{tmp_path}:{job.parents[1]}"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, str(job)], env=env, text=True, **pipes) as running:  # type: ignore[call-overload]
        assert running.stdout.readline() == "importing\n"
        running.send_signal(signal.SIGTERM)
        _, errors = running.communicate(timeout=60)
    assert (running.returncode, errors.count("\n")) == (143, 1), errors


SCRIPT = """
import os, signal
from pipeline.host import signals
signals.install()
{body}
print("not reached")
"""


def run(body: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", SCRIPT.format(body=body)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_a_signal_that_is_held_comes_after_the_body() -> None:
    done = run(
        "with signals.held():\n    with signals.held():\n        os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print('finished')"
    )
    assert (done.returncode, done.stdout) == (143, "finished\n")
    assert done.stderr.count("\n") == 1


def test_another_thread_holds_nothing() -> None:
    done = run(
        "import threading\nentered, left = threading.Event(), threading.Event()\n"
        "def work():\n    with signals.held():\n        entered.set()\n        left.wait()\n"
        "threading.Thread(target=work, daemon=True).start()\nentered.wait()\nos.kill(os.getpid(), signal.SIGTERM)"
    )
    assert (done.returncode, done.stdout) == (143, "")


def test_what_a_thread_raises_after_a_signal_is_not_said() -> None:
    """One of Ray Data's asks for its objects when Ray is gone."""
    done = run(
        "import threading\ngone = threading.Event()\ndef ask():\n    gone.wait()\n    raise KeyError\n"
        "asking = threading.Thread(target=ask)\nasking.start()\n"
        "try:\n    os.kill(os.getpid(), signal.SIGTERM)\nfinally:\n    gone.set()\n    asking.join()"
    )
    assert (done.returncode, done.stdout) == (143, "")
    assert done.stderr.count("\n") == 1


def test_what_others_do_at_the_end_does_not_change_the_status() -> None:
    """As Ray does: a thread that asks it for something while it goes ends the process with status 1."""
    done = run(
        "import atexit\natexit.register(os._exit, 1)\nprint('said', end='')\nos.kill(os.getpid(), signal.SIGTERM)"
    )
    assert (done.returncode, done.stdout) == (143, "said")


def test_a_signal_while_ray_starts_is_one_like_any_other() -> None:
    """Ray's own handler for SIGTERM, which it sets first, ends a process with status 15 and says nothing."""
    done = run(
        "import ray, threading\nthreading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()\n"
        "with signals.kept():\n    ray.init('local', num_cpus=1, include_dashboard=False)"
    )
    assert (done.returncode, done.stdout) == (143, "")
    assert "Stopped by SIGTERM" in done.stderr


def test_a_local_ray_ends_with_its_job() -> None:
    """And what a server starts has its priority, until then."""
    done = run(
        "import psutil, ray\nfrom pipeline.services import cluster\nos.environ.pop('RAY_ADDRESS', None)\n"
        "os.environ.pop('RAY_worker_niceness', None)\n"  # conftest's, for the tests' own Ray
        "with signals.kept():\n    cluster.keep_priority()\n    cluster.enter(1)\n"
        "    print('niceness', ray.get(ray.remote(lambda: os.nice(0)).remote()))\n"
        "print('started', *(child.pid for child in psutil.Process().children(recursive=True)))\n"
        "os.kill(os.getpid(), signal.SIGTERM)"
    )
    assert done.returncode == 143
    lines = done.stdout.splitlines()
    assert "niceness 0" in lines
    (line,) = (line for line in lines if line.startswith("started "))
    started = [int(pid) for pid in line.split()[1:]]
    assert len(started) > 3
    deadline = time.monotonic() + 10
    while any(map(alive, started)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(alive, started))


def alive(pid: int) -> bool:
    """Whether it runs: a container's first process may never ask for the status of the dead."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_the_first_signal_counts() -> None:
    done = run(
        "try:\n    os.kill(os.getpid(), signal.SIGINT)\nfinally:\n    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print('tidied up')"
    )
    assert (done.returncode, done.stdout) == (130, "tidied up\n")


def test_a_call_in_a_thread_can_be_left() -> None:
    done = run(
        "import threading\nforever = threading.Event()\n"
        "threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()\nsignals.interruptible(forever.wait)"
    )
    assert (done.returncode, done.stdout) == (143, "")


def test_an_ignored_signal_stays_ignored() -> None:
    done = run("signal.signal(signal.SIGHUP, signal.SIG_IGN)\nsignals.install()\nos.kill(os.getpid(), signal.SIGHUP)")
    assert (done.returncode, done.stdout) == (0, "not reached\n")


def test_what_a_call_in_a_thread_gives_or_raises_arrives() -> None:
    assert signals.interruptible(threading.get_ident) != threading.get_ident()
    with pytest.raises(KeyError):
        signals.interruptible(lambda: {}["nothing"])
