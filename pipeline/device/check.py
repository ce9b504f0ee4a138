"""The body of jobs/gpu_check.py: steps in order of worth in processes of their own, within some minutes; one sheet.

It computes nothing and holds no memory of the card. However it ends, the sheet of what was found is written, and says
what is left.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline import storage
from pipeline.device import plan, sheet, suite
from pipeline.device.budget import CLOSING, Budget, Ending, State, conduct
from pipeline.device.plan import Step
from pipeline.generator.arguments import Parser, truth
from pipeline.host import provenance, signals
from pipeline.host.errors import Refused, Unfinished

ROOT = Path(__file__).parents[2]
JSON, MARKDOWN = "gpu-check.json", "gpu-check.md"
MINUTES, OUT = 10.0, "runs/gpu-check"
ASKING = 120  # seconds in which a card answers
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "PYTHONUNBUFFERED": "1"}  # what a process has said is there when it is ended


def main(doc: str | None, args: Sequence[str] | None = None) -> None:
    """The body of jobs/gpu_check.py."""
    parser(doc).carry_out(check, args)


def parser(doc: str | None) -> Parser:
    """What jobs/gpu_check.py takes."""
    out = Parser(doc)
    add = out.add_argument
    add("--minutes", type=float, default=MINUTES, help="of the whole, default %(default)g; what does not fit is left")
    add("--only", default="", metavar="STEPS", help=f"kinds ({', '.join(plan.KINDS)}) or names of steps, with commas")
    add("--out", default=OUT, metavar="FOLDER", help="of the sheet, logs and weights, default %(default)s")
    add(
        "--graphs",
        type=truth,
        default=True,
        metavar="BOOL",
        help="what is drawn with as CUDA graphs, default true",
    )
    add("--cpu", type=truth, default=False, metavar="BOOL", help="rehearse with small recipes on the CPU")
    return out


def check(asked: argparse.Namespace) -> str:
    """Carry out the steps that were asked for, write the sheet and return it as Markdown.

    Raises Refused, one sentence, where there is no GPU, no such step or a sheet of another card, and Unfinished, after
    the sheet is written, where a step failed.
    """
    device = "cpu" if asked.cpu else "cuda"
    every = plan.steps(device)
    steps = plan.chosen(every, [name for name in asked.only.split(",") if name])
    if not asked.minutes > 0:
        raise Refused(f"--minutes is {asked.minutes:g}; give it more than 0.")
    budget, folder = Budget(60 * asked.minutes), Path(asked.out).resolve()
    card = card_of(device)
    storage.check_writable(str(folder))
    folder.mkdir(parents=True, exist_ok=True)
    found = sheet.onto(read(folder), card)
    run = {"begun": provenance.now(), "asked": [step.name for step in steps], "minutes_given": asked.minutes}
    session = Session(folder, device, asked.graphs, budget)
    try:
        for step, outcome in conduct(steps, budget, session.carry_out):
            print(f"{step.name}: {outcome.state} after {outcome.seconds:.0f} s.", file=sys.stderr, flush=True)
            sheet.record(found, step, outcome, card)
    finally:
        with signals.held():  # a second signal must not leave half a sheet
            if session.stopped:
                sheet.record(found, *session.stopped, card)
            run["minutes"] = round(budget.used / 60, 2)
            sheet.finish(found, run, every, sheet.command(asked.out, asked.cpu))
            text = write(folder, found, every)
            if signals.stopping():
                print(text, flush=True)
    failed = [name for name in run["asked"] if found["steps"][name]["state"] == "failed"]
    if failed:
        print(text, flush=True)
        raise Unfinished(f"{', '.join(failed)} failed; the logs lie in {folder}.")
    return text


def card_of(device: str) -> dict[str, Any]:
    """``card.facts`` from another process, since it would hold memory of the card; Refused without a GPU."""
    command = [sys.executable, "-m", "pipeline.device.card", device]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=ASKING, check=False
    )
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        raise Refused(f"torch cannot be asked for a card: {last_line(done.stderr)}")
    facts = json.loads(lines[-1])
    if facts is None:
        raise Refused("no CUDA device is found on this machine; --cpu true rehearses the check on the CPU.")
    return facts


def environment() -> dict[str, str]:
    """Of the processes: this checkout comes first, whatever is installed."""
    path = os.pathsep.join([str(ROOT), *filter(None, sys.path)])  # what this process finds, its step finds too
    return os.environ | QUIET | {"PYTHONPATH": path}


def read(folder: Path) -> dict[str, Any] | None:
    """The sheet of an earlier run; None without one. Refused for a file that is none."""
    try:
        return json.loads((folder / JSON).read_bytes())
    except FileNotFoundError:
        return None
    except ValueError:
        raise Refused(f"{folder / JSON} is no JSON; choose another --out.") from None


def write(folder: Path, found: dict[str, Any], every: Sequence[Step]) -> str:
    """Both forms of the sheet; returns the Markdown."""
    text = sheet.markdown(found, every)
    storage.write_bytes(str(folder / JSON), (json.dumps(found, indent=2) + "\n").encode())
    storage.write_bytes(str(folder / MARKDOWN), text.encode())
    return text


def last_line(text: str) -> str:
    """The last words of a process, as its errors end with what happened."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "it said nothing")


class Session:
    """The processes of the steps, one at a time, and their logs in the folder of the sheet."""

    def __init__(self, folder: Path, device: str, graphs: bool, budget: Budget) -> None:
        self.folder, self.device, self.graphs, self.budget = folder, device, graphs and device == "cuda", budget
        self.stopped: tuple[Step, Ending] | None = None  # the step that a signal met, with what it had found

    def carry_out(self, step: Step, seconds: float) -> Ending:
        """One step. Where it fails on CUDA graphs and time is left, it is tried again without them."""
        print(f"{step.name}: at most {seconds:.0f} s.", file=sys.stderr, flush=True)
        recorded = self.graphs and step.kind in plan.ON_GRAPHS
        outcome = self._once(step, seconds, recorded)
        again = self.budget.share(step) if recorded and outcome.state == "failed" else 0.0
        if not again:
            return outcome
        eager = self._once(step, again, False)
        said = [
            f"With CUDA graphs it failed ({' '.join(outcome.about)}); these figures are without them.",
            *eager.about,
        ]
        return Ending(**vars(eager) | {"about": said})

    def _once(self, step: Step, seconds: float, graphs: bool) -> Ending:
        """One try of a step in a process of its own, which is ended when its time is over."""
        begun, log = time.monotonic(), self.folder / f"{step.name}.log"
        notes = self.folder / f"{step.name}.notes.json"
        notes.unlink(missing_ok=True)
        command = suite.command() if step.kind == "tests" else self._command(step, seconds, graphs, notes)
        status: int | None = None
        with log.open("wb") as file:
            # A session of its own: Ctrl-C reaches this process alone, which ends the others.
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment(), stdout=file, stderr=file, start_new_session=True
            )
            try:
                status = process.wait(seconds)
            except subprocess.TimeoutExpired:
                status = end_group(process)
                state: State = "cut"
            except BaseException:
                end_group(process)
                self.stopped = step, outcome_of(step, "stopped", seconds, time.monotonic() - begun, log, notes)
                raise
            else:
                whole = suite.FINISHED if step.kind == "tests" else (0,)
                state = "measured" if status in whole else "failed"
        found = outcome_of(step, state, seconds, time.monotonic() - begun, log, notes)
        if found.state == "failed":
            died = f"Signal {-status} ended its process." if status and status < 0 else ""
            said = last_line(log.read_text(errors="replace"))
            return Ending(**vars(found) | {"about": [*found.about, *filter(None, [died, f"Its last words: {said}"])]})
        return found

    def _command(self, step: Step, seconds: float, graphs: bool, notes: Path) -> list[str]:
        """Of a step's own process, which has a little less time than it is given, to end by itself."""
        given = {"--device": self.device, "--folder": self.folder, "--notes": notes, "--graphs": graphs}
        given |= {"--seconds": max(1.0, seconds - CLOSING / 2)}
        flags = [str(word) for pair in given.items() for word in pair]
        return [sys.executable, "-m", "pipeline.device.measure", step.name, *flags]


def outcome_of(step: Step, state: State, given: float, seconds: float, log: Path, notes: Path) -> Ending:
    """How a step ended, with all that it had found by then; cut, where that is not all that it should find."""
    content: dict[str, Any] = {"values": {}, "about": []}
    details: dict[str, list[str]] = {}
    if step.kind == "tests":
        content["values"], details = suite.counted(log.read_text(errors="replace"))
    elif notes.exists():
        content = json.loads(notes.read_bytes())
        notes.unlink()
    if state == "measured" and {one.key for one in step.figures} - content["values"].keys():
        state = "cut"
    shortened = given < step.wanted
    return Ending(state, given, seconds, shortened, content["values"], content["about"], details)


def end_group(process: subprocess.Popen[bytes]) -> int:
    """Tell a process and all of its session to end, end those that do not soon; its status."""
    for number, patience in ((signal.SIGTERM, CLOSING / 2), (signal.SIGKILL, None)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            continue
    return process.wait()
