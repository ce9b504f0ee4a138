"""How a recipe distils."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pipeline.configuration import fields
from pipeline.configuration.fields import (
    Count,
    Pool,
    Positive,
    Range,
    Seed,
    Share,
    Size,
    SizeOrOff,
    Uri,
    Weight,
    Workers,
)
from pipeline.numerics.precision import Wanted

# What shapes a student where its family takes it, as it is by default. Code that draws with students asks for this
# alone, so that provenance counts no other setting of training as a part of how they draw.
STUDENT = {"mask": "released"}


@dataclass(frozen=True)
class TrainSettings:
    """Distillation (Alg. 2).

    Attributes:
        uri: folder of checkpoints and exported students; default <run>/student.
        start_steps: the AR steps t that training draws from, in paper numbering (1 is pure noise).
        start_weights: how often training draws each of them beside the others, as [2, 1]; by default all equally often,
            as in the paper.
        split: leading AR steps whose embeddings come from the logits head; later ones from the embedding head.
        cross_entropy: weight of the cross-entropy on logits.
        lpips: weight of the perceptual loss on decoded images.
        perceptual: which perceptual network: LPIPS's VGG or AlexNet trunk, or the small one of the digits default.
        batch: samples of one optimiser step over all workers.
        micro_batch: samples that a worker takes through the networks at once, adding up gradients until its share of
            the batch is done; 0 takes the share whole. Less memory, the same student but for rounding.
        epochs: passes over the pair set.
        optimizer: adamw, or muon: Muon for the matrices of the student's blocks, with steps of the size of AdamW's, and
            AdamW for embeddings, heads, norms and biases. One lr serves both.
        lr: peak learning rate.
        warmup: optimiser steps of linear warm-up.
        schedule: after the warm-up, constant or cosine to zero.
        betas: of AdamW: the decays of its averages of gradients and of their squares.
        weight_decay: of matrices only.
        clip: largest gradient norm.
        ema: decay of the moving average that is exported.
        seed: of the order of the pairs, of t and of the student's new parameters.
        mask: VAR students, whether a token sees its scale mates (paper) or not (released).
        precision: fp32, tf32 (float32 with TF32 products, on GPUs), bf16 autocast, or auto: bf16 where the devices of
            all workers multiply it in hardware, else fp32. With auto the student is the same but for rounding.
        compile: torch.compile the student's blocks. Changes float rounding only.
        recompute: keep less for the backward pass and compute it again there (activation checkpointing): in the
            student's blocks, the decoder's and LPIPS's trunk's. The same student in less memory and longer steps.
        workers: DDP workers; 0 trains in the driver's process. [fewest, most] takes as many as the cluster has places
            for: it goes on with fewer where a node is lost, and looks every minute whether there is room for more.
            The student is the same but for rounding.
        hang_minutes: how long the workers wait for one of them. One that hangs, or whose network does, ends them all
            then; they are replaced and go on from the last checkpoint. Exports and checkpoints of rank 0 count, too.
        checkpoint_every: optimiser steps between checkpoints.
        keep: newest checkpoints kept.
        log_every: optimiser steps between logged metrics and progress lines.
        snapshots: EMA students exported along the way for the report's curve, evenly spaced, the last is the result.
        export: safetensors, or released: also student.pth, in the layout that the authors' scripts read. Set after
            training, a second run of distill adds that file.
        tokenizer: copy: the student's folder holds the decoder's weights, so that it can be shared; link: config.json
            names their URI and SHA-256. Changed after training, a second run of distill changes the folder.
    """

    uri: Uri | None = None
    start_steps: tuple[Size, ...] = (1, 6)
    start_weights: tuple[Positive, ...] | None = None
    split: SizeOrOff = 5
    cross_entropy: Weight = 0.1
    lpips: Weight = 1.0
    perceptual: Literal["vgg", "alex", "digits"] = "vgg"
    batch: Size = 64
    micro_batch: SizeOrOff = 0
    epochs: Count = 10
    optimizer: Literal["adamw", "muon"] = "adamw"
    lr: Positive = 1e-4
    warmup: Annotated[int, Range(0, 10**12, "0 or more, and at most 10^12")] = 100
    schedule: Literal["constant", "cosine"] = "constant"
    betas: tuple[Share, Share] = (0.9, 0.95)
    weight_decay: Weight = 0.05
    clip: Positive = 1.0
    ema: Share = 0.9999
    seed: Seed = 3
    mask: Literal["released", "paper"] = "released"
    precision: Wanted = "fp32"
    compile: bool = False
    recompute: bool = False
    workers: Workers = 0
    hang_minutes: Annotated[float, Range(0.05, 10_000, "0.05 or more, and at most 10,000")] = 15.0
    checkpoint_every: Count = 500
    keep: Pool = 2
    log_every: Count = 20
    snapshots: Pool = 5
    export: Literal["safetensors", "released"] = "safetensors"
    tokenizer: Literal["copy", "link"] = "copy"

    @property
    def student_options(self) -> dict[str, Any]:
        """The settings that shape a student where its family takes them, by their names in exported files too."""
        return {name: getattr(self, name) for name in STUDENT}

    @property
    def fewest(self) -> int:
        """Workers that training waits for."""
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def most(self) -> int:
        """Workers that there are where the cluster has room."""
        return self.workers if isinstance(self.workers, int) else self.workers[1]

    def __post_init__(self) -> None:
        fields.check(self, "train")
        fields.require(
            self.lpips + self.cross_entropy > 0,
            "train.lpips and train.cross_entropy are both 0; nothing is learned.",
        )
        fields.require(
            self.precision != "fp16",
            "train.precision is fp16, whose gradients vanish or overflow without loss scaling; use bf16, tf32 or fp32.",
        )
        steps = self.start_steps
        fields.require(
            bool(steps) and steps[0] == 1 and list(steps) == sorted(set(steps)),
            f"train.start_steps is {list(steps)}; it must rise and begin with 1, the step of pure noise.",
        )
        fields.require(
            self.start_weights is None or len(self.start_weights) == len(steps),
            f"train.start_weights has {len(self.start_weights or ())} numbers for the {len(steps)} steps of"
            " train.start_steps; give one for each, or leave it out.",
        )
        self._check_workers()

    def _check_workers(self) -> None:
        if isinstance(self.workers, int):
            fields.require(
                not self.workers or self.batch % self.workers == 0,
                f"train.batch {self.batch} is not a multiple of train.workers {self.workers}; change one of them.",
            )
            return
        fields.require(
            self.fewest < self.most,
            f"train.workers is [{self.fewest}, {self.most}]; the first number must be below the second. For a fixed"
            " number give that alone.",
        )
        fields.require(
            self.most <= self.batch,
            f"train.batch {self.batch} is too small for train.workers [{self.fewest}, {self.most}]: each needs a sample"
            " of it; change one of them.",
        )
