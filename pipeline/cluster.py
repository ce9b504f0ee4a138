"""The Ray that a job runs on: the cluster it was submitted to, or a local one that lives as long as the job."""

from __future__ import annotations

import logging
import math
import os
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray
from ray.data import DataContext
from tqdm import tqdm

from pipeline import fields, storage
from pipeline.addresses import PLACEHOLDER
from pipeline.errors import Refused
from pipeline.recipe import FORMULA, Recipe

SPARE = 2  # logical CPUs of a local cluster beside the pool's: tasks that write or merge must never wait for a teacher

# glibc gives every large block back to the kernel and gets it back page by page; keeping 1 GiB saved a fifth of the CPU
# time of VAR's pairs. It is read when a process starts, so the workers have it and this process has not.
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 30)}

LOOK = 2.0  # seconds between two looks at the cluster's nodes
REMIND = 600.0  # seconds after which a job that has no place at all says so again


class NoGpu(Refused):
    """The recipe asks for GPUs that the local machine lacks; one sentence."""


def connect(recipe: Recipe) -> None:
    """Join the cluster of RAY_ADDRESS (set inside ``ray job submit``) or start a local one; nothing if already joined.

    Raises NoGpu where the recipe asks for GPUs and a local machine has too few for one replica.
    """
    if not ray.is_initialized():
        if os.environ.get("RAY_ADDRESS", "local") != "local":
            _use_token()
            ray.init(log_to_driver=False, logging_level=logging.ERROR)
        else:
            _start_local(recipe)
    _quiet()
    _warn_about_local_folder(recipe)


@contextmanager
def waiting(recipe: Recipe, replicas: int, what: str = "replicas") -> Iterator[None]:
    """While the body runs, say on stderr what it waits for: how many of its ``replicas`` have a place on the nodes.

    Nothing is said where all of them have one from the start. Places are counted as if the cluster were empty: Ray says
    nothing of what other jobs hold.
    """
    stop = threading.Event()

    def watch() -> None:
        """Say something whenever the number of places changes, and again while there is none."""
        said, silent = replicas, 0.0
        while not stop.is_set():
            found = min(places(recipe), replicas)
            if found != said or (not found and silent >= REMIND):
                tqdm.write(_waiting_for(recipe, found, replicas, what), file=sys.stderr)
                said, silent = found, 0.0
            silent += LOOK
            stop.wait(LOOK)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        stop.set()
        watcher.join()


def places(recipe: Recipe) -> int:
    """Replicas of the recipe that the nodes of the joined cluster hold together."""
    needs = {"CPU": recipe.cluster.cpus, "GPU": recipe.cluster.gpus}
    found = (
        min(int(node["Resources"].get(name, 0) / need + 1e-9) for name, need in needs.items() if need)
        for node in ray.nodes()
        if node["Alive"]
    )
    return sum(found)


def _waiting_for(recipe: Recipe, found: int, replicas: int, what: str) -> str:
    """One line: how many have a place, what each needs, what the cluster has."""
    settings, nodes = recipe.cluster, sum(node["Alive"] for node in ray.nodes())
    if found >= replicas:
        return f"The cluster has a place for all {replicas} {what}."
    gpus = f"{settings.gpus:g} GPU and " if settings.gpus else ""
    has = ray.cluster_resources()
    return (
        f"Waiting for nodes: {found} of {replicas} {what} have a place. Each needs {gpus}{settings.cpus:g} CPU on one"
        f" node; the cluster has {has.get('GPU', 0):g} GPU and {has.get('CPU', 0):g} CPU on {nodes}"
        f" node{'s' * (nodes != 1)}. `ray status` says what is on its way."
    )


def portable(recipe: Recipe) -> Recipe:
    """The same recipe with paths that mean the same in every process, whatever its working directory.

    package:// stays: each node has its own installed copy. So does models:/, which MLflow resolves.
    """

    def fixed(uri: str) -> str:
        stays = uri == FORMULA or uri.startswith(("package://", "models:/", PLACEHOLDER))
        return uri if stays else storage.resolve(uri)

    return fields.mapped(recipe, fixed)


def _start_local(recipe: Recipe) -> None:
    """A local cluster large enough for every pool of the recipe.

    Ray's CPUs are bookkeeping, not cores: with fewer than the pool reserves, a laptop of two cores would wait for ever.
    """
    replicas = max(recipe.pairs.actors, recipe.train.workers, recipe.evaluate.actors)
    for name, value in KEEP_MEMORY.items():
        os.environ.setdefault(name, value)
    cpus = max(os.cpu_count() or 1, math.ceil(replicas * recipe.cluster.cpus)) + SPARE
    ray.init(address="local", num_cpus=cpus, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    found = ray.cluster_resources().get("GPU", 0)
    if found < recipe.cluster.gpus:
        ray.shutdown()
        raise NoGpu(
            f"cluster.gpus is {recipe.cluster.gpus:g} but Ray sees {found:g} GPUs on this machine; set it to 0"
            " for the CPU, or submit the job to a cluster."
        )


def _use_token() -> None:
    """Authenticate with the token that is there: given an address, Ray 2.60 ignores it unless told to use it."""
    token = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if "RAY_AUTH_MODE" not in os.environ and ("RAY_AUTH_TOKEN" in os.environ or token.exists()):
        os.environ["RAY_AUTH_MODE"] = "token"


def _quiet() -> None:
    """Ray Data without its own progress output, with blocks left as they are and no patience limit on spot nodes."""
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    # The only way in 2.60 to bound the retries of an actor's task; the warning comes at every call.
    warnings.filterwarnings("ignore", message="`ray_remote_args` is deprecated")
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.target_max_block_size = None  # a block is a unit of work of ours and must not be split
    context.execution_no_progress_timeout_s = -1  # waiting hours for spot GPUs is no error
    context.retried_map_errors = ["CUDA out of memory"]
    context.max_map_retries = 2


def _warn_about_local_folder(recipe: Recipe) -> None:
    if "/working_dir_files/_ray_pkg_" in recipe.run:
        print(
            f"warning: run is {recipe.run}, in a submitted job's working directory, which Ray deletes some time after"
            " the job; give --run an absolute path that every node shares, or an s3:// or gs:// URI.",
            file=sys.stderr,
        )
    nodes = [node for node in ray.nodes() if node["Alive"]]
    more_to_come = ray.cluster_resources().get("GPU", 0) < recipe.cluster.gpus
    if (len(nodes) > 1 or more_to_come) and not storage.is_remote(recipe.run):
        print(
            f"warning: run is {recipe.run}, a local path, on a cluster of several nodes; it must be a folder that"
            " every node shares, or an s3:// or gs:// URI.",
            file=sys.stderr,
        )
