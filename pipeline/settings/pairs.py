"""The pair set of a recipe."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pipeline.configuration import fields
from pipeline.configuration.fields import Actors, Count, Range, Seed, Size, Uri
from pipeline.flow.matching import Solver
from pipeline.noise import Dtype

SHARDS = 10_000_000  # of a pair set; the driver lists them


@dataclass(frozen=True)
class PairSettings:
    """Noise-token pairs (Alg. 1).

    Attributes:
        uri: folder of the pair set; default <run>/pairs.
        count: rows in all. Outside the fingerprint: raise it to grow a set.
        seed: with the sample id, determines noise and label.
        shard_rows: rows of one Parquet shard, the unit of work, of commit and of resume.
        noise: stored in the shards, or derived again from (seed, sample id) by the reader.
        dtype: what the noise is rounded to before the teacher sees it, and stored as: float16, or float32, twice as
            large. The noise of an evaluation is always rounded to float16, so that all students are scored on the same.
        solver: how the flow-matching ODE is solved.
        batch: samples that a teacher replica generates at once; or auto, as many as the memory of its own GPU holds by
            what --dry_run says, 256 at most, and 64 on a CPU. Does not change results beyond float rounding.
        actors: teacher replicas: so many, and the cluster scales to it; or auto, as many as there are places for, and
            more as the cluster grows.
        patience_hours: how long finished shards wait for a storage that does not answer, and the replicas with them.
        verify: check the finished set instead of generating: every shard, and some rows again through the teacher.
    """

    uri: Uri | None = None
    count: Count = 20_000
    seed: Seed = 1
    shard_rows: Size = 1_000
    noise: Literal["stored", "derived"] = "stored"
    dtype: Dtype = "float16"
    solver: Solver = field(default_factory=Solver)
    batch: Size | Literal["auto"] = 250
    actors: Actors = 2
    patience_hours: Annotated[float, Range(0, 10_000, "0 or more, and at most 10,000")] = 24
    verify: bool = False

    def __post_init__(self) -> None:
        fields.check(self, "pairs")
        fields.require(
            self.count <= SHARDS * self.shard_rows,
            f"pairs.count {self.count} in shards of pairs.shard_rows {self.shard_rows} rows makes more than {SHARDS:,}"
            " files; make the shards larger.",
        )

    @property
    def replicas(self) -> int:
        """``actors`` where they are a number, as in a recipe that is ``counted``."""
        assert self.actors != "auto", "it was to be counted"
        return self.actors
