"""One optimiser step of Alg. 2, and what it needs: the student as its teacher leaves it, its loss, its device."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext

import ray.train.torch
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.host.stopwatch import WARM_UP, now
from pipeline.models import checkpoints, convnet
from pipeline.models.base import Student, Tokenizer
from pipeline.numerics.compilation import compiled, layers
from pipeline.numerics.precision import autocast, quick_at_bf16, set_products
from pipeline.numerics.recomputation import recomputed
from pipeline.recipe import Recipe
from pipeline.settings.train import TrainSettings
from pipeline.text import encoder
from pipeline.training import batches, perceptual
from pipeline.training.batches import Batch
from pipeline.training.losses import Loss
from pipeline.training.perceptual import Lpips
from pipeline.training.state import TrainingState

MEASURED = 3  # steps that a dry run times in steady state


def step(network: nn.Module, loss: Loss, state: TrainingState, batch: Batch, total: int) -> tuple[Tensor, Tensor]:
    """One optimiser step on this worker's share of a batch; the loss's sums and the gradient norm, on the device.

    Shares need not be equal. DDP takes the mean over the workers, so each weighs what it has against an equal share.
    """
    parts, sums = batch.parts(state.settings.micro_batch), []
    workers = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 0
    equal = state.settings.batch / workers if workers else len(batch.t)
    ddp = network if isinstance(network, DistributedDataParallel) else None
    for number, part in enumerate(parts, 1):
        with ddp.no_sync() if ddp and number < len(parts) else nullcontext():  # workers meet once a step
            with autocast(state.settings.precision, part.x_t.device):
                prediction = network(part.x_t, part.t, part.condition)
                value, part_sums = loss(prediction, part.tokens, part.t)
            (value * (len(part.t) / equal)).backward()
        sums.append(part_sums)
    return torch.stack(sums).sum(0), state.advance(total)


def build(recipe: Recipe, device: torch.device, fresh: bool = True) -> tuple[Student, Loss]:
    """The student as its teacher leaves it, and its loss; both on the device, the teacher's transformer gone.

    Where it is not to be ``fresh``, its weights are still to come and the teacher's tokenizer alone is read.
    """
    # In fp32 whatever made the pairs: the student starts from the weights as they are. Nothing runs the teacher.
    settings = dataclasses.replace(recipe.teacher, precision="fp32", compile=False)
    asked = recipe.train.student_options
    if fresh:
        teacher = checkpoints.teacher(settings)
        tokenizer = teacher.tokenizer.to(device)
        student = checkpoints.new_student(settings, teacher, asked, recipe.train.seed).to(device)
    else:
        tokenizer = checkpoints.tokenizer(settings).to(device)
        student = checkpoints.unfilled_student(settings, tokenizer.codebook, asked, device)
    network = perceptual.network(recipe.train.perceptual).to(device) if recipe.train.lpips else None
    return student.train(), Loss(recipe.train, tokenizer, network)


def prepare(student: Student, loss: Loss) -> None:
    """Compile and recompute as the recipe says, in place: what no copy, checkpoint or export of the student shows."""
    if loss.settings.compile:
        compiled(student)
    if loss.settings.recompute:
        recomputed(recomputable(student, loss.tokenizer, loss.network))


def recomputable(student: Student, tokenizer: Tokenizer, network: nn.Module | None) -> list[nn.Module]:
    """What keeps most for the backward pass: a student's layers, blocks of the decoder, stages of LPIPS's trunk."""
    stages = network.layers if isinstance(network, Lpips) else []
    return [*layers(student), *convnet.blocks(tokenizer), *stages]


def settled(settings: TrainSettings, device: torch.device) -> TrainSettings:
    """The settings with a precision in the place of ``auto``, the same on all workers: bf16 if all are quick at it."""
    if settings.precision != "auto":
        return settings
    quick = torch.tensor(int(quick_at_bf16(device)), device=device)
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(quick, torch.distributed.ReduceOp.MIN)
    return dataclasses.replace(settings, precision="bf16" if quick else "fp32")


def device_of(recipe: Recipe) -> torch.device:
    """This worker's device, its products set to ``train.precision``; on a CPU, also its share of the cores."""
    set_products(recipe.train.precision)
    if recipe.cluster.runs_on == "cuda":
        torch.backends.cudnn.benchmark = True  # decoder and LPIPS meet the same shapes at every step
        return ray.train.torch.get_device()
    torch.set_num_threads(max(1, int(recipe.cluster.cpus)))
    return torch.device("cpu")


def seconds_per_step(recipe: Recipe) -> float:
    """Seconds of one optimiser step on one worker's share of a batch, from made-up pairs."""
    device, layout = device_of(recipe), checkpoints.config(recipe.teacher).layout
    settings = settled(recipe.train, device)
    student, loss = build(recipe, device)
    state = TrainingState(student, settings)
    prepare(student, loss)
    pairs = batches.made_up(layout, settings.batch // max(1, settings.most))
    encode = encoder.conditioner(recipe.text, device)
    batch = batches.noised(pairs, 0, settings, layout, loss.tokenizer.codebook, encode)
    ends = []
    for _ in range(WARM_UP + MEASURED):
        step(student, loss, state, batch, total=WARM_UP + MEASURED)
        ends.append(now(device))
    state.check()
    return (ends[-1] - ends[WARM_UP - 1]) / MEASURED
