"""What determines the rows of a pair set: the teacher, its tokens, the noise, the solver, how shards are cut, prompts.

``PairFacts`` says it in the form of the set's JSON files, whose fingerprint is the set's, and everything that follows
from it alone: a sample's noise and class, and the ids, the size and the name of every shard. n is the tokens of an
image, C the dimension of a code.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np

from pipeline import noise
from pipeline.host.errors import Refused
from pipeline.models import checkpoints
from pipeline.models.base import Layout
from pipeline.models.conditions import Conditioning
from pipeline.noise import Dtype
from pipeline.recipe import Recipe, fingerprint
from pipeline.text import encoder
from pipeline.text.prompts import PromptList

FORMAT = 1
PROMPT_BYTES = 128  # of a prompt, about: those of LAION-COCO have 60
SHARD = re.compile(r"shard-(\d{5,})(?:-(\d+))?\.parquet")


@dataclass(frozen=True)
class PairFacts:
    """Everything that the rows and their storage depend on.

    Left out is where the set lies, how many rows it has, and what may change float rounding but not the distribution
    (batch, actors, cores, device).

    Attributes:
        format: version of this list.
        teacher: its family, config, filter and precision, and the SHA-256 of ``tokenizer`` and ``checkpoint``, as JSON
            values.
        layout: its tokens.
        seed: with the sample id, determines noise and label.
        solver: name and settings, as JSON values.
        noise_is_stored: in the shards, or derived again by the reader.
        shard_rows: rows of every shard but the last.
        dtype: what the noise is rounded to.
        captions: ``PromptList.facts`` of the prompts; None for a teacher that takes classes.
        encoder: ``encoder.check`` of what turns them into features; None for one that takes no features.
    """

    format: int
    teacher: dict[str, Any]
    layout: Layout
    seed: int
    solver: dict[str, Any]
    noise_is_stored: bool
    shard_rows: int
    dtype: Dtype
    captions: dict[str, Any] | None = None
    encoder: dict[str, Any] | None = None

    @classmethod
    def of(
        cls, recipe: Recipe, checksums: dict[str, str] | None = None, captions: dict[str, Any] | None = None
    ) -> PairFacts:
        """The facts of the recipe's pair set.

        ``checksums`` are ``checkpoints.checksums``, ``captions`` ``PromptList.facts``, where the caller has them; with
        empty ``checksums`` no file is read, and the facts serve for the shapes of shards alone.
        Raises ValueError or FileNotFoundError for a teacher that is not there, and for one whose pairs cannot be stored
        or drawn.
        """
        config, settings = checkpoints.config(recipe.teacher), recipe.pairs
        sums = checkpoints.checksums(recipe.teacher) if checksums is None else checksums
        layout: Layout = config.layout
        if layout.vocabulary > 2**16:
            raise Refused(
                f"the teacher has {layout.vocabulary} codes; a pair set stores tokens as uint16, up to 65536."
            )
        filters, precision = asdict(recipe.teacher.filter), recipe.teacher.precision
        teacher = {"family": recipe.teacher.family, "filter": filters, "precision": precision}
        return cls(
            format=FORMAT,
            teacher=_plain(teacher | {"config": asdict(config)} | sums),
            layout=layout,
            seed=settings.seed,
            solver=_plain(asdict(settings.solver)),
            noise_is_stored=settings.noise == "stored",
            shard_rows=settings.shard_rows,
            dtype=settings.dtype,
            **_of_text(recipe, captions, hashed=checksums != {}),
        )

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> PairFacts:
        """The inverse of ``json``, from one of a set's files."""
        layout = content["layout"]
        return cls(
            format=content["format"],
            teacher=content["teacher"],
            layout=Layout(**{**layout, "groups": tuple(layout["groups"])}),
            seed=content["seed"],
            solver=content["solver"],
            noise_is_stored=content["noise"] == "stored",
            shard_rows=content["shard_rows"],
            dtype=content.get("dtype", "float16"),
            captions=content.get("captions"),
            encoder=content.get("encoder"),
        )

    def json(self) -> dict[str, Any]:
        """As the set's files have it, in the order of their keys."""
        content = {
            "format": self.format,
            "teacher": self.teacher,
            "layout": _plain(asdict(self.layout)),
            "seed": self.seed,
            "solver": self.solver,
            "noise": "stored" if self.noise_is_stored else "derived",
            "shard_rows": self.shard_rows,
        }
        # What is as it always was is not named: the sets from before there was a choice stay valid.
        if self.dtype != "float16":
            content["dtype"] = self.dtype
        if self.captions:
            content |= {"captions": self.captions, "encoder": self.encoder}
        return content

    @property
    def fingerprint(self) -> str:
        """Equal for sets with equal rows in equal shards."""
        return fingerprint(self.json())

    @property
    def checksums(self) -> dict[str, str]:
        """SHA-256 of the teacher's two files, as ``checkpoints.checksums`` gives them."""
        return {name: self.teacher[name] for name in ("tokenizer", "checkpoint")}

    # ---- rows

    @property
    def length(self) -> int:
        """n."""
        return self.layout.length

    @property
    def dim(self) -> int:
        """C."""
        return self.layout.code_dim

    @property
    def codes(self) -> int:
        """Codes of the vocabulary."""
        return self.layout.vocabulary

    @property
    def row_bytes(self) -> int:
        """Bytes of a row in memory, and at most about as many on disk."""
        size = np.dtype(self.dtype).itemsize
        condition = PROMPT_BYTES if self.captions else 4
        return 8 + condition + 2 * self.length + (size * self.length * self.dim if self.noise_is_stored else 0)

    def noise(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """The noise of samples as their teacher sees it: [len(ids), n, C] of ``dtype``."""
        return noise.gaussian(self.seed, ids, self.length, self.dim, self.dtype)

    def noise_digest(self) -> str:
        """Tells whether another machine makes the same noise."""
        return noise.digest(self.seed, self.length, self.dim, self.dtype)

    def labels(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """The classes of samples, int64 [len(ids)], where the teacher takes classes."""
        return noise.labels(ids, self.layout.classes)

    # ---- shards: a number, the ids of its rows, a name

    def shard_of(self, sample: int) -> int:
        """The number of the shard that holds a sample."""
        return sample // self.shard_rows

    def rows_of(self, number: int, count: int) -> int:
        """Rows of a shard in a set of ``count`` rows: fewer than ``shard_rows`` in the last, 0 beyond it."""
        return max(0, min(self.shard_rows, count - number * self.shard_rows))

    def ids(self, number: int, rows: int) -> np.ndarray:
        """The sample ids of the first ``rows`` rows of a shard, int64 [rows]."""
        return number * self.shard_rows + np.arange(rows)

    def ids_of(self, name: str) -> np.ndarray:
        """The sample ids of a shard's rows, int64 [rows], by its name."""
        return self.ids(*self.number_and_rows(name))

    def shard_name(self, number: int, rows: int) -> str:
        """A shard with fewer than ``shard_rows`` rows (the last of a count) says how many it has."""
        return f"shard-{number:05d}.parquet" if rows == self.shard_rows else f"shard-{number:05d}-{rows}.parquet"

    def number_and_rows(self, name: str) -> tuple[int, int]:
        """The inverse of ``shard_name``."""
        match = SHARD.fullmatch(name)
        assert match, name
        return int(match[1]), int(match[2] or self.shard_rows)


def conditioning(recipe: Recipe) -> Conditioning:
    """What the pairs of a recipe are drawn for, by sample id; raises what ``PromptList.open`` does."""
    if recipe.captions.uri:
        return PromptList.open(recipe.captions.uri, recipe.captions.column)
    return partial(noise.labels, classes=checkpoints.config(recipe.teacher).layout.classes)


def _of_text(recipe: Recipe, captions: dict[str, Any] | None, hashed: bool) -> dict[str, Any]:
    """The facts of prompts and encoder; {} for classes. Refused where teacher, captions and encoder do not belong.

    Without ``hashed``, what it takes to read gigabytes for is left out.
    """
    caption = checkpoints.caption_shape(recipe.teacher)
    if caption is None:
        for name, value in (("captions.uri", recipe.captions.uri), ("text.encoder", recipe.text.encoder)):
            if value:
                raise Refused(
                    f"{name} is {value}, and the teacher takes classes (its config has no caption_dim); leave it out,"
                    " or give a text-to-image teacher."
                )
        return {}
    if not recipe.captions.uri:
        raise Refused(
            "the teacher takes captions and captions.uri is not set; give a Parquet file, a folder of them or a text"
            " file of prompts."
        )
    length, width = caption
    if not hashed:
        return {"captions": {"rows": 0, "column": recipe.captions.column}, "encoder": None}
    captions = captions or PromptList.open(recipe.captions.uri, recipe.captions.column).facts()
    return {"captions": captions, "encoder": encoder.check(recipe.text, width, length) if width else None}


def _plain(content: dict[str, Any]) -> dict[str, Any]:
    """The values as they are when read back from JSON: tuples become lists."""
    return json.loads(json.dumps(content))
