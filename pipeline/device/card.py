"""The card, its driver and the libraries that figures depend on: ``python -m pipeline.device.card cuda`` prints them.

A process of its own asks, since whoever asks CUDA for a card's name takes some of its memory.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from contextlib import suppress
from typing import Any

import torch

from pipeline.host import machine, provenance


def facts(device: str) -> dict[str, Any] | None:
    """Of "cuda" or "cpu", plain values; None where there is no CUDA device.

    Bytes of memory, driver and CUDA are None on a CPU, whatever does not say what it is, too.
    """
    cuda = device == "cuda"
    if cuda and not torch.cuda.is_available():
        return None
    triton = None
    with suppress(importlib.metadata.PackageNotFoundError):
        triton = importlib.metadata.version("triton")
    return {
        "name": machine.device_name(device),
        "rehearsal": not cuda,
        "memory_bytes": torch.cuda.get_device_properties(0).total_memory if cuda else None,
        "driver": asked("driver_version") if cuda else None,
        "cuda": torch.version.cuda if cuda else None,
        "torch": torch.__version__,
        "triton": triton,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "commit": provenance.version()["commit"],
        "changed": provenance.version()["changed"],
    }


def asked(query: str) -> str | None:
    """What nvidia-smi answers of the process's first card; None without it, or where it has no answer."""
    if not shutil.which("nvidia-smi"):
        return None
    name = f"GPU-{torch.cuda.get_device_properties(0).uuid}"
    command = ["nvidia-smi", "-i", name, f"--query-gpu={query}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return answer if answer and not answer.startswith("[") else None


if __name__ == "__main__":
    print(json.dumps(facts(sys.argv[1])))
