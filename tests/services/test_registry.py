"""Students as versions in a SQLite store; two small evaluations on Ray."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import pytest
import tiny
import torch

from pipeline import Generator, storage
from pipeline.generator import folder
from pipeline.models import checkpoints
from pipeline.models.convnet import to_uint8
from pipeline.pairs.facts import PairFacts
from pipeline.recipe import Recipe, fingerprint
from pipeline.sampling.samplers import FewStep, Models
from pipeline.services import registry, tracking
from pipeline.settings.evaluate import EvaluateSettings
from pipeline.workflow import evaluate


def changed(recipe: Recipe, **settings: Any) -> Recipe:
    """The recipe with other ``evaluate`` settings."""
    return replace(recipe, evaluate=replace(recipe.evaluate, **settings))


def export_student(recipe: Recipe, seed: int) -> str:
    """A student with weights of its own where distill would leave it."""
    teacher = checkpoints.teacher(recipe.teacher)
    student = checkpoints.family(recipe.teacher).Student.from_teacher(teacher, seed)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(seed)
        for parameter in student.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    facts = {"family": recipe.teacher.family, "teacher": checkpoints.checksums(recipe.teacher), "step": 7}
    facts |= {"pairs_fingerprint": PairFacts.of(recipe).fingerprint, "mask": "released", "mlflow_run": "a-run"}
    uri = storage.join(recipe.student_uri, "student.safetensors")
    facts |= {"config": recipe.teacher.config, "split": 1, "start_steps": [1, 2], "pairs_count": 40}
    checkpoints.save(student, uri, facts)
    about = folder.described(recipe, checkpoints.checksums(recipe.teacher))
    storage.write_json(storage.join(recipe.student_uri, folder.CONFIG), about)
    return uri


@pytest.fixture
def recipe(tmp_path: Path, blank_store: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copytree(blank_store, tmp_path / "run")
    made = tiny.tiny(tmp_path, "var", **tiny.IMAGES)
    samplers = [{"name": "FewStep"}, {"name": "FewStep", "steps": [1, 2]}]
    made = changed(made, samplers=samplers, timing_batches=(), register="digits")
    export_student(made, 1)
    return made


def results_of(recipe: Recipe, score: float, **other: Any) -> dict[str, Any]:
    """The results of a report of the recipe's student, as far as a version tells of them."""
    uri = other.pop("uri", storage.join(recipe.student_uri, "student.safetensors"))
    student = {
        "uri": uri,
        "SHA-256": storage.sha256(uri),
        "step": 7,
        "mlflow_run": "a-run",
        "pairs_fingerprint": "f" * 64,
    }
    made = {"student": student, "features SHA-256": {"scorer": "s"}, "reference": {"uri": "anywhere", "images": 9}}
    made |= {"teacher": {"tokenizer SHA-256": "t", "checkpoint SHA-256": "c"}}
    few = {"name": "FewStep", "split": 1, "steps": [1]}
    rows = [
        {"name": "real images", "count": 9},
        {"name": "teacher, AR", "sampler": {"name": "Autoregressive"}, "score": 1.0},
    ]
    rows += [{"name": "DD 1 step", "sampler": few, "score": score, "steps": 1, "count": 20}]
    found = {"title": "FD", "fingerprint": f"report-{score}", "rows": rows, "made": made}
    rows[-1] |= {key: other.pop(key) for key in ("count", "steps", "score_std") if key in other}
    return found | other


def register(recipe: Recipe, score: float, **other: Any) -> str:
    with tracking.Run.start(recipe, "evaluate") as run:
        return registry.register(run, recipe, results_of(recipe, score, **other), [], "{0} in {1} characters".format)


def client_of(recipe: Recipe) -> Any:
    return mlflow.MlflowClient(f"sqlite:///{recipe.run}/mlflow.db")


def test_a_version_says_what_it_is_and_brings_its_file(recipe: Recipe, tmp_path: Path) -> None:
    said = register(recipe, 5.25)
    assert said == "The student is models:/digits/1; it is best now (FD 5.25 of DD 1 step)."
    version = client_of(recipe).get_model_version_by_alias("digits", "best")
    student = storage.join(recipe.student_uri, "student.safetensors")
    assert version.tags == {
        "score/teacher_AR": "1",
        "score/DD_1_step": "5.25",
        "score": "5.25",
        "sampler": "DD 1 step",
        "steps": "1",
        "title": "FD",
        "count": "20",
        "features": fingerprint({"scorer": "s"})[:12],
        "reference": fingerprint({"images": 9})[:12],
        "student_sha256": storage.sha256(student),
        "report_fingerprint": "report-5.25",
        "teacher_tokenizer": "t",
        "teacher_checkpoint": "c",
        "step": "7",
        "pairs_fingerprint": "f" * 64,
        "distill_run": "a-run",
        "file": "student.safetensors",
        "report": recipe.report_uri,
    }
    assert version.description == "models:/digits/1 in 5000 characters"
    assert 'from_pretrained("models:/digits@best")' in client_of(recipe).get_registered_model("digits").description
    assert client_of(recipe).get_run(version.run_id).data.tags["job"] == "evaluate"
    Path(student).unlink()
    got, name = registry.fetch(changed(recipe, student="models:/digits@best"))
    assert name == "models:/digits/1"
    assert got.evaluate.student == f"{recipe.run}/cache/{version.tags['student_sha256'][:24]}.safetensors"
    assert storage.sha256(got.evaluate.student) == version.tags["student_sha256"]


def test_the_best_is_the_lowest_of_those_that_can_be_compared(recipe: Recipe) -> None:
    assert "it is best now (FD 5.00 of DD 1 step)" in register(recipe, 5.0)
    assert "models:/digits/2; version 1 stays best (FD 6.00 of DD 1 step, against 5.00)" in register(recipe, 6.0)
    assert "models:/digits/3; it is best now (FD 4.00 of DD 1 step, against 5.00 of version 1)" in register(recipe, 4.0)
    assert "version 3 stays best" in register(recipe, 4.0, fingerprint="a tie")
    for key, value in [("count", 30), ("steps", 2), ("title", "FID")]:
        said = register(recipe, 1.0, fingerprint=key, **{key: value})
        old = {"count": 20, "steps": 1, "title": "FD"}[key]
        assert f"not compared with version 3, which stays best: {key} is {old} there and {value} here." in said
    assert int(client_of(recipe).get_model_version_by_alias("digits", "best").version) == 3


def test_a_score_within_the_standard_error_moves_no_alias(recipe: Recipe) -> None:
    register(recipe, 5.0, score_std=0.1)
    said = register(recipe, 4.8, score_std=0.3)
    assert "version 1 stays best: the two cannot be told apart within a standard error of 0.30 (FD 4.80 of" in said
    assert "version 1 stays best: the two cannot" in register(recipe, 4.9, score_std=0.05), "the holder's counts, too"
    assert "it is best now (FD 4.60 of DD 1 step, against 5.00 of version 1)" in register(recipe, 4.6, score_std=0.3)
    assert "it is best now" in register(recipe, 4.59), "of an older report no error is known"


def test_the_same_student_with_the_same_report_is_one_version(recipe: Recipe) -> None:
    register(recipe, 5.0)
    assert "models:/digits/1; it is best (FD 5.00 of DD 1 step)" in register(recipe, 5.0)
    client_of(recipe).update_model_version("digits", "1", "")  # as versions of before are
    register(recipe, 5.0)
    assert client_of(recipe).get_model_version("digits", "1").description
    known = registry.version_of(recipe, results_of(recipe, 5.0))
    assert known == "The student is models:/digits/1 already; it is best (FD 5.00 of DD 1 step)."
    assert registry.version_of(recipe, results_of(recipe, 4.0)) is None
    export_student(recipe, 2)
    assert "models:/digits/2" in register(recipe, 5.0)
    client = client_of(recipe)
    assert len(client.search_model_versions("name = 'digits'")) == 2
    client.delete_registered_model_alias("digits", "best")  # as if the job had been killed before it gave it
    known = registry.version_of(recipe, results_of(recipe, 5.0))
    assert known == "The student is models:/digits/2 already; it is best now (FD 5.00 of DD 1 step)."


def refused(recipe: Recipe, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as caught:
        evaluate.evaluate(recipe)
    assert "\n" not in str(caught.value)


def test_what_is_not_in_the_registry_is_one_sentence(recipe: Recipe) -> None:
    for asked in ("models:/digits", "models:/digits@", "models:/digits/best", "models://digits/1"):
        refused(changed(recipe, student=asked), r"write models:/NAME/3 for a version, models:/NAME@best for an alias")
    refused(
        changed(recipe, student="models:/digits@best"), r"does not have \(Registered Model with name=digits not found\)"
    )
    register(recipe, 5.0)
    refused(changed(recipe, student="models:/digits/7"), r"does not have \(Model Version .* not found\)")
    refused(
        changed(recipe, student="models:/digits@worst"), r"does not have \(Registered model alias worst not found\)"
    )
    version = client_of(recipe).get_model_version("digits", "1")
    Path(version.source.removeprefix("file://"), "student.safetensors").write_bytes(b"other")
    refused(changed(recipe, student="models:/digits/1"), r"has SHA-256 .* it was replaced or damaged")
    shutil.rmtree(version.source.removeprefix("file://"))
    refused(
        changed(recipe, student="models:/digits/1"),
        r"models:/digits/1 is registered, but its file could not be fetched",
    )
    client_of(recipe).create_model_version("digits", version.source)
    refused(changed(recipe, student="models:/digits/2"), r"models:/digits/2 does not say which student it is")


def test_what_cannot_be_registered_is_one_sentence_before_sampling(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"evaluate.register is ' '; it must be a name"):
        EvaluateSettings(register=" ")
    for name in ("a/b", "a:b", "a@b", "it's"):
        with pytest.raises(ValueError, match=r"evaluate.register is .*; give a name without slash"):
            EvaluateSettings(register=name)
    refused(
        changed(recipe, samplers=[{"name": "Autoregressive"}]), r"evaluate.register is digits, and .* lists no FewStep"
    )
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    for asked in (recipe, changed(recipe, register=None, student="models:/digits@best")):
        refused(asked, r"the MLflow store http://127\.0\.0\.1:9 cannot be used")


def test_a_registry_that_fails_leaves_work(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    with tracking.Run.start(recipe, "evaluate") as run, monkeypatch.context() as patch:
        patch.setattr(run.client, "create_model_version", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(RuntimeError, match=r"could not be registered as digits \(division by zero\)"):
            registry.register(run, recipe, results_of(recipe, 5.0), [], str)
    assert "models:/digits/1" in register(recipe, 5.0)


@pytest.fixture
def evaluated(recipe: Recipe, ray_cluster: None) -> tuple[Recipe, str]:
    return recipe, evaluate.evaluate(recipe)


def test_an_evaluation_registers_its_student_and_one_of_the_version_is_bitwise_the_same(
    evaluated: tuple[Recipe, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, said = evaluated
    assert "The student is models:/digits/1; it is best now (FD " in said
    version = client_of(recipe).get_model_version("digits", "1")
    assert version.description.startswith("FD ")
    assert 'from_pretrained("models:/digits/1")' in version.description
    assert "## Scores\n\n| sampler " in version.description
    run = client_of(recipe).get_run(version.run_id)
    report = storage.read_json(f"{recipe.report_uri}/report.json")
    assert float(version.tags["score"]) == report["rows"][1]["score"] == run.data.metrics["DD_1_step/FD"]
    assert version.tags["report_fingerprint"] == report["fingerprint"]

    again = evaluate.evaluate(recipe)
    assert "Nothing is missing" in again
    assert "The student is models:/digits/1 already; it is best" in again
    assert "The student is models:/other/1; it is best now" in evaluate.evaluate(changed(recipe, register="other"))
    assert len(client_of(recipe).search_model_versions("name = 'digits'")) == 1

    moved = changed(recipe, register=None, student="models:/digits@best", uri=str(tmp_path / "elsewhere"))
    got, name = registry.fetch(moved)
    assert name == "models:/digits/1"
    teacher = checkpoints.teacher(recipe.teacher)
    images = []
    for uri in (storage.join(recipe.student_uri, "student.safetensors"), str(got.evaluate.student)):
        student = checkpoints.student(recipe.teacher, uri, teacher.codebook)
        models = Models(teacher, student, recipe.pairs.solver, recipe.evaluate.seed)
        images.append(teacher.decode(FewStep(split=1, steps=(1, 2)).draw(models, range(6))))
    assert torch.equal(*images)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{recipe.run}/mlflow.db")
    generator = Generator.from_pretrained("models:/digits@best", "cpu")
    drawn = generator.draw([i % 10 for i in range(6)], recipe.evaluate.seed, (1, 2))
    assert torch.equal(drawn, to_uint8(images[0]))
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    with pytest.raises(ValueError, match=r"nothing says in which registry; set MLFLOW_TRACKING_URI"):
        Generator.from_pretrained("models:/digits@best", "cpu")
    Path(recipe.student_uri, "student.safetensors").unlink()
    same = evaluate.evaluate(moved)
    theirs = storage.read_json(f"{moved.report_uri}/report.json")
    assert [row.get("score") for row in theirs["rows"]] == [row.get("score") for row in report["rows"]]
    assert (theirs["made"]["student"]["registry"], theirs["made"]["student"]["SHA-256"]) == (
        "models:/digits/1",
        version.tags["student_sha256"],
    )
    assert "models:/digits/1" in Path(moved.report_uri, "report.md").read_text()
    assert "Nothing is missing" not in same
