"""The ways to draw an image: Alg. 3, Alg. 4, the teacher itself, and the baselines skip-n and onestep*.

A sampler is a frozen value that a recipe lists by class name. All of them turn (seed, sample ids) into
embeddings [B, n, C], the teacher's through ``Teacher.generate`` and the student's through ``Student.jump``,
so the same id asks every sampler for the same class or prompt from the same noise. AR steps are counted from 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline import noise
from pipeline.flow import matching
from pipeline.host.errors import Refused
from pipeline.models.base import Choose, Layout, Student, Teacher, nearest
from pipeline.models.conditions import Condition, Conditioning, Encode, labels_of, of_column
from pipeline.numerics.precision import Precision, autocast, products, tuned_convolutions

CHUNK = 1 << 23  # float64 entries of one block of cumulative sums, 64 MiB


class Inputs(NamedTuple):
    """What a sampler may use: what its samples are drawn for, noise float32 [B, n, C], uniform draws float64 [B, n]."""

    condition: Condition
    noise: Tensor
    uniform: Tensor


@dataclass(frozen=True)
class Models:
    """The networks that samplers draw with, all on ``device``.

    ``student`` and ``frequencies`` may be missing where no sampler needs them. ``frequencies`` holds how
    often the pair set has each code at each position, [classes, n, V], or [1, n, V] where no sampler is given
    the class. Each network works in its own precision, the decoder in that of the network it draws for.
    ``conditioning`` says what a sample is drawn for, by default its class, and ``encode`` makes of it what the networks
    are given, by default the same.
    """

    teacher: Teacher
    student: Student | None
    solver: matching.Solver
    seed: int
    frequencies: Tensor | None = None
    device: torch.device | str = "cpu"
    teacher_precision: Precision = "fp32"
    student_precision: Precision = "fp32"
    conditioning: Conditioning | None = None
    encode: Encode | None = None

    @property
    def layout(self) -> Layout:
        return self.teacher.layout

    def generate(self, choose: Choose, inputs: Inputs, prefix: Tensor | None = None, stop: int | None = None) -> Tensor:
        """``Teacher.generate`` in the teacher's precision, whose weights are cast already where it is fp16 or bf16.

        Refused where fp16 does not hold its numbers.
        """
        with products(self.teacher_precision):
            codes = self.teacher.generate(inputs.condition, choose, prefix, stop)
        self.teacher.check()
        return codes

    def jump(self, x: Tensor, inputs: Inputs, t: int, split: int) -> Tensor:
        """``Student.jump`` in the student's precision: embeddings float32 [B, n, C]; ValueError without a student."""
        if self.student is None:
            raise ValueError("this sampler needs a student, and none was given.")
        with products(self.student_precision), autocast(self.student_precision, self.device):
            return self.student.jump(x, inputs.noise, t, inputs.condition, split)

    def decode(self, embeddings: Tensor, student: bool) -> Tensor:
        """Images float32 [B, 3, H, W] of embeddings [B, n, C] that the student, or the teacher alone, drew."""
        with products(self.student_precision if student else self.teacher_precision), tuned_convolutions():
            return self.teacher.decode(embeddings)

    def column(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """What the samples ``ids`` are drawn for: int64 labels [B], or prompts [B]."""
        return self.conditioning(ids) if self.conditioning else noise.labels(ids, self.layout.classes)

    def inputs(self, ids: Sequence[int] | np.ndarray) -> Inputs:
        """Conditions, noise and uniform draws of the samples ``ids``."""
        layout = self.layout
        condition: Condition = of_column(self.column(ids))
        gaussian = torch.from_numpy(noise.gaussian(self.seed, ids, layout.length, layout.code_dim))
        uniform = torch.from_numpy(noise.uniform(self.seed, ids, layout.length))
        condition = self.encode(condition) if self.encode else condition.to(self.device)
        return Inputs(condition, gaussian.float().to(self.device), uniform.to(self.device))


@dataclass(frozen=True)
class Sampler:
    """One row of the report."""

    type: ClassVar[str] = "baseline"  # as the paper's tables group them: AR, baseline, DD, DD + AR
    student: ClassVar[bool] = False  # draws with the student
    frequencies: ClassVar[bool] = False  # draws from the pair set's token frequencies

    @property
    def name(self) -> str:
        """As the report calls it."""
        raise NotImplementedError

    def steps_label(self, layout: Layout) -> int:
        """#Step of the paper's tables: network evaluations per image, guidance not counted twice."""
        raise NotImplementedError

    def jumps(self, layout: Layout) -> tuple[int, ...]:
        """The AR steps from which the student jumps."""
        return ()

    def check(self, layout: Layout) -> None:
        """Raises ValueError, one sentence, for a sampler that this layout cannot run."""

    def sample(self, models: Models, inputs: Inputs) -> Tensor:
        """Embeddings float32 [B, n, C] on the models' device."""
        raise NotImplementedError

    @torch.no_grad()
    def draw(self, models: Models, ids: Sequence[int] | np.ndarray) -> Tensor:
        """``sample`` for the samples ``ids``."""
        return self.sample(models, models.inputs(ids))


@dataclass(frozen=True)
class FewStep(Sampler):
    """Alg. 3: the student jumps from each of ``steps`` to the end; what is before a step is kept.

    ``split`` leading AR steps take their tokens from the logits head, the others from the embedding head.
    """

    split: int
    steps: tuple[int, ...] = (1,)
    type: ClassVar[str] = "DD"
    student: ClassVar[bool] = True

    @property
    def name(self) -> str:
        later = f" ({', '.join(map(str, self.steps))})" if len(self.steps) > 1 else ""
        return f"DD {len(self.steps)} step{'s' * (len(self.steps) > 1)}{later}"

    def steps_label(self, layout: Layout) -> int:
        return len(self.steps)

    def jumps(self, layout: Layout) -> tuple[int, ...]:
        return self.steps

    def check(self, layout: Layout) -> None:
        """The steps must rise from 1 and end within the layout."""
        rising = list(self.steps) == sorted(set(self.steps))
        if not (self.steps and rising and self.steps[0] == 1 and self.steps[-1] <= layout.steps):
            raise Refused(
                f"sampler FewStep has steps {list(self.steps)}; they must rise, begin with 1 and end by"
                f" {layout.steps}, the last AR step of this teacher."
            )
        _check_split(self, self.split, layout)

    def sample(self, models: Models, inputs: Inputs) -> Tensor:
        x = inputs.noise
        for t in self.steps:
            x = models.jump(x, inputs, t, self.split)
        return x


@dataclass(frozen=True)
class WithTeacher(Sampler):
    """Alg. 4, the paper's pre-trained-n-m with n = ``start`` and m = ``resume``.

    The student jumps from noise; the teacher samples AR steps start .. resume - 1 anew, given the student's
    tokens before ``start`` as codes; the student jumps again from ``resume``. With start = 1 nothing of the
    first jump would be kept and with resume one beyond the last AR step nothing is left for the second, so
    those jumps are skipped and not counted.
    """

    start: int
    resume: int
    split: int
    type: ClassVar[str] = "DD + AR"
    student: ClassVar[bool] = True

    @property
    def name(self) -> str:
        return f"DD pre-trained-{self.start}-{self.resume}"

    def steps_label(self, layout: Layout) -> int:
        return len(self.jumps(layout)) + (self.resume - self.start)

    def jumps(self, layout: Layout) -> tuple[int, ...]:
        return (1,) * (self.start > 1) + (self.resume,) * (self.resume <= layout.steps)

    def check(self, layout: Layout) -> None:
        """start and resume must be rising AR steps of the layout."""
        if not 1 <= self.start < self.resume <= layout.steps + 1:
            raise Refused(
                f"sampler WithTeacher has start {self.start} and resume {self.resume}; they must satisfy 1"
                f" <= start < resume <= {layout.steps + 1} for the {layout.steps} AR steps of this teacher."
            )
        _check_split(self, self.split, layout)

    def sample(self, models: Models, inputs: Inputs) -> Tensor:
        """The first jump, the teacher on codes, the second jump."""
        teacher, layout = models.teacher, models.layout
        x, prefix = inputs.noise, None
        if self.start > 1:
            x = models.jump(x, inputs, 1, self.split)
            prefix = nearest(x[:, : layout.before(self.start)], teacher.codebook)
        codes = models.generate(_ancestral(models, inputs), inputs, prefix, self.resume)
        x = torch.cat([teacher.codebook[codes], inputs.noise[:, codes.shape[1] :]], dim=1)
        if self.resume <= layout.steps:
            x = models.jump(x, inputs, self.resume, self.split)
        return x


@dataclass(frozen=True)
class Autoregressive(Sampler):
    """The teacher as it is sampled without us: every code drawn from p by the inverse CDF of a uniform
    draw.
    """

    type: ClassVar[str] = "AR"

    @property
    def name(self) -> str:
        return "teacher, AR"

    def steps_label(self, layout: Layout) -> int:
        return layout.steps

    def sample(self, models: Models, inputs: Inputs) -> Tensor:
        codes = models.generate(_ancestral(models, inputs), inputs)
        return models.teacher.codebook[codes]


@dataclass(frozen=True)
class FlowMatched(Sampler):
    """The teacher through AR flow matching (Alg. 1): the image that the student of the same noise should
    make.
    """

    type: ClassVar[str] = "AR"

    @property
    def name(self) -> str:
        return "teacher, FM"

    def steps_label(self, layout: Layout) -> int:
        return layout.steps

    def sample(self, models: Models, inputs: Inputs) -> Tensor:
        """Generation in which every token is the code that its noise flows to."""
        codebook, layout = models.teacher.codebook, models.layout
        matcher = matching.Matcher(codebook, models.solver)

        def choose(t: int, log_p: Tensor) -> Tensor:
            return matcher(inputs.noise[:, layout.span(t)], log_p)

        codes = models.generate(choose, inputs)
        matcher.check()
        return codebook[codes]


@dataclass(frozen=True)
class Skip(Sampler):
    """The paper's baseline skip-n: the teacher draws all but its last ``n`` AR steps.

    The paper does not say what stands in the places that are left. Here it is the zero vector of the code
    space: a VAR residual that adds nothing (but the bias of its refining convolution), the centre of
    LlamaGen's unit sphere.
    """

    n: int

    @property
    def name(self) -> str:
        return f"skip-{self.n}"

    def steps_label(self, layout: Layout) -> int:
        return layout.steps - self.n

    def check(self, layout: Layout) -> None:
        if not 1 <= self.n < layout.steps:
            raise Refused(
                f"sampler Skip has n {self.n}; it must be from 1 to {layout.steps - 1}, one less than the AR"
                " steps of this teacher."
            )

    def sample(self, models: Models, inputs: Inputs) -> Tensor:
        stop = models.layout.steps + 1 - self.n
        codes = models.generate(_ancestral(models, inputs), inputs, stop=stop)
        out = torch.zeros_like(inputs.noise)
        out[:, : codes.shape[1]] = models.teacher.codebook[codes]
        return out


@dataclass(frozen=True)
class OneStepStar(Sampler):
    """The paper's baseline onestep*: every position on its own, from the pair set's token frequencies there.

    The best that a one-step sampler of independent tokens can do. ``given_class`` takes the frequencies among
    the pairs of the sample's class, a stronger baseline than the paper's.
    """

    given_class: bool = False
    frequencies: ClassVar[bool] = True

    @property
    def name(self) -> str:
        return "onestep* given the class" if self.given_class else "onestep*"

    def steps_label(self, layout: Layout) -> int:
        return 1

    def check(self, layout: Layout) -> None:
        """There must be classes to be given."""
        if self.given_class and not layout.classes:
            raise Refused(
                "sampler OneStepStar has given_class, and this teacher takes captions; leave given_class out."
            )

    def sample(self, models: Models, inputs: Inputs) -> Tensor:
        """One draw per position; no network is asked."""
        if models.frequencies is None:
            raise ValueError("sampler OneStepStar needs the token frequencies of a pair set, and none were given.")
        counts = models.frequencies if self.given_class else models.frequencies.sum(0, keepdim=True)
        rows = torch.zeros(len(inputs.noise), dtype=torch.long, device=inputs.noise.device)
        if self.given_class:
            rows = labels_of(inputs.condition)
        # As many positions at a time as fit: [B, n, V] whole would be gigabytes.
        at_once = max(1, CHUNK // (len(rows) * counts.shape[2]))
        positions = [
            inverse_cdf(counts[rows, i : i + at_once].log(), inputs.uniform[:, i : i + at_once])
            for i in range(0, models.layout.length, at_once)
        ]
        return models.teacher.codebook[torch.cat(positions, dim=1)]


SAMPLERS: tuple[type[Sampler], ...] = (FewStep, WithTeacher, Autoregressive, FlowMatched, Skip, OneStepStar)


def inverse_cdf(log_p: Tensor, u: Tensor) -> Tensor:
    """The first code whose cumulative probability exceeds u: log_p [..., V], u [...] in (0, 1) -> codes int64
    [...].

    log_p need not be normalised. Sums are float64; a code of probability 0 is never returned, whatever the
    rounding.
    """
    flat, levels = log_p.flatten(0, -2), u.flatten()
    out = torch.empty(len(flat), dtype=torch.long, device=log_p.device)
    rows = max(1, CHUNK // flat.shape[1])
    for i in range(0, len(flat), rows):
        p = flat[i : i + rows].double().softmax(-1)
        cdf = p.cumsum(-1)
        over = (cdf > levels[i : i + rows, None] * cdf[:, -1:]) & (p > 0)
        last = p.shape[1] - 1 - (p > 0).flip(-1).byte().argmax(-1)
        out[i : i + rows] = torch.where(over.any(-1), over.byte().argmax(-1), last)
    return out.view(u.shape)


def _check_split(sampler: Sampler, split: int, layout: Layout) -> None:
    if not 0 <= split <= layout.steps:
        raise Refused(
            f"sampler {type(sampler).__name__} has split {split}; it must be from 0 (embedding head only) to"
            f" {layout.steps} (logits head only) for this teacher."
        )


def _ancestral(models: Models, inputs: Inputs) -> Choose:
    """Plain AR sampling: each position's own uniform draw."""

    def choose(t: int, log_p: Tensor) -> Tensor:
        return inverse_cdf(log_p, inputs.uniform[:, models.layout.span(t)])

    return choose
