"""The application on Ray Serve: replicas of a student behind one address, and a teacher beside them if asked for."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray
from ray import serve
from ray.serve.config import BackpressureConfig
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig
from starlette.applications import Starlette

from pipeline.generator.generator import Generator
from pipeline.host.errors import Outage, Refused, Unfinished
from pipeline.services import ray_errors
from pipeline.serving import application
from pipeline.serving.gathering import Gathering
from pipeline.serving.orders import Order, Sample
from pipeline.serving.painter import Drawn, Painter
from pipeline.serving.service import Service

NAME = "student"  # of the application, which Serve's own commands show
AHEAD = 4  # batches of single images that a replica takes at once; what is beyond waits in the proxy
DRAIN = 10.0  # seconds in which requests are finished when the server stops
ATTEMPTS = 2  # at starting a replica, before it is said that it cannot be


class PainterReplica:
    """One process that draws batches out of the requests that it has; ``draw`` may be called from many at once."""

    def __init__(self, service: Service, teacher: bool) -> None:
        generator = Generator.from_pretrained(service.student, service.device, teacher=teacher)
        self.painter = Painter(generator, service.batch, teacher)
        # In a thread of its own, so that requests are read and answered meanwhile; one, for there is one device.
        thread = ThreadPoolExecutor(1, thread_name_prefix="painter")
        thread.submit(self.painter.draw, [_any_sample(generator, teacher)]).result()  # the first call is a slow one
        self._gathering = Gathering(self._batch, service.batch, thread)

    async def draw(self, order: Order) -> list[Drawn]:
        """The images of an order, in as many batches as it takes; Refused before any is drawn."""
        self.painter.check(order.samples)
        return list(await asyncio.gather(*map(self._gathering.draw, order.samples)))

    def _batch(self, samples: list[Sample]) -> list[Drawn]:
        try:
            return self.painter.draw(samples)
        except Exception as error:
            if ray_errors.device_error(error):
                ray_errors.end_process(error)
            raise


@serve.ingress()
class Student(PainterReplica):
    """A replica that also answers HTTP, so that a request goes from the proxy straight to where it is drawn."""

    def __init__(self, service: Service, teacher: DeploymentHandle | None) -> None:
        super().__init__(service, teacher=False)
        self.service, self.teacher = service, teacher

    def __serve_build_asgi_app__(self) -> Starlette:
        return application.build(self.drawn, self.health)

    async def drawn(self, order: Order) -> list[Drawn]:
        """By the student here, or by the teacher where it is."""
        if order.model == "student":
            return await self.draw(order)
        if self.teacher is None:
            raise Refused("this server has no teacher; it is started with --teacher true.")
        try:
            found: list[Drawn] = await self.teacher.draw.remote(order)
        except BackPressureError:
            raise Outage("too many requests wait for the teacher; try again.") from None
        except Exception as error:
            if not ray_errors.is_ray(error):
                raise
            raise ray_errors.translation(error) from None
        return found

    def health(self) -> dict[str, Any]:
        """That this replica answers, and what a client may ask of it."""
        layout, description = self.painter.generator.layout, self.painter.generator.description
        return {
            "status": "ok",
            "takes": "prompts" if description.text else "labels",
            "classes": layout.classes,
            "start_steps": list(description.start_steps),
            "image_size": layout.image_size,
            "teacher": self.teacher is not None,
            "device": self.service.device,
            "batch": self.service.batch,
        }


def _any_sample(generator: Generator, teacher: bool) -> Sample:
    return Sample("" if generator.description.text else 0, 0, 0, () if teacher else (1,))


def check_free() -> None:
    """Refused where Serve runs on the joined cluster: it has one address, and what it serves is somebody else's."""
    if running():
        raise Refused(
            "Ray Serve runs on this cluster already, and it has one address alone; stop it (`serve shutdown`), or serve"
            " on another cluster."
        )


def start(service: Service) -> None:
    """Serve it on the Ray that is joined, and return when it answers; Unfinished, one sentence, where it does not."""
    logging.getLogger("ray.serve").setLevel(logging.ERROR)  # here, where its news are none; replicas have their files
    quiet = LoggingConfig(enable_access_log=False, log_level="WARNING")
    serve.start(
        proxy_location="HeadOnly", http_options={"host": service.host, "port": service.port}, logging_config=quiet
    )
    try:
        serve.run(_bound(service), name=NAME, route_prefix="/", logging_config=quiet)
    except RuntimeError as error:  # a replica could not start, as often as it was tried
        said = [line for line in str(error).splitlines() if line.strip()]
        raise Unfinished(f"the student could not be started: {said[-1].strip()}") from None


def device() -> str:
    """Of the replicas where nothing is said: a GPU if the joined cluster has one."""
    return "cuda" if ray.cluster_resources().get("GPU", 0) >= 1 else "cpu"


def status() -> str:
    """How the application stands, in Serve's words: RUNNING, DEPLOYING, UNHEALTHY; NOT_STARTED where it is gone."""
    found = serve.status().applications.get(NAME)
    return found.status.value if found else "NOT_STARTED"


def drain() -> None:
    """Finish the requests that there are, ``DRAIN`` seconds at most, and take no more."""
    if ray.is_initialized() and running():
        serve.delete(NAME)


def stop() -> None:
    """``drain``, and end Serve."""
    drain()
    serve.shutdown()


def _bound(service: Service) -> serve.Application:
    """The deployments, with the bounds of their queues."""
    options: dict[str, Any] = {
        "ray_actor_options": {"num_cpus": 1, "num_gpus": int(service.device == "cuda")},
        "max_ongoing_requests": AHEAD * service.batch,
        "max_queued_requests": service.queue,
        "backpressure_config": BackpressureConfig(retry_after_s=application.RETRY),
        "graceful_shutdown_timeout_s": DRAIN,
        "graceful_shutdown_wait_loop_s": 0.1,
        "max_constructor_retry_count": ATTEMPTS,
    }
    deployed: Callable[..., Any] = serve.deployment
    teacher = deployed(PainterReplica, name="teacher", **options).bind(service, True) if service.teacher else None
    student = deployed(Student, name="student", num_replicas=service.replicas, **options)
    return student.bind(service, teacher)


def running() -> bool:
    """Whether Serve runs on the joined cluster."""
    try:
        ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
    except ValueError:
        return False
    return True
