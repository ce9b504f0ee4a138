"""The Ray that a job runs on: the cluster it was submitted to, or a local one that lives as long as the job."""

from __future__ import annotations

import logging
import math
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import ray
from ray._private import auto_init_hook
from ray.data import ActorPoolStrategy, DataContext
from ray.exceptions import NodeDiedError, RaySystemError, TaskUnschedulableError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from torch.cuda import device_count

from pipeline import storage
from pipeline.configuration import fields
from pipeline.configuration.addresses import PLACEHOLDER
from pipeline.configuration.fields import Actors
from pipeline.files.places import is_relative
from pipeline.host import events, signals
from pipeline.host.errors import Outage, Refused
from pipeline.recipe import Recipe
from pipeline.services.heartbeat import Heartbeat as Heartbeat
from pipeline.services.ray_address import LOCAL, address, make_token, use_token
from pipeline.services.ray_address import check_address as check_address
from pipeline.services.ray_errors import Lost as Lost
from pipeline.services.ray_errors import device_error as device_error
from pipeline.services.ray_errors import end_process as end_process
from pipeline.services.ray_errors import is_ray as is_ray
from pipeline.services.ray_errors import translated as translated
from pipeline.services.ray_errors import translation as translation
from pipeline.settings.evaluate import FORMULA

SPARE = 2  # logical CPUs of a local cluster beside the pool's: tasks that write or merge must never wait for a teacher

# glibc gives every large block back to the kernel and gets it back page by page; keeping 1 GiB saves that CPU time. It
# is read when a process starts, so the workers have it and this process has not.
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 30)}

STARTS = 5  # replicas in a row that may fail to start: a hub that is busy, a node without its mount
POOL = "ray.data._internal.execution.operators.actor_pool_map_operator"  # the logger that knows of failed starts

LOOK = 2.0  # seconds between two looks at the cluster's nodes
REMIND = 600.0  # seconds after which a job that has no place at all says so again


class NoGpu(Refused):
    """The recipe asks for GPUs that the local machine lacks; one sentence."""


def connect(recipe: Recipe) -> None:
    """Join the cluster of RAY_ADDRESS (set inside ``ray job submit``) or start a local one; nothing if already joined.

    Raises NoGpu where the recipe asks for GPUs and a local machine has too few for one replica.
    """
    pools = [recipe.pairs.actors, recipe.train.most, recipe.evaluate.actors]
    replicas = max(own_places(recipe) if pool == "auto" else pool for pool in pools)
    enter(math.ceil(replicas * recipe.cluster.cpus), recipe.cluster.gpus)
    _warn_about_local_folder(recipe)


def enter(cpus: int, gpus: float = 0) -> None:
    """``connect`` for pools that need so many CPUs together, and for replicas that need so many GPUs each."""
    auto_init_hook.enable_auto_connect = False  # a thread that outlives the connection must not start a Ray of its own
    if not ray.is_initialized():
        check_address()
        with signals.kept():  # Ray sets its own
            if address() == LOCAL:
                _start_local(cpus, gpus)
            else:
                _join()


def keep_priority() -> None:
    """Let the workers of a local Ray that is still to be started have this process's priority.

    Ray gives them a niceness of 15, so that all else on the machine goes first: kind to who works beside a job of
    hours, and a delay for who waits for an image.
    """
    os.environ.setdefault("RAY_worker_niceness", "0")


@contextmanager
def session(recipe: Recipe, replicas: Actors, what: str = "replicas") -> Iterator[None]:
    """Everything that a job does on Ray: join or start it, say what it waits for, translate what it raises.

    Of ``auto`` replicas one is waited for.

    A Refused or Unfinished raised in a worker comes out as itself, whatever else Ray raises as Unfinished, a sentence.
    Settings of Ray Data made in the body are gone after it.
    """
    connect(recipe)
    with _own_settings(), waiting(recipe, 1 if replicas == "auto" else replicas, what), translated():
        yield


def on_worker(recipe: Recipe, function: Callable[..., Any], *args: Any, cpus: float | None = None) -> Any:
    """Call a function in one Ray task that has a replica's resources, or another number of CPUs; its result."""
    alone = recipe if cpus is None else replace(recipe, cluster=replace(recipe.cluster, cpus=cpus))
    with session(alone, 1, "workers"):
        return _result(ray.remote(function).options(**_resources(alone)).remote(*args))


def on_actor(recipe: Recipe, cls: type, args: tuple[Any, ...], method: str, *more: Any) -> Any:
    """Call one method of ``cls(*args)`` in an actor that has a replica's resources; its result."""
    with session(recipe, 1, "workers"):
        actor: Any = ray.remote(cls).options(**_resources(recipe)).remote(*args)
        return _result(getattr(actor, method).remote(*more))


def gcs_address() -> str:
    """Of the cluster that is joined: what another process on this machine takes as RAY_ADDRESS."""
    found: str = ray.get_runtime_context().gcs_address
    return found


def on_one_machine(recipe: Recipe) -> bool:
    """Whether the joined cluster is this machine alone and has a place for a replica, so that none is to come."""
    return sum(node["Alive"] for node in ray.nodes()) == 1 and places(recipe) > 0


def on_every_node(recipe: Recipe, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Call a function on every node that there is, and in a worker with a replica's resources, on a node that may be
    still to come; the results. A node that is lost meanwhile is left out.
    """
    task = ray.remote(function)
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
    everywhere = [NodeAffinitySchedulingStrategy(node, soft=False) for node in nodes]
    calls = [task.options(num_cpus=0, scheduling_strategy=here).remote(*args) for here in everywhere]
    out = [_result(task.options(**_resources(recipe)).remote(*args))]
    for call in calls:
        with suppress(RaySystemError, NodeDiedError, TaskUnschedulableError):
            out.append(_result(call))
    return out


def _result(call: Any) -> Any:
    """What a call in a worker comes to; a signal ends the wait for it, as it would not end that of ``ray.get``."""
    return signals.interruptible(lambda: ray.get(call))


def pool(recipe: Recipe, size: int, retries: int) -> dict[str, Any]:
    """What ``map_batches`` is told of a pool of so many replicas, whose units survive ``retries`` deaths of theirs."""
    # One unit at a time: one that takes its actor down would take the retries of another queued behind it, too.
    strategy = ActorPoolStrategy(size=size, max_tasks_in_flight_per_actor=1)
    return {"compute": strategy, "max_task_retries": retries, **_resources(recipe)}


def _resources(recipe: Recipe) -> dict[str, float]:
    """Of a replica, as Ray's options."""
    return {"num_cpus": recipe.cluster.cpus, "num_gpus": recipe.cluster.gpus}


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
            try:
                found = min(places(recipe), replicas)
            except Exception:  # the cluster is gone, which the body hears, too
                return
            if found != said or (not found and silent >= REMIND):
                events.warn(_waiting_for(recipe, found, replicas, what))
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


def own_places(recipe: Recipe) -> int:
    """Replicas of the recipe that this machine alone has a place for: by its GPUs, or by its cores; at least one."""
    settings = recipe.cluster
    found, need = (device_count(), settings.gpus) if settings.gpus else (os.cpu_count() or 1, settings.cpus)
    return max(1, int(found / need + 1e-9)) if need else 1


def cpus_of_a_node(recipe: Recipe) -> float:
    """CPUs of the largest node of the cluster that the recipe's jobs run on, which is joined or started."""
    connect(recipe)
    return max(float(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"])


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

    package:// stays: each node has its own installed copy. So does models:/, which MLflow resolves. Where relative
    paths do not start from the working directory, a line says from where.
    """
    relative: list[str] = []

    def fixed(uri: str) -> str:
        if uri == FORMULA or uri.startswith(("package://", "models:/", PLACEHOLDER)):
            return uri
        relative.extend([uri] if is_relative(uri) else [])
        return storage.resolve(uri)

    out = fields.mapped(recipe, fixed)
    if relative and (start := storage.resolve(".")) != os.getcwd():
        print(
            f"Relative paths are taken from {start}: the job's working directory is deleted when it ends.", flush=True
        )
    return out


def _join() -> None:
    """Join the cluster of RAY_ADDRESS, of which this machine must be a node."""
    use_token()
    try:
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise Outage(
            f"the cluster of RAY_ADDRESS {address()} cannot be joined ({reason}); a job runs on one of its nodes:"
            " submit it (cluster/submit.py), or see `ray status` there."
        ) from error


def _start_local(pool: int, gpus: float) -> None:
    """A local cluster large enough for pools of so many CPUs.

    Ray's CPUs are bookkeeping, not cores: with fewer than the pool reserves, a laptop of two cores would wait for ever.
    """
    for name, value in KEEP_MEMORY.items():
        os.environ.setdefault(name, value)
    cpus = max(os.cpu_count() or 1, pool) + SPARE
    make_token()
    try:
        ray.init(
            address="local", num_cpus=cpus, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR
        )
    except OSError as error:
        raise Refused(
            f"a local Ray cannot be started ({error}); it writes to {os.environ.get('RAY_TMPDIR', '/tmp')}"
            " (RAY_TMPDIR, a short path) and its token to ~/.ray (HOME)."
        ) from error
    found = ray.cluster_resources().get("GPU", 0)
    if found < gpus:
        ray.shutdown()
        raise NoGpu(
            f"cluster.gpus is {gpus:g} but Ray sees {found:g} GPUs on this machine; set it to 0"
            " for the CPU, or submit the job to a cluster."
        )


@contextmanager
def _own_settings() -> Iterator[None]:
    """Ray Data as our jobs want it, while the body runs: quiet and patient, with whole blocks."""
    for handler in logging.getLogger("ray.data").handlers:
        if not isinstance(handler, logging.FileHandler):  # its files in Ray's logs may know everything
            handler.setLevel(logging.CRITICAL)  # what it raises is translated
    # The only way in 2.60 to bound the retries of an actor's task; the warning comes at every call.
    warnings.filterwarnings("ignore", message="`ray_remote_args` is deprecated")
    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.target_max_block_size = None  # a block is a unit of work of ours and must not be split
    context.execution_no_progress_timeout_s = -1  # waiting hours for spot GPUs is no error
    context.retried_map_errors = ["CUDA out of memory"]
    context.max_map_retries = 2
    context.raise_original_map_exception = True  # so that a worker's sentence arrives as what it is
    context.max_consecutive_actor_init_deaths = STARTS
    starts, heard = logging.getLogger(POOL), _FailedStarts()
    starts.addHandler(heard)
    try:
        with DataContext.current(context):
            yield
    finally:
        starts.removeHandler(heard)


class _FailedStarts(logging.Handler):
    """Says why an actor could not start; Ray Data, which starts another, has it in its log alone."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and record.exc_info[1]:
            found = translation(record.exc_info[1])
            reason = found.reason if isinstance(found, Lost) else found
            events.warn(f"An actor could not start and is started again: {reason}")


def _warn_about_local_folder(recipe: Recipe) -> None:
    if "/working_dir_files/_ray_pkg_" in recipe.run:
        events.warn(
            f"warning: what is made goes to {recipe.run}, in a submitted job's working directory, which Ray deletes"
            " some time after the job; give an absolute path that every node shares, or an s3:// or gs:// URI."
        )
    nodes = [node for node in ray.nodes() if node["Alive"]]
    more_to_come = ray.cluster_resources().get("GPU", 0) < recipe.cluster.gpus
    if (len(nodes) > 1 or more_to_come) and not storage.is_remote(recipe.run):
        events.warn(
            f"warning: what is made goes to {recipe.run}, a local path, on a cluster of several nodes; it must be a"
            " folder that every node shares, or an s3:// or gs:// URI."
        )
