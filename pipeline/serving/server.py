"""The application on an address, in a thread of this process, and the replicas behind it."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from starlette.applications import Starlette

from pipeline.host import collector, signals
from pipeline.host.errors import Outage
from pipeline.serving import application
from pipeline.serving.desk import Desk
from pipeline.serving.service import DRAIN, Service


@contextmanager
def serving(service: Service, place: socket.socket) -> Iterator[tuple[Desk, threading.Thread]]:
    """A student served at a bound socket, on the Ray that is joined, while the body runs; with the thread that answers.

    Raises Unfinished, one sentence, where no replica can be started. It does not end Ray Serve.
    """
    from pipeline.serving import deployment  # Ray Serve, which takes seconds to import

    desk = Desk(service, *signals.interruptible(lambda: deployment.start(service)))
    collector.settle()
    with listening(application.build(desk.draw, desk.health), place) as thread:
        yield desk, thread


@contextmanager
def listening(routes: Starlette, place: socket.socket) -> Iterator[threading.Thread]:
    """A thread that answers at a bound socket while the body runs; what is under way then is finished, in ``DRAIN``."""
    config = uvicorn.Config(
        routes, log_level="critical", access_log=False, lifespan="off", timeout_graceful_shutdown=DRAIN
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [place]}, daemon=True)
    thread.start()
    while not server.started:
        if not thread.is_alive():
            raise Outage("the HTTP server could not be started.")
        time.sleep(0.01)
    try:
        yield thread
    finally:
        server.should_exit = True
        thread.join(DRAIN + 1)
