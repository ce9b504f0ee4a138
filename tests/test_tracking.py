"""pytest tests/test_tracking.py: a SQLite store in a temporary folder, an unreachable server, no network."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline import tracking
from pipeline.recipe import Recipe, TeacherSettings, fingerprint
from pipeline.tracking import Run, flattened, without_credentials


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    teacher = TeacherSettings(checkpoint="s3://bucket/var.pth")
    return Recipe(name="tracked", run=str(tmp_path / "run"), teacher=teacher)


def stored(run: Run):
    return run._client.get_run(run.id)


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
        assert run.previous("pairs", pairs_fingerprint=digest) == pairs.id
        assert run.previous("pairs", pairs_fingerprint="other") is None
        assert run.previous("distill") is None, "a run must not find itself"
        run.dataset("pairs", recipe.pairs_uri, digest, "training")
        run.metrics({"loss": 2.0, "lr": 1e-3}, step=10)
        run.metrics({"loss": 1.0}, step=20)
        run.image("samples", np.full((8, 8, 3), 255, np.uint8), step=20)
        card = Path(recipe.run, "card.md")
        card.write_text("hello")
        run.artifact(card, "notes")

    found = stored(run)
    assert found.data.tags["job"] == "distill"
    assert found.data.params["train.lr"] == "0.0001"
    assert found.data.params["train.start_steps"] == "[1, 6]"
    assert found.data.params["teacher.checkpoint"] == "s3://bucket/var.pth"
    assert [(m.step, m.value) for m in run._client.get_metric_history(run.id, "loss")] == [
        (10, 2.0),
        (20, 1.0),
    ]
    (data,) = found.inputs.dataset_inputs
    assert (data.dataset.digest, data.tags[0].value) == (digest[:36], "training")
    assert "secret" not in stored(pairs).inputs.dataset_inputs[0].dataset.source
    artifacts = {a.path for a in run._client.list_artifacts(run.id)}
    assert artifacts == {"images", "notes"}
    assert list(Path(recipe.run, "mlartifacts").rglob("card.md")), "artifacts belong in the run folder"


def test_a_run_carries_the_provenance_of_a_submitted_job(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_RUN_CONTEXT", '{"mlflow.source.git.commit": "abc", "job": "other"}')
    with Run.start(recipe, "pairs") as run:
        tags = stored(run).data.tags
    assert (tags["mlflow.source.git.commit"], tags["job"]) == ("abc", "pairs")
    assert tags["mlflow.user"]


def test_a_run_resumes_under_its_id_and_shows_how_it_ended(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError), Run.start(recipe, "distill") as first:
        raise RuntimeError
    assert stored(first).info.status == "FAILED"
    with pytest.raises(KeyboardInterrupt), Run.start(recipe, "distill", resume_id=first.id) as second:
        assert second.id == first.id
        assert stored(second).info.status == "RUNNING"
        raise KeyboardInterrupt
    assert stored(second).info.status == "KILLED"
    with Run.start(recipe, "distill", resume_id="0" * 32) as third:
        assert third.id != first.id
    assert "a new run takes its place" in capsys.readouterr().err


def test_an_unreachable_server_is_one_sentence_before_work(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(ValueError, match=r"the MLflow store http://127\.0\.0\.1:9 cannot be used") as caught:
        Run.start(recipe, "distill")
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_store_that_dies_on_the_way_costs_a_warning(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = []

    def gone(*args: object, **kwargs: object) -> None:
        calls.append(args)
        raise ConnectionError("gone\nand more")

    with Run.start(recipe, "distill") as run:
        monkeypatch.setattr(run._client, "log_batch", gone)
        run.metrics({"loss": 1.0}, step=1)
        run.metrics({"loss": 1.0}, step=2)
        assert len(calls) == 1, "a dead store is left alone for a while"
        monkeypatch.setattr(tracking, "PAUSE", 0.0)
        run._quiet_until = 0.0
        run.metrics({"loss": 1.0}, step=3)
        assert len(calls) == 2
    assert capsys.readouterr().err.count("does not take this run's data (gone)") == 1
    assert stored(run).info.status == "FINISHED"


def test_a_remote_run_folder_has_its_store_on_this_machine(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with Run.start(replace(recipe, run="s3://bucket/run"), "distill") as run:
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
        before._client.set_tag(before.id, "kept", "yes")
        run._client.update_run(run.id, status="RUNNING")
        for other in (before, after):
            run.adopt(other.id, variant="base")
        run.adopt("0" * 32, variant="gone")  # a warning and no more
    tags = [stored(other).data.tags for other in (before, after)]
    assert [(one["ablate"], one["variant"]) for one in tags] == [(run.id, "base")] * 2
    assert tags[0]["kept"] == "yes"
    started = [stored(one).info.start_time for one in (before, run, after)]
    assert ("mlflow.parentRunId" in tags[0]) == (started[0] >= started[1])
    assert tags[1]["mlflow.parentRunId"] == run.id


def test_flattened_names_every_leaf_and_hides_credentials() -> None:
    tree = {"a": {"b": 1, "c": {}}, "d": None, "e": ["x://u:p@h/"], "f": "plain@text"}
    assert flattened(tree) == {"a.b": "1", "a.c": "{}", "d": "null", "e": '["x://h/"]', "f": "plain@text"}
    assert without_credentials("postgresql://u:p@h/db and s3://b/k") == "postgresql://h/db and s3://b/k"
