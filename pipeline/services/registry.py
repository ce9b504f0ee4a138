"""Students in MLflow's model registry: a version is one student's file with one report, the alias ``best`` the best.

``evaluate.register: NAME`` writes a version after the report, ``evaluate.student: models:/NAME@best`` (or
models:/NAME/3) reads one before it. The registry is that of the tracking store. Nothing is pickled: a version's
artifact is the weight file that was scored.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline import storage
from pipeline.host.errors import Refused, Unfinished
from pipeline.recipe import Recipe, fingerprint
from pipeline.report.names import metric_name
from pipeline.report.origin import StudentOrigin
from pipeline.report.results import Results
from pipeline.services import mlflow_store, tracking
from pipeline.services.mlflow_names import LONGEST
from pipeline.services.mlflow_store import first_line, without_credentials

BEST = "best"  # the alias
FOLDER = "student"  # of the run's artifacts
ABOUT = """Few-step students of Distilled Decoding. The best one draws with

```python
from pipeline import Generator

generator = Generator.from_pretrained("models:/{name}@{best}")
```

where MLFLOW_TRACKING_URI names this store."""
ADDRESS = re.compile(r"models:/(?P<name>[^/:@]+)(?:/(?P<version>\d+)|@(?P<alias>[^/:@]+))")
COMPARABLE = ("title", "features", "reference", "count", "steps")  # tags of versions whose scores may be compared
ABSENT = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")  # error codes of MLflow for what is not there


# ---- reading


def fetch(recipe: Recipe) -> tuple[Recipe, str]:
    """The recipe with a file in the place of evaluate.student models:/..., and which version that is.

    The file is put beside the report's statistics, where every node finds it, once. A recipe that names a file, or
    nothing, comes back as it is, with "". Raises ValueError, one sentence, for a version that is not there or not ours,
    and for a registry that cannot be reached.
    """
    address = recipe.evaluate.student or ""
    if not address.startswith("models:/"):
        return recipe, ""
    place, name = _fetched(recipe, address, "evaluate.student")
    return replace(recipe, evaluate=replace(recipe.evaluate, student=place)), name


def fetch_others(recipe: Recipe) -> tuple[Recipe, dict[str, str]]:
    """``fetch`` for evaluate.students: the recipe with files in their places, and their versions by their names."""
    places, versions = dict(recipe.evaluate.students), dict.fromkeys(recipe.evaluate.students, "")
    for name, address in recipe.evaluate.students.items():
        if address.startswith("models:/"):
            places[name], versions[name] = _fetched(recipe, address, f"evaluate.students.{name}")
    return replace(recipe, evaluate=replace(recipe.evaluate, students=places)), versions


def _fetched(recipe: Recipe, address: str, what: str) -> tuple[str, str]:
    """Where the file of a version is now, and which version that is."""
    store = mlflow_store.of(recipe)
    client = mlflow_store.opened(store)
    version = _found(client, store, address, what)
    sha256 = version.tags["student_sha256"]
    place = storage.join(recipe.cache_uri, sha256[:24] + Path(version.tags["file"]).suffix)
    if not storage.exists(place) or storage.sha256(place) != sha256:
        _download(client, version, store.uri, place)
    return place, f"models:/{version.name}/{version.version}"


def folder_of(address: str) -> str:
    """The folder of a registered student on this machine, out of the store that MLFLOW_TRACKING_URI names.

    Raises Refused, one sentence, as ``fetch`` does, and where that variable is not set.
    """
    chosen = os.environ.get("MLFLOW_TRACKING_URI")
    if not chosen:
        raise Refused(
            f"the student is {address}, and nothing says in which registry; set MLFLOW_TRACKING_URI to its store, e.g."
            " sqlite:///runs/demo/mlflow.db."
        )
    store = mlflow_store.named(chosen)
    client = mlflow_store.opened(store)
    version = _found(client, store, address, "the student")
    from mlflow.artifacts import download_artifacts

    with mlflow_store.usable(store):
        source = client.get_model_version_download_uri(version.name, str(version.version))
        return str(download_artifacts(artifact_uri=source, tracking_uri=store.uri))


def _found(client: Any, store: mlflow_store.Store, address: str, what: str) -> Any:
    """The version at ``address``, which is ``what``; Refused for one that is not there or not of ours."""
    match = ADDRESS.fullmatch(address)
    if not match:
        raise Refused(f"{what} is {address}; write models:/NAME/3 for a version, models:/NAME@best for an alias.")
    with mlflow_store.usable(store):
        version, why = _version(client, match)
    if version is None:
        raise Refused(
            f"{what} is {address}, which the registry of {without_credentials(store.uri)} does not have"
            f" ({why}); register a student with evaluate.register, or give the file of one."
        )
    if not {"student_sha256", "file"} <= version.tags.keys():
        raise Refused(
            f"{what} is {address}, and models:/{version.name}/{version.version} does not say which student it is, so it"
            " was not registered by evaluate.register; give the student's file."
        )
    return version


def _version(client: Any, wanted: re.Match[str]) -> tuple[Any, str]:
    """The version that is meant, or None and why there is none."""
    from mlflow.exceptions import MlflowException

    try:
        if wanted["version"]:
            return client.get_model_version(wanted["name"], wanted["version"]), ""
        return client.get_model_version_by_alias(wanted["name"], wanted["alias"]), ""
    except MlflowException as error:
        if error.error_code not in ABSENT:
            raise
        return None, first_line(error).rstrip(".")


def _download(client: Any, version: Any, store: str, place: str) -> None:
    """Bring the file of a version to ``place``; ValueError for one that is gone or not what was registered."""
    from mlflow.artifacts import download_artifacts

    name, wanted = f"models:/{version.name}/{version.version}", version.tags["student_sha256"]
    with tempfile.TemporaryDirectory() as folder:
        try:
            source = client.get_model_version_download_uri(version.name, str(version.version))
            uri = f"{source}/{version.tags['file']}"
            local = download_artifacts(artifact_uri=uri, dst_path=folder, tracking_uri=store)
            sha256 = storage.sha256(local)
        except Exception as error:  # whatever the artifacts' store raises
            raise Refused(
                f"{name} is registered, but its file could not be fetched ({first_line(error)}); restore the"
                " artifacts of its run, or give another student."
            ) from error
        if sha256 != wanted:
            raise Refused(
                f"the file of {name} has SHA-256 {sha256[:12]}... and was registered with {wanted[:12]}...; it was"
                " replaced or damaged, so register the student again."
            )
        with open(local, "rb") as source_file, storage.replacing(place) as target:
            shutil.copyfileobj(source_file, target)


# ---- writing


def check(recipe: Recipe) -> None:
    """Before any sampling: whether a student can be registered as the recipe asks; ValueError, one sentence."""
    name = recipe.evaluate.register
    if name is None:
        return
    if all(entry.get("name") != "FewStep" for entry in recipe.evaluate.samplers):
        raise Refused(
            f"evaluate.register is {name}, and evaluate.samplers lists no FewStep, by whose distance the best student"
            " is chosen; list one, e.g. {name: FewStep, steps: [1]}."
        )
    store = mlflow_store.of(recipe)
    client = mlflow_store.opened(store)
    with mlflow_store.usable(store):
        client.search_registered_models(max_results=1)


def version_of(recipe: Recipe, results: Results) -> str | None:
    """The version that already holds this student with this report, as a sentence, or None; gives the alias its due."""
    name, store = recipe.evaluate.register or "", mlflow_store.of(recipe)
    client = mlflow_store.opened(store)
    with mlflow_store.usable(store):
        version = _same(client, name, _tags(results))
        return (
            version and f"The student is models:/{name}/{version.version} already; {_promote(client, name, version)}."
        )


def register(
    run: tracking.Run, recipe: Recipe, results: Results, beside: Sequence[str], describe: Callable[[str, int], str]
) -> str:
    """Register the student of a written report, unless it is; move the alias if it is the best; returns what was done.

    ``beside`` are URIs of files that a version has beside the weights: what makes it a folder to draw from.
    ``describe`` makes its description, Markdown, of its address and the characters that there is room for.
    Raises RuntimeError where the registry fails: the report is there, and the same command registers its student.
    """
    name, student = recipe.evaluate.register or "", _student(results)["uri"]
    tags = _tags(results) | {"file": storage.local(student).name, "report": recipe.report_uri}
    try:
        version = _same(run.client, name, tags)
        if version is None:
            version = _create(run, name, [storage.local(uri) for uri in (student, *beside)], tags)
        if not version.description:
            said = describe(f"models:/{name}/{version.version}", LONGEST["description"])
            run.client.update_model_version(name, str(version.version), said)
        return f"The student is models:/{name}/{version.version}; {_promote(run.client, name, version)}."
    except Exception as error:  # whatever the registry's client raises
        raise Unfinished(
            f"the report is {storage.join(recipe.report_uri, 'report.md')}, but its student could not be registered as"
            f" {name} ({first_line(error)}); the same command tries again."
        ) from error


def _tags(results: Results) -> dict[str, str]:
    """What a version says of itself: its student, its report, what made them, and the score of each sampler.

    ``score`` is that of the first few-step sampler listed, of ``steps`` steps: what students are compared by.
    """
    origin, student = results["made"], _student(results)
    rows = [row for row in results["rows"] if "sampler" in row]
    first = next(row for row in rows if row["sampler"]["name"] == "FewStep")
    tags: dict[str, str | float] = {f"score/{metric_name(row['name'])}": row["score"] for row in rows}
    tags |= {
        "score": first["score"],
        "sampler": first["name"],
        "steps": first["steps"],
        "title": results["title"],
        "count": first["count"],
        "features": fingerprint(origin["features SHA-256"])[:12],
        "reference": fingerprint({key: value for key, value in origin["reference"].items() if key != "uri"})[:12],
        "student_sha256": student["SHA-256"],
        "report_fingerprint": results["fingerprint"],
    }
    tags |= {"teacher_tokenizer": origin["teacher"]["tokenizer SHA-256"]}
    tags |= {"teacher_checkpoint": origin["teacher"]["checkpoint SHA-256"]}
    optional: dict[str, str | float | None] = {"score_error": first.get("score_std"), "step": student.get("step")}
    optional |= {"pairs_fingerprint": student.get("pairs_fingerprint"), "distill_run": student.get("mlflow_run")}
    tags |= {tag: value for tag, value in optional.items() if value is not None}
    return {key: value if isinstance(value, str) else f"{value:.17g}" for key, value in tags.items()}


def _student(results: Results) -> StudentOrigin:
    student = results["made"]["student"]
    assert student is not None  # ``check`` has seen a FewStep among the samplers
    return student


def _same(client: Any, name: str, tags: dict[str, str]) -> Any:
    """The version of ``name`` with the same student and the same report, or None."""
    keys = ("student_sha256", "report_fingerprint")
    versions = client.search_model_versions(f"name = '{name}'")
    return next((one for one in versions if all(one.tags.get(key) == tags[key] for key in keys)), None)


def _create(run: tracking.Run, name: str, files: Sequence[Path], tags: dict[str, str]) -> Any:
    """A new version, its files among the artifacts of ``run``."""
    from mlflow.exceptions import MlflowException

    for file in files:
        run.client.log_artifact(run.id, str(file), FOLDER)
    try:
        run.client.create_registered_model(name, description=ABOUT.format(name=name, best=BEST))
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    source = f"{run.client.get_run(run.id).info.artifact_uri}/{FOLDER}"
    return run.client.create_model_version(name, source, run_id=run.id, tags=tags)


def _promote(client: Any, name: str, version: Any) -> str:
    """Give ``version`` the alias if it is better than who has it, where the two can be compared; what was found."""
    best = client.get_registered_model(name).aliases.get(BEST)
    mine, sampler = version.tags, version.tags["sampler"]
    summary = f"{mine['title']} {float(mine['score']):.2f} of {sampler}"
    if best is not None and str(best) == str(version.version):
        return f"it is {BEST} ({summary})"
    if best is not None:
        holder = client.get_model_version(name, str(best)).tags
        other = [
            f"{key} is {holder.get(key)} there and {mine[key]} here"
            for key in COMPARABLE
            if holder.get(key) != mine[key]
        ]
        if other:
            return f"not compared with version {best}, which stays {BEST}: {', '.join(other)}"
        if not float(mine["score"]) < float(holder["score"]):
            return f"version {best} stays {BEST} ({summary}, against {float(holder['score']):.2f})"
        summary += f", against {float(holder['score']):.2f} of version {best}"
        if all("score_error" in tags for tags in (mine, holder)):
            error = max(float(tags["score_error"]) for tags in (mine, holder))
            if not float(holder["score"]) - float(mine["score"]) > error:
                why = f"the two cannot be told apart within a standard error of {error:.2f}"
                return f"version {best} stays {BEST}: {why} ({summary})"
    client.set_registered_model_alias(name, BEST, str(version.version))
    return f"it is {BEST} now ({summary})"
