"""The steps of a check within their minutes, what it writes however it ends, and a rehearsal of the cheapest step."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.device import check, formula, measure, plan, sheet, suite
from pipeline.device.budget import CLOSING, Budget, Ending, conduct
from pipeline.device.check import Session
from pipeline.device.plan import Step
from pipeline.host.errors import Refused, Unfinished

ROOT = Path(__file__).parents[2]
CARD = {"name": "NVIDIA H100", "rehearsal": False, "memory_bytes": 80e9, "driver": "570.1", "cuda": "12.8"}
CARD |= {"torch": "2.13.0", "triton": "3.6.0", "python": "3.11.9", "cores": 16, "commit": "0123456789abc"}
STEPS = plan.steps("cuda")
BY_NAME = {step.name: step for step in STEPS}


class Clock:
    """Stands still until a step moves it."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def whole(step: Step, value: float = 1.0) -> dict[str, float | None]:
    """Every figure of a step."""
    return {one.key: value for one in step.figures}


def outcomes(minutes: float, takes: dict[str, float], steps: list[Step] = STEPS) -> dict[str, Ending]:
    """Steps that take so many seconds, or all that they are given, on a clock of their own."""
    clock = Clock()

    def carry_out(step: Step, seconds: float) -> Ending:
        took = min(seconds, takes.get(step.name, seconds))
        clock.now += took
        return Ending("measured", seconds, took, seconds < step.wanted, whole(step))

    return {step.name: outcome for step, outcome in conduct(steps, Budget(60 * minutes, clock), carry_out)}


# ---- the plan and its minutes


def test_steps_come_in_order_of_worth_and_each_fits_a_session() -> None:
    assert [step.kind for step in STEPS] == sorted((step.kind for step in STEPS), key=plan.KINDS.index)
    assert list(BY_NAME) == [
        "tests", "benchmark-var-d16", "benchmark-llamagen-l", "pairs-var-d16", "pairs-llamagen-l",
        "memory-var-d16", "memory-llamagen-l", "training-var-d16",
    ]  # fmt: skip
    assert all(step.least <= step.wanted <= 60 * check.MINUTES - CLOSING for step in STEPS)
    assert sum(step.least for step in STEPS) <= 60 * check.MINUTES - CLOSING, "in a pinch, all of them"
    for step in STEPS:
        assert len({one.key for one in step.figures}) == len(step.figures)


def test_steps_are_chosen_by_kind_and_by_name() -> None:
    assert plan.chosen(STEPS, []) == STEPS
    found = plan.chosen(STEPS, ["training-var-d16", "pairs"])
    assert [step.name for step in found] == ["pairs-var-d16", "pairs-llamagen-l", "training-var-d16"]
    with pytest.raises(Refused, match="--only names 'pears'; there are tests, benchmark"):
        plan.chosen(STEPS, ["pears"])


def test_steps_that_end_early_leave_their_time_to_others() -> None:
    found = outcomes(10, {"tests": 60, "benchmark-var-d16": 60})
    assert all(one.state == "measured" and not one.shortened for one in found.values())


def test_the_last_step_is_shortened_and_what_does_not_fit_is_left() -> None:
    found = outcomes(4, {})
    assert (found["tests"].given, found["tests"].shortened) == (130, False)
    assert (found["benchmark-var-d16"].given, found["benchmark-var-d16"].shortened) == (95, False)
    assert [one.state for one in found.values()][2:] == ["left"] * 6
    assert found["pairs-var-d16"].about == ["5 s were left, and it needs 50."]
    found = outcomes(5, {})
    assert (found["benchmark-llamagen-l"].given, found["benchmark-llamagen-l"].shortened) == (65, True)


def test_a_cheaper_step_fits_where_a_dearer_one_does_not() -> None:
    found = outcomes(5, {"benchmark-llamagen-l": 35})
    assert found["pairs-var-d16"].state == "left"
    assert (found["memory-var-d16"].state, found["memory-var-d16"].given) == ("measured", 30)


# ---- the sheet


def recorded(**states: Any) -> dict[str, Any]:
    """A sheet of a run with these steps ('-' as '_'), each with its outcome."""
    found = sheet.new(CARD)
    for name, outcome in states.items():
        sheet.record(found, BY_NAME[name.replace("_", "-")], outcome, CARD)
    run = {"begun": "2026-11-30T10:00:00+00:00", "asked": [], "minutes_given": 10, "minutes": 9.5}
    sheet.finish(found, run, STEPS, sheet.command("a folder", False))
    return json.loads(json.dumps(found))


def test_the_sheet_has_every_figure_with_its_unit_measured_or_not() -> None:
    found = recorded(pairs_var_d16=Ending("measured", 95, 90, False, whole(BY_NAME["pairs-var-d16"], 120.5)))
    assert found["format"] == "distilled-decoding gpu-check 1"
    assert found["card"] == CARD
    step = found["steps"]["pairs-var-d16"]
    assert (step["state"], step["seconds"], step["commit"]) == ("measured", 90, CARD["commit"])
    assert {one["unit"] for one in step["figures"]} == {"pairs/s", "pairs", "s", "bytes"}
    text = sheet.markdown(found, STEPS)
    assert text.startswith("# GPU check: NVIDIA H100\n\n80 GB; driver 570.1, CUDA 12.8, torch 2.13.0, triton 3.6.0")
    assert "commit 012345678; 2026-11-30; 9.5 minutes in 1 run(s)" in text
    line = next(line for line in text.splitlines() if line.startswith("| pairs a second"))
    assert [cell.strip() for cell in line.split("|")[2:-1]] == ["pairs/s", "120", ""], (
        "empty where nothing was measured"
    )


def test_claims_say_whether_they_are_met() -> None:
    values = whole(BY_NAME["benchmark-llamagen-l"], 1.0) | {"ar_rate": 229.0, "one_step_ms": 11.5, "alg1_large": None}
    found = recorded(benchmark_llamagen_l=Ending("measured", 95, 90, False, values))
    figures = {one["key"]: one for one in found["steps"]["benchmark-llamagen-l"]["figures"]}
    assert [figures[key]["met"] for key in ("ar_rate", "one_step_ms", "alg1_large", "fm_ms")] == [
        False,
        True,
        None,
        None,
    ]
    claims = sheet.markdown(found, STEPS).split("## Tests")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in claims.splitlines() if line.startswith("| ")]
    cells = {row[0]: row[1:] for row in rows}
    assert cells["llamagen-l: teacher, AR, decoded, large batch"] == ["**229**", ">= 230 images/s", "**no**"]
    assert cells["llamagen-l: student, one step, decoded, batch 1"] == ["11.5", "<= 12 ms/image", "yes"]
    assert cells["llamagen-l: Alg. 1 over plain AR sampling, time at the large batch"] == ["", "<= 1.05 ratio", ""]
    assert cells["var-d16: student, one step, decoded, batch 1"] == ["", "<= 12 ms/image", ""]


def test_it_says_what_is_left_and_the_command_for_it() -> None:
    measured = {step.name.replace("-", "_"): Ending("measured", values=whole(step)) for step in STEPS}
    measured["pairs_var_d16"] = Ending("cut", about=["Odd."])
    measured["memory_var_d16"] = Ending("failed", about=["Its last words: out of memory"])
    measured["training_var_d16"] = Ending("left")
    found = recorded(**measured)
    command = "python jobs/gpu_check.py --out 'a folder' --only pairs-var-d16,training-var-d16 --minutes 3"
    assert found["left"] == {
        "steps": ["pairs-var-d16", "training-var-d16"], "failed": ["memory-var-d16"], "command": command,
    }  # fmt: skip
    text = sheet.markdown(found, STEPS)
    assert f"Left: pairs-var-d16, training-var-d16. These alone: `{command}`" in text
    assert "- pairs-var-d16: Its time ended before all was measured. Odd." in text
    assert "- memory-var-d16: It failed. Its last words: out of memory" in text
    assert "Failed: memory-var-d16; their logs lie beside this sheet." in text
    assert sheet.markdown(recorded(), STEPS).count("Left: tests, ") == 1


def test_a_step_that_is_not_begun_leaves_earlier_figures_alone() -> None:
    found = recorded(tests=Ending("measured", values=whole(BY_NAME["tests"], 7)))
    sheet.record(found, BY_NAME["tests"], Ending("left"), CARD)
    assert found["steps"]["tests"]["figures"][0]["value"] == 7
    sheet.record(found, BY_NAME["tests"], Ending("cut", values={"passed": 3}), CARD)
    assert [one["value"] for one in found["steps"]["tests"]["figures"]] == [3, None, None]


def test_a_sheet_is_of_one_card_and_of_one_format() -> None:
    assert sheet.onto(None, CARD) == sheet.new(CARD)
    assert sheet.onto(recorded(), CARD | {"driver": "580.0"})["card"]["driver"] == "580.0"
    with pytest.raises(
        Refused, match="of NVIDIA H100, and this is a rehearsal on a CPU, AMD EPYC; choose another --out"
    ):
        sheet.onto(recorded(), CARD | {"name": "AMD EPYC", "rehearsal": True})
    with pytest.raises(Refused, match="format 'older'"):
        sheet.onto({"format": "older"}, CARD)


# ---- the tests of the suite


PYTEST = """tests/models/test_graphs.py::test_a[{}-var] PASSED                    [ 25%]
tests/models/test_graphs.py::test_b[{'compile': True}-var-config0] FAILED [ 50%]
tests/models/test_graphs.py::test_c SKIPPED (no GPU)                      [ 75%]
tests/models/test_graphs.py::test_d """


def test_tests_are_counted_though_pytest_was_ended() -> None:
    values, names = suite.counted(PYTEST)
    assert values == {"passed": 1, "failed": 1, "skipped": 1}
    assert names["Failed"] == ["tests/models/test_graphs.py::test_b[{'compile': True}-var-config0]"]


def test_the_files_and_names_of_the_suite_are_there() -> None:
    """Every test that waits for a GPU is among those that are run."""
    words = suite.NAMES.split(" or ")
    for name in suite.FILES:
        lines = (ROOT / "tests" / f"{name}.py").read_text().splitlines()
        marks = [i for i, line in enumerate(lines) if line.startswith(("@GPU", "@pytest.mark.skipif(not torch.cuda"))]
        for mark in marks:
            test = next(line for line in lines[mark:] if line.startswith("def test_"))
            assert any(word in test for word in words), test


# ---- processes


@pytest.fixture
def session(tmp_path: Path) -> Session:
    return Session(tmp_path, "cuda", True, Budget(600))


def scripted(monkeypatch: pytest.MonkeyPatch, session: Session, script: str) -> list[bool]:
    """Every step runs this Python, whose arguments are the file of notes and whether there are graphs."""
    tried: list[bool] = []

    def command(step: Step, seconds: float, graphs: bool, notes: Path) -> list[str]:
        tried.append(graphs)
        return [sys.executable, "-c", script, str(notes), str(graphs)]

    monkeypatch.setattr(session, "_command", command)
    return tried


NOTE = """
import json, sys, time
def write(**values): open(sys.argv[1], "w").write(json.dumps({"values": values, "about": ["Odd."]}))
"""


def test_a_step_that_runs_over_is_ended_and_keeps_what_it_found(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, session, NOTE + "write(pairs_rate=3); time.sleep(60)")
    found = session.carry_out(BY_NAME["pairs-var-d16"], 1.0)
    assert (found.state, found.values, found.about) == ("cut", {"pairs_rate": 3}, ["Odd."])
    assert found.seconds < 10


def test_a_step_that_ends_without_all_figures_is_cut(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    step = BY_NAME["training-var-d16"]
    scripted(monkeypatch, session, NOTE + f"write(**{whole(step)!r})")
    assert session.carry_out(step, 30).state == "measured"
    scripted(monkeypatch, session, NOTE + "write(batch=1)")
    assert session.carry_out(step, 30).state == "cut"


@pytest.mark.parametrize(
    ("device", "asked", "on"), [("cuda", True, True), ("cuda", False, False), ("cpu", True, False)]
)
def test_graphs_are_those_of_teacher_and_student_or_of_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, asked: bool, on: bool
) -> None:
    monkeypatch.setattr(formula, "write", lambda settings, folder: {})
    recipe = measure.recipe_of(next(iter(plan.RECIPES[device])), device, tmp_path, tmp_path / "run", asked)
    assert (recipe.records("teacher"), recipe.records("evaluate")) == (on, on)


def test_a_step_that_fails_on_graphs_is_tried_without(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    step = BY_NAME["pairs-var-d16"]
    script = NOTE + f"sys.exit('no capture') if sys.argv[2] == 'True' else write(**{whole(step)!r})"
    tried = scripted(monkeypatch, session, script)
    found = session.carry_out(step, 30)
    assert (found.state, tried) == ("measured", [True, False])
    assert found.about[0].startswith("With CUDA graphs it failed (Its last words: no capture); these figures are")
    session.budget.seconds = 0
    assert session.carry_out(step, 30).state == "failed"


def test_a_crash_is_named(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, session, "import os; os.abort()")
    found = session.carry_out(BY_NAME["training-var-d16"], 30)
    assert (found.state, found.about[0]) == ("failed", "Signal 6 ended its process.")


# ---- the job


def check_on(folder: Path, monkeypatch: pytest.MonkeyPatch, only: str = "", minutes: float = 10) -> str:
    """The job with another machine's card, in this process."""
    monkeypatch.setattr(check, "card_of", lambda device: dict(CARD))
    return check.check(check.parser(None).parse_args(["--out", str(folder), "--only", only, "--minutes", str(minutes)]))


def test_runs_lie_over_one_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []

    def carry_out(self: Session, step: Step, seconds: float) -> Ending:
        taken.append(step.name)
        return Ending("measured", seconds, 1.0, False, whole(step, len(taken)))

    monkeypatch.setattr(Session, "carry_out", carry_out)
    tmp_path /= "not there yet"
    first = check_on(tmp_path, monkeypatch, "tests,pairs")
    assert "Left: benchmark-var-d16" in first
    second = check_on(tmp_path, monkeypatch, "pairs-llamagen-l,benchmark,memory,training")
    assert "Nothing is left." in second
    assert second == (tmp_path / check.MARKDOWN).read_text()
    found = json.loads((tmp_path / check.JSON).read_text())
    values = {name: step["figures"][0]["value"] for name, step in found["steps"].items()}
    assert (values["tests"], values["pairs-var-d16"], values["pairs-llamagen-l"]) == (1, 2, 6)
    assert len(found["runs"]) == 2
    assert check_on(tmp_path, monkeypatch, "tests", minutes=0.1).count("Nothing is left.") == 1, "nothing fits"


def test_a_failure_is_written_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Session, "carry_out", lambda self, step, seconds: Ending("failed", about=["Its last words: x"]))
    with pytest.raises(Unfinished, match="pairs-var-d16, pairs-llamagen-l failed; the logs lie in"):
        check_on(tmp_path, monkeypatch, "pairs")
    assert "It failed. Its last words: x" in (tmp_path / check.MARKDOWN).read_text()


def test_bad_asks_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Refused, match="--minutes is 0; give it more than 0"):
        check_on(tmp_path, monkeypatch, minutes=0)
    (tmp_path / check.JSON).write_text("{")
    with pytest.raises(Refused, match="is no JSON"):
        check_on(tmp_path, monkeypatch)
    monkeypatch.undo()
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, 0, "warning\nnull\n", ""))
    with pytest.raises(Refused, match="no CUDA device is found on this machine; --cpu true rehearses"):
        check.card_of("cuda")


SLOW = """
import sys
from pipeline.device import check, suite
check.card_of = lambda device: {card!r}
suite.command = lambda: [sys.executable, "-c", "print({line!r}); import time; time.sleep(60)"]
check.main(None, ["--out", {out!r}])
"""


def test_a_signal_writes_the_sheet(tmp_path: Path) -> None:
    """The process of the step is ended, too, and its figures are kept."""
    line = "tests/a.py::test_b PASSED"
    script = SLOW.format(card=CARD, line=line, out=str(tmp_path / "new"))
    job = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    log, deadline = tmp_path / "new" / "tests.log", time.monotonic() + 120
    while not (log.exists() and line in log.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    job.send_signal(signal.SIGTERM)
    out, said = job.communicate(timeout=60)
    assert job.returncode == 128 + signal.SIGTERM, said
    found = json.loads((tmp_path / "new" / check.JSON).read_text())
    assert found["steps"]["tests"]["state"] == "stopped"
    assert found["steps"]["tests"]["figures"][0]["value"] == 1
    assert found["left"]["steps"] == list(BY_NAME)
    assert b"- tests: A signal stopped it." in out


def test_make_runs_the_job() -> None:
    command = ["make", "--no-print-directory", "--dry-run", "gpu-check", "CHECK=--only pairs"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert said.rstrip().endswith("python jobs/gpu_check.py --only pairs") or said.rstrip().endswith(
        "python3 jobs/gpu_check.py --only pairs"
    )
    assert "pip" not in said


@pytest.mark.slow
def test_a_rehearsal_on_the_cpu(tmp_path: Path) -> None:
    """One step in earnest, without bounds, as no GPU's: footprints and training of the digits by formula."""
    command = [sys.executable, "jobs/gpu_check.py", "--cpu", "true", "--out", str(tmp_path), "--only"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "training"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("# GPU check: a rehearsal on a CPU, ")
    assert "**No GPU took part" in done.stdout
    found = json.loads((tmp_path / check.JSON).read_text())
    (step,) = found["steps"].values()
    assert step["state"] == "measured"
    assert all(one["value"] > 0 and one["bound"] is None for one in step["figures"])
    assert not list(tmp_path.glob("run-*"))
