"""What stands on top of a run's page."""

from __future__ import annotations

import pytest

from pipeline.recipe import Recipe
from pipeline.services.run_note import ABOUT, NEXT, SCRIPTS, Note
from pipeline.settings.evaluate import EvaluateSettings

COMMAND = ("python", "jobs/generate_pairs.py", "--config", "a b.yaml", "--run", "s3://user:secret@bucket/run")


def test_every_job_has_its_words() -> None:
    assert SCRIPTS.keys() == ABOUT.keys()
    assert NEXT.keys() <= SCRIPTS.keys()


def test_the_result_comes_first_and_what_to_do_next_last() -> None:
    note = Note("pairs", "s3://user:secret@bucket/run/pairs", COMMAND)
    text = note.finished("6,000 pairs", "In 3 shards.", {"pairs": "#/experiments/1/runs/abc"})
    assert text.splitlines()[0] == f"**6,000 pairs.** {ABOUT['pairs']}"
    parts = ["Folder: `s3://bucket/run/pairs`", "[generate_pairs](#/experiments/1/runs/abc)"]
    parts += [
        "python jobs/generate_pairs.py --config 'a b.yaml'",
        "Next:",
        "python jobs/distill.py --config 'a b.yaml'",
    ]
    parts.append("In 3 shards.")
    assert [text.index(part) for part in parts] == sorted(text.index(part) for part in parts)
    assert "secret" not in text
    assert note.titled("6,000 pairs") == "generate_pairs: 6,000 pairs"
    assert note.finished("6,000 pairs", "x" * 5000) == note.finished("6,000 pairs"), "half a table helps nobody"


def test_a_job_inside_another_does_not_say_which_command_is_next() -> None:
    """jobs/ablate.py makes pairs, too, and its own flags are no recipe of distill."""
    inside = Note("pairs", "runs/pairs", ("python", "jobs/ablate.py", "--config", "a.yaml"))
    assert "Next:" not in inside.finished("6,000 pairs")
    assert "Next:" not in Note("evaluate", "runs/report", ("python", "jobs/evaluate.py")).finished("FD 27.0 at 1 step")


@pytest.mark.parametrize(("job", "said"), [("distill", "goes on where it stopped"), ("benchmark", "begins anew")])
def test_without_a_result_the_note_says_how_to_go_on(job: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", [f"jobs/{job}.py", "--run", "/runs/mine"])
    note = Note.of(Recipe(run="/runs/mine"), job)  # type: ignore[arg-type]
    text = note.unfinished()
    assert "There is no result yet" in text
    assert said in text
    assert f"\npython jobs/{job}.py --run /runs/mine\n" in text
    assert note.title == job


def test_the_folder_is_where_the_result_goes() -> None:
    recipe = Recipe(run="/runs/mine", evaluate=EvaluateSettings(uri="/reports/one"))
    places = [Note.of(recipe, job).folder for job in ("pairs", "distill", "evaluate")]  # type: ignore[arg-type]
    assert places == ["/runs/mine/pairs", "/runs/mine/student", "/reports/one"]
