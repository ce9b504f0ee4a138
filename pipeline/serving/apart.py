"""A server in a process of its own on the Ray that is joined: as its users run it, for who measures it."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from multiprocessing import get_context
from multiprocessing.connection import Connection

from pipeline.host import signals
from pipeline.host.errors import Refused, Unfinished
from pipeline.services import cluster
from pipeline.serving.service import DRAIN, Service


@contextmanager
def served(service: Service) -> Iterator[str]:
    """The address of a server on a port of this machine and the Ray that is joined, while the body runs.

    It answers in a process of its own, as jobs/serve.py does, and not in one that logs and measures.
    """
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    cluster_address = cluster.gcs_address()
    process = context.Process(target=_serve, args=(service, cluster_address, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        try:
            said = signals.interruptible(ours.recv)
        except EOFError:
            raise Unfinished("the process of the server has ended before it answered.") from None
        if isinstance(said, Exception):
            raise said
        yield said
    finally:
        ours.close()
        process.join(2 * DRAIN)


def _serve(service: Service, cluster_address: str, end: Connection) -> None:
    """Serve on that cluster until the other end of the pipe is closed; says the address there, or what was raised."""
    from pipeline.serving import deployment, server  # Ray Serve, which not everybody has

    signals.leave_to_parent()
    os.environ["RAY_ADDRESS"] = cluster_address
    try:
        cluster.enter(0)
        deployment.check_free()
        with socket.create_server((service.host, 0)) as place:
            try:
                with server.serving(service, place):
                    end.send(replace(service, port=place.getsockname()[1]).address)
                    with suppress(EOFError):
                        end.recv()
            finally:
                deployment.stop()
    except (Refused, Unfinished) as error:
        end.send(error)
