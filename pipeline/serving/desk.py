"""Where orders are taken: checked, gathered into batches, and given to the replicas of student and teacher."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.generator.folder import Description
from pipeline.host.errors import Refused
from pipeline.models.base import Layout
from pipeline.serving import painter
from pipeline.serving.gathering import Gathering
from pipeline.serving.orders import Model, Order, Sample
from pipeline.serving.painter import Drawn
from pipeline.serving.service import Service

Work = Callable[[list[Sample]], Awaitable[Sequence[Drawn]]]
"""The images of a batch, by whichever replica is free."""


@dataclass(frozen=True)
class About:
    """What is served: what its folder says, and the layout of its tokens."""

    description: Description
    layout: Layout


class Desk:
    """Takes orders for those whose ``work`` is given, "student" and perhaps "teacher"; for one event loop.

    Attributes:
        state: how the replicas stand, in Ray Serve's words; RUNNING is well.
    """

    def __init__(self, service: Service, about: About, work: Mapping[Model, Work]) -> None:
        self.service, self.about, self.state = service, about, "RUNNING"
        replicas: dict[Model, int] = {"student": service.replicas, "teacher": 1}
        halved = service.device == "cpu"  # where time grows with a batch; a GPU takes hardly less for half of one
        self._gatherings = {
            model: Gathering(draw, service.batch, replicas[model], service.queue, halved)
            for model, draw in work.items()
        }

    async def draw(self, order: Order) -> list[Drawn]:
        """The images of an order; Refused before any is drawn for what there is not, Outage where too many wait."""
        if order.model not in self._gatherings:
            raise Refused("this server has no teacher; it is started with --teacher true.")
        painter.check(self.about.description, self.about.layout, order.samples)
        return await self._gatherings[order.model].draw(order.samples)

    def health(self) -> dict[str, Any]:
        """How it stands, and what a client may ask of it."""
        layout, description = self.about.layout, self.about.description
        return {
            "status": "ok" if self.state == "RUNNING" else self.state.lower(),
            "takes": "prompts" if description.text else "labels",
            "classes": layout.classes,
            "start_steps": list(description.start_steps),
            "image_size": layout.image_size,
            "teacher": "teacher" in self._gatherings,
            "device": self.service.device,
            "batch": self.service.batch,
        }
