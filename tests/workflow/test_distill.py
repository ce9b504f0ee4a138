"""Alg. 2 on a tiny teacher; tests -m slow adds two DDP workers."""

from __future__ import annotations

import copy
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import perishable
import pytest
import torch
from tiny import tiny, tiny_text
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline import noise, storage
from pipeline.host import events
from pipeline.host.errors import Outage, Refused, Unfinished
from pipeline.models import checkpoints
from pipeline.models.conditions import labels_of
from pipeline.pairs import manifest
from pipeline.pairs import shards as pairs
from pipeline.pairs.facts import PairFacts, conditioning
from pipeline.pairs.rows import Rows
from pipeline.recipe import Recipe
from pipeline.services import cluster, tracking
from pipeline.settings.train import TrainSettings
from pipeline.training import batches as training_data
from pipeline.training import loop, observer
from pipeline.training import plan as training_plan
from pipeline.training import state as training_state
from pipeline.training import step as training_step
from pipeline.training.observer import Message, Observer
from pipeline.training.state import TrainingState, learning_rate
from pipeline.workflow import distill as job
from pipeline.workflow.distill import distill


class Journal:
    """Stands for ``tracking.Run``: keeps what a job logs."""

    def __init__(self) -> None:
        self.id, self.history, self.tags, self.images = "run-1", [], {}, []
        self.resumed: list[str | None] = []

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def metrics(self, values: dict[str, float], step: int = 0) -> None:
        self.history.append((step, values))

    def image(self, key: str, image: np.ndarray, step: int = 0) -> None:
        self.images.append((step, image))

    def tag(self, key: str, value: str) -> None:
        self.tags[key] = value

    def dataset(self, *data: str) -> None:
        self.data = data

    def link(self, job: str, **tags: str) -> None:
        self.tags[f"{job}_run"] = f"{job}-run"

    def mark(self, folder: str) -> None:
        pass

    def conclude(self, result: str, text: str = "", draw_with: str = "") -> None:
        self.result = result

    def system_metrics(self, values: dict[str, float]) -> None:
        self.machine = values

    def curve(self, name: str = "loss") -> dict[int, float]:
        return {step: values[name] for step, values in self.history if name in values}


@pytest.fixture
def journal(monkeypatch: pytest.MonkeyPatch) -> Journal:
    kept = Journal()

    def start(recipe: Recipe, job: str, resume_id: str | None = None) -> Journal:
        kept.resumed.append(resume_id)
        return kept

    monkeypatch.setattr(tracking.Run, "start", start)
    return kept


def make_pairs(recipe: Recipe) -> None:
    """A complete pair set without a teacher: its tokens follow from label and noise, so that they can be learnt."""
    facts = PairFacts.of(recipe)
    length, dim = facts.length, facts.dim
    shards = []
    manifest.claim(recipe.pairs_uri, facts, recipe)
    for begin in range(0, recipe.pairs.count, recipe.pairs.shard_rows):
        ids = np.arange(begin, min(begin + recipe.pairs.shard_rows, recipe.pairs.count))
        labels = facts.labels(ids)
        drawn = noise.gaussian(facts.seed, ids, length, dim)
        tokens = (4 * labels[:, None] + 2 * (drawn[..., 0] > 0) + (drawn[..., 1] > 0)).astype(np.uint16)
        shards.append(pairs.write_shard(recipe.pairs_uri, facts, pairs.table(facts, Rows(ids, labels, drawn, tokens))))
    manifest.finish(recipe.pairs_uri, facts, shards, {"rows": recipe.pairs.count, "seconds": 1.0, "device": "cpu"})


def with_train(recipe: Recipe, **changes: Any) -> Recipe:
    return replace(recipe, train=replace(recipe.train, **changes))


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """40 pairs, of which 8 are held out: 4 steps an epoch of 8 pairs."""
    made = tiny(tmp_path)
    made = replace(made, pairs=replace(made.pairs, count=40, shard_rows=16))
    make_pairs(made)
    return with_train(made, batch=8, epochs=2, lr=3e-3, warmup=2, ema=0.9, log_every=1, checkpoint_every=3, snapshots=2)


@pytest.fixture
def plan(recipe: Recipe) -> training_plan.TrainingPlan:
    return training_plan.check(recipe)


def weights(uri: str) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(storage.local(uri))


# ---- a whole run


def test_the_student_learns_and_is_exported(recipe: Recipe, journal: Journal) -> None:
    recipe = with_train(recipe, epochs=20, snapshots=2, checkpoint_every=1000, schedule="cosine")
    summary = distill(recipe)
    assert "80 steps" in summary
    folder = Path(recipe.student_uri)
    exported = ["model.safetensors", "step-000040.safetensors", "step-000080.safetensors", "tokenizer.safetensors"]
    assert sorted(path.name for path in folder.glob("*.safetensors")) == exported

    loss = list(journal.curve().values())
    assert len(loss) == 80
    assert np.mean(loss[-8:]) < 0.6 * np.mean(loss[:4])
    logged = {name for _, values in journal.history for name in values}
    assert {"cross_entropy", "perceptual", "token_accuracy", "t1/cross_entropy", "t2/perceptual"} <= logged
    assert {"lr", "gradient_norm", "images_per_second", "data_wait", "seconds"} <= logged
    assert {"held_out/loss", "held_out/t2/perceptual"} <= logged
    assert journal.curve("held_out/token_accuracy").keys() == {40, 80}
    assert journal.curve("token_accuracy")[80] > journal.curve("token_accuracy")[1] + 0.2

    step, image = journal.images[-1]
    assert step == 80
    assert image.dtype == np.uint8
    assert image.ndim == 3
    assert journal.tags["pairs_run"] == "pairs-run"
    assert journal.tags["student"] == storage.sha256(f"{recipe.student_uri}/model.safetensors")[:12]
    assert journal.data[2:] == (journal.tags["pairs_fingerprint"], "training")

    settings = checkpoints.metadata(f"{recipe.student_uri}/model.safetensors")
    assert settings["teacher"] == checkpoints.checksums(recipe.teacher)
    assert settings["pairs_fingerprint"] == manifest.read(recipe.pairs_uri)["fingerprint"]
    assert settings["family"] == recipe.teacher.family
    assert settings["step"] == 80
    assert settings["pairs_count"] == recipe.pairs.count
    assert 80 % settings["steps_per_epoch"] == 0
    assert settings["mlflow_run"] == journal.id
    assert (settings["mask"], settings["split"], settings["start_steps"]) == ("released", 1, [1, 2])
    codebook = checkpoints.tokenizer(recipe.teacher).codebook
    checkpoints.student(recipe.teacher, f"{recipe.student_uri}/model.safetensors", codebook, {"mask": settings["mask"]})


def test_events_tell_of_steps_checkpoints_and_snapshots(recipe: Recipe, journal: Journal, tmp_path: Path) -> None:
    """What they name is there when they tell of it."""
    log, plan = tmp_path / "events.jsonl", training_plan.check(recipe)
    with events.written(str(log), job="distill", run=recipe.run):
        distill(recipe)
    told = [json.loads(line) for line in log.read_text().splitlines()]
    assert {line["folder"] for line in told} == {plan.at()}
    assert (told[0]["event"], told[0]["fingerprint"], told[0]["total"]) == ("begun", plan.fingerprint, 8)
    steps = {kind: [line for line in told if line["event"] == kind] for kind in ("step", "snapshot", "checkpoint")}
    assert [line["step"] for line in steps["step"]] == list(range(1, 9))
    assert {line["metrics"]["loss"] for line in steps["step"]} == set(journal.curve().values())
    assert [line["step"] for line in steps["snapshot"]] == list(plan.snapshot_steps)
    assert all("held_out/loss" in line["metrics"] for line in steps["snapshot"])
    assert sorted(line["step"] for line in steps["checkpoint"]) == [3, 6, 8]
    assert Path(steps["checkpoint"][-1]["uri"]).exists()


def test_the_authors_layout_is_written_by_option(recipe: Recipe, journal: Journal) -> None:
    """And a decoder that was copied is linked by option: either way without training again."""
    distill(recipe)
    assert "tokenizer.safetensors" in storage.listing(recipe.student_uri)
    assert "names the decoder's weights at" in distill(with_train(recipe, tokenizer="link"))
    assert "tokenizer.safetensors" not in storage.listing(recipe.student_uri)
    assert "holds the decoder's weights now" in distill(recipe)
    asked = with_train(recipe, export="released")
    assert "student.pth" in distill(asked), "a finished student is not trained again"
    uri = f"{recipe.student_uri}/student.pth"
    content = torch.load(uri, weights_only=True)
    own = weights(f"{recipe.student_uri}/model.safetensors")
    places = checkpoints.family(recipe.teacher).Student.released
    assert len(places) == 2
    for place in places:
        inside = content
        for key in place:
            inside = inside[key]
        assert inside.keys() == own.keys()
        assert all(torch.equal(inside[key], own[key]) for key in own)
    student = checkpoints.student(recipe.teacher, uri, checkpoints.tokenizer(recipe.teacher).codebook)
    assert all(torch.equal(value, own[key]) for key, value in student.state_dict().items())
    assert "Nothing is missing" in distill(asked)


def test_the_authors_layout_needs_one(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints.family(recipe.teacher).Student, "released", ())
    with pytest.raises(ValueError, match=r"train\.export is released, but nobody released"):
        distill(with_train(recipe, export="released"))


def test_the_export_is_the_moving_average(recipe: Recipe, journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a plain loop over the weights of every step."""
    seen: list[dict[str, Tensor]] = []
    advance = TrainingState.advance

    def spied(state: TrainingState, total: int) -> Tensor:
        if not seen:
            seen.append(copy.deepcopy(state.student.state_dict()))
        out = advance(state, total)
        seen.append(copy.deepcopy(state.student.state_dict()))
        return out

    monkeypatch.setattr(TrainingState, "advance", spied)
    distill(recipe)
    found = weights(f"{recipe.student_uri}/model.safetensors")
    assert found.keys() == seen[0].keys()
    for name in found:
        average = seen[0][name].double()
        for step, state in enumerate(seen[1:], start=1):
            decay = min(0.9, (1 + step) / (10 + step))
            average = decay * average + (1 - decay) * state[name].double()
        if found[name].is_floating_point() and found[name].isfinite().all():
            assert torch.allclose(found[name].double(), average, atol=1e-6), name
    head = next(name for name in found if "final_layer_conti.linear.weight" in name)
    assert not torch.equal(found[head], seen[-1][head])


class Stopped(Exception):
    pass


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_an_interrupted_run_goes_on_as_if_nothing_had_been(
    recipe: Recipe, journal: Journal, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    recipe = with_train(recipe, optimizer=optimizer)
    whole = with_train(recipe, uri=f"{recipe.run}/whole")
    distill(whole)
    expected = journal.curve()
    journal.history.clear()

    log = Observer.log

    def interrupted(observer: Observer, metrics: dict[str, float]) -> None:
        log(observer, metrics)
        if observer.state.step == 5:  # inside the second epoch, two steps after the checkpoint
            raise Stopped

    monkeypatch.setattr(Observer, "log", interrupted)
    with pytest.raises(Stopped):
        distill(recipe)
    monkeypatch.setattr(Observer, "log", log)
    assert not Path(recipe.student_uri, "model.safetensors").exists()
    assert [path.name for path in Path(recipe.student_uri, "checkpoints").iterdir()] == ["step-00000003.pt"]
    distill(recipe)
    assert [step for step, values in journal.history if "loss" in values] == [1, 2, 3, 4, 5, 4, 5, 6, 7, 8]
    assert journal.curve() == pytest.approx(expected, rel=1e-6)
    assert journal.resumed == [None, None, journal.id], "the MLflow run goes on too"
    one, other = (weights(f"{r.student_uri}/model.safetensors") for r in (whole, recipe))
    assert all(torch.equal(one[name], other[name]) for name in one)
    kept = sorted(path.name for path in Path(recipe.student_uri, "checkpoints").iterdir())
    assert kept == ["step-00000006.pt", "step-00000008.pt"]


def test_waiting_for_data_is_seen(
    recipe: Recipe, journal: Journal, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Against a stream that takes 0.3 s for each of the batches of one log line in two."""
    quick = training_data.batches

    def slow(*args: Any) -> Iterator[Any]:
        for number, item in enumerate(quick(*args)):
            time.sleep(0.3 if number // 2 % 2 else 0.0)
            yield item

    monkeypatch.setattr(training_data, "batches", slow)
    distill(with_train(recipe, epochs=3, log_every=2, checkpoint_every=100, snapshots=1))
    waits, rates = journal.curve("data_wait"), journal.curve("images_per_second")
    assert list(waits) == [2, 4, 6, 8, 10, 12]
    for step, share in waits.items():
        seconds = 16 / rates[step]
        assert 0 <= share < 1
        if step % 4 == 0:
            assert share * seconds == pytest.approx(0.6, abs=0.2), "what it slept"
    assert max(waits[2], waits[6], waits[10]) < min(waits[4], waits[8], waits[12])
    assert capsys.readouterr().err.startswith("steps 2/12, loss")


def test_the_pace_leaves_out_the_snapshots(recipe: Recipe, journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that ticks once a look, and a million times in a snapshot."""
    now, snapshot = [0.0], Observer.snapshot

    def clock() -> float:
        now[0] += 1
        return now[0]

    def long(observer: Observer) -> None:
        snapshot(observer)
        now[0] += 1e6

    monkeypatch.setattr(observer, "time", SimpleNamespace(perf_counter=clock))
    monkeypatch.setattr(Observer, "snapshot", long)
    distill(recipe)
    assert min(journal.curve("images_per_second").values()) > 8 / 1000


def test_waiting_is_named_from_two_per_cent() -> None:
    metrics = {"loss": 1.25, "lr": 0.1, "images_per_second": 30.0}
    assert job.noteworthy(metrics | {"data_wait": 0.019}) == "loss 1.25, images_per_second 30"
    assert job.noteworthy(metrics | {"data_wait": 0.021}) == "loss 1.25, images_per_second 30, data_wait 0.021"


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flipped(path: Path) -> None:
    """One bit of a weight, deep inside a file that still opens."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def emptied(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.faults("student: newest checkpoint damaged")
@pytest.mark.parametrize("damage", [truncated, flipped, emptied])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(
    recipe: Recipe,
    journal: Journal,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], None],
) -> None:
    recipe = with_train(recipe, checkpoint_every=2)
    whole = with_train(recipe, uri=f"{recipe.run}/whole")
    distill(whole)
    log = Observer.log

    def interrupted(observer: Observer, metrics: dict[str, float]) -> None:
        log(observer, metrics)
        if observer.state.step == 5:
            raise Stopped

    monkeypatch.setattr(Observer, "log", interrupted)
    with pytest.raises(Stopped):
        distill(recipe)
    monkeypatch.setattr(Observer, "log", log)
    folder = Path(recipe.student_uri, "checkpoints")
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000002.pt", "step-00000004.pt"]
    damage(folder / "step-00000004.pt")
    journal.history.clear()
    # Another distance between checkpoints: the damaged one is not written again, and must not crowd out the sound one.
    distill(with_train(recipe, checkpoint_every=3, keep=1))
    assert "step-00000004.pt is damaged; looking for the checkpoint before it." in capsys.readouterr().out
    assert next(step for step, values in journal.history if "loss" in values) == 3
    one, other = (weights(f"{r.student_uri}/model.safetensors") for r in (whole, recipe))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert [path.name for path in folder.iterdir()] == ["step-00000008.pt"]


@pytest.mark.faults("student: a flipped bit anywhere in a checkpoint")
def test_any_flipped_bit_of_a_checkpoint_is_seen_or_harmless(tmp_path: Path) -> None:
    """Torch itself asks no checksums. What zip repeats or does not need may change without harm."""
    path, weight = tmp_path / "step-00000001.pt", torch.arange(64.0)
    torch.save({"weight": weight}, path)
    data = path.read_bytes()
    for place in range(0, len(data), 2):
        path.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
        if content := training_state._content(path):
            assert torch.equal(content["weight"], weight), place


def test_a_checkpoint_is_read_once(recipe: Recipe, journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole, that is; the driver and the worker ask a few bytes whether it has its end. Nor is the teacher read."""
    distill(recipe)
    Path(recipe.student_uri, "model.safetensors").unlink()
    read, content = [], training_state._content
    monkeypatch.setattr(training_state, "_content", lambda path: (read.append(path.name), content(path))[1])
    monkeypatch.setattr(checkpoints, "teacher", lambda settings: pytest.fail("the teacher was read"))
    assert "after 8 steps" in distill(recipe)
    assert read == ["step-00000008.pt"]


def test_training_goes_on_while_a_checkpoint_is_written(
    recipe: Recipe, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The write of step 3 waits for step 4; it holds what step 3 was, and step 6's comes after it."""
    stepped, write, original, written = threading.Event(), training_state._write, loop.step, []

    def waiting(content: dict[str, Any], folder: str, keep: int) -> None:
        if content["step"] == 3:
            assert stepped.wait(60), "training waits for its checkpoint"
        written.append(content["step"])
        write(content, folder, keep)

    def noticed(*args: Any, **more: Any) -> tuple[Tensor, Tensor]:
        out = original(*args, **more)
        if args[2].step == 4:
            stepped.set()
        return out

    monkeypatch.setattr(training_state, "_write", waiting)
    monkeypatch.setattr(loop, "step", noticed)
    distill(with_train(recipe, keep=3))
    assert written == [3, 6, 8]
    monkeypatch.setattr(training_state, "_write", write)
    monkeypatch.setattr(loop, "step", original)
    other = with_train(recipe, keep=3, uri=f"{recipe.run}/other")
    distill(other)
    for name in ("step-00000003.pt", "step-00000006.pt"):
        one, two = (torch.load(Path(r.student_uri, "checkpoints", name), weights_only=True) for r in (recipe, other))
        assert all(torch.equal(one["student"][key], two["student"][key]) for key in one["student"])
        for index, moments in one["optimizer"]["state"].items():
            assert torch.equal(moments["exp_avg"], two["optimizer"]["state"][index]["exp_avg"])


def test_a_large_state_on_a_cpu_is_written_without_a_copy(
    recipe: Recipe, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training waits for it, and goes on from it all the same."""
    recipe = with_train(recipe, epochs=2, checkpoint_every=3)
    distill(recipe)
    large = with_train(recipe, uri=f"{recipe.run}/large")
    monkeypatch.setattr(training_state, "LARGE", 0)
    monkeypatch.setattr(training_state, "_copied", lambda value: pytest.fail("the state was copied"))
    distill(large)
    one, other = (weights(f"{r.student_uri}/model.safetensors") for r in (recipe, large))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    names, others = (training_state.saved(f"{r.student_uri}/checkpoints") for r in (recipe, large))
    assert names == others
    for name in names:
        one, other = (
            torch.load(f"{r.student_uri}/checkpoints/{name}", weights_only=True)["student"] for r in (recipe, large)
        )
        assert all(torch.equal(value, other[key]) for key, value in one.items())


@pytest.mark.faults("student: the disk is full when a checkpoint is written")
def test_a_checkpoint_that_cannot_be_written_stops_the_run(
    recipe: Recipe, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the next is due, or at the end: the thread's error is not lost."""
    for last in (3, 8):
        place = with_train(recipe, uri=f"{recipe.run}/{last}")

        def full(content: dict[str, Any], folder: str, keep: int, last: int = last) -> None:
            if content["step"] == last:
                raise Outage("the disk is full")

        monkeypatch.setattr(training_state, "_write", full)
        with pytest.raises(Outage, match="the disk is full"):
            distill(place)
        assert not Path(place.student_uri, "model.safetensors").exists()


@pytest.mark.faults("student: every checkpoint damaged")
def test_when_every_checkpoint_is_damaged_the_user_decides(recipe: Recipe, journal: Journal) -> None:
    folder = Path(recipe.student_uri, "checkpoints")
    folder.mkdir(parents=True)
    (folder / "step-00000003.pt").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"every checkpoint in .* is damaged \(step-00000003\.pt\); delete them"):
        distill(recipe)
    assert (folder / "step-00000003.pt").exists()


def test_a_finished_run_says_so(recipe: Recipe, journal: Journal) -> None:
    distill(recipe)
    before = storage.sha256(f"{recipe.student_uri}/model.safetensors")
    journal.history.clear()
    assert distill(with_train(recipe, log_every=7, keep=1)).startswith("Nothing is missing")
    assert not journal.history
    assert storage.sha256(f"{recipe.student_uri}/model.safetensors") == before


def test_bf16_trains_float32_weights(recipe: Recipe, journal: Journal) -> None:
    distill(with_train(recipe, epochs=1, uri=f"{recipe.run}/float32"))
    exact = journal.curve()
    journal.history.clear()
    distill(with_train(recipe, epochs=1, precision="bf16"))
    assert journal.curve() == pytest.approx(exact, rel=0.02)
    assert journal.curve() != exact
    stored = weights(f"{recipe.student_uri}/model.safetensors")
    assert not any(value.dtype == torch.bfloat16 for value in stored.values())


def test_auto_is_what_the_device_is_quick_at(recipe: Recipe, journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    """The student is that of the precision said by name, bit for bit."""
    made = {}
    for precision, quick in (("bf16", None), ("fp32", None), ("auto", True), ("auto", False)):
        monkeypatch.setattr(training_step, "quick_at_bf16", lambda device, quick=quick: quick)
        name = f"{precision}-{quick}"
        distill(with_train(recipe, epochs=1, precision=precision, uri=f"{recipe.run}/{name}"))
        made[name] = weights(f"{recipe.run}/{name}/model.safetensors")
    for found, said in (("auto-True", "bf16-None"), ("auto-False", "fp32-None")):
        assert all(torch.equal(value, made[said][key]) for key, value in made[found].items())
    assert not all(torch.equal(value, made["bf16-None"][key]) for key, value in made["fp32-None"].items())


@pytest.mark.parametrize("micro_batch", [1, 3, 8, 50])
def test_gradients_add_up_over_micro_batches(
    recipe: Recipe, plan: training_plan.TrainingPlan, micro_batch: int
) -> None:
    def gradients(size: int) -> tuple[Tensor, dict[str, Tensor]]:
        made = with_train(recipe, micro_batch=size)
        student, loss = training_step.build(made, torch.device("cpu"))
        state = TrainingState(student, made.train)
        monkey = pytest.MonkeyPatch()
        monkey.setattr(state, "advance", lambda total: torch.zeros(()))
        rows = training_data.made_up(plan.layout, 8)
        batch = training_data.noised(rows, 0, made.train, plan.layout, loss.tokenizer.codebook)
        sums, _ = training_step.step(student, loss, state, batch, total=1)
        return sums, {name: p.grad for name, p in student.named_parameters() if p.grad is not None}

    (sums, whole), (added, parts) = gradients(0), gradients(micro_batch)
    assert torch.allclose(sums, added, rtol=1e-5)
    assert whole.keys() == parts.keys()
    for name, value in whole.items():
        assert (value - parts[name]).norm() <= 1e-4 * value.norm() + 1e-9, name


def test_gradients_of_a_part_stay_in_ddps_own_memory(plan: training_plan.TrainingPlan, tmp_path: Path) -> None:
    """Without DDP's memory a batch in parts would hold all gradients twice; the numbers are the same."""
    plan = replace(plan, recipe=with_train(plan.recipe, micro_batch=3))
    settings, device = plan.recipe.train, torch.device("cpu")
    stream = training_data.batches(plan, training_data.stream(plan), 0, 0, 1)
    shares = [next(stream) for _ in range(3)]

    def trained(wrap: bool) -> TrainingState:
        student, loss = training_step.build(plan.recipe, device)
        state = TrainingState(student, settings)
        network = DistributedDataParallel(student, gradient_as_bucket_view=True) if wrap else student
        for epoch, share in shares:
            batch = training_data.noised(share, epoch, settings, plan.layout, loss.tokenizer.codebook)
            training_step.step(network, loss, state, batch, plan.total)
        return state

    alone = trained(wrap=False)
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        together = trained(wrap=True)
    finally:
        torch.distributed.destroy_process_group()
    assert all(weight.grad is not None and not weight.grad.any() for weight in together.student.parameters())
    for one, two in zip(alone.student.parameters(), together.student.parameters(), strict=True):
        assert torch.equal(one, two)


def test_logits_only_and_embeddings_only(recipe: Recipe, journal: Journal) -> None:
    """With one head untrained, nothing of the other is computed or moved."""
    logits = with_train(recipe, uri=f"{recipe.run}/logits", lpips=0.0, split=3, epochs=1, weight_decay=0.0)
    distill(logits)
    assert "perceptual" not in journal.history[0][1]
    embeddings = with_train(
        recipe, uri=f"{recipe.run}/embeddings", cross_entropy=0.0, split=0, epochs=1, weight_decay=0.0
    )
    distill(embeddings)
    teacher = checkpoints.teacher(recipe.teacher)
    start = checkpoints.family(recipe.teacher).Student.from_teacher(teacher, recipe.train.seed).state_dict()
    trained = {r.student_uri: weights(f"{r.student_uri}/model.safetensors") for r in (logits, embeddings)}
    head, conti = "head.weight", "final_layer_conti.linear.weight"
    assert torch.allclose(trained[logits.student_uri][conti], start[conti], atol=1e-7)
    assert not torch.allclose(trained[logits.student_uri][head], start[head], atol=1e-4)
    assert torch.allclose(trained[embeddings.student_uri][head], start[head], atol=1e-7)
    assert not torch.allclose(trained[embeddings.student_uri][conti], start[conti], atol=1e-4)


def test_a_dry_run_plans_and_writes_nothing(recipe: Recipe, journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "on_actor", lambda *args: (6, 1.0))  # of the pairs
    plan = distill(replace(recipe, dry_run=True))
    assert "steps        8 of 8 pairs; 8 are left" in plan
    assert "32 to train on, 8 held out" in plan
    assert "GPU-hours" not in plan
    assert "MB a sample" in plan
    student, _ = training_step.build(recipe, torch.device("cpu"))
    assert f"{sum(p.numel() for p in student.parameters()):,} of the student" in plan
    assert not Path(recipe.student_uri).exists()
    later = replace(recipe, dry_run=True, pairs=replace(recipe.pairs, uri=f"{recipe.run}/not-yet", count=1000))
    assert "8 pairs; 244 are left" in distill(later).replace("244 of ", "")


def test_a_dry_run_for_gpus_plans_memory_without_one(
    recipe: Recipe, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    def connect(recipe: Recipe) -> None:
        raise cluster.NoGpu("this machine has none.")

    monkeypatch.setattr(cluster, "connect", connect)
    plan = distill(replace(with_train(recipe, workers=2), cluster=replace(recipe.cluster, gpus=1), dry_run=True))
    assert "train.micro_batch of at most" in plan
    assert plan.count("time         not measured: this machine has none.") >= 1


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("lpips", "micro_batch", "optimizer", "workers"),
    [(1.0, 3, "adamw", (1, 2)), (0.0, 0, "adamw", 2), (1.0, 3, "muon", 2)],
)
def test_two_workers_follow_the_curve_of_one(
    recipe: Recipe, journal: Journal, ray_cluster: None, lpips: float, micro_batch: int, optimizer: str, workers: Any
) -> None:
    recipe = with_train(recipe, lpips=lpips, split=1 if lpips else 3, optimizer=optimizer)
    alone = with_train(recipe, uri=f"{recipe.run}/alone")
    distill(alone)
    expected = journal.curve()
    journal.history.clear()
    together = with_train(recipe, uri=f"{recipe.run}/together", workers=workers, micro_batch=micro_batch)
    distill(together)
    assert journal.curve() == pytest.approx(expected, rel=1e-4)
    assert journal.images
    one, other = (weights(f"{r.student_uri}/model.safetensors") for r in (alone, together))
    for name, value in one.items():
        assert torch.allclose(value.double(), other[name].double(), atol=1e-4), name


@pytest.mark.faults("student: worker killed")
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_worker_that_dies_is_replaced_from_the_checkpoint(
    recipe: Recipe, journal: Journal, ray_cluster: None
) -> None:
    other = replace(recipe, teacher=replace(recipe.teacher, family="perishable"))
    other = with_train(
        replace(other, pairs=replace(other.pairs, uri=f"{recipe.run}/others")), uri=f"{recipe.run}/other"
    )
    make_pairs(other)
    perishable.FUSE.write_text("5")
    try:
        distill(with_train(other, workers=2))
        assert not perishable.FUSE.exists()
    finally:
        perishable.FUSE.unlink(missing_ok=True)
    steps = [step for step, values in journal.history if "loss" in values]
    assert steps == [1, 2, 3, 4, 5, 4, 5, 6, 7, 8], "the sixth step died, and the checkpoint was at 3"
    broken = journal.curve()
    journal.history.clear()
    distill(recipe)
    assert broken == pytest.approx(journal.curve(), rel=1e-4)


@pytest.mark.faults("student: an error of ours in a worker")
def test_a_sentence_of_a_worker_is_the_last_word(recipe: Recipe, journal: Journal, ray_cluster: None) -> None:
    other = replace(recipe, teacher=replace(recipe.teacher, family="perishable"))
    other = replace(other, pairs=replace(other.pairs, uri=f"{recipe.run}/others"))
    other = with_train(other, uri=f"{recipe.run}/other", workers=1)
    make_pairs(other)
    perishable.REFUSALS.touch()
    try:
        with pytest.raises(Unfinished) as raised:
            distill(other)
        assert perishable.REFUSALS.read_text() == "x", "it is not tried again"
    finally:
        perishable.REFUSALS.unlink()
    assert str(raised.value) == "the loss is inf; lower train.lr."


# ---- bad input


def test_bad_input_is_one_sentence_before_work(recipe: Recipe, journal: Journal) -> None:
    def refused(bad: Recipe, sentence: str, kind: type[Exception] = ValueError) -> None:
        with pytest.raises(kind, match=sentence) as caught:
            distill(bad)
        assert "\n" not in str(caught.value)

    refused(with_train(recipe, start_steps=(1, 9)), "train.start_steps holds 9")
    refused(with_train(recipe, batch=33), "leaves 32 pairs to train on")
    refused(replace(recipe, cluster=replace(recipe.cluster, gpus=1)), "this machine has no GPU")
    refused(replace(recipe, pairs=replace(recipe.pairs, count=41)), "holds 40 pairs and pairs.count is 41")
    refused(replace(recipe, pairs=replace(recipe.pairs, seed=9)), "made otherwise: seed is 1 there and 9 here")
    missing = replace(recipe, pairs=replace(recipe.pairs, uri=f"{recipe.run}/nothing"))
    refused(missing, "holds no pair set; run generate_pairs", FileNotFoundError)
    other = replace(recipe.teacher.filter, top_k=3)
    refused(replace(recipe, teacher=replace(recipe.teacher, filter=other)), "made otherwise: teacher.filter.top_k")
    assert not journal.resumed, "nothing was started"


@pytest.mark.parametrize("content", ["[]", "{}", "3", '{"fingerprint": "x"}', "\xff"])
def test_a_claim_that_is_none_is_one_sentence(recipe: Recipe, journal: Journal, content: str) -> None:
    Path(recipe.student_uri).mkdir()
    Path(recipe.student_uri, "recipe.json").write_text(content, encoding="latin-1")
    with pytest.raises(Refused, match=r"student/recipe\.json is not"):
        distill(recipe)


def test_a_folder_keeps_to_its_recipe(recipe: Recipe, journal: Journal) -> None:
    distill(with_train(recipe, epochs=1))
    with pytest.raises(ValueError, match=r"other settings: train\.lr is 0\.003 there and 0\.001 here"):
        distill(with_train(recipe, epochs=1, lr=1e-3))
    foreign = with_train(recipe, uri=f"{recipe.run}/foreign")
    storage.write_bytes(f"{foreign.student_uri}/model.safetensors", b"")
    with pytest.raises(ValueError, match=r"no recipe\.json to say whose"):
        distill(foreign)


@pytest.mark.faults("student: a gradient that is not finite")
def test_a_gradient_that_is_not_finite_stops_the_run(
    recipe: Recipe, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = loop.step

    def poisoned(network: nn.Module, loss: Any, state: TrainingState, batch: Any, total: int) -> tuple[Tensor, Tensor]:
        if state.step == 4:
            batch = batch._replace(x_t=batch.x_t * float("nan"))
        return original(network, loss, state, batch, total)

    monkeypatch.setattr(loop, "step", poisoned)
    with pytest.raises(
        Unfinished, match=r"the gradient of step 5 is not finite\. Set train\.lr, now 0\.003,"
    ) as caught:
        distill(with_train(recipe, log_every=6))
    assert "train.uri to a new folder" in str(caught.value)
    assert "same command" not in str(caught.value), "that is another advice"
    assert "fp32" not in str(caught.value), "it is set"
    assert [path.name for path in Path(recipe.student_uri, "checkpoints").iterdir()] == ["step-00000003.pt"]


# ---- the parts


def test_batches_are_shared_out_and_resumed_without_a_trace(plan: training_plan.TrainingPlan) -> None:
    stream = training_data.stream(plan)

    def run(done: int, rank: int, world: int) -> Iterator[tuple[int, list[int]]]:
        for epoch, share in training_data.batches(plan, stream, done, rank, world):
            yield epoch, share.ids.tolist()

    whole = list(run(0, 0, 1))
    assert [epoch for epoch, _ in whole] == [0] * 4 + [1] * 4
    assert sorted(i for _, ids in whole[:4] for i in ids) == list(range(32)), "the last 8 rows are held out"
    assert whole[0][1] != whole[4][1], "every epoch has its own order"
    for done in (0, 3, 4, 5, 8):
        assert list(run(done, 0, 1)) == whole[done:]
    halves = [list(run(0, rank, 2)) for rank in (0, 1)]
    assert [(e, a + b) for (e, a), (_, b) in zip(*halves, strict=True)] == whole


def test_a_part_of_a_larger_set_trains_like_a_set_of_that_size(recipe: Recipe) -> None:
    pairs_of = replace(recipe.pairs, count=24, uri=f"{recipe.run}/24")
    alone = replace(recipe, pairs=pairs_of)
    make_pairs(alone)
    plans = [training_plan.check(one) for one in (replace(recipe, pairs=replace(pairs_of, uri=None)), alone)]
    assert plans[0].fingerprint == plans[1].fingerprint
    assert plans[0].facts != training_plan.check(recipe).facts
    batches = [list(training_data.batches(plan, training_data.stream(plan), 0, 0, 1)) for plan in plans]
    assert len(batches[0]) == 4
    for (_, part), (_, whole) in zip(*batches, strict=True):
        assert part.ids.max() < 16, "beside 8 that are held out"
        assert all(torch.equal(getattr(part, name), getattr(whole, name)) for name in ("ids", "noise", "tokens"))
        assert torch.equal(labels_of(part.condition), labels_of(whole.condition))


def test_held_out_rows_are_those_the_stream_leaves_out(recipe: Recipe) -> None:
    plan = training_plan.check(recipe)
    assert training_data.held_out(plan).ids.tolist() == list(range(32, 40))
    smaller = training_plan.check(replace(recipe, pairs=replace(recipe.pairs, count=30)))  # a set that grew since
    assert training_data.held_out(smaller).ids.tolist() == list(range(22, 30))
    assert training_data.stream(smaller).count == 22
    assert sorted(training_data.stream(smaller).order(0, 3)) == list(range(22))


def test_x_t_keeps_the_codes_before_t(plan: training_plan.TrainingPlan) -> None:
    rows = training_data.held_out(plan)
    codebook = torch.randn(24, 4, generator=torch.Generator().manual_seed(0))
    settings = plan.recipe.train
    batch = training_data.noised(training_data.as_pairs(rows), 1, settings, plan.layout, codebook)
    assert set(batch.t.tolist()) == {1, 2}
    for i, t in enumerate(batch.t.tolist()):
        kept = plan.layout.before(t)
        assert torch.equal(batch.x_t[i, :kept], codebook[rows.tokens[i, :kept].astype(int)])
        assert torch.equal(batch.x_t[i, kept:], torch.from_numpy(rows.noise[i, kept:]).float())
    alone = training_data.noised(training_data.as_pairs(rows.take(slice(5, 6))), 1, settings, plan.layout, codebook)
    assert torch.equal(alone.t, batch.t[5:6]), "t belongs to the sample, not to its batch"
    last = replace(settings, start_weights=(1e-9, 1.0))
    assert set(training_data.noised(training_data.as_pairs(rows), 1, last, plan.layout, codebook).t.tolist()) == {2}


def test_choices_are_even_and_differ_by_draw() -> None:
    first, second = (noise.choice(3, range(6000), draw, 3) for draw in (0, 1))
    assert np.abs(np.bincount(first) - 2000).max() < 150
    assert 0.30 < (first == second).mean() < 0.37
    assert np.array_equal(first[100:200], noise.choice(3, np.arange(100, 200), 0, 3))


def test_learning_rate_warms_up_then_stays_or_falls() -> None:
    constant = TrainSettings(lr=1.0, warmup=4)
    assert [learning_rate(constant, s, 12) for s in (0, 1, 3, 4, 11)] == [0.25, 0.5, 1, 1, 1]
    cosine = replace(constant, schedule="cosine")
    assert [learning_rate(cosine, s, 12) for s in (4, 8, 12)] == pytest.approx([1, 0.5, 0])
    assert learning_rate(replace(cosine, warmup=0), 0, 12) == 1


def test_snapshots_are_spread_and_end_with_the_last_step(plan: training_plan.TrainingPlan) -> None:
    assert plan.total == 8
    assert plan.snapshot_steps == [4, 8]
    assert replace(plan, recipe=with_train(plan.recipe, snapshots=3)).snapshot_steps == [3, 5, 8]


def test_facts_leave_out_what_does_not_change_the_student(plan: training_plan.TrainingPlan) -> None:
    def with_(**changes: Any) -> str:
        return replace(plan, recipe=with_train(plan.recipe, **changes)).fingerprint

    assert with_(uri="elsewhere", workers=2, checkpoint_every=9, keep=9, log_every=9, snapshots=9) == plan.fingerprint
    assert with_(compile=True, recompute=True, micro_batch=2) == plan.fingerprint
    assert with_(seed=4) != plan.fingerprint
    assert with_(optimizer="adamw") == plan.fingerprint
    before = "students of before there was a choice keep their fingerprints"
    assert not {"optimizer", "start_weights"} & plan.facts["train"].keys(), before
    assert with_(optimizer="muon") != plan.fingerprint
    weights = (1.0,) * len(plan.recipe.train.start_steps)
    assert with_(start_weights=weights) != plan.fingerprint
    assert with_(precision="bf16") != plan.fingerprint
    gpus = replace(plan.recipe, cluster=replace(plan.recipe.cluster, gpus=1))
    tf32 = replace(gpus, train=replace(gpus.train, precision="tf32"))
    assert replace(plan, recipe=tf32).fingerprint != replace(plan, recipe=gpus).fingerprint == plan.fingerprint
    assert replace(plan, pairs_fingerprint="other").fingerprint != plan.fingerprint


def test_the_grid_shows_teacher_one_step_and_all_steps(plan: training_plan.TrainingPlan) -> None:
    student, loss = training_step.build(plan.recipe, torch.device("cpu"))
    sent: list[Message] = []
    observer = Observer(plan, TrainingState(student, plan.recipe.train), loss, lambda given: given, sent.append, "run")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for parameter in observer.state.average.parameters():
            nn.init.normal_(parameter, std=0.5)  # a fresh student's heads hardly depend on t
    rows = observer.grid()
    assert [row.shape for row in rows] == [(8, 3, 6, 6)] * 3
    codes = loss.tokenizer.codebook[torch.from_numpy(training_data.held_out(plan).tokens.astype(np.int64))]
    image = (loss.tokenizer.decode(codes) * 127.5 + 127.5).clamp(0, 255)
    assert np.abs(rows[0] - image.numpy()).max() <= 0.51
    assert not np.array_equal(rows[1], rows[2])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(observer, "export", lambda uri: None)
        observer.snapshot()
    assert sent[-1].conditions is not None
    assert np.array_equal(sent[-1].conditions, training_data.held_out(plan).conditions[:8]), "what columns stand for"


def test_a_student_of_prompts_learns_and_needs_no_list_of_prompts(tmp_path: Path, journal: Journal) -> None:
    """The prompts come from the shards; the list, which may be gone by then, said only whose they are."""
    made = tiny_text(tmp_path)
    facts, ids, prompts = PairFacts.of(made), np.arange(40), conditioning(made)
    drawn = noise.gaussian(facts.seed, ids, facts.length, facts.dim)
    first = np.array(["three" in prompt for prompt in prompts(ids)])
    tokens = (4 * first[:, None] + 2 * (drawn[..., 0] > 0) + (drawn[..., 1] > 0)).astype(np.uint16)
    manifest.claim(made.pairs_uri, facts, made)
    shards = [
        pairs.write_shard(made.pairs_uri, facts, pairs.table(facts, Rows(ids, prompts(ids), drawn, tokens).take(some)))
        for some in (slice(0, 16), slice(16, 32), slice(32, 40))
    ]
    manifest.finish(made.pairs_uri, facts, shards, {"rows": 40, "seconds": 1.0, "device": "cpu"})
    Path(str(made.captions.uri)).unlink()
    made = with_train(made, batch=8, epochs=6, lr=3e-3, warmup=2, ema=0.9, log_every=1, micro_batch=3)
    made = with_train(made, start_steps=(1, 4), split=9, lpips=0.0)
    distill(made)
    losses = list(journal.curve().values())
    assert np.mean(losses[-4:]) < 0.9 * np.mean(losses[:4])
    assert "cls_embedding.cap_proj.fc1.weight" in weights(training_plan.check(made).result)
