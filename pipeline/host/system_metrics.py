"""How busy a machine is, every few seconds: what MLflow shows as a run's system metrics, by its names.

MLflow's own monitor would log into the store from whatever process it runs in, and the store may be slow or out of a
worker's reach. Here a thread reads the machine and hands the numbers to whoever logs.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psutil

INTERVAL = 10.0  # seconds, as in MLflow
MEBIBYTE, MEGABYTE = 1 << 20, 1e6  # nvidia-smi counts in the first, MLflow in the second
ASKED = "index,utilization.gpu,memory.used,memory.total,power.draw"


@contextmanager
def sampled(report: Callable[[dict[str, float]], object], interval: float = INTERVAL) -> Iterator[None]:
    """Call ``report`` with ``now()`` every ``interval`` seconds while the body runs, in a thread.

    Neither a machine that cannot be read nor a ``report`` that fails ends the body; the samples end, the former said.
    """
    ended = threading.Event()

    def follow() -> None:
        """The thread."""
        psutil.cpu_percent()  # the share of the time since the thread's last call: the first one has none
        while not ended.wait(interval):
            try:
                values = now()
            except (psutil.Error, OSError, ValueError) as error:
                print(f"This machine's system metrics are not recorded any more ({error}).", file=sys.stderr)
                return
            if ended.is_set():  # nvidia-smi may take its time
                return
            try:
                report(values)
            except Exception:  # whoever listened is gone, which the work itself will find out
                return

    threading.Thread(target=follow, name="system metrics", daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def now() -> dict[str, float]:
    """How busy the CPU's cores were since this thread's last call, the memory in use, and the same of each NVIDIA GPU.

    The names are MLflow's: ``cpu_utilization_percentage``, ``system_memory_usage_megabytes``,
    ``gpu_0_utilization_percentage`` and so on.
    """
    memory = psutil.virtual_memory()
    return {
        "cpu_utilization_percentage": psutil.cpu_percent(),
        "system_memory_usage_megabytes": round(memory.used / MEGABYTE, 1),
        "system_memory_usage_percentage": round(100 * memory.used / memory.total, 1),
        **_gpus(),
    }


def _gpus() -> dict[str, float]:
    """What nvidia-smi says of every GPU of the machine; nothing where there is none. What it does not know is left
    out.
    """
    if not shutil.which("nvidia-smi"):
        return {}
    command = ["nvidia-smi", f"--query-gpu={ASKED}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except subprocess.TimeoutExpired:
        return {}
    if answer.returncode:
        return {}  # a driver without GPUs, which says so on stdout
    out: dict[str, float] = {}
    for line in answer.stdout.splitlines():
        index, work, used, total, power = (cell.strip() for cell in line.split(","))
        values = {"utilization_percentage": _number(work), "power_usage_watts": _number(power)}
        if (mine := _number(used)) is not None and (all_of_it := _number(total)):
            values["memory_usage_megabytes"] = round(mine * MEBIBYTE / MEGABYTE, 1)
            values["memory_usage_percentage"] = round(100 * mine / all_of_it, 1)
        out |= {f"gpu_{index}_{name}": value for name, value in values.items() if value is not None}
    return out


def _number(cell: str) -> float | None:
    """A cell of nvidia-smi's table; None of "[N/A]" and its like."""
    try:
        return float(cell)
    except ValueError:
        return None
