"""The application of pipeline/serving on a port of loopback, without Ray: a tiny student's painter behind it."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from pipeline import Generator
from pipeline.serving import application
from pipeline.serving.application import Draw
from pipeline.serving.orders import Order
from pipeline.serving.painter import Drawn, Painter, check
from pipeline.serving.server import listening


def drawing(generator: Generator, batch: int) -> Draw:
    """What draws an order of at most ``batch`` images, by the student or by its teacher."""
    painters = {"student": Painter(generator, batch), "teacher": Painter(generator, batch, teacher=True)}

    async def draw(order: Order) -> list[Drawn]:
        check(generator.description, generator.layout, order.samples)
        return await asyncio.to_thread(painters[order.model].draw, order.samples)

    return draw


@contextmanager
def served(draw: Draw, health: Callable[[], dict[str, Any]]) -> Iterator[str]:
    """Its address while the body runs."""
    with socket.create_server(("127.0.0.1", 0)) as place, listening(application.build(draw, health), place):
        yield f"http://127.0.0.1:{place.getsockname()[1]}"
