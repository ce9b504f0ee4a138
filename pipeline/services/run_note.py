"""What a run is called in MLflow and what stands on top of its page: what it is, its result, its folder, how to go on.

MLflow shows the first lines of a note and folds the rest away, and cuts long names in its table, so the result comes
early in both, and tables come last. Knows nothing of MLflow itself.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline import storage
from pipeline.recipe import Recipe
from pipeline.services.mlflow_names import LONGEST, Job
from pipeline.services.mlflow_store import without_credentials

SCRIPTS: dict[Job, str] = {  # in jobs/
    "pairs": "generate_pairs",
    "distill": "distill",
    "evaluate": "evaluate",
    "ablate": "ablate",
    "benchmark": "benchmark",
}
ABOUT: dict[Job, str] = {
    "pairs": "Noise-token pairs (Alg. 1): what the teacher makes of numbered noise.",
    "distill": "A few-step student, distilled from noise-token pairs (Alg. 2).",
    "evaluate": "Images of every sampler that the recipe lists, scored against a reference and timed.",
    "ablate": "One setting at a time around a recipe; the runs below this one made its variants.",
    "benchmark": "The speed of everything, as ratios measured in one run.",
}
NEXT: dict[Job, Job] = {"pairs": "distill", "distill": "evaluate"}  # takes the same recipe and flags


@dataclass(frozen=True)
class Note:
    """What is known of a run when it begins.

    Attributes:
        job: whose run it is.
        folder: where its result goes, a URI.
        command: the command line that began it.
    """

    job: Job
    folder: str
    command: tuple[str, ...]

    @classmethod
    def of(cls, recipe: Recipe, job: Job) -> Note:
        """The note of a run that this process begins."""
        folders = {"pairs": recipe.pairs_uri, "distill": recipe.student_uri, "evaluate": recipe.report_uri}
        folders |= {"ablate": recipe.ablation_uri, "benchmark": recipe.benchmark_uri}
        return cls(job, storage.resolve(folders[job]), ("python", *sys.argv))

    @property
    def title(self) -> str:
        """The run's name until there is a result; the recipe's own is that of the experiment."""
        return SCRIPTS[self.job]

    def titled(self, result: str) -> str:
        """The run's name with its result: "evaluate: FD 27.0 at 1 step"."""
        return f"{self.title}: {result}"

    def unfinished(self) -> str:
        """The note as long as there is no result, Markdown."""
        again = "begins anew" if self.job == "benchmark" else "goes on where it stopped"
        return _text(
            ABOUT[self.job],
            "There is no result yet: the job runs, or was stopped. The same command " + again + ":",
            _code(self.command),
            f"Folder: `{without_credentials(self.folder)}`",
        )

    def finished(
        self, result: str, text: str = "", origins: Mapping[Job, str] | None = None, draw_with: str = ""
    ) -> str:
        """The note of a run with a ``result``, Markdown.

        ``text`` says more of the result, and is left out where MLflow has no room for it; ``origins`` leads from the
        jobs that this one went on from to the addresses of their runs' pages; ``draw_with`` is the folder of a student
        to draw images with.
        """
        links = ", ".join(f"[{SCRIPTS[job]}]({page})" for job, page in (origins or {}).items())
        short = _text(
            f"**{result[:1].upper()}{result[1:]}.** {ABOUT[self.job]}",
            f"Folder: `{without_credentials(self.folder)}`",
            f"Goes on from: {links}" if links else "",
            "Made by:",
            _code(self.command),
            *self._onward(draw_with),
        )
        whole = _text(short, text)
        return whole if len(whole) <= LONGEST["tag"] else short

    def _onward(self, draw_with: str) -> Sequence[str]:
        """Headed commands for what comes next."""
        out = []
        following = NEXT.get(self.job)
        if following and len(self.command) > 1 and Path(self.command[1]).stem == SCRIPTS[self.job]:
            script = str(Path(self.command[1]).with_stem(SCRIPTS[following]))
            out += ["Next:", _code((self.command[0], script, *self.command[2:]))]
        if draw_with:
            command = ("python", "jobs/sample.py", "--student", draw_with, "--out", "samples.png")
            out += ["Images of the student:", _code(command)]
        return out


def _text(*parts: str) -> str:
    return "\n\n".join(filter(None, parts))


def _code(command: Sequence[str]) -> str:
    return f"```\n{without_credentials(shlex.join(command))}\n```"
