"""The routes: GET / is a page, GET /health says how it stands, POST /images draws. What draws is handed in.

A client gets images or {"error": one sentence}: 400 for what is no JSON, 408, 413 and 415 for a body that is too slow,
too large or of another kind, 422 for what cannot be drawn, 503 with Retry-After where too many wait, 500 for a fault of
ours, which is in the log and not in the answer.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import logging
import re
import time
from collections.abc import Awaitable, Callable
from importlib import resources
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from pipeline.host.errors import Refused, Unfinished
from pipeline.serving import orders, replies
from pipeline.serving.orders import Malformed, Order
from pipeline.serving.painter import Drawn

BODY_SECONDS = 10.0  # that a body may take to come
RETRY = 1  # seconds until a client that found the queue full may try again

Draw = Callable[[Order], Awaitable[list[Drawn]]]
"""The images of an order; Refused for what cannot be drawn, Unfinished where it cannot be drawn now."""

log = logging.getLogger("ray.serve")  # the one that Serve writes into a replica's file


def build(draw: Draw, health: Callable[[], dict[str, Any]]) -> Starlette:
    """The application; ``health`` is what /health answers, which the page is made of, too."""
    html = resources.files("pipeline.serving").joinpath("page.html").read_text()
    headers = {
        "Content-Security-Policy": policy(html),
        "X-Content-Type-Options": "nosniff",
        "Cache-Control": "no-cache",
    }

    async def page(request: Request) -> Response:
        return HTMLResponse(html, headers=headers)

    async def healthy(request: Request) -> Response:
        return JSONResponse(health())

    async def images(request: Request) -> Response:
        return await _images(request, draw)

    routes = [Route("/", page), Route("/health", healthy), Route("/images", images, methods=["POST"])]
    return Starlette(routes=routes, exception_handlers={HTTPException: _refusal})


def policy(html: str) -> str:
    """A Content-Security-Policy that lets the page run its own script and style, ask this server, and nothing else."""
    hashes = {}
    for tag in ("script", "style"):
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.S)
        hashes[tag] = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
    return (
        f"default-src 'none'; script-src 'sha256-{hashes['script']}'; style-src 'sha256-{hashes['style']}'; img-src"
        " data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


async def _images(request: Request, draw: Draw) -> Response:
    """The answer to POST /images."""
    begin = time.perf_counter()
    preferred = replies.form(request.headers.get("accept", ""))
    try:
        order = orders.parse(await _body(request))
        wanted = order.form or preferred
        if wanted is None:
            return _error(406, "Accept takes neither image/png nor application/json, which are what there is.")
        drawn = await draw(order)
        took = 1000 * (time.perf_counter() - begin)
        timing = {"Server-Timing": f"draw;dur={max(one.milliseconds for one in drawn):.2f}, total;dur={took:.2f}"}
        # In threads: others are answered while large images become PNGs.
        if wanted == "json":
            return JSONResponse(await asyncio.to_thread(replies.listed, order, drawn, took), headers=timing)
        return Response(await asyncio.to_thread(replies.picture, order, drawn), media_type="image/png", headers=timing)
    except Refused as error:
        return _error(400 if isinstance(error, Malformed) else 422, str(error))
    except Unfinished as error:
        return _error(503, str(error), {"Retry-After": str(RETRY)})
    except (HTTPException, ClientDisconnect):
        raise
    except Exception:
        log.exception("A request could not be answered.")
        return _error(500, "the server could not draw this; its log says why.")


async def _body(request: Request) -> bytes:
    """The request's body, of a bounded length that comes in a bounded time."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        # Of other kinds a page of any site may send some to this machine without being asked.
        raise HTTPException(415, "the Content-Type must be application/json.")
    out = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                out += chunk
                if len(out) > orders.BODY:
                    raise HTTPException(413, f"the body is larger than {orders.BODY:,} bytes.")
    except TimeoutError:
        raise HTTPException(408, f"the body did not come within {BODY_SECONDS:g} seconds.") from None
    return bytes(out)


async def _refusal(request: Request, error: Exception) -> Response:
    """What Starlette refuses, and ``_body``: a route that is not there, another method, a body."""
    assert isinstance(error, HTTPException)
    said = {404: f"there is no {request.url.path[:80]}; there are /, /health and /images.",
            405: f"{request.url.path} does not take {request.method}."}  # fmt: skip
    return _error(error.status_code, said.get(error.status_code, error.detail), dict(error.headers or {}))


def _error(status: int, sentence: str, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse({"error": sentence}, status, headers)
