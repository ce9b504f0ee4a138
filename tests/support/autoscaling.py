"""Ray's own autoscaler on one machine: a head without GPUs, and nodes with made-up ones that come when a job asks.

The nodes are processes (Ray's fake provider), the rest is what runs in a cloud: the head's monitor sees what jobs ask
for, starts nodes, and ends those that have nothing to do.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

RAY = str(Path(sys.executable).with_name("ray"))
HEAD, HEAD_TYPE = "f" * 51 + "00000", "ray.head.default"  # as the provider calls the head
PATIENCE = 90  # seconds for the head's start
STARTED = "Ray runtime started"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def own_address() -> str:
    """The address that nodes on one machine find each other under; Ray rewrites 127.0.0.1."""
    import ray.util

    return str(ray.util.get_node_ip_address())


def configuration(gcs: str, workers: dict[str, Any], idle: float) -> dict[str, Any]:
    """What a file for ``ray up`` would hold, without a cloud."""
    lists = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
    return {
        "cluster_name": "tests",
        "max_workers": 8,
        "idle_timeout_minutes": idle / 60,
        "upscaling_speed": 1.0,
        "head_node_type": HEAD_TYPE,
        "available_node_types": {
            HEAD_TYPE: {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "worker": {"resources": workers, "node_config": {}, "min_workers": 0, "max_workers": 2},
        },
        "provider": {
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "gcs_address": gcs,
            "launch_multiple": True,
            "head_node_id": HEAD,
        },
        "auth": {},
        "docker": {},
        "file_mounts": {},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        "rsync_exclude": [],
        "rsync_filter": [],
    } | {f"{name}_commands": [] for name in lists}


@contextmanager
def cluster(folder: Path, workers: dict[str, Any], idle: float = 6.0) -> Iterator[str]:
    """A head whose autoscaler may start two nodes of ``workers``; yields the address of its dashboard.

    ``folder`` is short, holds Ray's files, and tells this cluster's processes from all others when it ends.
    """
    port, dashboard = free_port(), free_port()
    ip = own_address()
    config = folder / "autoscaling.yaml"
    config.write_text(json.dumps(configuration(f"{ip}:{port}", workers, idle)))  # JSON is YAML
    environment = os.environ | {
        "RAY_FAKE_CLUSTER": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": HEAD,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD,
        "RAY_TMPDIR": str(folder),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    }
    command = [RAY, "start", "--head", "--block", "--num-cpus=0", "--disable-usage-stats"]
    command += [f"--autoscaling-config={config}", f"--port={port}", f"--node-ip-address={ip}", f"--temp-dir={folder}"]
    command += ["--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", "--dashboard-agent-listen-port=0"]
    command += [f"--ray-client-server-port={free_port()}", f"--object-store-memory={150 << 20}"]
    log = folder / "head.log"
    with log.open("w") as out:
        head = subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + PATIENCE
        while STARTED not in log.read_text():
            assert head.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield f"http://127.0.0.1:{dashboard}"
    finally:
        head.terminate()
        with suppress(subprocess.TimeoutExpired):
            head.wait(20)
        _sweep(folder)


def _sweep(folder: Path) -> None:
    """Kill what is left of a cluster: every process that names its folder, in its environment or as an argument."""
    mark = str(folder).encode()
    for place in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            named = (
                mark in (place / "cmdline").read_bytes() or b"RAY_TMPDIR=" + mark in (place / "environ").read_bytes()
            )
            if named and int(place.name) != os.getpid():
                os.kill(int(place.name), signal.SIGKILL)
