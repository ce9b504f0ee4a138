"""Where a recipe runs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from pipeline.configuration import fields
from pipeline.configuration.fields import Range, Weight


@dataclass(frozen=True)
class ClusterSettings:
    """Where the jobs run.

    Attributes:
        gpus: GPUs of one teacher replica, training worker or sampling actor, which uses one at most: 1, a share of one
            where several fit into its memory, or 0 for the CPU.
        cpus: CPU cores of the same.
        device: what torch calls one of those GPUs. "cpu" rehearses a cluster whose GPUs are made up (``ray start
            --num-gpus``): the same replicas on the same nodes, computing on the CPU.
        usd_per_gpu_hour: price that --dry_run multiplies the GPU-hours with.
        heartbeat_minutes: a job of which nothing has finished for so long says what is in work, where and since when.
        stall_minutes: a shard, or a part of an evaluation, that a process is at for longer is taken from it and given
            to another; if it takes that one as long, it has failed. 0 is no limit.
    """

    gpus: Annotated[float, Range(0, 1, "0, 1 or a share of 1: a replica uses one GPU at most")] = 0
    cpus: Annotated[float, Range(math.nextafter(0, 1), 10_000, "above 0, and at most 10,000")] = 1
    device: Literal["cuda", "cpu"] = "cuda"
    usd_per_gpu_hour: Weight | None = None
    heartbeat_minutes: Annotated[float, Range(0.001, 100_000, "from 0.001 to 100,000")] = 10
    stall_minutes: Annotated[float, Range(0, 100_000, "0 or more, and at most 100,000")] = 360

    def __post_init__(self) -> None:
        fields.check(self, "cluster")

    @property
    def runs_on(self) -> str:
        """The torch device type of the models: the CPU without a GPU, else ``device``."""
        return self.device if self.gpus else "cpu"
