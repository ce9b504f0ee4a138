"""Distillation (Alg. 2) at scale: a Ray Train loop that turns noise-token pairs into a few-step student.

The driver makes every cheap check, claims the student's folder, starts the MLflow run and hands over to ``train``,
which runs in each DDP worker, or in the driver's own process when ``train.workers`` is 0. What a run computes is a
function of its facts: batches are arithmetic in (seed, epoch), t in (seed, epoch, sample id), so neither the number of
workers nor an interruption changes it beyond float rounding. Running the same command again goes on from the last
checkpoint.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
from ray.exceptions import RayError
from ray.train import RunConfig, ScalingConfig
from ray.train.collective import broadcast_from_rank_zero
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.queue import Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline import (
    cluster,
    footprint,
    losses,
    mlflow_store,
    signals,
    storage,
    tracking,
    training_data,
    training_plan,
    training_state,
)
from pipeline.compilation import blocks, compiled
from pipeline.errors import Unfinished
from pipeline.losses import Loss
from pipeline.models import checkpoints
from pipeline.models.base import Student
from pipeline.observer import Message, Observer, Report, Window, timed
from pipeline.precision import autocast, set_products
from pipeline.progress import Progress, duration
from pipeline.recipe import Recipe, TrainSettings
from pipeline.recomputation import recomputed
from pipeline.stopwatch import WARM_UP, now
from pipeline.training_data import Batch
from pipeline.training_plan import Plan
from pipeline.training_state import TrainingState

FAILURES = 2  # groups of workers that are replaced before a training without a new checkpoint gives up
MEASURED = 3  # steps that a dry run times in steady state
SHOWN = ("loss", "images_per_second", "held_out/loss")  # on the progress line
WAITING = 0.02  # share of the time from which waiting for data is shown there, too


def distill(recipe: Recipe) -> str:
    """Train the recipe's student, or what is left of it, and export it; returns a summary.

    Raises ValueError or FileNotFoundError, one sentence, for a recipe, pair set, folder or weight file that does not
    fit, before anything expensive starts.
    """
    recipe.check_filled("teacher", "pairs", "train")
    recipe = cluster.portable(recipe)
    mlflow_store.check(recipe)
    plan = training_plan.check(recipe)
    if recipe.dry_run:
        return describe(plan)
    if storage.exists(plan.result):
        tracking.complete(plan.recipe, "distill", plan.at(), lambda run: _log(run, plan))
        if added := _release(plan):
            return added
        return f"Nothing is missing: {plan.result} is the student of this recipe, after {plan.total:,} steps."
    if plan.recipe.train.workers:
        cluster.check_address()
    storage.check_writable(plan.at())
    earlier = training_plan.claimed(plan) or {}
    start = time.monotonic()
    with tracking.Run.start(plan.recipe, "distill", earlier.get("mlflow_run")) as run:
        training_plan.claim(plan, run.id)
        run.mark(plan.at())
        _log_origin(run, plan)
        fit(plan, run)
        _log(run, plan)
        _release(plan)
    took = duration(time.monotonic() - start)
    return f"The student is {plan.result}, after {plan.total:,} steps; this run took {took} (MLflow run {run.id})."


def _log_origin(run: tracking.Run, plan: Plan) -> None:
    """Tell MLflow from which pairs the student is made."""
    run.tag("pairs_fingerprint", plan.pairs_fingerprint)
    run.link("pairs", pairs_fingerprint=plan.pairs_fingerprint)
    run.dataset("pairs", plan.recipe.pairs_uri, plan.pairs_fingerprint, "training")


def _log(run: tracking.Run, plan: Plan) -> None:
    """Tell MLflow of a finished student."""
    _log_origin(run, plan)
    run.tag("student", storage.sha256(plan.result)[:12])
    steps = ", ".join(map(str, plan.recipe.train.start_steps))
    text = f"The student is {plan.result}, after {plan.total:,} steps; its start steps are {steps}."
    run.conclude(f"{plan.recipe.name}, student of {plan.total:,} steps", text)


def _release(plan: Plan) -> str:
    """Write the authors' layout beside a finished student if the recipe asks for it and it is not there."""
    if plan.recipe.train.export != "released" or storage.exists(plan.released):
        return ""
    checkpoints.release(plan.recipe.teacher, plan.result, plan.released)
    return f"{plan.released} holds the student as the authors' scripts read it."


def fit(plan: Plan, run: tracking.Run) -> None:
    """Run ``train`` here or on Ray's workers, whose messages the driver turns into progress and MLflow entries."""
    recipe = plan.recipe
    done = training_state.steps_done(plan.at("checkpoints"), say=lambda sentence: print(sentence, flush=True))
    with Progress(plan.total, "steps", done=done) as progress:

        def receive(message: Message) -> None:
            """A worker's message as progress and as MLflow metrics and pictures, or printed."""
            if message.line:
                print(message.line, flush=True)
                return
            progress.update(message.step - progress.done, noteworthy(message.metrics))
            run.metrics(message.metrics, message.step)
            if message.grid:
                from pipeline.plots import mosaic  # loads matplotlib, which no worker needs

                run.image("samples", mosaic(message.grid), message.step)

        config = {"plan": plan, "mlflow_run": run.id}
        if not recipe.train.workers:
            _fit(recipe, config | {"report": receive})
            return
        with cluster.session(recipe, recipe.train.workers, "training workers"), _relay(receive) as report:
            _fit(recipe, config | {"report": report})


def noteworthy(metrics: dict[str, float]) -> str:
    """What the progress line says of them."""
    waits = metrics.get("data_wait", 0.0) > WAITING
    shown = (*SHOWN, "data_wait") if waits else SHOWN
    return ", ".join(f"{name} {value:.4g}" for name, value in metrics.items() if name in shown)


@contextmanager
def _relay(receive: Report) -> Iterator[Report]:
    """A function that any process of the cluster may call to have ``receive`` called in this one.

    So MLflow and the progress line live in the driver alone, whose store no worker has to reach.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)  # not on a spot node
    queue = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})

    failed: list[Exception] = []

    def follow() -> None:
        """Until the end is said, or until the queue is gone because the work was ended."""
        try:
            with suppress(RayError):
                while (message := queue.get()) is not None:
                    receive(message)
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield queue.put
        queue.put(None)
        thread.join()
    finally:
        queue.shutdown(force=True)
    if failed:
        raise failed[0]


def _fit(recipe: Recipe, config: dict[str, Any]) -> None:
    """``train`` here or on the workers, who are replaced as long as the checkpoints advance; Unfinished where not.

    A worker's own Refused or Unfinished is the last word: it would be raised again.
    """
    folder, total = config["plan"].at("checkpoints"), config["plan"].total
    lost, done = 0, training_state.steps_done(folder)
    while True:
        try:
            _fit_once(recipe, config)
            return
        except Exception as error:
            if not cluster.is_ray(error):
                raise
            found = cluster.translation(error)
        if found.__class__ is not cluster.Lost:
            raise found
        before, done = done, training_state.steps_done(folder)
        lost = 1 if done > before else lost + 1
        if lost > FAILURES:
            break
        print(f"Lost workers ({found.reason}); going on from the checkpoint of step {done:,}.", flush=True)
    raise Unfinished(
        f"training stopped ({found.reason}) after step {done:,} of {total:,}; what was learnt until then is in"
        f" {folder}, and the same command goes on from there."
    )


def _fit_once(recipe: Recipe, config: dict[str, Any]) -> None:
    """Ray Train around ``train``: places the workers and joins them for DDP.

    It asks for a folder of its own; ours is empty and soon gone, because checkpoints are not Ray's (see
    ``training_state``). Nor does Ray count failures: it knows neither which are final nor whether steps were made.
    """
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    gpu = {"GPU": recipe.cluster.gpus} if recipe.cluster.gpus else {}
    scaling = ScalingConfig(
        num_workers=recipe.train.workers,
        use_gpu=bool(gpu),
        resources_per_worker={"CPU": recipe.cluster.cpus} | gpu,
    )
    backend = TorchConfig(backend="nccl" if recipe.cluster.runs_on == "cuda" else "gloo")
    with tempfile.TemporaryDirectory(prefix="distill-", ignore_cleanup_errors=True) as scratch:
        trainer = TorchTrainer(
            train,
            train_loop_config=config,
            torch_config=backend,
            scaling_config=scaling,
            run_config=RunConfig(name="train", storage_path=scratch),
        )
        if recipe.train.workers:
            signals.interruptible(trainer.fit)  # in this thread, Ray would take Ctrl-C for itself
        else:
            trainer.fit()


# ---- every worker


def train(config: dict[str, Any]) -> None:
    """Alg. 2 on one worker of many, or on the only one."""
    plan: Plan = config["plan"]
    settings = plan.recipe.train

    # 1. This worker's share and device.
    context = ray.train.get_context()
    rank, world, device = context.get_world_rank(), context.get_world_size(), _device(plan.recipe)

    # 2. The student goes on where the last checkpoint left it, or starts from its teacher, of which only the tokenizer
    # stays. Rank 0 alone reads either; what it sees counts, should a folder be slow to show.
    folder = plan.at("checkpoints")
    newest = broadcast_from_rank_zero(training_state.newest(folder) if rank == 0 else None)
    student, loss = build(plan.recipe, device, fresh=rank == 0 and not newest)
    state = TrainingState(student, settings)
    if newest and rank == 0:
        resume(plan, state, newest, config["report"])

    # 3. The workers become one.
    if world > 1:
        state.share(broadcast_from_rank_zero)
    prepare(student, loss)
    network = _distributed(student, settings, device)

    # 4. Rank 0 also speaks, looks at the held-out pairs and exports the moving average.
    observer = Observer(plan, state, loss, config["report"], config["mlflow_run"]) if rank == 0 else None

    # 5. Optimiser steps. Nothing waits for the device between two log lines.
    pairs = training_data.stream(plan)
    window = Window(settings, device)
    with training_state.Writer(folder, settings.keep) as writer:
        for waited, (epoch, share) in timed(training_data.batches(plan, pairs, state.step, rank, world)):
            window.waited += waited
            batch = training_data.noised(share, epoch, settings, plan.layout, loss.tokenizer.codebook)
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
                if observer and saving:
                    writer.write(state)

    # 6. The result comes last: whoever finds it knows that nothing is missing.
    if observer:
        observer.export(plan.result)


def resume(plan: Plan, state: TrainingState, newest: str, report: Report) -> None:
    """Restore the ``newest`` checkpoint, or the last one before it that is whole; those after that are deleted."""
    folder = plan.at("checkpoints")

    def say(line: str) -> None:
        report(Message(state.step, {}, [], line))

    names = [name for name in training_state.saved(folder) if name <= newest]
    name = state.restore(folder, names, say)
    say(f"Resuming {plan.at()} from step {state.step:,} of {plan.total:,}.")
    training_state.drop_after(folder, name)


def step(network: nn.Module, loss: Loss, state: TrainingState, batch: Batch, total: int) -> tuple[Tensor, Tensor]:
    """One optimiser step on this worker's share of a batch; the loss's sums and the gradient norm, on the device."""
    parts, sums = batch.parts(state.settings.micro_batch), []
    ddp = network if isinstance(network, DistributedDataParallel) else None
    for number, part in enumerate(parts, 1):
        with ddp.no_sync() if ddp and number < len(parts) else nullcontext():  # workers meet once a step
            with autocast(state.settings.precision, part.x_t.device):
                prediction = network(part.x_t, part.t, part.condition)
                value, part_sums = loss(prediction, part.tokens, part.t)
            (value * (len(part.t) / len(batch.t))).backward()
        sums.append(part_sums)
    return torch.stack(sums).sum(0), state.advance(total)


def build(recipe: Recipe, device: torch.device, fresh: bool = True) -> tuple[Student, Loss]:
    """The student as its teacher leaves it, and its loss; both on the device, the teacher's transformer gone.

    Where it is not to be ``fresh``, its weights are still to come and the teacher's tokenizer alone is read.
    """
    # In fp32 whatever made the pairs: the student starts from the weights as they are. Nothing runs the teacher.
    settings, mask = dataclasses.replace(recipe.teacher, precision="fp32", compile=False), recipe.train.mask
    if fresh:
        teacher = checkpoints.teacher(settings)
        tokenizer = teacher.tokenizer.to(device)
        student = checkpoints.family(settings).Student.from_teacher(teacher, mask, recipe.train.seed).to(device)
    else:
        tokenizer = checkpoints.tokenizer(settings).to(device)
        student = checkpoints.unfilled_student(settings, tokenizer.codebook, mask, device)
    network = losses.perceptual(recipe.train.perceptual).to(device) if recipe.train.lpips else None
    return student.train(), Loss(recipe.train, tokenizer, network)


def prepare(student: Student, loss: Loss) -> None:
    """Compile and recompute as the recipe says, in place: what no copy, checkpoint or export of the student shows."""
    if loss.settings.compile:
        compiled(student)
    if loss.settings.recompute:
        recomputed([*blocks(student), *losses.layers(loss.tokenizer, loss.network)])


def _device(recipe: Recipe) -> torch.device:
    """This worker's device, its products set to ``train.precision``; on a CPU, also its share of the cores."""
    set_products(recipe.train.precision)
    if recipe.cluster.runs_on == "cuda":
        torch.backends.cudnn.benchmark = True  # decoder and LPIPS meet the same shapes at every step
        return ray.train.torch.get_device()
    torch.set_num_threads(max(1, int(recipe.cluster.cpus)))
    return torch.device("cpu")


def _distributed(student: Student, settings: TrainSettings, device: torch.device) -> nn.Module:
    """The student in DDP where there are several workers; with a weight of 0, one head has no gradient to wait for."""
    options = {
        "find_unused_parameters": not (settings.cross_entropy and settings.lpips),
        "broadcast_buffers": False,  # they are constants
        "gradient_as_bucket_view": True,
    }
    return ray.train.torch.prepare_model(student, move_to_device=device, parallel_strategy_kwargs=options)


# ---- planning


def describe(plan: Plan) -> str:
    """The resolved recipe and what a run would take, from the seconds of a few steps; nothing is written."""
    recipe, settings, cluster_settings = plan.recipe, plan.recipe.train, plan.recipe.cluster
    left = plan.total - training_state.steps_done(plan.at("checkpoints"))
    left = 0 if storage.exists(plan.result) else left
    workers = max(1, settings.workers)
    lines = [
        json.dumps(recipe.resolved(), indent=2),
        f"student      {plan.at()}, fingerprint {plan.fingerprint}",
        f"parameters   {parameters(recipe):,} of the student; weight, gradient, two moments, average: 20 bytes each",
        f"pairs        {plan.rows:,} to train on, {plan.held_out:,} held out",
        f"steps        {plan.total:,} of {settings.batch} pairs; {left:,} are left",
    ]
    if left:
        at_once = training_plan.at_once(settings)
        lines += footprint_of(recipe).lines(at_once, "train.micro_batch", cluster_settings.runs_on == "cuda")
        try:
            seconds = _seconds_per_step(recipe)
        except cluster.NoGpu as error:
            return "\n".join([*lines, f"time         not measured: {error}"])
        where = f"{workers} {'GPU' if cluster_settings.gpus else 'CPU'} worker{'s' * (workers > 1)}"
        lines.append(f"one step     {duration(seconds)} on {where}, communication and reading not counted")
        lines.append(f"time         about {duration(seconds * left)}")
        if cluster_settings.gpus:
            hours = seconds * left * workers * cluster_settings.gpus / 3600
            price = cluster_settings.usd_per_gpu_hour
            lines.append(f"GPU-hours    {hours:,.2f}" + (f", ${hours * price:,.2f}" if price is not None else ""))
    return "\n".join(lines)


def parameters(recipe: Recipe) -> int:
    """How many the recipe's student has."""
    family, config = checkpoints.family(recipe.teacher), checkpoints.config(recipe.teacher)
    with torch.device("meta"):
        codebook = torch.empty(config.layout.vocabulary, config.layout.code_dim)
        student = family.Student(config, codebook, recipe.train.mask)
    return sum(parameter.numel() for parameter in student.parameters())


def footprint_of(recipe: Recipe) -> footprint.Footprint:
    """What ``step`` needs on one worker: student, gradients, optimiser, average, frozen networks, activations."""
    settings = dataclasses.replace(recipe.train, micro_batch=0)  # what is traced is taken at once
    family, config = checkpoints.family(recipe.teacher), checkpoints.config(recipe.teacher)
    with torch.device("meta"):
        tokenizer = family.Tokenizer(config).eval().requires_grad_(False)
        student = family.Student(config, tokenizer.codebook, settings.mask).train()
    network = losses.perceptual(settings.perceptual, pretrained=False) if settings.lpips else None
    if settings.recompute:
        recomputed([*blocks(student), *losses.layers(tokenizer, network)])

    def work(samples: int) -> None:
        """Two optimiser steps on so many samples."""
        for module in filter(None, (tokenizer, student, network)):
            footprint.hollow(module)
        loss, state = Loss(settings, tokenizer, network), TrainingState(student, settings)
        batch = training_data.hollow(config.layout, samples)
        for _ in range(2):  # from the second on, the optimiser has its moments
            step(student, loss, state, batch, total=2)

    return footprint.trace(work, square=config.layout.length + 1 if recipe.cluster.runs_on == "cuda" else 0)


def _seconds_per_step(recipe: Recipe) -> float:
    """``measure`` where a worker would run."""
    if not recipe.train.workers:
        return measure(recipe)
    return float(cluster.on_worker(recipe, measure, recipe))


def measure(recipe: Recipe) -> float:
    """Seconds of one optimiser step on one worker's share of a batch, from made-up pairs."""
    settings, layout = recipe.train, checkpoints.config(recipe.teacher).layout
    device = _device(recipe)
    student, loss = build(recipe, device)
    state = TrainingState(student, settings)
    prepare(student, loss)
    pairs = training_data.made_up(layout, settings.batch // max(1, settings.workers))
    batch = training_data.noised(pairs, 0, settings, layout, loss.tokenizer.codebook)
    ends = []
    for _ in range(WARM_UP + MEASURED):
        step(student, loss, state, batch, total=WARM_UP + MEASURED)
        ends.append(now(device))
    state.check()
    return (ends[-1] - ends[WARM_UP - 1]) / MEASURED
