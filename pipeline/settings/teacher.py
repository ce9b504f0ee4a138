"""The teacher of a recipe: which network, which weights, which p."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Any

from pipeline.configuration import fields
from pipeline.configuration.addresses import Address
from pipeline.configuration.fields import Name, Positive, Range, SizeOrOff, Switch, Weight
from pipeline.numerics.precision import Precision


@dataclass(frozen=True)
class Filter:
    """How a teacher turns logits into p: guidance, temperature, top-k, top-p. p after the filter is what FM preserves.

    Attributes:
        guidance: classifier-free guidance. VAR: (1 + w) cond - w uncond with w = guidance * s / (S - 1) on scale s, 0
            is off. LlamaGen: uncond + guidance * (cond - uncond), 1 is off.
        temperature: logits are divided by it.
        top_k: keep the k largest logits (ties with the k-th stay); 0 is off.
        top_p: keep the nucleus of this probability by the family's own rule; 1 is off.
    """

    guidance: Weight = 2.0
    temperature: Positive = 1.0
    top_k: SizeOrOff = 0
    top_p: Annotated[float, Range(math.nextafter(0, 1), 1, "above 0 and at most 1, which keeps every code")] = 1.0

    def __post_init__(self) -> None:
        fields.check(self, "teacher.filter")


@dataclass(frozen=True)
class TeacherSettings:
    """The teacher: which network, which weights, which p.

    Attributes:
        family: dotted path of the package with Config, Tokenizer, Teacher and Student.
        config: fields of the family's Config, the shape of the nets.
        tokenizer: URI of the tokenizer's weights (a path, s3://, gs://, hf:// or package://, the installed assets).
        checkpoint: URI of the transformer's weights.
        filter: guidance, temperature, top-k and top-p.
        precision: of the transformer: fp32, tf32 (float32 with TF32 products, on GPUs), fp16 (float16 in its blocks,
            float32 around them; numbers beyond 65,504 end the job) or bf16 (throughout). Guidance, filter and flow
            matching are always in full float32. Part of a pair set's fingerprint.
        compile: torch.compile the transformer's blocks. Changes float rounding only.
        graphs: record what a GPU does in every AR step as a CUDA graph and replay it, in generations from the first
            step on whose batch size comes twice in a row. auto does so where the models run on GPUs. Changes nothing
            but speed; the graphs take memory.
        unpickle: read .pt and .pth files (students' too) that hold more than tensors and plain values. Reading them
            runs code that they bring along: only for files that you trust.
    """

    family: Name = "pipeline.models.var"
    config: dict[str, Any] = field(default_factory=dict)
    tokenizer: Annotated[str, Address(empty=True)] = ""
    checkpoint: Annotated[str, Address(empty=True)] = ""
    filter: Filter = field(default_factory=Filter)
    precision: Precision = "fp32"
    compile: bool = False
    graphs: Switch = False
    unpickle: bool = False

    def __post_init__(self) -> None:
        fields.check(self, "teacher")
        fields.require(
            all(part.isidentifier() for part in self.family.split(".")),
            f"teacher.family is {self.family!r}; it must be the dotted path of a package, e.g. pipeline.models.var.",
        )
