"""What a recipe draws and scores."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pipeline.configuration import fields
from pipeline.configuration.addresses import Address
from pipeline.configuration.fields import Actors, Name, Pool, Range, Seed, Size, SizeOrOff, Switch, Uri
from pipeline.numerics.precision import Precision
from pipeline.report.names import metric_name
from pipeline.settings.text import UnseenSettings

Flavour = Literal["torch-fidelity", "pytorch-fid"]
NAME_OF_STUDENT = r"[A-Za-z0-9][A-Za-z0-9._-]{0,39}"
FORMULA = "formula"  # weights of a scoring network that are random numbers: a rehearsal


@dataclass(frozen=True)
class EvaluateSettings:
    """Sampling and scoring.

    Attributes:
        uri: folder of the report; default <run>/report.
        cache: folder in which the statistics of finished samplers are kept, under fingerprints of all that shaped them;
            reports may share one. Default <run>/cache, or <report>/cache of a report with a uri of its own.
        count: samples per sampler.
        seed: of the evaluation's noise; never the pairs'.
        samplers: rows of the report, each {name: FewStep, ...fields of that sampler}. Figures that the paper prints for
            one may stand beside them, ``paper: {fid: 9.94, is: 193.6, precision: 0.8, recall: 0.37, parameters:
            327_000_000, seconds: 0.021, speedup: 6.3}``, and are shown beside ours.
        student: URI of a student's folder or of its weights, or models:/NAME@best or models:/NAME/3 out of MLflow's
            model registry; default <run>/student.
        students: other students that stand beside the recipe's own in one report, {name: URI}, each as ``student`` is
            given. Every sampler that draws with a student draws with each of them too, for the same labels or prompts
            from the same noise, and differences are told with their errors. Their layout, tokenizer and conditioning
            must be those of the teacher; names are of letters, digits and ``._-``.
        register: name in MLflow's model registry under which the student becomes a version once its report is written.
            The alias ``best`` moves to it if the first FewStep listed has a lower distance than that of the version
            that holds it, at the same count, features, reference and number of steps.
        features: which network scores: digits, or inception (FID).
        flavour: how Inception sees images: torch-fidelity (as ADM, VAR and LlamaGen score), pytorch-fid (as the paper's
            FID), or both, two distances of the same images. Their numbers do not compare.
        inception: URI of the Inception weights, or formula: random ones, for rehearsals without the file (features:
            inception).
        reference: what samples are compared with (features: inception). URI of statistics: ADM's .npz, pytorch-fid's
            .npz, the authors' statistic.pth, or the reference.npz of an earlier report. Or of real images, whose
            statistics are then made here: a folder of them, Parquet with a column image (or jpg, png, webp), an .npz
            with arr_0 alone.
        images: URI of real images beside a reference of statistics alone, for precision, recall and KID: a folder,
            Parquet, or an .npz with arr_0, such as ADM's. What they lack as statistics of a flavour is made of them.
        image_size: side that images are resized to before they are scored, bicubically, as LlamaGen's authors do; 0
            takes the teacher's, but 256 of one that makes 384, for which nobody has a reference.
        reference_flavour: the flavour of statistics that do not say it themselves.
        captions: prompts that are drawn, of which no pair was made.
        clip: URI of a folder in Hugging Face's layout with a CLIP model, for a CLIP score of images and prompts.
        dinov2: URI of the weights of DINOv2's ViT-L/14, Meta's dinov2_vitl14_pretrain.pth, for FD-DINOv2 as another
            column; or formula: random ones, for rehearsals. It needs real images: as the reference, or as ``images``.
        npz: also write each sampler's images to <run>/samples/<name>.npz, for OpenAI's evaluator; to <report>/samples
            of a report with a uri of its own.
        precision: of the student: fp32, tf32 (float32 with TF32 products, on GPUs) or bf16 autocast. Where a student
            draws, the decoder follows in fp32 or tf32; where none does, it follows the teacher. Scores are fp32's.
        compile: torch.compile the student's blocks. Changes float rounding only.
        graphs: record what a GPU does in a student's jump and in decoding as CUDA graphs and replay them, at batch
            sizes that come twice in a row, as ``teacher.graphs`` does with AR steps: speed-ups then compare like with
            like. auto does so where the models run on GPUs. Changes nothing but speed; the graphs take memory.
        batch: samples that an actor draws at once.
        actors: sampling actors: so many, and the cluster scales to it, or auto, as many as there are places for.
        grid: columns of the sample grid, one noise each.
        curve_count: samples per exported student for the curve over training; 0 leaves the curve out.
        timing_batches: batch sizes whose speed is measured, 1 always among them: every sampler at every size, however
            long it takes, since speed-ups are over the teacher at the same size. None are with an empty list.
        compare: URIs of report.json files of runs that differ in pairs.count alone, for scores over its size.
    """

    uri: Uri | None = None
    cache: Uri | None = None
    count: Annotated[int, Range(2, 10**12, "2 or more, which a covariance needs, and at most 10^12")] = 5_000
    seed: Seed = 2
    samplers: list[dict[str, Any]] = field(default_factory=list)
    student: Annotated[str, Address(model=True)] | None = None
    students: dict[str, Annotated[str, Address(model=True)]] = field(default_factory=dict)
    register: Name | None = None
    features: Literal["digits", "inception"] = "digits"
    flavour: Literal["torch-fidelity", "pytorch-fid", "both"] = "torch-fidelity"
    inception: Uri | None = None
    reference: Uri | None = None
    images: Uri | None = None
    image_size: SizeOrOff = 0
    reference_flavour: Flavour | None = None
    captions: UnseenSettings = field(default_factory=UnseenSettings)
    clip: Uri | None = None
    dinov2: Uri | None = None
    npz: bool = False
    precision: Precision = "fp32"
    compile: bool = False
    graphs: Switch = False
    batch: Size = 250
    actors: Actors = 2
    grid: Pool = 12
    curve_count: Annotated[int, Range(0, 10**12, "0, or 2 or more, and at most 10^12")] = 1_000
    timing_batches: tuple[Annotated[int, Range(1, 1 << 16, "1 or more, and at most 65,536")], ...] = (1, 4, 16, 64, 256)
    compare: tuple[Uri, ...] = ()

    def __post_init__(self) -> None:
        fields.check(self, "evaluate")
        fields.require(
            self.curve_count != 1,
            "evaluate.curve_count is 1, and a covariance needs 2 samples or more; give 2 or more, or 0 for no curve.",
        )
        self._check_students()
        if self.register is not None:
            fields.require(
                not set(self.register) & set("/:@'"),
                f"evaluate.register is {self.register!r}; give a name without slash, colon, @ and quote.",
            )
        fields.require(
            self.precision != "fp16",
            "evaluate.precision is fp16, which only teachers know (teacher.precision); use bf16, tf32 or fp32.",
        )
        if self.features == "inception":
            for name in ("inception", "reference"):
                fields.require(
                    bool(getattr(self, name)),
                    f"evaluate.features is inception but evaluate.{name} is not set; give its path or URI.",
                )

    def _check_students(self) -> None:
        """Refuse names of other students that cannot stand in tables and file names, or that clash there."""
        seen: dict[str, str] = {}
        for name in self.students:
            fields.require(
                re.fullmatch(NAME_OF_STUDENT, name) is not None,
                f"evaluate.students has the name {name!r}; give 1 to 40 letters, digits, dots, hyphens and underscores,"
                " a letter or a digit first.",
            )
            key = metric_name(name).casefold()
            fields.require(
                key not in seen,
                f"evaluate.students has the names {seen.get(key)} and {name}, which clash in the names of files and"
                " metrics; change one of them.",
            )
            seen[key] = name

    @property
    def flavours(self) -> tuple[Flavour, ...]:
        """Those that are scored, the one of the main column first."""
        return ("torch-fidelity", "pytorch-fid") if self.flavour == "both" else (self.flavour,)

    @property
    def replicas(self) -> int:
        """``actors`` where they are a number, as in a recipe that is ``counted``."""
        assert self.actors != "auto", "it was to be counted"
        return self.actors
