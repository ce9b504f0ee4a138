"""One experiment as a frozen dataclass: one YAML file, three commands. Its sections' knobs are in ``settings``.

What needs several sections is checked here, before anything expensive. ``command_line`` makes recipes out of YAML and
flags.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from pipeline.configuration import fields
from pipeline.configuration.addresses import PLACEHOLDER
from pipeline.configuration.fields import Lines, Name, Uri
from pipeline.files.places import check_no_credentials
from pipeline.settings.cluster import ClusterSettings
from pipeline.settings.evaluate import EvaluateSettings
from pipeline.settings.pairs import PairSettings
from pipeline.settings.studies import AblationSettings, BenchmarkSettings
from pipeline.settings.teacher import TeacherSettings
from pipeline.settings.text import CaptionSettings, TextSettings
from pipeline.settings.train import TrainSettings


@dataclass(frozen=True)
class Recipe:
    """One experiment.

    Attributes:
        name: of the experiment; the MLflow runs carry it.
        run: folder (path or URI) that holds pairs, student, report and the default MLflow store.
        teacher: network, weights and filter.
        captions: prompts of a teacher that takes captions; none for one that takes classes.
        text: their encoder.
        pairs: noise-token pairs.
        train: distillation.
        evaluate: sampling and scoring.
        cluster: resources.
        ablate: what the ablation varies; the three jobs take no notice of it.
        benchmark: what the benchmark measures, likewise.
        preflight: whose inputs a job checks before it begins: of all jobs that follow it, too, or of this one alone.
        events: a file that gets one JSON object a line for what happens (started, shard, step, checkpoint, snapshot,
            part, warning, finished, failed and so on), after what is in it. "-" is standard output, which then has
            these lines alone; all else that a job prints goes to standard error.
        dry_run: print the resolved recipe, what is missing for the three jobs and what they will cost; run nothing.
        status: print what is there, what is missing, rate and last activity of a run, without Ray; run nothing.
    """

    name: Name = "digits-llamagen"
    run: Uri = "runs/digits-llamagen"
    teacher: TeacherSettings = field(default_factory=TeacherSettings)
    captions: CaptionSettings = field(default_factory=CaptionSettings)
    text: TextSettings = field(default_factory=TextSettings)
    pairs: PairSettings = field(default_factory=PairSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    evaluate: EvaluateSettings = field(default_factory=EvaluateSettings)
    cluster: ClusterSettings = field(default_factory=ClusterSettings)
    ablate: AblationSettings = field(default_factory=AblationSettings)
    benchmark: BenchmarkSettings = field(default_factory=BenchmarkSettings)
    preflight: Literal["all", "this"] = "all"
    events: Lines | None = None
    dry_run: bool = False
    status: bool = False

    def __post_init__(self) -> None:
        fields.check(self, "")
        for name, value in leaves(self.resolved()).items():
            check_no_credentials(str(value), name)  # a recipe is printed, logged and stored
        fields.require(
            self.pairs.seed != self.evaluate.seed,
            f"pairs.seed and evaluate.seed are both {self.pairs.seed}; a student must not be scored on noise it was"
            " trained on, so change evaluate.seed.",
        )
        for name in ("teacher", "train", "evaluate"):
            fields.require(
                self.cluster.runs_on == "cuda" or getattr(self, name).precision != "tf32",
                f"{name}.precision is tf32 and cluster.gpus is {self.cluster.gpus:g}, but only GPUs have TF32 products;"
                f" set {name}.precision to fp32, or cluster.gpus above 0.",
            )

        for name in ("teacher", "evaluate"):
            fields.require(
                self.cluster.runs_on == "cuda" or getattr(self, name).graphs is not True,
                f"{name}.graphs is true, but the models run on the CPU (cluster.gpus {self.cluster.gpus:g},"
                f" cluster.device {self.cluster.device}), and CUDA graphs need a GPU; set {name}.graphs to false, or"
                " run on GPUs.",
            )

    def records(self, section: Literal["teacher", "evaluate"]) -> bool:
        """Whether CUDA graphs are recorded: a teacher's AR steps, or an evaluation's students and decoder.

        What ``graphs`` of the section says, with auto settled.
        """
        wanted = getattr(self, section).graphs
        return self.cluster.runs_on == "cuda" if wanted == "auto" else bool(wanted)

    @property
    def pairs_uri(self) -> str:
        """Folder of the pair set."""
        return self.pairs.uri or f"{self.run}/pairs"

    @property
    def student_uri(self) -> str:
        """Folder of the student and its checkpoints."""
        return self.train.uri or f"{self.run}/student"

    @property
    def report_uri(self) -> str:
        """Folder of the report."""
        return self.evaluate.uri or f"{self.run}/report"

    @property
    def cache_uri(self) -> str:
        """Folder of what an evaluation keeps for the next, unless evaluate.cache says where: not the report's, which is
        small enough to mail.
        """
        return self._beside_report("cache")

    @property
    def samples_uri(self) -> str:
        """Folder of the samplers' images, where evaluate.npz wants them."""
        return self._beside_report("samples")

    def _beside_report(self, name: str) -> str:
        """In the run's folder, or inside a report at a place of its own: what lies around that may not be ours."""
        return f"{self.evaluate.uri or self.run}/{name}"

    @property
    def ablation_uri(self) -> str:
        """Folder of the ablation."""
        return self.ablate.uri or f"{self.run}/ablation"

    @property
    def benchmark_uri(self) -> str:
        """Folder of the benchmark's table."""
        return self.benchmark.uri or f"{self.run}/benchmark"

    def placeholders(self) -> dict[str, str]:
        """{field: what to set it to} of the fields that a recipe leaves to its user, as ``CHANGE: URI of ...``."""
        return {
            name: value.removeprefix(PLACEHOLDER).lstrip(": ")
            for name, value in leaves(self.resolved()).items()
            if isinstance(value, str) and value.startswith(PLACEHOLDER)
        }

    def check_filled(self, *sections: str) -> None:
        """Raises Refused for a field of the recipe itself or of ``sections`` that its user has still to set."""
        for name, what in self.placeholders().items():
            fields.require(
                "." in name and name.partition(".")[0] not in sections,
                f"{name} says {PLACEHOLDER}; set it to the {what}, in the recipe or with --{name}.",
            )

    def resolved(self) -> dict[str, Any]:
        """The whole recipe as plain nested dicts, as it is printed, logged and stored."""
        return json.loads(json.dumps(asdict(self)))


def fingerprint(facts: dict[str, Any]) -> str:
    """SHA-256 over facts (plain JSON values) in a canonical order: equal settings, equal fingerprint."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def leaves(tree: Any, name: str = "") -> dict[str, Any]:
    """{"train": {"lr": 1e-4}} -> {"train.lr": 1e-4}: nested settings by dotted name; lists stay whole."""
    if not isinstance(tree, dict) or (name and not tree):
        return {name: tree}
    return {k: v for key, sub in tree.items() for k, v in leaves(sub, f"{name}.{key}".lstrip(".")).items()}
