"""Distillation (Alg. 2) at scale: the driver, which turns noise-token pairs into a few-step student with Ray Train.

It makes every cheap check, claims the student's folder, starts the MLflow run and hands over to ``training.loop``,
which runs in each DDP worker, or in the driver's own process when ``train.workers`` is 0; their messages come back
through a queue. Running the same command again goes on from the last checkpoint.
"""

from __future__ import annotations

import logging
import math
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import ray
from ray.exceptions import RayError
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.queue import Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline import storage
from pipeline.generator import card, folder
from pipeline.host import events, signals
from pipeline.host.errors import Unfinished
from pipeline.host.progress import Progress, duration
from pipeline.models import checkpoints
from pipeline.recipe import Recipe
from pipeline.services import cluster, tracking
from pipeline.training import plan as training_plan
from pipeline.training import state as training_state
from pipeline.training.loop import train
from pipeline.training.observer import Message, Report
from pipeline.training.plan import TrainingPlan
from pipeline.workflow import costs, preflight, status

FAILURES = 2  # groups of workers that are replaced before a training without a new checkpoint gives up
SHOWN = ("loss", "images_per_second", "held_out/loss")  # on the progress line
TAKEN_AWAY = "a node of theirs is about to be taken away"  # of which Ray was told, and the workers by Ray
WAITING = 0.02  # share of the time from which waiting for data is shown there, too


def distill(recipe: Recipe) -> str:
    """Train the recipe's student, or what is left of it, and export it; returns a summary.

    Raises ValueError or FileNotFoundError, one sentence, for a recipe, pair set, folder or weight file that does not
    fit, before anything expensive starts.
    """
    recipe = cluster.portable(recipe)
    if recipe.status:
        return status.of_training(recipe)
    if recipe.dry_run:
        return costs.described(recipe)
    preflight.check(recipe, "distill")
    plan = training_plan.check(recipe)
    if storage.exists(plan.result):
        tracking.complete(plan.recipe, "distill", plan.at(), lambda run: _log(run, plan))
        changed = [*filter(None, (_describe(plan), _release(plan)))]
        if changed:
            return " ".join(changed)
        return f"Nothing is missing: {plan.result} is the student of this recipe, after {plan.total:,} steps."
    storage.check_writable(plan.at())
    events.tell("begun", folder=plan.at(), fingerprint=plan.fingerprint, unit="step", total=plan.total)
    if workers := plan.recipe.train.fewest:
        with cluster.session(plan.recipe, workers, "training workers"):
            preflight.check_workers(plan.recipe, "distill", plan.at())
    earlier = training_plan.claimed(plan) or {}
    start = time.monotonic()
    with tracking.Run.start(plan.recipe, "distill", earlier.get("mlflow_run")) as run:
        training_plan.claim(plan, run.id)
        run.mark(plan.at())
        _log_origin(run, plan)
        _log(run, plan, fit(plan, run))
        _describe(plan)
        _release(plan)
    took = duration(time.monotonic() - start)
    return f"The student is {plan.result}, after {plan.total:,} steps; this run took {took} (MLflow run {run.id})."


def _log_origin(run: tracking.Run, plan: TrainingPlan) -> None:
    """Tell MLflow from which pairs the student is made."""
    run.tag("pairs_fingerprint", plan.pairs_fingerprint)
    run.link("pairs", pairs_fingerprint=plan.pairs_fingerprint)
    run.dataset("pairs", plan.recipe.pairs_uri, plan.pairs_fingerprint, "training")


def _log(run: tracking.Run, plan: TrainingPlan, loss: float | None = None) -> None:
    """Tell MLflow of a finished student, and its ``loss`` on the held-out pairs where this process saw it."""
    _log_origin(run, plan)
    run.tag("student", storage.sha256(plan.result)[:12])
    steps = ", ".join(map(str, plan.recipe.train.start_steps))
    text = f"The student is `{plan.result}`, of {plan.recipe.pairs.count:,} pairs; its start steps are {steps}."
    result = f"{plan.total:,} steps" + ("" if loss is None else f", held-out loss {loss:.3g}")
    run.conclude(result, text, draw_with=storage.resolve(plan.at()))


def _describe(plan: TrainingPlan) -> str:
    """Make a finished student's folder one that can be shared, unless it is; config.json comes last.

    Of a folder that is, only ``train.tokenizer`` may ask for something else now; returns what that changed.
    """
    if storage.exists(plan.at(folder.CONFIG)):
        return folder.with_decoder_as_asked(plan.recipe, plan.teacher)
    content = folder.described(plan.recipe, plan.teacher)
    storage.write_bytes(plan.at(folder.CARD), card.card(plan.recipe.name, content).encode())
    storage.write_json(plan.at(folder.CONFIG), content)
    return ""


def _release(plan: TrainingPlan) -> str:
    """Write the authors' layout beside a finished student if the recipe asks for it and it is not there."""
    if plan.recipe.train.export != "released" or storage.exists(plan.released):
        return ""
    checkpoints.release(plan.recipe.teacher, plan.result, plan.released)
    return f"{plan.released} holds the student as the authors' scripts read it."


def fit(plan: TrainingPlan, run: tracking.Run) -> float | None:
    """Run ``train`` here or on Ray's workers, whose messages the driver turns into progress and MLflow entries.

    Returns the last loss on the held-out pairs, None where none was measured any more.
    """
    recipe, loss = plan.recipe, None
    done = training_state.steps_done(plan.at("checkpoints"), say=lambda sentence: print(sentence, flush=True))
    with Progress(plan.total, "steps", done=done) as progress:

        def receive(message: Message) -> None:
            """A worker's message as progress, as an event, and as MLflow metrics and pictures, or printed."""
            nonlocal loss
            _tell(plan, message)
            if message.line:
                print(message.line, flush=True)
                return
            if message.checkpoint:
                return
            if message.machine:
                run.system_metrics(message.machine)
                return
            loss = message.metrics.get("held_out/loss", loss)
            progress.update(message.step - progress.done, noteworthy(message.metrics))
            run.metrics(message.metrics, message.step)
            if message.grid and message.conditions is not None:
                from pipeline.report.plots import training_samples  # loads matplotlib, which no worker needs

                run.image("samples", training_samples(message.grid, message.conditions), message.step)

        config = {"plan": plan, "mlflow_run": run.id}
        if not recipe.train.workers:
            _fit(recipe, config | {"report": receive})
            return loss
        with cluster.session(recipe, recipe.train.fewest, "training workers"), _relay(receive) as report:
            _fit(recipe, config | {"report": report})
    return loss


def _tell(plan: TrainingPlan, message: Message) -> None:
    """A worker's message as an event; how busy the machine is, is none."""
    about = {"folder": plan.at(), "step": message.step}
    if message.line:
        events.tell("note", **about, text=message.line)
    elif message.checkpoint:
        events.tell("checkpoint", **about, uri=message.checkpoint)
    elif message.metrics:
        event = "snapshot" if message.grid else "step"
        events.tell(event, **about, total=plan.total, metrics=message.metrics)


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
    plan: TrainingPlan = config["plan"]
    folder, lost = plan.at("checkpoints"), 0
    done = training_state.steps_done(folder)
    while True:
        reason = TAKEN_AWAY
        try:
            _fit_once(recipe, config)
        except Exception as error:
            if not cluster.is_ray(error):
                raise
            found = cluster.translation(error)
            if found.__class__ is not cluster.Lost:
                raise found from None
            reason = found.reason
        if storage.exists(plan.result):
            return
        before, done = done, training_state.steps_done(folder)
        lost = 1 if done > before else lost + 1
        if lost > FAILURES:
            break
        text = f"Lost workers ({reason}); going on from the checkpoint of step {done:,}."
        print(text, flush=True)
        events.tell("warning", text=text)
    raise Unfinished(
        f"training stopped ({reason}) after step {done:,} of {plan.total:,}; what was learnt until then is in"
        f" {folder}, and the same command goes on from there."
    )


def _fit_once(recipe: Recipe, config: dict[str, Any]) -> None:
    """Ray Train around ``train``: places the workers and joins them for DDP.

    It asks for a folder of its own; ours is empty and soon gone, because checkpoints are not Ray's (see
    ``training.state``). Nor does Ray count failures: it knows neither which are final nor whether steps were made.
    """
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    gpu = {"GPU": recipe.cluster.gpus} if recipe.cluster.gpus else {}
    scaling = ScalingConfig(
        num_workers=recipe.train.workers,  # type: ignore[arg-type]  # 2.60 declares the first Ray Train's class
        use_gpu=bool(gpu),
        resources_per_worker={"CPU": recipe.cluster.cpus} | gpu,
    )
    backend = TorchConfig(
        backend="nccl" if recipe.cluster.runs_on == "cuda" else "gloo",
        timeout_s=math.ceil(60 * recipe.train.hang_minutes),
    )
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
