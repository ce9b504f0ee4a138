"""SQLite stores that are killed, locked, half made, moved, or have odd names."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import shutil
import signal
import sqlite3
import threading
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from alembic.runtime.migration import HeadMaintainer
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
from mlflow.tracking._tracking_service import utils as remembered

from pipeline.host.errors import Refused
from pipeline.recipe import Recipe
from pipeline.services import mlflow_store
from pipeline.services.mlflow_store import Store, without_credentials
from pipeline.services.tracking import Run


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return Recipe(name="stored", run=str(tmp_path / "run"))


def killed(make: Callable[[], object], migration: int) -> None:
    """Have a process make a store and die after so many of MLflow's migrations, without a moment to tidy up."""

    def work() -> None:
        made, done = HeadMaintainer.update_to_step, itertools.count(1)

        def counted(self: HeadMaintainer, step: Any) -> None:
            made(self, step)
            if next(done) == migration:
                os.kill(os.getpid(), signal.SIGKILL)

        HeadMaintainer.update_to_step = counted  # type: ignore[method-assign]
        make()

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def make_in_place(place: Path) -> None:
    """As MLflow itself makes a store, and this package did before."""
    place.parent.mkdir()
    SqlAlchemyStore(f"sqlite:///{place}", "file:///nowhere")


def names(recipe: Recipe) -> set[str]:
    return {path.name for path in Path(recipe.run).iterdir()}


def usable(recipe: Recipe) -> Run:
    with Run.start(recipe, "pairs") as run:
        run.tag("it", "works")
    assert run.client.get_run(run.id).data.tags["it"] == "works"
    return run


@pytest.mark.faults("MLflow: killed while it makes its store")
def test_a_job_killed_while_its_store_is_made_leaves_nothing_in_the_way(recipe: Recipe) -> None:
    killed(lambda: mlflow_store.opened(mlflow_store.of(recipe)), 20)
    assert "mlflow.db" not in names(recipe)
    assert len(names(recipe)) >= 2, "the beginning of one, and the lock"
    usable(recipe)
    assert names(recipe) == {"mlflow.db", "mlartifacts"}


@pytest.mark.faults("MLflow: a store that was half made")
@pytest.mark.parametrize("state", ["between two migrations", "without tables", "some tables and no version"])
def test_a_store_that_was_half_made_is_set_aside(
    recipe: Recipe, state: str, capsys: pytest.CaptureFixture[str]
) -> None:
    place = Path(recipe.run, "mlflow.db")
    if state == "between two migrations":
        killed(lambda: make_in_place(place), 30)
    else:
        place.parent.mkdir()
        place.touch()
        Path(f"{place}-journal").write_bytes(b"of no use")
    if state == "some tables and no version":
        with closing(sqlite3.connect(place)) as db:
            db.execute("CREATE TABLE experiments (experiment_id INTEGER)")
    usable(recipe)
    assert "mlflow.db holds no runs" in capsys.readouterr().err
    assert names(recipe) >= {"mlflow.db", "mlflow-unfinished-1.db", "mlartifacts"}
    assert "mlflow.db-journal" not in names(recipe)


def test_a_journal_without_its_database_is_not_applied_to_the_next(recipe: Recipe) -> None:
    Path(recipe.run).mkdir()
    for suffix in mlflow_store.JOURNALS:
        Path(recipe.run, f"mlflow.db{suffix}").write_bytes(b"of a database that was deleted")
    usable(recipe)
    assert names(recipe) == {"mlflow.db", "mlartifacts"}


def test_jobs_that_start_at_once_share_a_store_and_an_experiment(recipe: Recipe) -> None:
    runs, trouble = [], []

    def start() -> None:
        try:
            runs.append(usable(recipe))
        except Exception as error:
            trouble.append(error)

    threads = [threading.Thread(target=start) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert trouble == []
    experiments = {run.client.get_run(run.id).info.experiment_id for run in runs}
    assert (len(runs), len(experiments)) == (3, 1)
    assert names(recipe) == {"mlflow.db", "mlartifacts"}


def test_a_store_with_runs_and_one_of_something_else_are_left_alone(recipe: Recipe, blank_store: Path) -> None:
    shutil.copytree(blank_store, recipe.run)
    first = usable(recipe)
    second = usable(recipe)
    assert len(second.client.search_runs([first.client.get_run(first.id).info.experiment_id])) == 2
    older = replace(recipe, run=f"{recipe.run}-older")  # MLflow remembers what it opened in this process
    shutil.copytree(recipe.run, older.run)
    with closing(sqlite3.connect(Path(older.run, "mlflow.db"))) as db, db:
        db.execute("UPDATE alembic_version SET version_num = '89d4b8295536'")
    with pytest.raises(Refused, match=r"another version of MLflow made it: copy it, then run mlflow db upgrade"):
        usable(older)
    place = Path(recipe.run, "mlflow.db")
    place.unlink()
    with closing(sqlite3.connect(place)) as db, db:
        db.execute("CREATE TABLE addresses (name TEXT)")
        db.execute("INSERT INTO addresses VALUES ('mine')")
    with pytest.raises(Refused, match=r"cannot be used .*; move the file away"):
        usable(recipe)
    with closing(sqlite3.connect(place)) as db:
        assert [name for (name,) in db.execute("SELECT name FROM sqlite_master")] == ["addresses"]
    place.write_bytes(b"no database at all" * 1000)
    with pytest.raises(Refused, match=r"\(file is not a database\); move the file away"):
        usable(recipe)


@pytest.mark.faults("MLflow: folder moved")
def test_a_run_folder_that_was_moved_keeps_its_artifacts(
    recipe: Recipe, blank_store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(blank_store, recipe.run)
    with Run.start(recipe, "pairs") as run:
        run.artifact("card.md", b"hello")
    elsewhere = replace(recipe, run=f"{recipe.run} of 1 May")
    shutil.move(recipe.run, elsewhere.run)
    remembered._artifact_repos_cache.clear()  # as in another process
    with Run.start(elsewhere, "pairs", run.id) as again:
        again.artifact("more.md", b"more")
    assert "was elsewhere before" in capsys.readouterr().err
    client = again.client
    assert {file.path for file in client.list_artifacts(run.id)} == {"card.md", "more.md", "recipe.yaml"}
    assert Path(client.download_artifacts(run.id, "card.md")).read_bytes() == b"hello"
    assert not Path(recipe.run).exists(), "nothing is written where the folder was"
    usable(elsewhere)
    assert "was elsewhere" not in capsys.readouterr().err
    last = replace(recipe, run=f"{recipe.run} of 2 May")
    shutil.move(elsewhere.run, last.run)
    remembered._artifact_repos_cache.clear()
    assert mlflow_store.addresses(last.run).startswith("stored: http://127.0.0.1:5000/"), "what `make ui` asks"
    assert "was elsewhere before" in capsys.readouterr().err
    shown = mlflow_store.loaded().MlflowClient(f"sqlite:///{last.run}/mlflow.db")
    assert Path(shown.download_artifacts(run.id, "card.md")).read_bytes() == b"hello"
    elsewhere = last
    copy = replace(recipe, run=f"{recipe.run}-copy")
    shutil.copytree(elsewhere.run, copy.run)
    remembered._artifact_repos_cache.clear()  # as in another process
    with Run.start(copy, "pairs", run.id) as third:
        third.artifact("third.md", b"third")
    assert not list(Path(elsewhere.run).rglob("third.md")), "a copy has artifacts of its own"


@pytest.mark.parametrize("name", ["per%20cent", "a?x=1"])
def test_a_folder_that_no_address_can_name_is_refused_at_once(recipe: Recipe, tmp_path: Path, name: str) -> None:
    odd = replace(recipe, run=str(tmp_path / name))
    character = next(c for c in ("%", "?", "\\n", "\\t") if c in repr(name))
    with pytest.raises(Refused, match=rf"run is .*, and '\{character}' has a meaning of its own") as caught:
        mlflow_store.check(odd)
    assert "\n" not in str(caught.value)


def test_other_odd_folders_hold_their_store(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = replace(recipe, run=str(tmp_path / """a #1 [x] * 'q' "d" & + ; ~ = @ : ü € \\ $HOME"""))
    mlflow_store.check(odd)
    with Run.start(odd, "pairs") as run:
        run.artifact("card.md", b"hello")
    assert names(odd) == {"mlflow.db", "mlartifacts"}
    assert Path(run.client.download_artifacts(run.id, "card.md")).read_bytes() == b"hello"
    assert {path.name for path in tmp_path.iterdir()} == {Path(odd.run).name}
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    mlflow_store.check(replace(recipe, run="100%"))


def test_the_address_leads_to_the_experiment(recipe: Recipe, blank_store: Path) -> None:
    with pytest.raises(Refused, match=r"mlflow.db is not there; run a job first"):
        mlflow_store.addresses(recipe.run)
    shutil.copytree(blank_store, recipe.run)
    usable(recipe)
    assert mlflow_store.addresses(recipe.run) == (
        "stored: http://127.0.0.1:5000/#/experiments/1/runs?workflowType=machine_learning"
    )


def test_the_advice_fits_the_store() -> None:
    for uri, error, advice in [
        ("http://u:secret@host", ConnectionError("refused"), "start its server, set MLFLOW_TRACKING_URI to another"),
        ("sqlite:///x.db", sqlite3.OperationalError("database is locked"), "another process is writing to it"),
    ]:
        with pytest.raises(Refused, match=advice) as caught, mlflow_store.usable(Store(uri)):
            raise error
        assert "secret" not in str(caught.value)
    assert without_credentials("postgresql://u:p@h/db and s3://b/k") == "postgresql://h/db and s3://b/k"
