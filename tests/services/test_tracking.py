"""A SQLite store in a temporary folder, servers that hang or are gone, no network."""

from __future__ import annotations

import json
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from mlflow.exceptions import MlflowException

from pipeline.host.errors import Refused
from pipeline.recipe import Recipe, fingerprint
from pipeline.services import mlflow_store, tracking
from pipeline.services.mlflow_names import PARAMETERS, fitted, flattened, parameters
from pipeline.services.run_note import ABOUT
from pipeline.services.tracking import MARKER, Run
from pipeline.settings.studies import AblationSettings
from pipeline.settings.teacher import TeacherSettings


@pytest.fixture
def recipe(tmp_path: Path, blank_store: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copytree(blank_store, tmp_path / "run")
    teacher = TeacherSettings(checkpoint="s3://bucket/var.pth")
    return Recipe(name="tracked", run=str(tmp_path / "run"), teacher=teacher)


def stored(run: Run) -> Any:
    return run.client.get_run(run.id)


def files(run: Run) -> set[str]:
    return {file.path for file in run.client.list_artifacts(run.id)}


def test_one_run_from_start_to_end(recipe: Recipe) -> None:
    digest = fingerprint({"seed": 1})
    with Run.start(recipe, "pairs") as pairs:
        pairs.dataset("pairs", "s3://key:secret@bucket/pairs", digest, "output")
        pairs.tag("pairs_fingerprint", digest)
    assert Path(recipe.run, "mlflow.db").exists()
    assert stored(pairs).info.status == "FINISHED"

    with Run.start(recipe, "distill") as run:
        assert stored(run).info.status == "RUNNING"
        assert stored(run).info.experiment_id == stored(pairs).info.experiment_id
        assert stored(run).info.run_name == "distill"
        assert "There is no result yet" in stored(run).data.tags["mlflow.note.content"]
        run.link("pairs", pairs_fingerprint=digest)
        run.link("evaluate", pairs_fingerprint="other")
        run.link("distill")  # a run must not find itself
        run.dataset("pairs", recipe.pairs_uri, digest, "training")
        run.metrics({"loss": 2.0, "lr": 1e-3}, step=10)
        run.metrics({"loss": 1.0}, step=20)
        run.image("samples", np.full((8, 8, 3), 255, np.uint8), step=20)
        run.artifact("card.md", lambda: b"hello")
        run.table("scores.json", ["name", "score"], [["a", 1.5]])
        run.conclude("455 steps", "| a | table |", draw_with="/runs/a b/student")

    found = stored(run)
    assert found.info.run_name == "distill: 455 steps"
    assert found.data.tags["job"] == "distill"
    assert found.data.tags["pairs_run"] == pairs.id
    assert not {"evaluate_run", "distill_run"} & found.data.tags.keys()
    note = found.data.tags["mlflow.note.content"].split("\n\n")
    assert note[:2] == [f"**455 steps.** {ABOUT['distill']}", f"Folder: `{recipe.student_uri}`"]
    place = f"#/experiments/{found.info.experiment_id}/runs/{pairs.id}?workflowType=machine_learning"
    assert note[2] == f"Goes on from: [generate_pairs]({place})"
    assert note[-2] == "```\npython jobs/sample.py --student '/runs/a b/student' --out samples.png\n```"
    assert note[-1] == "| a | table |"
    assert found.data.params["train.lr"] == "0.0001"
    assert found.data.params["train.start_steps"] == "[1, 6]"
    assert found.data.params["teacher.checkpoint"] == "s3://bucket/var.pth"
    history = run.client.get_metric_history(run.id, "loss")
    assert [(m.step, m.value) for m in history] == [(10, 2.0), (20, 1.0)]
    (data,) = found.inputs.dataset_inputs
    assert (data.dataset.digest, data.tags[0].value) == (digest[:36], "training")
    assert "secret" not in stored(pairs).inputs.dataset_inputs[0].dataset.source
    assert files(run) == {"images", "card.md", "scores.json", "recipe.yaml"}
    assert json.loads(found.data.tags["mlflow.loggedArtifacts"]) == [{"path": "scores.json", "type": "table"}]
    assert list(Path(recipe.run, "mlartifacts").rglob("card.md")), "artifacts belong in the run folder"
    (place,) = Path(recipe.run, "mlartifacts", run.id).rglob("recipe.yaml")
    assert yaml.safe_load(place.read_text()) == recipe.resolved()


def test_a_run_carries_the_provenance_of_a_submitted_job(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_RUN_CONTEXT", '{"mlflow.source.git.commit": "abc", "job": "other"}')
    monkeypatch.setattr("sys.argv", ["jobs/distill.py", "--run", "s3://key:secret@bucket/a b"])
    with Run.start(recipe, "pairs") as run:
        tags = stored(run).data.tags
    assert (tags["mlflow.source.git.commit"], tags["job"]) == ("abc", "pairs")
    assert tags["mlflow.user"]
    assert "\npython jobs/distill.py --run 's3://bucket/a b'\n" in tags["mlflow.note.content"]


def test_a_run_resumes_under_its_id_and_shows_how_it_ended(recipe: Recipe) -> None:
    with pytest.raises(RuntimeError), Run.start(recipe, "distill") as first:
        raise RuntimeError
    assert stored(first).info.status == "FAILED"
    with pytest.raises(KeyboardInterrupt), Run.start(recipe, "distill", resume_id=first.id) as second:
        assert second.id == first.id
        assert stored(second).info.status == "RUNNING"
        raise KeyboardInterrupt
    assert stored(second).info.status == "KILLED"


def test_system_metrics_are_those_of_one_run_over_its_seconds(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """And of a run that goes on, the later ones come after the earlier ones."""
    told = threading.Event()

    @contextmanager
    def sampled(report: Callable[[dict[str, float]], object]) -> Iterator[None]:
        report({"cpu_utilization_percentage": 12.5, "gpu_0_power_usage_watts": 700.0})
        told.set()
        yield

    monkeypatch.setattr(tracking.system_metrics, "sampled", sampled)
    with Run.start(recipe, "pairs") as first, first.watching_this_machine():
        pass
    begun = stored(first).info.start_time / 1000
    monkeypatch.setattr(tracking.time, "time", lambda: begun + 3600.5)
    with Run.start(recipe, "pairs", first.id) as again, again.watching_this_machine():
        pass
    assert told.is_set()
    assert stored(first).data.metrics.keys() == {"system/cpu_utilization_percentage", "system/gpu_0_power_usage_watts"}
    history = first.client.get_metric_history(first.id, "system/gpu_0_power_usage_watts")
    assert [(one.step < 60, one.step == 3600) for one in history] == [(True, False), (False, True)]
    assert len(first.client.search_runs([stored(first).info.experiment_id])) == 1


@pytest.mark.faults("MLflow: run deleted")
def test_a_new_run_takes_the_place_of_one_that_is_gone(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    with Run.start(recipe, "distill") as first:
        pass
    first.client.delete_run(first.id)
    for gone in (first.id, "0" * 32):
        with Run.start(recipe, "distill", resume_id=gone) as run:
            run.adopt(gone, variant="base")
            run.tag("it", "works")
        assert run.id != gone
        assert stored(run).data.tags["it"] == "works"
        said = capsys.readouterr().err
        assert f"MLflow run {gone} is not in this store any more; a new run takes its place." in said
        assert f"MLflow run {gone} is not in this store any more; nothing links to it." in said
        assert "did not take" not in said


@pytest.mark.faults("MLflow: experiment deleted")
def test_an_experiment_that_was_deleted_is_restored(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    with Run.start(recipe, "distill") as first:
        pass
    first.client.delete_experiment(stored(first).info.experiment_id)
    with Run.start(recipe, "distill", first.id) as run:
        assert run.id == first.id, "it is restored with its experiment"
    assert "The MLflow experiment tracked had been deleted; it and its runs are restored." in capsys.readouterr().err
    assert stored(run).info.status == "FINISHED"


@pytest.mark.faults("MLflow: job killed")
def test_a_run_whose_job_was_killed_runs_no_more_once_another_does_its_work(recipe: Recipe) -> None:
    first = Run.start(recipe, "evaluate")
    first.mark(recipe.report_uri)  # and no more of it
    with Run.start(recipe, "evaluate") as second:
        second.mark(recipe.report_uri)
    assert (stored(first).info.status, stored(second).info.status) == ("KILLED", "FINISHED")
    with Run.start(recipe, "evaluate") as third:
        third.mark(recipe.report_uri)
    assert stored(second).info.status == "FINISHED"


def test_a_start_that_fails_leaves_no_run_behind(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    with Run.start(recipe, "distill") as first:
        pass

    def fail(*args: object, **kwargs: object) -> None:
        raise MlflowException("not now")

    monkeypatch.setattr("mlflow.MlflowClient.log_batch", fail)
    monkeypatch.setattr("mlflow.MlflowClient.log_artifact", fail)
    with pytest.raises(RuntimeError), Run.start(recipe, "distill"):
        raise RuntimeError
    monkeypatch.setattr("mlflow.MlflowClient.create_run", fail)
    with pytest.raises(Refused, match="not now"):
        Run.start(recipe, "distill")
    runs = first.client.search_runs([stored(first).info.experiment_id])
    assert sorted(run.info.status for run in runs) == ["FAILED", "FINISHED"]


def test_an_unreachable_server_is_one_sentence_before_work(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(ValueError, match=r"the MLflow store http://127\.0\.0\.1:9 cannot be used") as caught:
        Run.start(recipe, "distill")
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.fixture
def silent() -> Iterator[str]:
    """The address of a server that accepts every connection and never answers."""
    listener, connections = socket.create_server(("127.0.0.1", 0)), []

    def accept() -> None:
        while True:
            try:
                connections.append(listener.accept())
            except OSError:
                return

    thread = threading.Thread(target=accept)
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    for connection, _ in connections:
        connection.close()
    thread.join()


@pytest.mark.faults("MLflow: hangs")
def test_a_job_does_not_wait_for_a_server_that_hangs(
    recipe: Recipe, silent: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "600")
    monkeypatch.setattr(tracking, "PATIENCE", 0.05)
    done = 0
    with Run.start(recipe, "distill") as run:
        run.mark(recipe.student_uri)
        hanging = tracking.mlflow_store.loaded().MlflowClient(tracking_uri=silent)
        monkeypatch.setattr(run, "_client", hanging)
        for step in range(10_000):  # a call that waited would not come back within the test's time
            run.metrics({"loss": 1.0}, step)
            done += 1
        run.link("pairs", pairs_fingerprint="x")
        run.conclude("a title")
    assert done == 10_000
    assert "did not take all of this run" in capsys.readouterr().err
    assert Path(recipe.student_uri, MARKER).exists()


@pytest.mark.faults("MLflow: one call fails")
def test_what_failed_is_logged_at_the_end_or_by_the_same_command(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def log(run: Run) -> None:
        run.artifact("report.md", b"a report")
        run.tag("report_fingerprint", "abc")
        run.metrics({"score": 5.0})

    first = Run.start(recipe, "evaluate")
    logged = first.client.log_artifact

    def fail(run_id: str, path: str = "", *args: Any, **rows: Any) -> None:
        if rows or path.endswith("report.md"):
            raise OSError("disk full\nand more")
        logged(run_id, path, *args)

    monkeypatch.setattr(first.client, "log_artifact", fail)
    monkeypatch.setattr(first.client, "log_batch", fail)
    with first:
        first.mark(recipe.report_uri)
        log(first)
    said = capsys.readouterr().err
    assert said.count("does not take this run's data (disk full)") == 1
    assert "of its entries are missing; the same command tries again" in said
    assert files(first) == {"recipe.yaml"}
    assert stored(first).data.tags["report_fingerprint"] == "abc", "what came after it is there"

    tracking.complete(recipe, "evaluate", recipe.report_uri, log)
    assert files(first) == {"recipe.yaml", "report.md"}
    assert stored(first).data.metrics == {"score": 5.0}
    assert stored(first).data.params["teacher.checkpoint"] == "s3://bucket/var.pth"
    assert stored(first).info.status == "FINISHED"
    assert not Path(recipe.report_uri, MARKER).exists()
    tracking.complete(recipe, "evaluate", recipe.report_uri, lambda run: pytest.fail("nothing is missing"))


def test_a_file_that_cannot_be_read_does_not_turn_success_into_failure(recipe: Recipe) -> None:
    def read() -> bytes:
        raise Refused("s3://bucket/manifest.json could not be read")

    with Run.start(recipe, "pairs") as run:
        run.artifact("manifest.json", read)
    assert stored(run).info.status == "FINISHED"


def test_a_run_is_completed_later_where_there_is_no_store_now(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place = Path(recipe.report_uri, MARKER)
    place.parent.mkdir(parents=True)
    place.write_text('{"mlflow_run": "abc"}')
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    tracking.complete(recipe, "evaluate", recipe.report_uri, lambda run: pytest.fail("no store"))
    assert "is not complete, and stays so for now: the MLflow store" in capsys.readouterr().err
    assert place.exists()


def test_a_remote_run_folder_has_its_store_on_this_machine(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    remote = replace(recipe, run="s3://bucket/run")
    assert "cannot live" in mlflow_store.of(remote).note
    assert capsys.readouterr().err == "", "who asks where it is only asks"
    with Run.start(remote, "distill") as run:
        pass
    place = tmp_path / "distilled-decoding" / "mlflow.db"
    assert run.uri == f"sqlite:///{place}"
    assert place.exists()
    assert f"it is {place} on this machine; set MLFLOW_TRACKING_URI" in capsys.readouterr().err


def test_a_run_adopts_others_and_lists_below_it_those_that_began_later(recipe: Recipe) -> None:
    with (
        Run.start(recipe, "pairs") as before,
        Run.start(recipe, "ablate") as run,
        Run.start(recipe, "distill") as after,
    ):
        before.client.set_tag(before.id, "kept", "yes")
    with Run.start(recipe, "ablate", run.id) as run:
        run.adopt(before.id, variant="base")
        run.adopt(before.id, variant="base")
        run.adopt_newest("distill", {}, variant="base")
        run.adopt_newest("evaluate", {"report_fingerprint": "x"}, variant="there is none")
    tags = [stored(other).data.tags for other in (before, after)]
    assert [(one["ablate"], one["variant"]) for one in tags] == [(run.id, "base")] * 2
    assert tags[0]["kept"] == "yes"
    assert [stored(one).info.run_name for one in (before, after)] == ["base: generate_pairs", "base: distill"]
    started = [stored(one).info.start_time for one in (before, run, after)]
    assert ("mlflow.parentRunId" in tags[0]) == (started[0] >= started[1])
    assert tags[1]["mlflow.parentRunId"] == run.id


def test_names_outside_mlflows_alphabet_are_made_fit(recipe: Recipe) -> None:
    odd = {"a: b → c": 1, "a: b ← c": 2, "//x/../y": 3, "": 4, "é/" + "x" * 300: 5, "plain.lr": 6}
    names = dict(zip(fitted(odd), odd.values(), strict=True))
    assert names == {"a_ b _ c": 1, "a_ b _ c_2": 2, "x/y": 3, "_": 4, "é/" + "x" * 243: 5, "plain.lr": 6}
    axes = {"Schritte: 1 → 2 (bf16)": [{"train.lr": 1.0}], "train.lr": [1e-3]}
    named = replace(recipe, name="Ziffern: 100 % 'neu' " + 500 * "x", ablate=AblationSettings(axes=axes))
    with Run.start(named, "ablate") as run:
        run.metrics({"Schritte: 1 → 2 (bf16)/DD 1 step/mean": 1.0})
        run.tag("variant", "x" * 10_000)
    found = stored(run)
    assert found.data.params["ablate.axes.Schritte_ 1 _ 2 _bf16_"] == '[{"train.lr": 1.0}]'
    assert found.data.metrics == {"Schritte_ 1 _ 2 _bf16_/DD 1 step/mean": 1.0}
    assert len(found.data.tags["variant"]) == 5000
    assert found.info.status == "FINISHED"


def test_parameters_are_those_of_the_job_without_what_is_not_set(recipe: Recipe) -> None:
    found = {job: set(parameters(recipe, job)) for job in PARAMETERS}
    assert all("name" in names for names in found.values())
    assert {name.split(".")[0] for name in found["evaluate"]} == {"name", "teacher", "evaluate"}
    assert {name for name in found["distill"] if name.startswith("pairs")} == {"pairs.count"}
    assert "train.uri" not in found["distill"]


def test_flattened_names_every_leaf_and_hides_credentials() -> None:
    tree = {"a": {"b": 1, "c": {}}, "d": None, "e": ["x://u:p@h/"], "f": "plain@text"}
    assert flattened(tree) == {"a.b": "1", "a.c": "{}", "d": "null", "e": '["x://h/"]', "f": "plain@text"}
