"""What a family of models must provide: ``Layout``, ``Tokenizer``, ``Teacher``, ``Student``.

``TrainableTokenizer`` is for families whose networks are to be trained from nothing, as those of the digits are.

Nothing here knows VAR from LlamaGen. AR steps are counted from 1, as in the paper; step t covers the tokens of
``Layout.span(t)``. B is the batch, n the tokens of an image, V the vocabulary, C the dimension of a code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from pipeline.host.errors import Refused
from pipeline.models.conditions import Condition, tensors_of
from pipeline.models.float16 import Float16
from pipeline.models.graphs import Graphs, Recording, Replays
from pipeline.numerics.precision import full_precision
from pipeline.settings.teacher import Filter

Choose = Callable[[int, Tensor], Tensor]
"""(AR step from 1, log-probabilities [B, g, V] float32 with -inf where p is 0) -> codes [B, g] int64."""


@dataclass(frozen=True)
class Layout:
    """The shape of one image as a sequence of tokens.

    ``groups[i]`` is the number of tokens that AR step i + 1 draws at once: (1, 4, 9, ..., 256) for VAR, (1,) * 256 for
    LlamaGen.
    """

    groups: tuple[int, ...]
    vocabulary: int
    code_dim: int
    classes: int
    image_size: int

    @property
    def length(self) -> int:
        """Tokens of one image, n."""
        return sum(self.groups)

    @property
    def steps(self) -> int:
        """AR steps of one image."""
        return len(self.groups)

    def before(self, t: int) -> int:
        """Tokens drawn before AR step t; t = steps + 1 gives all of them."""
        if not 1 <= t <= self.steps + 1:
            raise ValueError(f"AR step {t} is outside this layout: steps run from 1 to {self.steps}.")
        return sum(self.groups[: t - 1])

    def span(self, t: int) -> slice:
        """The tokens of AR step t, 1 <= t <= steps."""
        return slice(self.before(t), self.before(t + 1))

    def step_of(self, tokens: int) -> int:
        """The AR step that comes after the first ``tokens`` tokens; the inverse of ``before``."""
        for t in range(1, self.steps + 2):
            if self.before(t) == tokens:
                return t
        raise ValueError(f"a prefix of {tokens} tokens ends inside an AR step; the steps hold {self.groups} tokens.")


class Tokenizer(nn.Module):
    """Images [B, 3, H, W] float32 in [-1, 1] to codes and back; the state_dict has the official file's names."""

    layout: Layout

    @property
    def codebook(self) -> Tensor:
        """[V, C] float32: the space in which flow matching runs and the student's tokens live."""
        raise NotImplementedError

    def encode(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> codes [B, n] int64."""
        raise NotImplementedError

    def decode(self, embeddings: Tensor) -> Tensor:
        """Embeddings [B, n, C], codes or any continuous values -> images [B, 3, H, W]; differentiable.

        About in [-1, 1] and not clamped, or a training loss would not see what lies beyond.
        """
        raise NotImplementedError


class TrainableTokenizer(Tokenizer):
    """A tokenizer that ``digits.pretrain`` can also make from nothing; the three jobs do without.

    Its codes lie in an ``nn.Embedding`` named ``quantize.embedding``.
    """

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Training: images [B, 3, H, W] -> reconstruction (not clamped), codes [B, n], scalar quantization loss.

        Gradients cross the quantizer straight through.
        """
        raise NotImplementedError

    def searched(self, images: Tensor) -> Tensor:
        """All vectors for which ``encode`` looks up the nearest code, [b, C]."""
        raise NotImplementedError

    def corrupted(self, images: Tensor, rate: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """For training a teacher that mends its errors: codes some of which are wrong, and the right next codes.

        Both [B, n] int64. Only for tokens that code what the ones before them left; Refused elsewhere.
        """
        raise Refused(
            f"tokens of {type(self).__module__} do not mend one another, so no teacher can learn it; leave the plan's"
            " self_correction at 0."
        )


class Teacher(nn.Module):
    """A pre-trained AR model with its tokenizer and its sampling filter.

    ``network`` is the transformer, with the official state_dict names and its repeated blocks as ``layers``;
    ``tokenizer`` has its own file. A network that can compute in float16 has a method ``to_float16`` and a ``float16``.
    ``caption`` are the positions and the width of the longest captions that it takes, None for one that takes classes.
    With ``graphs``, AR steps are recorded and replayed, on a GPU; with ``decodes``, decoding is.
    """

    layout: Layout
    filter: Filter
    tokenizer: Tokenizer
    network: nn.Module
    caption: tuple[int, int] | None = None
    graphs: Graphs | None = None
    decodes: Replays | None = None

    @property
    def codebook(self) -> Tensor:
        return self.tokenizer.codebook

    def forward(self, condition: Condition, codes: Tensor) -> Tensor:
        """Teacher-forced logits [B, n, V], without guidance or filter: codes [B, n] -> p(code i | codes before i)."""
        raise NotImplementedError

    def generate(
        self, condition: Condition, choose: Choose, prefix: Tensor | None = None, stop: int | None = None
    ) -> Tensor:
        """Draw AR steps one after the other with cached keys and values, guidance and filter.

        ``choose`` turns the filtered log-probabilities of one step into codes. ``prefix`` [B, m] holds the codes of the
        leading whole steps, which are kept. Generation ends before AR step ``stop`` (default: after the last).
        Returns codes [B, before(stop)] int64, the prefix included. Raises ValueError for a prefix that ends inside a
        step and for a stop that is not after the prefix.
        """
        raise NotImplementedError

    def check(self) -> None:
        """Refused if numbers left float16's range in a generation since the last check; waits for the device."""
        for part in self.modules():
            if isinstance(part, Float16):
                part.check()

    def recording(self, batch: int, memory: Callable[[], Any], conditions: int = 1) -> Recording | None:
        """The graphs for a generation from AR step 1 on, if there are any; ``memory`` makes the family's part.

        ``conditions`` are the positions of a condition, where they shape the first step.
        """
        device = self.codebook.device
        if self.graphs is None or device.type != self.graphs.on:
            return None
        shapes = [(batch, group, self.layout.vocabulary) for group in self.layout.groups]
        kind = (batch, conditions, self.filter)
        return self.graphs.find(kind, lambda capture: Recording(capture, memory(), shapes, device))

    def decode(self, embeddings: Tensor) -> Tensor:
        """Embeddings [B, n, C] -> images [B, 3, H, W] in [-1, 1]."""
        return self.decodes(None, self._decoded, embeddings) if self.decodes else self._decoded(embeddings)

    def _decoded(self, embeddings: Tensor) -> Tensor:
        return self.tokenizer.decode(embeddings).clamp(-1, 1)

    def span(self, prefix: Tensor | None, stop: int | None) -> tuple[int, int]:
        """(first AR step to draw, first AR step not to draw) of a ``generate`` call, checked."""
        first = 1 if prefix is None else self.layout.step_of(prefix.shape[1])
        end = self.layout.steps + 1 if stop is None else stop
        if not first <= end <= self.layout.steps + 1:
            raise ValueError(
                f"generate was asked to stop before AR step {end}, but the prefix holds those before {first}"
                f" and the layout has {self.layout.steps} steps."
            )
        return first, end


class Prediction(NamedTuple):
    """What a student says of every position: logits [B, n, V] and embeddings [B, n, C]."""

    logits: Tensor
    embeddings: Tensor


class Student(nn.Module):
    """A few-step generator: from X_t (true tokens before AR step t, noise from there on) to the whole sequence.

    ``codebook`` [V, C] comes from the tokenizer and is not part of the state_dict; ``layers`` are the transformer's
    repeated blocks. ``released`` are the places in a file of the authors' at which their own scripts look for the
    weights; () where they released no student. ``settings`` are those of ``TrainSettings.student_options`` that the
    constructor, after config and codebook, and ``from_teacher`` take by name; a recipe that sets another one is refused
    in the words of ``no_choice``. With ``jumps``, jumps are recorded and replayed, on a GPU: then weights must stay
    where they are.
    """

    layout: Layout
    codebook: Tensor
    released: ClassVar[tuple[tuple[str, ...], ...]] = ()
    settings: ClassVar[tuple[str, ...]] = ()
    no_choice: ClassVar[str] = "students of this family have no such choice"
    jumps: Replays | None = None

    @classmethod
    def from_teacher(cls, teacher: Any, seed: int) -> Student:
        """A float32 student that starts from its teacher's weights; new parameters come from ``seed``."""
        raise NotImplementedError

    def heads(self) -> tuple[tuple[nn.Module, ...], tuple[nn.Module, ...]]:
        """What the logits alone come from, and what the embeddings alone come from: frozen where its loss weighs 0."""
        raise NotImplementedError

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Prediction:
        """x_t [B, n, C], t [B] int64 (AR steps from 1, may differ in a batch) -> Prediction at every position."""
        raise NotImplementedError

    def jump(self, x: Tensor, noise: Tensor, t: int, condition: Condition, split: int) -> Tensor:
        """F_theta (Eq. 6) from step t to the final sequence: keep what is before t, predict the rest.

        x and noise [B, n, C]; returns embeddings [B, n, C]. Tokens of the first ``split`` AR steps are codes (argmax of
        the logits; kept tokens are snapped to the nearest code), the others are the embedding head's output.
        """
        if self.jumps is None or not tensors_of(condition):
            return self._jump(x, noise, t, condition, split)
        kind: Any = type(condition)

        def jump(x: Tensor, noise: Tensor, *given: Tensor) -> Tensor:
            return self._jump(x, noise, t, kind(*given), split)

        return self.jumps((kind, t, split), jump, x, noise, *tensors_of(condition))

    def _jump(self, x: Tensor, noise: Tensor, t: int, condition: Condition, split: int) -> Tensor:
        kept, coded = self.layout.before(t), self.layout.before(split + 1)
        x_t = torch.cat([x[:, :kept], noise[:, kept:]], dim=1)
        at = torch.full((x.shape[0],), t, dtype=torch.long, device=x.device)
        logits, embeddings = self(x_t, at, condition)
        out = torch.cat([x[:, :kept], embeddings[:, kept:].float()], dim=1)
        if coded:
            chosen = logits[:, :coded].argmax(-1)
            known = min(kept, coded)
            if known:
                chosen[:, :known] = nearest(x[:, :known], self.codebook)
            out[:, :coded] = self.codebook[chosen]
        return out


def answer(head: nn.Linear, h: Tensor) -> Tensor:
    """A student's logits head(h) [.., V]: where nothing is trained in float32, whatever autocast is around.

    bfloat16 logits tie, and of equal ones argmax takes the first code. The cross-entropy averages their rounding out,
    so training keeps the cheaper product, the largest of a student's.
    """
    if torch.is_grad_enabled():
        return head(h)
    with torch.autocast(h.device.type, enabled=False):
        return head(h.float())


def nearest(x: Tensor, codebook: Tensor) -> Tensor:
    """Index of the nearest code of x [..., C] in codebook [V, C]; the first wins a tie.

    |x|^2 is left out: it does not change the order. No [.., V, C] tensor is built. In full precision: another code is
    not a rounding error.
    """
    with full_precision(x.device):
        return (x.to(codebook.dtype) @ codebook.T - 0.5 * codebook.square().sum(-1)).argmax(-1)
