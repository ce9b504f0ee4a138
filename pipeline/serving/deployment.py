"""A student's replicas on Ray Serve, and its teacher's beside them if asked for; HTTP is not their business.

Ray Serve's own HTTP proxy is not started. It hands every request on to its replica in several calls, which there share
one Python with what draws: on two cores 10 to 64 of 160 requests a second were answered. Batches come in one call each.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.config import ProxyLocation
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig

from pipeline.generator.generator import Generator
from pipeline.host import collector
from pipeline.host.errors import Outage, Refused, Unfinished
from pipeline.services import ray_errors
from pipeline.serving.desk import About, Work
from pipeline.serving.gathering import AHEAD
from pipeline.serving.orders import Model, Sample
from pipeline.serving.painter import Drawn, Painter
from pipeline.serving.service import DRAIN, Service

ATTEMPTS = 2  # at starting a replica, before it is said that it cannot be


class PainterReplica:
    """One process that draws batches, one after the other."""

    def __init__(self, service: Service, teacher: bool) -> None:
        generator = Generator.from_pretrained(service.student, service.device, teacher=teacher)
        self.painter = Painter(generator, service.batch, teacher)
        # One thread, for there is one device, and beside the one in which Serve asks how the replica is.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="painter")
        collector.settle()

    async def draw(self, samples: list[Sample]) -> list[Drawn]:
        """The images of a batch of samples that were checked."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._draw, samples)

    def about(self) -> About:
        """What is drawn here."""
        return About(self.painter.generator.description, self.painter.generator.layout)

    def _draw(self, samples: list[Sample]) -> list[Drawn]:
        try:
            return self.painter.draw(samples)
        except Exception as error:
            if ray_errors.device_error(error):
                ray_errors.end_process(error)
            raise


def check_free() -> None:
    """Refused where Serve runs on the joined cluster: what it serves is somebody else's, and ending it ends that."""
    if running():
        raise Refused(
            "Ray Serve runs on this cluster already, for somebody else; stop it (`serve shutdown`), or serve on another"
            " cluster."
        )


def start(service: Service) -> tuple[About, dict[Model, Work]]:
    """Start the replicas on the Ray that is joined: what they draw, and what to call for a batch of it.

    Raises Unfinished, one sentence, where they cannot be started.
    """
    logging.getLogger("ray.serve").setLevel(logging.ERROR)  # here, where its news are none; replicas have their files
    logging.getLogger("asyncio").addFilter(without_the_gone)
    quiet = LoggingConfig(enable_access_log=False, log_level="WARNING")
    serve.start(proxy_location=ProxyLocation.Disabled, logging_config=quiet)
    replicas: dict[Model, int] = {"student": service.replicas}
    if service.teacher:
        replicas["teacher"] = 1
    try:
        handles = {model: _run(service, model, count, quiet) for model, count in replicas.items()}
        about: About = handles["student"].about.remote().result()
    except RuntimeError as error:  # a replica could not start, as often as it was tried
        said = [line for line in str(error).splitlines() if line.strip()]
        raise Unfinished(f"the student could not be started: {said[-1].strip()}") from None
    return about, {model: _work(handle) for model, handle in handles.items()}


def without_the_gone(record: logging.LogRecord) -> bool:
    """Whether a record of asyncio's is worth a line: that a replica has died is said once, by its status.

    Serve asks a replica how much it has to do in a task that it leaves alone where that takes long; asyncio then prints
    the traceback of a task that nobody waits for.
    """
    return not (record.exc_info and isinstance(record.exc_info[1], RayActorError))


def _run(service: Service, model: Model, replicas: int, quiet: LoggingConfig) -> DeploymentHandle:
    """The replicas of one model, as an application of their own."""
    options: dict[str, Any] = {
        "name": model,
        "num_replicas": replicas,
        "ray_actor_options": {"num_cpus": 1, "num_gpus": int(service.device == "cuda")},
        "max_ongoing_requests": AHEAD,
        "graceful_shutdown_timeout_s": float(DRAIN),
        "graceful_shutdown_wait_loop_s": 0.1,
        "max_constructor_retry_count": ATTEMPTS,
    }
    deployed: Any = serve.deployment(PainterReplica, **options)
    return serve.run(deployed.bind(service, model == "teacher"), name=model, route_prefix=None, logging_config=quiet)


def _work(handle: DeploymentHandle) -> Work:
    """A batch by one of the handle's replicas; Outage where it dies, or what it raised."""

    async def draw(samples: list[Sample]) -> Sequence[Drawn]:
        try:
            found: list[Drawn] = await handle.draw.remote(samples)
        except RayActorError:
            raise Outage("the process that was to draw this is gone, and another is started; try again.") from None
        return found

    return draw


def device() -> str:
    """Of the replicas where nothing is said: a GPU if the joined cluster has one."""
    return "cuda" if ray.cluster_resources().get("GPU", 0) >= 1 else "cpu"


def status() -> str:
    """How the replicas stand, in Serve's words: RUNNING, DEPLOYING, UNHEALTHY; NOT_STARTED where some are gone.

    Of student and teacher it is that of the one that does not run.
    """
    found = [application.status.value for application in serve.status().applications.values()]
    return next((one for one in found if one != "RUNNING"), "RUNNING") if found else "NOT_STARTED"


def drain() -> None:
    """Finish the batches that there are, ``DRAIN`` seconds at most, and take no more."""
    if ray.is_initialized() and running():
        for name in serve.status().applications:
            serve.delete(name)


def stop() -> None:
    """``drain``, and end Serve."""
    drain()
    serve.shutdown()


def running() -> bool:
    """Whether Serve runs on the joined cluster."""
    try:
        ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
    except ValueError:
        return False
    return True
