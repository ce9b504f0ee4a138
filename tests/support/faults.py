"""Jobs in processes of their own, and how to kill them, their workers and their nodes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from pipeline import storage
from pipeline.recipe import Recipe

JOBS = Path(__file__).parents[2] / "jobs"
TIMED = ("seconds", "speeds", "ms", "throughput", "throughput_batch")  # columns of a report
TIMED += tuple(f"{kind}speedup{error}" for kind in ("", "throughput_") for error in ("", "_std"))
PATIENCE = 600  # seconds that a job may take
LOGS: dict[int, Path] = {}  # what each job prints, by its process


def start(job: str, recipe: Recipe, folder: Path, address: str) -> subprocess.Popen[str]:
    """A job in a process of its own, which joins the Ray at ``address``."""
    config = folder / "recipe.yaml"
    config.write_text(yaml.safe_dump(recipe.resolved()))
    env = os.environ | {"RAY_ADDRESS": address}
    command = [sys.executable, str(JOBS / f"{job}.py"), "--config", str(config)]
    # A file and no pipe: nobody reads while the test waits, and a full pipe would stop the job.
    with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".log", delete=False) as log:
        started = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT, text=True)
    LOGS[started.pid] = Path(log.name)
    return started


def workers(kind: str) -> list[int]:
    """Ray's processes that run ``kind`` for this session of tests, by their ids."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            ours = f"DD_TESTS={os.environ['DD_TESTS']}".encode() in (place / "environ").read_bytes().split(b"\0")
            if ours and re.match(rb"ray::.*" + kind.encode(), (place / "cmdline").read_bytes()):
                found.append(int(place.name))
    return found


def kill(process: int) -> bool:
    """Whether it was still there."""
    with suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)
        return True
    return False


def wait(job: subprocess.Popen[str], count: Callable[[], int], wanted: int) -> None:
    """Until ``count()`` has reached ``wanted`` or the job has ended."""
    deadline = time.monotonic() + PATIENCE
    while count() < wanted and job.poll() is None:
        assert time.monotonic() < deadline, f"{job.args} took longer than {PATIENCE} s"
        time.sleep(0.01)


def said(job: subprocess.Popen[str]) -> str:
    """What a job has printed when it has ended."""
    job.wait(PATIENCE)
    return LOGS[job.pid].read_text()


def finish(job: subprocess.Popen[str]) -> str:
    out = said(job)
    assert job.returncode == 0, out[-3000:]
    return out


def shards(recipe: Recipe) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(recipe.pairs_uri).glob("shard-*")}


def scores(recipe: Recipe) -> list[dict[str, Any]]:
    """The table of a report without what was timed."""
    rows = storage.read_json(storage.join(recipe.report_uri, "report.json"))["rows"]
    return [{k: v for k, v in row.items() if k not in TIMED} for row in rows]
