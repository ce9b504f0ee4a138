"""The application of pipeline/serving on a port of loopback, without Ray: a tiny student's painter behind it."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

from pipeline import Generator
from pipeline.serving import application
from pipeline.serving.application import Draw
from pipeline.serving.orders import Order
from pipeline.serving.painter import Drawn, Painter


def drawing(generator: Generator, batch: int) -> Draw:
    """What draws an order of at most ``batch`` images, by the student or by its teacher."""
    painters = {"student": Painter(generator, batch), "teacher": Painter(generator, batch, teacher=True)}

    async def draw(order: Order) -> list[Drawn]:
        painters[order.model].check(order.samples)
        return await asyncio.to_thread(painters[order.model].draw, order.samples)

    return draw


@contextmanager
def served(draw: Draw, health: Callable[[], dict[str, Any]]) -> Iterator[str]:
    """Its address while the body runs."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(application.build(draw, health), log_level="critical"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        server.should_exit = True
        thread.join()
