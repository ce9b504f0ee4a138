"""What a server does under load: asked at random moments, or by clients that each wait for their answer.

In an ``open_loop`` arrivals are a Poisson process, and a request's time counts from its arrival and not from when the
client got round to sending it: a server that falls behind is not asked less because of it. In a ``closed_loop`` it is
asked as much as it answers. The client runs in this process.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from dataclasses import dataclass, replace

import aiohttp
import numpy as np

from pipeline.serving.orders import Sample


@dataclass(frozen=True)
class Answers:
    """What came of the requests of one image each.

    Attributes:
        seconds: float64 [requests], from arrival to the last byte; infinite for those without an image.
        span: seconds from the first arrival to the last answer.
        refused: requests that were answered 503.
        failed: other requests without an image.
    """

    seconds: np.ndarray
    span: float
    refused: int
    failed: int

    def quantile(self, share: float) -> float:
        """Seconds within which this share of the requests had their image; infinite where fewer had one."""
        return float(np.quantile(self.seconds, share, method="higher"))

    @property
    def rate(self) -> float:
        """Images a second."""
        return float(np.isfinite(self.seconds).sum() / self.span)

    def over(self, seconds: float) -> Answers:
        """The same with ``seconds`` as the unit of time."""
        return replace(self, seconds=self.seconds / seconds, span=self.span / seconds)


def arrivals(rate: float, seconds: float, seed: int) -> np.ndarray:
    """Moments of a Poisson process of ``rate`` a second, float64 [N], within ``seconds``."""
    gaps = np.random.default_rng(seed).exponential(1 / rate, int(2 * rate * seconds) + 100)
    moments = np.cumsum(gaps)
    return moments[moments < seconds]


def closed_loop(address: str, samples: list[Sample], clients: int, seconds: float) -> Answers:
    """Let so many clients ask the server at ``address`` for one image after the other, for the samples in turn."""
    return asyncio.run(_busy(address, samples, clients, seconds))


def open_loop(address: str, samples: list[Sample], moments: np.ndarray) -> Answers:
    """Ask the server at ``address`` for an image at each of the moments, for the samples in turn."""
    return asyncio.run(_all(address, samples, moments))


async def _busy(address: str, samples: list[Sample], clients: int, seconds: float) -> Answers:
    upcoming, begin = itertools.cycle(samples), time.perf_counter()
    found: list[tuple[int, float]] = []

    async def ask_on(session: aiohttp.ClientSession) -> None:
        while (now := time.perf_counter()) < begin + seconds:
            found.append(await _one(session, next(upcoming), now))

    async with _session(address) as session:
        await asyncio.gather(*(ask_on(session) for _ in range(clients)))
    return _answers(found, time.perf_counter() - begin)


async def _all(address: str, samples: list[Sample], moments: np.ndarray) -> Answers:
    async with _session(address) as session:
        begin = time.perf_counter()
        calls = []
        for moment, sample in zip(moments, itertools.cycle(samples), strict=False):
            await asyncio.sleep(begin + moment - time.perf_counter())
            calls.append(asyncio.create_task(_one(session, sample, begin + moment)))
        found = await asyncio.gather(*calls)
    return _answers(found, time.perf_counter() - begin)


def _session(address: str) -> aiohttp.ClientSession:
    """Of as many connections as there are requests at once."""
    return aiohttp.ClientSession(address, connector=aiohttp.TCPConnector(limit=0))


def _answers(found: list[tuple[int, float]], span: float) -> Answers:
    """Of the requests' (status, seconds)."""
    status = [code for code, _ in found]
    seconds = np.array([took if code == 200 else np.inf for code, took in found])
    return Answers(seconds, span, status.count(503), sum(code not in (200, 503) for code in status))


async def _one(session: aiohttp.ClientSession, sample: Sample, arrival: float) -> tuple[int, float]:
    """(status, seconds since its arrival) of one request; status 0 where the connection broke."""
    name = "prompts" if isinstance(sample.wanted, str) else "labels"
    wanted = {name: [sample.wanted], "seeds": [sample.seed], "ids": [sample.id], "steps": list(sample.steps)}
    try:
        async with session.post("/images", json=wanted, headers={"Accept": "image/png"}) as answer:
            await answer.read()
            return answer.status, time.perf_counter() - arrival
    except aiohttp.ClientError:
        return 0, time.perf_counter() - arrival
