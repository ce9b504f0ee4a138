"""Machines that are none: each has an address, processes, a /tmp and a shared memory of its own, and no checkout.

Linux's namespaces make them, for which one has to be root. They see this machine's programs, as of one image.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
NETWORK = "10.77.41"
OURS = f"{NETWORK}.1"  # this machine's address for them
BRIDGE = "dd-machines"
OWN = ("/tmp", "/dev/shm", *(str(ROOT / part) for part in ("pipeline", "jobs")))  # what is empty on each at first
POSSIBLE = os.geteuid() == 0 and all(map(shutil.which, ("ip", "unshare", "nsenter")))


@contextmanager
def network() -> Iterator[None]:
    """What joins machines with this one, while the body runs."""
    _run("ip", "link", "add", BRIDGE, "type", "bridge")
    try:
        _run("ip", "address", "add", f"{OURS}/24", "dev", BRIDGE)
        _run("ip", "link", "set", BRIDGE, "up")
        yield
    finally:
        _run("ip", "link", "delete", BRIDGE)


class Machine:
    """One that is reached at ``address``; ``end`` takes its processes with it."""

    def __init__(self, number: int, environment: dict[str, str]) -> None:
        self.address, self.environment = f"{NETWORK}.{number}", environment | {"HOME": "/tmp"}
        mounts = "; ".join(f"mount -t tmpfs tmpfs {place}" for place in OWN)
        command = ["unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-ec"]
        self._first = subprocess.Popen([*command, f"{mounts}; exec sleep infinity"])
        self._pid = self._inner()
        self._link = f"dd-{number}"
        _run("ip", "link", "add", self._link, "type", "veth", "peer", "name", "eth0", "netns", str(self._pid))
        _run("ip", "link", "set", self._link, "master", BRIDGE, "up")
        for line in (f"address add {self.address}/24 dev eth0", "link set eth0 up", "link set lo up"):
            self.run("ip", *line.split())

    def run(self, *command: str) -> str:
        """What a command says there; the test fails with it where the command does."""
        return _run(*self._inside(), *command, env=self.environment)

    def start(self, log: Path, *command: str) -> None:
        """Begin what lasts as long as the machine; it says what it says in ``log``, on this machine."""
        with log.open("wb") as out:
            subprocess.Popen([*self._inside(), *command], env=self.environment, stdout=out, stderr=out)

    def end(self) -> None:
        _run("ip", "link", "delete", self._link)  # the kernel takes its time with those of a namespace that is gone
        self._first.kill()
        self._first.wait()

    def _inside(self) -> list[str]:
        return ["nsenter", "--target", str(self._pid), "--net", "--mount", "--pid", "--wd=/tmp"]

    def _inner(self) -> int:
        """The id of its first process, which sleeps once its mounts are there."""
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            for child in psutil.Process(self._first.pid).children():
                if child.name() == "sleep":
                    return child.pid
            time.sleep(0.05)
        raise RuntimeError("the machine did not start.")


def _run(*command: str, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout
