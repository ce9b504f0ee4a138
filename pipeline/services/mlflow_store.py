"""Where MLflow keeps the runs of a recipe: a server that the environment names, or SQLite in the run's folder.

A SQLite store is made under another name and appears when it is whole, so a job that is killed meanwhile leaves nothing
in the way of the next. ``python -m pipeline.services.mlflow_store RUN`` says where the runs of a folder are shown
(``make ui``).
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import sqlite3
import sys
import unicodedata
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

from pipeline import storage
from pipeline.files import places
from pipeline.host.errors import Refused, Unfinished
from pipeline.recipe import Recipe

SETTINGS = {
    "MLFLOW_ENABLE_ASYNC_LOGGING": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # the default of 7 blocks for minutes
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "GIT_PYTHON_REFRESH": "quiet",
}
ARTIFACTS = "mlartifacts"  # the folder beside a database
JOURNALS = ("-journal", "-wal", "-shm")  # what SQLite keeps beside a database that is in use or was killed
PATIENCE = 20.0  # seconds to wait for another process to let go of the database
FILLED = ("alembic_version", "workspaces")  # tables that MLflow's migrations put rows into
PAGE = "#/experiments/{place}?workflowType=machine_learning"  # else MLflow shows its pages for language models
PLACES = (  # where the database holds places of artifacts
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)


class Store(NamedTuple):
    """A tracking URI, where a new experiment's artifacts go (None: the server decides), and the file of a SQLite one.

    ``note`` says what a user would not expect of the place, for whoever opens it.
    """

    uri: str
    artifacts: str | None = None
    database: Path | None = None
    note: str = ""


def loaded() -> ModuleType:
    """MLflow, imported when first needed and made quiet; the user's environment variables win."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    import mlflow

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return mlflow


def check(recipe: Recipe) -> None:
    """Before any work: ValueError, one sentence, for a run folder that no SQLite store can be addressed in."""
    if os.environ.get("MLFLOW_TRACKING_URI") or storage.is_remote(recipe.run):
        return
    folder = storage.resolve(recipe.run)
    if odd := next((c for c in folder if c in "%?" or unicodedata.category(c) in ("Cc", "Cs")), None):
        raise Refused(
            f"run is {folder!r}, and {odd!r} has a meaning of its own in the address of MLflow's SQLite store there;"
            " choose a folder without it, or set MLFLOW_TRACKING_URI to a store elsewhere."
        )


def of(recipe: Recipe) -> Store:
    """The store of a recipe's runs: MLFLOW_TRACKING_URI, or SQLite at <run>/mlflow.db with artifacts beside it.

    Where ``run`` is remote, SQLite is in ~/distilled-decoding.
    """
    chosen = os.environ.get("MLFLOW_TRACKING_URI")
    if chosen:
        return named(chosen)
    check(recipe)
    folder, note = storage.resolve(recipe.run), ""
    if storage.is_remote(folder):
        folder = str(places.home())
        note = (
            f"run is {recipe.run}, where MLflow's SQLite store cannot live: it is {folder}/mlflow.db on this machine;"
            " set MLFLOW_TRACKING_URI for a server."
        )
    return _in_file(f"sqlite:///{folder}/mlflow.db", Path(folder, "mlflow.db"))._replace(note=note)


def named(uri: str) -> Store:
    """The store at a tracking URI. Left to itself, MLflow would put a database's files into the working directory."""
    if not uri.startswith("sqlite"):
        return Store(uri)
    from sqlalchemy.engine import make_url

    with usable(Store(uri)):
        file = make_url(uri).database
    if not file or file == ":memory:" or file.startswith("file:"):
        return Store(uri)
    return _in_file(uri, Path(file).absolute())


def _in_file(uri: str, database: Path) -> Store:
    return Store(uri, database.with_name(ARTIFACTS).as_uri(), database)


def opened(store: Store) -> Any:
    """MLflow's client of a store, a SQLite one whole and with its artifacts in place, after saying its note.

    Raises ValueError, one sentence.
    """
    if store.note:
        print(store.note, file=sys.stderr)
    with usable(store):
        mlflow = loaded()
        if store.database:
            store.database.parent.mkdir(parents=True, exist_ok=True)
            if not _is_whole(store.database):
                _make(store.database, str(store.artifacts))
            _bring_artifacts(store.database, str(store.artifacts))
        return mlflow.MlflowClient(tracking_uri=store.uri)


@contextmanager
def usable(store: Store) -> Iterator[None]:
    """Whatever is raised about a store, as a ValueError of one sentence with the advice that fits it."""
    try:
        yield
    except (Refused, Unfinished):
        raise
    except Exception as error:
        advice = "start its server, set MLFLOW_TRACKING_URI to another, or unset it for SQLite in the run's folder"
        if store.uri.startswith("sqlite"):
            advice = "move the file away for a new one to be made, or set MLFLOW_TRACKING_URI to another store"
            if "out-of-date" in str(error):
                advice = f"another version of MLflow made it: copy it, then run mlflow db upgrade '{store.uri}'"
            elif "locked" in str(error):
                advice = "another process is writing to it, so try again when that has ended"
        raise Refused(
            f"the MLflow store {without_credentials(store.uri)} cannot be used ({first_line(error)}); {advice}."
        ) from error


# ---- a SQLite store


def _connected(database: Path) -> closing[sqlite3.Connection]:
    return closing(sqlite3.connect(database, timeout=PATIENCE))


def _is_whole(database: Path) -> bool:
    """Whether MLflow finished making the database: its first experiment comes last.

    One that holds something else and no experiment is somebody's all the same, and MLflow says what is wrong with it.
    """
    if not database.exists():
        return False
    with _connected(database) as db:
        names = [name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        return any(db.execute(f'SELECT 1 FROM "{name}" LIMIT 1').fetchone() for name in names if name not in FILLED)


def _make(database: Path, artifacts: str) -> None:
    """Make a whole database or none; a half of one, which earlier versions could leave behind, is set aside."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    with _alone(database.with_name(f".{database.name}.lock")):
        if _is_whole(database):
            return  # another job was faster
        _set_aside(database)
        beginning = f"{storage.TEMPORARY}{database.name}-"
        for left in database.parent.glob(f"{beginning}*"):  # by a job that was killed here
            left.unlink()
        temporary = database.with_name(f"{beginning}{uuid.uuid4().hex}")
        try:
            made = SqlAlchemyStore(f"sqlite:///{temporary}", artifacts)
            made.engine.dispose()
            os.replace(temporary, database)
        finally:
            for suffix in ("", *JOURNALS):
                Path(f"{temporary}{suffix}").unlink(missing_ok=True)


def _set_aside(database: Path) -> None:
    """Rename a database that was never finished; SQLite would apply a journal without one to the next of its name."""
    if not database.exists():
        for suffix in JOURNALS:
            Path(f"{database}{suffix}").unlink(missing_ok=True)
        return
    number = 1
    while (aside := database.with_name(f"{database.stem}-unfinished-{number}{database.suffix}")).exists():
        number += 1
    for suffix in (*JOURNALS, ""):
        with suppress(FileNotFoundError):
            os.rename(f"{database}{suffix}", f"{aside}{suffix}")
    print(
        f"{database} holds no runs: a job was stopped while MLflow made it. It is called {aside.name} now, and a new"
        " one takes its place.",
        file=sys.stderr,
    )


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """One process at a time. The file is gone afterwards; a killed process leaves it, but not the lock on it."""
    while True:
        with open(lock, "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            try:
                if not os.path.samestat(os.fstat(file.fileno()), os.stat(lock)):
                    continue  # whoever had it took the file away
            except FileNotFoundError:
                continue
            try:
                yield
            finally:
                lock.unlink()
            return


def _bring_artifacts(database: Path, artifacts: str) -> None:
    """Have the recorded places of artifacts beside the database: MLflow keeps absolute ones, and folders are moved."""
    with _connected(database) as db, db:
        recorded = [place for (place,) in db.execute("SELECT DISTINCT artifact_location FROM experiments")]
        roots = {match[1] for place in recorded if (match := re.fullmatch(rf"(file://.*/{ARTIFACTS})(/0)?", place))}
        for old in sorted(filter(lambda root: _is_elsewhere(root, artifacts), roots)):
            for table, column in PLACES:
                if column not in {row[1] for row in db.execute(f"PRAGMA table_info({table})")}:
                    continue  # of another version of MLflow
                db.execute(
                    f"UPDATE {table} SET {column} = ? || substr({column}, ?)"
                    f" WHERE {column} = ? OR substr({column}, 1, ?) = ?",
                    (artifacts, len(old) + 1, old, len(old) + 1, f"{old}/"),
                )
            print(
                f"{database.parent} was elsewhere before: MLflow finds the artifacts of its runs here now.",
                file=sys.stderr,
            )


def _is_elsewhere(root: str, artifacts: str) -> bool:
    """Whether a recorded root of artifacts is not the folder beside the database, nor all that there is of them."""
    there, here = (Path(unquote(urlsplit(uri).path)) for uri in (root, artifacts))
    if root == artifacts or (there.exists() and not here.exists()):
        return False
    return not (there.exists() and here.samefile(there))


# ---- texts


def without_credentials(text: str) -> str:
    """``text`` without the user:password@ of URIs in it."""
    return re.sub(r"(?<=://)[^/@\s]+@", "", text)


def first_line(error: Exception) -> str:
    lines = without_credentials(str(error)).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def addresses(run: str, port: int = 5000) -> str:
    """Where ``make ui`` shows the experiments in a run's folder, one line each; MLflow opens on another page."""
    database = Path(storage.resolve(run), "mlflow.db")
    if not database.exists():
        raise Refused(f"{database} is not there; run a job first, or name another run's folder: make ui RUN=runs/mine.")
    client = opened(_in_file(f"sqlite:///{database}", database))
    found = [experiment for experiment in client.search_experiments() if experiment.name != "Default"]
    return "\n".join(
        f"{experiment.name}: http://127.0.0.1:{port}/{PAGE.format(place=f'{experiment.experiment_id}/runs')}"
        for experiment in found
    )


if __name__ == "__main__":
    try:
        print("Open, once MLflow is up:", addresses(sys.argv[1]), sep="\n", flush=True)
    except Refused as refusal:
        raise SystemExit(f"error: {refusal}") from None
