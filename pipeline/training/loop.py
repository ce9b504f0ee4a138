"""The loop of distillation (Alg. 2) as every DDP worker runs it, or the driver's own process.

What a run computes is a function of its facts: batches are arithmetic in (seed, epoch), t in (seed, epoch, sample id),
so neither the number of workers nor an interruption changes it beyond float rounding.

Where Ray is told that a node with a worker is about to be taken away, as a cloud says of a spot node, all workers
stop after the same step and its checkpoint; the driver goes on from it on other nodes, and no step is lost.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import ray.train
import ray.train.torch
import torch
from ray.train.collective import broadcast_from_rank_zero
from torch import nn

from pipeline.host import system_metrics
from pipeline.host.ahead import timed
from pipeline.models.base import Student
from pipeline.services.metrics import Recorder
from pipeline.text import encoder
from pipeline.training import batches
from pipeline.training import state as training_state
from pipeline.training.observer import Message, Observer, Report, Window
from pipeline.training.plan import TrainingPlan
from pipeline.training.state import TrainingState
from pipeline.training.step import build, device_of, prepare, settled, step

# What Prometheus is told of a message's metrics, by their names.
GAUGES = {
    "loss": "dd_train_loss",
    "held_out/loss": "dd_train_held_out_loss",
    "gradient_norm": "dd_train_gradient_norm",
    "lr": "dd_train_learning_rate",
    "images_per_second": "dd_train_images_per_second",
    "data_wait": "dd_train_data_wait_ratio",
}


def train(config: dict[str, Any]) -> None:
    """Alg. 2 on one worker of many, or on the only one."""
    plan: TrainingPlan = config["plan"]

    # 1. This worker's share and device, and the precision, which is the same on all.
    context = ray.train.get_context()
    rank, world, device = context.get_world_rank(), context.get_world_size(), device_of(plan.recipe)
    settings = settled(plan.recipe.train, device)
    report = recorded(config["report"], Recorder(plan.recipe))

    # 2. The student goes on where the last checkpoint left it, or starts from its teacher, of which only the tokenizer
    # stays. Rank 0 alone reads either; what it sees counts, should a folder be slow to show.
    folder = plan.at("checkpoints")
    newest = broadcast_from_rank_zero(training_state.newest(folder) if rank == 0 else None)
    student, loss = build(plan.recipe, device, fresh=rank == 0 and not newest)
    state, encode = TrainingState(student, settings), encoder.conditioner(plan.recipe.text, device)
    if newest and rank == 0:
        resume(plan, state, newest, report)

    # 3. The workers become one.
    if world > 1:
        state.share(broadcast_from_rank_zero)
    prepare(student, loss)
    network = _distributed(student, device)

    # 4. Rank 0 also speaks, looks at the held-out pairs and exports the moving average.
    observer = Observer(plan, state, loss, encode, report, config["mlflow_run"]) if rank == 0 else None
    if observer and settings.fewest < settings.most:
        report(_of_number(state, world, settings.most))

    # 5. Optimiser steps. Nothing waits for the device between two log lines.
    pairs = batches.stream(plan)
    window = Window(settings, device)
    watched = system_metrics.sampled(_of_machine(state, report)) if observer else nullcontext()
    with watched, training_state.Writer(folder, settings.keep, _of_checkpoint(report)) as writer:
        for waited, (epoch, share) in timed(batches.batches(plan, pairs, state.step, rank, world)):
            window.waited += waited
            batch = batches.noised(share, epoch, settings, plan.layout, loss.tokenizer.codebook, encode)
            window.add(*step(network, loss, state, batch, plan.total))

            saving = state.step % settings.checkpoint_every == 0 or state.step == plan.total
            looking = state.step in plan.snapshot_steps
            if saving or looking or state.step % settings.log_every == 0:
                state.check()
                metrics = window.close()
                if observer:
                    observer.log(metrics)
                if observer and looking:
                    observer.snapshot()
                    window.begin()
                leaving = state.step < plan.total and _notice()
                if observer and (saving or leaving):
                    writer.write(state)
                if leaving:
                    break

    # 6. The result comes last: whoever finds it knows that nothing is missing.
    if observer and state.step == plan.total:
        observer.export(plan.result)


def _notice() -> bool:
    """Whether a worker's node is about to be taken away; all workers ask together, and get the same answer."""
    return ray.train.get_preemption_info() is not None


def recorded(report: Report, record: Callable[[dict[str, float]], object]) -> Report:
    """A ``report`` that also has ``record`` told of the numbers of a message, as this process's gauges.

    Ray forgets within twenty seconds what a gauge shows, so they are told again with every message, and one of how busy
    the machine is comes every ten.
    """
    shown: dict[str, float] = {}

    def both(message: Message) -> None:
        """The gauges come first: the driver's queue may take its time."""
        if message.metrics:
            shown["dd_train_step"] = message.step
            shown.update({GAUGES[name]: value for name, value in message.metrics.items() if name in GAUGES})
        if shown:
            record(dict(shown))
        report(message)

    return both


def _of_number(state: TrainingState, workers: int, most: int) -> Message:
    """What the driver prints where a recipe leaves the number of workers open."""
    count = f"{workers} worker{'s' * (workers > 1)}, of at most {most}"
    return Message(state.step, {}, [], f"Training with {count}, from step {state.step:,} on.")


def _of_machine(state: TrainingState, report: Report) -> Callable[[dict[str, float]], None]:
    """What tells the driver how busy this machine is: its own may be another one."""
    return lambda values: report(Message(state.step, {}, [], machine=values))


def _of_checkpoint(report: Report) -> Callable[[int, str], None]:
    """What tells the driver of a checkpoint that is whole."""
    return lambda step, uri: report(Message(step, {}, [], checkpoint=uri))


def resume(plan: TrainingPlan, state: TrainingState, newest: str, report: Report) -> None:
    """Restore the ``newest`` checkpoint, or the last one before it that is whole; those after that are deleted."""
    folder = plan.at("checkpoints")

    def say(line: str) -> None:
        report(Message(state.step, {}, [], line))

    names = [name for name in training_state.saved(folder) if name <= newest]
    name = state.restore(folder, names, say)
    say(f"Resuming {plan.at()} from step {state.step:,} of {plan.total:,}.")
    training_state.drop_after(folder, name)


def _distributed(student: Student, device: torch.device) -> nn.Module:
    """The student in DDP where there are several workers."""
    options = {
        "broadcast_buffers": False,  # they are constants
        "gradient_as_bucket_view": True,
    }
    return ray.train.torch.prepare_model(student, move_to_device=device, parallel_strategy_kwargs=options)
