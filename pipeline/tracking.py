"""One MLflow run per job, linked by fingerprints; the only module that knows MLflow.

Only a job's driver talks to the store; workers send it what there is to log. A store that cannot be reached is an error
before work begins and only a warning afterwards: no result is lost for the sake of its curve.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, Literal

import numpy as np

from pipeline import storage
from pipeline.errors import Refused
from pipeline.recipe import Recipe, leaves
from pipeline.signals import Stopped, held

Job = Literal["pairs", "distill", "evaluate", "ablate", "benchmark"]
PAUSE = 60.0  # seconds without calls after a failed one, so that a dead server costs a job next to nothing
SETTINGS = {
    "MLFLOW_ENABLE_ASYNC_LOGGING": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # the default of 7 blocks for minutes
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "GIT_PYTHON_REFRESH": "quiet",
}


def loaded() -> ModuleType:
    """MLflow, imported when first needed (1.5 s) and made quiet; the user's environment variables win."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    import mlflow

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return mlflow


class Run:
    """The MLflow run of one job: ``with Run.start(recipe, "distill") as run``; ends finished, failed or killed.

    While the job works, a failing store is reported once and otherwise ignored.
    """

    def __init__(self, uri: str, run_id: str, client: Any) -> None:
        self.uri, self.id, self._client = uri, run_id, client
        self._warned, self._quiet_until = False, 0.0

    @classmethod
    def start(cls, recipe: Recipe, job: Job, resume_id: str | None = None) -> Run:
        """Open a run of ``job`` in the experiment ``recipe.name``, or reopen ``resume_id``.

        A new run's parameters are the flattened recipe. The store is MLFLOW_TRACKING_URI, or SQLite at <run>/mlflow.db
        with artifacts beside it; in ~/distilled-decoding, which is said aloud, where ``run`` is remote. Raises
        ValueError, one sentence, for a store that cannot be reached.
        """
        uri, artifacts = store(recipe)
        run = None
        try:
            with usable(uri), held():
                client = loaded().MlflowClient(tracking_uri=uri)
                run_id = _reopened(client, resume_id) if resume_id else None
                if run_id is None:
                    run_id = _created(client, recipe, job, artifacts)
                run = cls(uri, run_id, client)
        except Stopped as stopped:
            if run:
                run.__exit__(Stopped, stopped, None)
            raise
        assert run is not None
        return run

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        stopped = kind is not None and issubclass(kind, (KeyboardInterrupt, Stopped))
        status = "FINISHED" if kind is None else "KILLED" if stopped else "FAILED"
        self._quiet_until = 0.0
        self._attempt(lambda: self._client.set_terminated(self.id, status))

    def metrics(self, values: dict[str, float], step: int = 0) -> None:
        """Log all ``values`` at ``step`` in one call."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        rows = [Metric(key, float(value), now, step) for key, value in values.items()]
        self._attempt(lambda: self._client.log_batch(self.id, metrics=rows))

    def image(self, key: str, image: np.ndarray, step: int = 0) -> None:
        """Log a uint8 [H, W, 3] image; images of one key at several steps form a series."""
        self._attempt(lambda: self._client.log_image(self.id, image, key=key, step=step))

    def artifact(self, path: str | Path, folder: str | None = None) -> None:
        """Copy a local file into the run's artifacts."""
        self._attempt(lambda: self._client.log_artifact(self.id, str(path), folder))

    def tag(self, key: str, value: str) -> None:
        self._attempt(lambda: self._client.set_tag(self.id, key, value))

    def dataset(self, name: str, uri: str, digest: str, context: str) -> None:
        """Link a pair set to the run, its ``context`` "output", "training" or "evaluation".

        ``digest`` is its fingerprint, of which MLflow keeps 36 characters.
        """
        from mlflow.entities import Dataset, DatasetInput, InputTag

        place = without_credentials(uri)
        kind = place.split("://")[0] if "://" in place else "local"
        data = Dataset(name, digest[:36], source_type=kind, source=json.dumps({"uri": place}))
        row = DatasetInput(data, [InputTag("mlflow.data.context", context)])
        self._attempt(lambda: self._client.log_inputs(self.id, datasets=[row]))

    def previous(self, job: Job, **tags: str) -> str | None:
        """Id of the newest run of ``job`` in this experiment that carries ``tags``, or None."""
        wanted = {"job": job} | tags
        query = " and ".join(f"tags.{key} = '{value}'" for key, value in wanted.items())

        def search() -> str | None:
            experiment = self._client.get_run(self.id).info.experiment_id
            found = self._client.search_runs([experiment], query, max_results=2, order_by=["start_time DESC"])
            return next((run.info.run_id for run in found if run.info.run_id != self.id), None)

        return self._attempt(search)

    @property
    def client(self) -> Any:
        """MLflow's own, for what raises when it fails."""
        return self._client

    def adopt(self, run_id: str, **tags: str) -> None:
        """Tag another run with this one's id and with ``tags``; one that began later is listed below this one."""

        def link() -> None:
            """Set the tags of the other run."""
            mine, other = (self._client.get_run(one) for one in (self.id, run_id))
            links = {mine.data.tags["job"]: self.id} | tags
            if other.info.start_time >= mine.info.start_time:
                links["mlflow.parentRunId"] = self.id
            for key, value in links.items():
                self._client.set_tag(run_id, key, value)

        self._attempt(link)

    def _attempt(self, call: Callable[[], Any]) -> Any:
        if time.monotonic() < self._quiet_until:
            return None
        try:
            with held():  # left in the middle of a transaction, the store would not even take how the run ended
                return call()
        except Exception as error:  # whatever the store's client raises: the job's result matters more
            self._quiet_until = time.monotonic() + PAUSE
            if not self._warned:
                print(
                    f"MLflow at {without_credentials(self.uri)} does not take this run's data"
                    f" ({first_line(error)}); the job goes on and tries again now and then.",
                    file=sys.stderr,
                )
                self._warned = True
            return None


@contextmanager
def usable(uri: str) -> Iterator[None]:
    """Whatever is raised about the store at ``uri``, as a ValueError of one sentence."""
    try:
        yield
    except Exception as error:
        raise Refused(
            f"the MLflow store {without_credentials(uri)} cannot be used ({first_line(error)}); start"
            " its server, set MLFLOW_TRACKING_URI to another, or unset it for SQLite in the run's folder."
        ) from error


def without_credentials(text: str) -> str:
    """``text`` without the user:password@ of URIs in it."""
    return re.sub(r"(?<=://)[^/@\s]+@", "", text)


def flattened(tree: dict[str, Any]) -> dict[str, str]:
    """{"train": {"lr": 1e-4}} -> {"train.lr": "0.0001"}: nested settings by dotted name, free of credentials."""
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in leaves(tree).items()}
    return {name: without_credentials(text) for name, text in texts.items()}


def store(recipe: Recipe) -> tuple[str, str | None]:
    """(tracking URI, place of a new experiment's artifacts or None where the server decides)."""
    chosen = os.environ.get("MLFLOW_TRACKING_URI")
    if chosen:  # beside a local database; left to itself, MLflow would put files into the working directory
        _, is_file, database = chosen.partition("sqlite:///")
        return chosen, Path(database).absolute().with_name("mlartifacts").as_uri() if is_file else None
    folder = storage.resolve(recipe.run)
    if storage.is_remote(folder):
        folder = str(storage.home())
        print(
            f"run is {recipe.run}, where MLflow's SQLite store cannot live: it is {folder}/mlflow.db on this machine;"
            " set MLFLOW_TRACKING_URI for a server.",
            file=sys.stderr,
        )
    Path(folder).mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{folder}/mlflow.db", Path(folder, "mlartifacts").as_uri()


def _created(client: Any, recipe: Recipe, job: Job, artifacts: str | None) -> str:
    from mlflow.entities import Param
    from mlflow.tracking.context.registry import resolve_tags

    experiment = client.get_experiment_by_name(recipe.name)
    if experiment is None:
        experiment_id = client.create_experiment(recipe.name, artifact_location=artifacts)
    else:
        experiment_id = experiment.experiment_id
    # Provenance: user, script, the repository's commit, and MLFLOW_RUN_CONTEXT where code runs without its repository.
    run = client.create_run(experiment_id, run_name=job, tags=resolve_tags({"job": job}))
    client.log_batch(run.info.run_id, params=[Param(k, v) for k, v in flattened(recipe.resolved()).items()])
    return run.info.run_id


def _reopened(client: Any, run_id: str) -> str | None:
    """``run_id`` set to running again; None, said aloud, where the store was moved or removed."""
    from mlflow.exceptions import MlflowException

    try:
        client.update_run(run_id, status="RUNNING")
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        print(f"MLflow run {run_id} is not in this store any more; a new run takes its place.", file=sys.stderr)
        return None
    return run_id


def first_line(error: Exception) -> str:
    lines = without_credentials(str(error)).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
