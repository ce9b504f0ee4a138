"""The machine as MLflow's page of system metrics shows it, with an nvidia-smi that a test writes."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import psutil
import pytest

from pipeline.host import system_metrics

TABLE = """\
0, 87, 40960, 81920, 412.5
1, [N/A], 1024, 81920, [Not Supported]
"""


@pytest.fixture
def no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))


def with_nvidia_smi(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    place = folder / "nvidia-smi"
    place.write_text(f"#!/bin/sh\n{script}\n")
    place.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}/usr/bin{os.pathsep}/bin")


def joined() -> None:
    """Wait for the sampling thread, which ends with the body; a thread that does not is found here."""
    for one in threading.enumerate():
        if one.name == "system metrics":
            one.join(60)
            assert not one.is_alive()


def test_cpu_and_memory_have_mlflows_names_and_units(no_gpu: None) -> None:
    found = system_metrics.now()
    assert found.keys() == {
        "cpu_utilization_percentage",
        "system_memory_usage_megabytes",
        "system_memory_usage_percentage",
    }
    total = psutil.virtual_memory().total / 1e6
    share = 100 * found["system_memory_usage_megabytes"] / total
    assert found["system_memory_usage_percentage"] == pytest.approx(share, abs=0.1)
    assert 0 <= found["cpu_utilization_percentage"] <= 100


def test_every_gpu_of_the_machine_is_there_with_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_nvidia_smi(tmp_path, monkeypatch, f"cat <<'END'\n{TABLE}END")
    found = {name: value for name, value in system_metrics.now().items() if name.startswith("gpu")}
    assert found == {
        "gpu_0_utilization_percentage": 87.0,
        "gpu_0_power_usage_watts": 412.5,
        "gpu_0_memory_usage_megabytes": 42949.7,
        "gpu_0_memory_usage_percentage": 50.0,
        "gpu_1_memory_usage_megabytes": 1073.7,
        "gpu_1_memory_usage_percentage": 1.2,
    }


def test_a_driver_without_gpus_is_no_trouble(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_nvidia_smi(tmp_path, monkeypatch, "echo 'No devices were found'; exit 6")
    assert not [name for name in system_metrics.now() if name.startswith("gpu")]


def test_samples_come_until_the_body_ends(no_gpu: None) -> None:
    told: list[dict[str, float]] = []
    three = threading.Event()

    def report(values: dict[str, float]) -> None:
        told.append(values)
        if len(told) == 3:
            three.set()

    with system_metrics.sampled(report, interval=0.01):
        assert three.wait(60)
    joined()
    assert told[0].keys() == system_metrics.now().keys()


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_nothing_that_goes_wrong_there_reaches_the_work(
    no_gpu: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tried = threading.Event()

    def fail(*_: object) -> None:
        tried.set()
        raise OSError("no /proc here")

    with system_metrics.sampled(fail, interval=0.01):
        assert tried.wait(60)
        joined()
    assert capsys.readouterr().err == ""
    tried.clear()
    monkeypatch.setattr(system_metrics, "now", fail)
    with system_metrics.sampled(fail, interval=0.01):
        assert tried.wait(60)
        joined()
    assert "This machine's system metrics are not recorded any more (no /proc here)." in capsys.readouterr().err
