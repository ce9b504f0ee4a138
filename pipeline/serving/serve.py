"""The command line of jobs/serve.py: what is served and where, all of it looked at before Ray starts."""

from __future__ import annotations

import argparse
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec

import torch

from pipeline import storage
from pipeline.generator import folder
from pipeline.generator.arguments import Parser, truth
from pipeline.generator.generator import BATCH
from pipeline.host import signals
from pipeline.host.errors import Missing, Outage, Refused
from pipeline.models import checkpoints
from pipeline.services import cluster
from pipeline.services.ray_address import LOCAL, address
from pipeline.serving.desk import Desk
from pipeline.serving.service import Service
from pipeline.text import encoder

LOOK = 5.0  # seconds between two looks at how the application stands
NEEDED = ("fastapi", "starlette", "uvicorn", "watchfiles")  # what ray[serve] adds to Ray


def main(doc: str | None, args: Sequence[str] | None = None) -> None:
    """The body of jobs/serve.py."""
    parser(doc).carry_out(lambda asked: serve(checked(Service(**vars(asked)))), args)


def parser(doc: str | None) -> Parser:
    """What jobs/serve.py takes; the names are those of ``Service``."""
    out, usual = Parser(doc), Service("")
    add = out.add_argument
    add("--student", required=True, metavar="URI", help="folder of a student: a path, hf://, s3://, gs:// or models:/")
    add("--teacher", type=truth, nargs="?", const=True, default=False, metavar="true",
        help="also its teacher, in a replica of its own, for images of the same noise")  # fmt: skip
    add("--device", metavar="cpu|cuda", help="by default a GPU if there is one")
    add("--replicas", type=_within(1, 10_000), default=usual.replicas, metavar="N",
        help=f"of the student, each with a CPU, and a GPU on cuda; by default {usual.replicas}")  # fmt: skip
    add("--batch", type=_within(1, BATCH), default=usual.batch, metavar="N",
        help=f"images that go through the network together, 1 to {BATCH}; by default {usual.batch}")  # fmt: skip
    add("--queue", type=_within(1, 1_000_000), default=usual.queue, metavar="N",
        help=f"images that may wait when another request is taken; by default {usual.queue}")  # fmt: skip
    add("--host", default=usual.host, help=f"address to listen on; by default {usual.host}, this machine alone")
    add("--port", type=_within(1, 65_535), default=usual.port, metavar="N", help=f"by default {usual.port}")
    return out


def _within(low: int, high: int) -> Callable[[str], int]:
    """The type of an argument that is a whole number between two others."""

    def number(text: str) -> int:
        if not text.isdecimal() or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {low:,} to {high:,}")
        return int(text)

    return number


def checked(service: Service) -> Service:
    """The same with a student that every process finds; Refused, Missing or Outage, one sentence, for what cannot be.

    No network is built, and Ray is not started.
    """
    check_packages()
    if service.device not in (None, "cpu", "cuda"):
        raise Refused(f"--device is {service.device}; it must be cpu or cuda.")
    cluster.check_address()
    if service.device == "cuda" and address() == LOCAL and not torch.cuda.is_available():
        raise Refused("--device is cuda, and this machine has no CUDA device; leave it out for the CPU.")
    _listener(service).close()
    uri = service.student
    if uri.startswith("models:/"):
        from pipeline.services import registry

        uri = registry.folder_of(uri)
    uri = storage.resolve(uri)
    description = folder.read(uri)
    if description.text and (shape := checkpoints.caption_shape(description.settings)):
        encoder.check(description.text, shape[1], shape[0])
    if service.teacher:
        checkpoints.check(description.teacher())
    return replace(service, student=uri)


def check_packages() -> None:
    """Missing, one sentence, where Ray has no Serve."""
    if any(find_spec(name) is None for name in NEEDED):
        raise Missing("Ray Serve's packages are not installed; pip install 'distilled-decoding[serve]' adds them.")


def _listener(service: Service) -> socket.socket:
    """A socket that is bound to the service's address; Refused where nothing can listen there."""
    try:
        family, kind, _, _, place = socket.getaddrinfo(service.host, service.port, type=socket.SOCK_STREAM)[0]
    except OSError:
        raise Refused(f"--host is {service.host}, which is no address of a machine; 127.0.0.1 is this one.") from None
    found = socket.socket(family, kind)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # else one that was just closed is taken
    try:
        found.bind(place)
    except OSError as error:
        found.close()
        raise Refused(
            f"nothing can listen on {service.host}:{service.port} ({error.strerror}); give another --port, or --host an"
            " address of this machine."
        ) from None
    return found


def serve(service: Service) -> None:
    """Serve until a signal comes; Unfinished, one sentence, where the cluster or the students fail meanwhile."""
    from pipeline.serving import deployment, server  # Ray Serve, which takes seconds to import

    with _listener(service) as place, cluster.translated():
        cluster.keep_priority()
        cluster.enter(service.replicas + service.teacher)
        service = replace(service, device=service.device or deployment.device())
        deployment.check_free()
        print(f"Starting {_what(service)}.", file=sys.stderr, flush=True)
        try:
            with server.serving(service, place) as (desk, answering):
                print(f"{service.address} serves {service.student}; Ctrl-C stops it.", flush=True)
                _watch(deployment.status, desk, answering)
        finally:
            if address() == LOCAL:
                deployment.drain()  # a local Ray ends with this process, and Serve, were it ended first, not in silence
            else:
                deployment.stop()


def _what(service: Service) -> str:
    replicas = f"{service.replicas} replica{'s' * (service.replicas > 1)} of the student"
    return f"{replicas}{' and its teacher' * service.teacher} on {service.device}"


def _watch(status: Callable[[], str], desk: Desk, answering: threading.Thread) -> None:
    """Tell the desk, and stderr, whenever the replicas stand otherwise than before; Outage once nobody can be answered.

    It never returns.
    """
    while True:
        time.sleep(LOOK)
        if not answering.is_alive():
            raise Outage("the HTTP server has ended, which nobody asked it to; start the job again.")
        found = signals.interruptible(status)
        if found != desk.state:
            print(f"Ray Serve says that the student is {found}.", file=sys.stderr, flush=True)
        if found == "NOT_STARTED":
            raise Outage("the student is no longer served: somebody else has stopped Ray Serve on this cluster.")
        desk.state = found
