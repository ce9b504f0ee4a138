"""One MLflow run per job, linked by fingerprints: a name that says the result, a note, its numbers and its files.

Only a job's driver talks to the store; workers send it what there is to log. A store that cannot be reached is an error
before work begins and only a warning afterwards: nothing waits for it, and no result is lost for the sake of its curve.
As long as a run is not complete, MARKER lies beside the job's result, and the same command completes it.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import yaml

from pipeline import storage
from pipeline.host import events, system_metrics
from pipeline.host.errors import Refused, Unfinished
from pipeline.host.signals import Stopped, held
from pipeline.recipe import Recipe
from pipeline.services import mlflow_store
from pipeline.services.mlflow_names import LONGEST, Job, fitted, parameters
from pipeline.services.mlflow_store import Store, first_line, without_credentials
from pipeline.services.outbox import JOINED, Outbox
from pipeline.services.run_note import Note

PATIENCE = 60.0  # seconds that the end of a job waits for MLflow to take one entry more
HASTE = 10.0  # the same, of a job that failed or was stopped
MARKER = "_mlflow-run.json"  # in a result's folder: the run that is not complete
VARIANT = 60  # characters of a variant's name that still fit before a run's
METRIC_BYTES = 300  # that a metric takes while it waits


class Run:
    """The MLflow run of one job: ``with Run.start(recipe, "distill") as run``; ends finished, failed or killed.

    Its methods put down what there is to log and return at once; the end of the job waits for it, within bounds.
    """

    def __init__(self, store: Store, run_id: str, client: Any, note: Note) -> None:
        self.uri, self.id, self._client = store.uri, run_id, client
        self._folder: str | None = None  # with MARKER in it
        self._note, self._origins = note, dict[Job, str]()
        self._since = time.time()  # the run's beginning, once MLflow has said it
        self._outbox = Outbox(self._warn, self._warn_of_room)

    @classmethod
    def start(cls, recipe: Recipe, job: Job, resume_id: str | None = None) -> Run:
        """Open a run of ``job`` in the experiment ``recipe.name``, or reopen ``resume_id``.

        The store is MLFLOW_TRACKING_URI, or SQLite at <run>/mlflow.db with artifacts beside it; in
        ~/distilled-decoding, which is said aloud, where ``run`` is remote. Raises ValueError, one sentence, for a store
        that cannot be reached.
        """
        store = mlflow_store.of(recipe)
        client = mlflow_store.opened(store)
        note, run = Note.of(recipe, job), None
        try:
            with mlflow_store.usable(store), held():
                experiment = _experiment(client, recipe.name, store.artifacts)
                run_id = _reopened(client, resume_id) if resume_id else None
                run_id = run_id or _created(client, experiment, note)
                run = cls(store, run_id, client, note)
                run._since = client.get_run(run_id).info.start_time / 1000
        except Stopped as stopped:
            if run:
                run.__exit__(Stopped, stopped, None)
            raise
        run._outbox.put(partial(run._send_parameters, parameters(recipe, job)))
        run.artifact("recipe.yaml", _as_yaml(recipe).encode())
        return run

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        stopped = kind is not None and issubclass(kind, (KeyboardInterrupt, Stopped))
        status = "FINISHED" if kind is None else "KILLED" if stopped else "FAILED"
        with held():
            self._outbox.put(lambda _: self._client.set_terminated(self.id, status))
            missing = self._outbox.close(PATIENCE if kind is None else HASTE)
        if missing:
            again = "; the same command tries again" if self._folder and kind is None else ""
            events.warn(
                f"MLflow at {without_credentials(self.uri)} did not take all of this run: {missing} of its entries are"
                f" missing{again}.",
            )
        elif self._folder and kind is None:
            with suppress(Refused, Unfinished):  # the next run of the same command only logs again
                storage.remove(storage.join(self._folder, MARKER))

    def mark(self, folder: str) -> None:
        """Leave MARKER in the folder of the job's result until the run is complete.

        One that is there is of a run that did not end well; MLflow is told so, should it still take it for running.
        """
        place = storage.join(folder, MARKER)
        before = storage.read_json(place)["mlflow_run"] if storage.exists(place) else self.id
        storage.write_json(place, {"mlflow_run": self.id})
        self._folder = folder

        def send(_: list[Any]) -> None:
            run = _active(self._client, before)
            if run and run.info.status == "RUNNING":
                self._client.set_terminated(before, "KILLED")

        if before != self.id:
            self._outbox.put(send)

    def metrics(self, values: dict[str, float], step: int = 0) -> None:
        """Log all ``values`` at ``step``."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        rows = [Metric(key, float(value), now, step) for key, value in fitted(values).items()]
        for begin in range(0, len(rows), JOINED):
            some = rows[begin : begin + JOINED]
            self._outbox.put(self._send_metrics, some, METRIC_BYTES * len(some), lossy=True)

    def system_metrics(self, values: dict[str, float]) -> None:
        """Log how busy a machine is now; MLflow shows it on a page of its own, over the seconds since the run began."""
        self.metrics({f"system/{name}": value for name, value in values.items()}, int(time.time() - self._since))

    @contextmanager
    def watching_this_machine(self) -> Iterator[None]:
        """Log how busy the driver's machine is while the body runs."""
        with system_metrics.sampled(self.system_metrics):
            yield

    def image(self, key: str, image: np.ndarray, step: int = 0) -> None:
        """Log a uint8 [H, W, 3] image; images of one key at several steps form a series."""
        send = lambda _: self._client.log_image(self.id, image, key=key, step=step)  # noqa: E731
        self._outbox.put(send, size=image.nbytes, lossy=True)

    def artifact(self, name: str, content: bytes | Callable[[], bytes]) -> None:
        """Put a file among the run's artifacts: its bytes, or what reads them when it is sent."""

        def send(_: list[Any]) -> None:
            data = content if isinstance(content, bytes) else content()
            with tempfile.TemporaryDirectory(prefix="dd-") as folder:
                Path(folder, name).write_bytes(data)
                self._client.log_artifact(self.id, str(Path(folder, name)))

        self._outbox.put(send, size=len(content) if isinstance(content, bytes) else 0)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Put a table among the run's artifacts that MLflow shows as one, as its ``log_table`` writes it."""
        content = {"columns": list(columns), "data": [list(row) for row in rows]}
        self.artifact(name, json.dumps(content).encode())
        self.tag("mlflow.loggedArtifacts", json.dumps([{"path": name, "type": "table"}]))

    def tag(self, key: str, value: str) -> None:
        self._outbox.put(lambda _: self._set_tag(self.id, key, value))

    def dataset(self, name: str, uri: str, digest: str, context: str) -> None:
        """Link a pair set, prompts or a reference to the run, its ``context`` "input", "output", "training" or
        "evaluation".

        ``digest`` is its fingerprint, of which MLflow keeps 36 characters.
        """
        from mlflow.entities import Dataset, DatasetInput, InputTag

        place = without_credentials(uri)
        kind = place.split("://")[0] if "://" in place else "local"
        data = Dataset(name, digest[:36], source_type=kind, source=json.dumps({"uri": place}))
        row = DatasetInput(data, [InputTag("mlflow.data.context", context)])
        self._outbox.put(lambda _: self._client.log_inputs(self.id, datasets=[row]))

    def link(self, job: Job, run_id: str | None = None, **tags: str) -> None:
        """Tag this run with the run of ``job`` that it goes on from, and have the note lead there.

        That is ``run_id``, or the newest run of this experiment that carries ``tags``; nothing where there is none.
        """

        def send(_: list[Any]) -> None:
            if other := run_id or self._newest(job, tags):
                self._set_tag(self.id, f"{job}_run", other)
                mine = self._client.get_run(self.id).info.experiment_id
                self._origins[job] = mlflow_store.PAGE.format(place=f"{mine}/runs/{other}")

        self._outbox.put(send)

    def adopt(self, run_id: str, **tags: str) -> None:
        """Tag another run with this one's id and with ``tags``; one that began later is listed below this one.

        A tag ``variant`` becomes part of its name.
        """
        self._outbox.put(lambda _: self._adopt(run_id, tags))

    def adopt_newest(self, job: Job, carrying: dict[str, str], **tags: str) -> None:
        """``adopt`` the newest run of ``job`` in this experiment that carries some tags, if there is one."""

        def send(_: list[Any]) -> None:
            if other := self._newest(job, carrying):
                self._adopt(other, tags)

        self._outbox.put(send)

    def conclude(self, result: str, text: str = "", draw_with: str = "") -> None:
        """Name the run after its result and have the note on top of its page say it, as ``Note.finished`` does."""

        def send(_: list[Any]) -> None:
            note = self._note.finished(result, text, self._origins, draw_with)
            self._set_tag(self.id, "mlflow.note.content", note)
            self._set_tag(self.id, "mlflow.runName", self._note.titled(result))

        self._outbox.put(send)

    @property
    def client(self) -> Any:
        """MLflow's own, for what raises when it fails."""
        return self._client

    # ---- in the outbox's thread

    def _send_metrics(self, rows: list[Any]) -> None:
        self._client.log_batch(self.id, metrics=rows)

    def _send_parameters(self, values: dict[str, str], _: list[Any]) -> None:
        """Log those that the run does not have: MLflow takes no other value of a parameter."""
        from mlflow.entities import Param

        logged = self._client.get_run(self.id).data.params
        rows = [Param(key, value[: LONGEST["parameter"]]) for key, value in values.items() if key not in logged]
        for begin in range(0, len(rows), 100):  # what one call takes
            self._client.log_batch(self.id, params=rows[begin : begin + 100])

    def _set_tag(self, run_id: str, key: str, value: str) -> None:
        self._client.set_tag(run_id, key, value[: LONGEST["tag"]])

    def _newest(self, job: Job, tags: dict[str, str]) -> str | None:
        """Id of the newest other run of ``job`` in this experiment that carries ``tags``, or None."""
        query = " and ".join(f"tags.{key} = '{value}'" for key, value in ({"job": job} | tags).items())
        experiment = self._client.get_run(self.id).info.experiment_id
        runs = self._client.search_runs([experiment], query, max_results=2, order_by=["start_time DESC"])
        return next((run.info.run_id for run in runs if run.info.run_id != self.id), None)

    def _adopt(self, run_id: str, tags: dict[str, str]) -> None:
        other = _active(self._client, run_id)
        if other is None:
            events.warn(f"MLflow run {run_id} is not in this store any more; nothing links to it.")
            return
        mine = self._client.get_run(self.id)
        links = {mine.data.tags["job"]: self.id} | tags
        if other.info.start_time >= mine.info.start_time:
            links["mlflow.parentRunId"] = self.id
        name, variant = other.info.run_name, tags.get("variant", "")
        if 0 < len(variant) <= VARIANT and not name.startswith(variant):
            links["mlflow.runName"] = f"{variant}: {name}"
        for key, value in links.items():
            self._set_tag(run_id, key, value)

    def _warn(self, error: Exception) -> None:
        events.warn(
            f"MLflow at {without_credentials(self.uri)} does not take this run's data ({first_line(error)}); the job"
            " goes on, and what is missing is tried again at its end.",
        )

    def _warn_of_room(self) -> None:
        events.warn(
            f"MLflow at {without_credentials(self.uri)} is so far behind that the oldest metrics and images waiting for"
            " it are dropped.",
        )


def complete(recipe: Recipe, job: Job, folder: str, log: Callable[[Run], None]) -> None:
    """Have ``log`` tell MLflow again of a result whose run is not complete; without a store, that has to wait."""
    place = storage.join(folder, MARKER)
    if not storage.exists(place):
        return
    try:
        run = Run.start(recipe, job, storage.read_json(place)["mlflow_run"])
    except Refused as error:
        events.warn(f"The MLflow run of {folder} is not complete, and stays so for now: {error}")
        return
    with run:
        print(f"Completing the MLflow run of {folder} ({run.id}).", file=sys.stderr)
        run.mark(folder)
        log(run)


def _as_yaml(recipe: Recipe) -> str:
    """The whole recipe as YAML; no field of one holds credentials."""
    return yaml.safe_dump(recipe.resolved(), sort_keys=False, allow_unicode=True)


def _experiment(client: Any, name: str, artifacts: str | None) -> str:
    """Id of the experiment of a recipe's name, made if it is not there and restored if it was deleted."""
    from mlflow.exceptions import MlflowException

    name = name[: LONGEST["experiment"]] or "unnamed"
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            return client.create_experiment(name, artifact_location=artifacts)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        experiment = client.get_experiment_by_name(name)  # another job was faster
    if experiment.lifecycle_stage == "deleted":
        client.restore_experiment(experiment.experiment_id)
        events.warn(f"The MLflow experiment {name} had been deleted; it and its runs are restored.")
    return experiment.experiment_id


def _created(client: Any, experiment: str, note: Note) -> str:
    from mlflow.tracking.context.registry import resolve_tags

    # Provenance: user, script, the repository's commit, and MLFLOW_RUN_CONTEXT where code runs without its repository.
    tags = resolve_tags({"job": note.job, "mlflow.note.content": note.unfinished()})
    tags = {key: value[: LONGEST["tag"]] for key, value in tags.items()}
    return client.create_run(experiment, run_name=note.title, tags=tags).info.run_id


def _active(client: Any, run_id: str) -> Any:
    """A run that is in the store and was not deleted there, or None."""
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None
    return run if run.info.lifecycle_stage == "active" else None


def _reopened(client: Any, run_id: str) -> str | None:
    """``run_id`` set to running again; None, said aloud, where the store was moved or the run deleted."""
    if _active(client, run_id) is None:
        events.warn(f"MLflow run {run_id} is not in this store any more; a new run takes its place.")
        return None
    client.update_run(run_id, status="RUNNING")
    return run_id
