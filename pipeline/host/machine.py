"""The machine that times something: what it is, and how busy others keep it meanwhile."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypedDict

import torch

BEFORE = 1.0  # seconds in which the machine is looked at before anything is timed
QUIET = 0.1  # share of the cores, and of a GPU's time, that others may take from a machine that is called quiet
IDLE = ("idle", "iowait", "guest", "guest_nice")  # columns of /proc/stat that are no work, or counted in another
COLUMNS = ("user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal", "guest", "guest_nice")
STAT = Path("/proc/stat")


@dataclass(frozen=True)
class Load:
    """What others did on a machine while something was timed there; None where the system does not say.

    ``before`` and ``during`` are cores that others kept busy: other processes, and other guests of the same host where
    the system counts what they took. ``gpu`` is the share of time, in percent, that the GPU worked just before.
    """

    average: float  # the system's load average over the minute before, ourselves included
    before: float | None
    during: float | None
    gpu: float | None = None

    busy: bool = False  # others took so much that times are longer than on a quiet machine


class Moment(NamedTuple):
    """Seconds on a clock, of all cores' work, and of this process's own."""

    clock: float
    all: float | None
    own: float


class Watch:
    """Looks at the machine: for ``BEFORE`` seconds when it is made, and from then until it is asked."""

    def __init__(self, device: torch.device | str) -> None:
        self.average, start = os.getloadavg()[0], moment()
        time.sleep(BEFORE)
        self.before, self.gpu = taken(start, moment()), gpu_work(device)
        self.start = moment()

    def load(self) -> Load:
        """What others did so far."""
        during = taken(self.start, moment())
        share = max(self.before or 0.0, during or 0.0) / (os.cpu_count() or 1)
        busy = share > QUIET or (self.gpu or 0.0) > 100 * QUIET
        return Load(round(self.average, 2), rounded(self.before), rounded(during), self.gpu, busy)


def rounded(cores: float | None) -> float | None:
    """To a hundredth, as a report prints it."""
    return None if cores is None else round(cores, 2)


def moment() -> Moment:
    """Now; ``all`` is None on a system without /proc/stat."""
    work = None
    if STAT.exists():
        columns = dict(zip(COLUMNS, map(int, STAT.read_text().splitlines()[0].split()[1:]), strict=False))
        work = sum(ticks for name, ticks in columns.items() if name not in IDLE) / os.sysconf("SC_CLK_TCK")
    return Moment(time.monotonic(), work, time.process_time())


def taken(start: Moment, end: Moment) -> float | None:
    """Cores that others kept busy between two moments, on average."""
    if start.all is None or end.all is None or end.clock <= start.clock:
        return None
    others = (end.all - start.all) - (end.own - start.own)
    return max(0.0, others / (end.clock - start.clock))


def gpu_work(device: torch.device | str) -> float | None:
    """Percent of the last moment that the GPU worked, by nvidia-smi; None without either."""
    if torch.device(device).type != "cuda" or not shutil.which("nvidia-smi"):
        return None
    name = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    asked = ["nvidia-smi", "-i", name, "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"]
    answer = subprocess.run(asked, capture_output=True, text=True, timeout=30, check=False).stdout.strip()
    return float(answer) if answer.isdigit() else None


def device_name(device: torch.device | str) -> str:
    """The GPU's or the processor's own name."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text().splitlines() if listing.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


class Described(TypedDict):
    """The device's name, and the machine's cores."""

    device: str
    cores: int


def described(device: torch.device | str) -> Described:
    """What times depend on that no recipe says."""
    return {"device": device_name(device), "cores": os.cpu_count() or 1}
