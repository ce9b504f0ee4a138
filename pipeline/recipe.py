"""Every knob of the three jobs as frozen dataclasses: one experiment, one YAML file, three commands.

The type of a field says which values it may have (``fields``); what needs several fields is checked here. Both need no
file and no network, and come before anything expensive. ``command_line`` makes recipes out of YAML and flags.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal, get_args

from pipeline import storage
from pipeline.configuration import fields
from pipeline.configuration.addresses import PLACEHOLDER, Address
from pipeline.configuration.fields import (
    Count,
    Name,
    Pool,
    PoolOrOff,
    Positive,
    Range,
    Seed,
    Share,
    Size,
    SizeOrOff,
    Uri,
    Weight,
)
from pipeline.errors import Refused
from pipeline.flow.matching import Solver
from pipeline.noise import Dtype
from pipeline.numerics.precision import Precision

Flavour = Literal["torch-fidelity", "pytorch-fid"]
SHARDS = 10_000_000  # of a pair set; the driver lists them
FORMULA = "formula"  # Inception weights that are random numbers: a rehearsal


@dataclass(frozen=True)
class Filter:
    """How a teacher turns logits into p: guidance, temperature, top-k, top-p. p after the filter is what FM preserves.

    Attributes:
        guidance: classifier-free guidance. VAR: (1 + w) cond - w uncond with w = guidance * s / (S - 1) on scale s, 0
            is off. LlamaGen: uncond + guidance * (cond - uncond), 1 is off.
        temperature: logits are divided by it.
        top_k: keep the k largest logits (ties with the k-th stay); 0 is off.
        top_p: keep the nucleus of this probability by the family's own rule; 1 is off.
    """

    guidance: Weight = 2.0
    temperature: Positive = 1.0
    top_k: SizeOrOff = 0
    top_p: Annotated[float, Range(math.nextafter(0, 1), 1, "above 0 and at most 1, which keeps every code")] = 1.0

    def __post_init__(self) -> None:
        fields.check(self, "teacher.filter")


@dataclass(frozen=True)
class TeacherSettings:
    """The teacher: which network, which weights, which p.

    Attributes:
        family: dotted path of the package with Config, Tokenizer, Teacher and Student.
        config: fields of the family's Config, the shape of the nets.
        tokenizer: URI of the tokenizer's weights (a path, s3://, gs://, hf:// or package://, the installed assets).
        checkpoint: URI of the transformer's weights.
        filter: guidance, temperature, top-k and top-p.
        precision: of the transformer: fp32, tf32 (float32 with TF32 products, on GPUs), fp16 (float16 in its blocks,
            float32 around them; numbers beyond 65,504 end the job) or bf16 (throughout). Guidance, filter and flow
            matching are always in full float32. Part of a pair set's fingerprint.
        compile: torch.compile the transformer's blocks. Changes float rounding only.
        graphs: record what a GPU does in every AR step as a CUDA graph and replay it, in generations from the first
            step on whose batch size comes twice in a row. Changes nothing but speed; the graphs take memory.
        unpickle: read .pt and .pth files (students' too) that hold more than tensors and plain values. Reading them
            runs code that they bring along: only for files that you trust.
    """

    family: Name = "pipeline.models.var"
    config: dict[str, Any] = field(default_factory=dict)
    tokenizer: Annotated[str, Address(empty=True)] = ""
    checkpoint: Annotated[str, Address(empty=True)] = ""
    filter: Filter = field(default_factory=Filter)
    precision: Precision = "fp32"
    compile: bool = False
    graphs: bool = False
    unpickle: bool = False

    def __post_init__(self) -> None:
        fields.check(self, "teacher")
        _check(
            all(part.isidentifier() for part in self.family.split(".")),
            f"teacher.family is {self.family!r}; it must be the dotted path of a package, e.g. pipeline.models.var.",
        )


@dataclass(frozen=True)
class PairSettings:
    """Noise-token pairs (Alg. 1).

    Attributes:
        uri: folder of the pair set; default <run>/pairs.
        count: rows in all. Outside the fingerprint: raise it to grow a set.
        seed: with the sample id, determines noise and label.
        shard_rows: rows of one Parquet shard, the unit of work, of commit and of resume.
        noise: stored in the shards, or derived again from (seed, sample id) by the reader.
        dtype: what the noise is rounded to before the teacher sees it, and stored as: float16, or float32, twice as
            large. The noise of an evaluation is always rounded to float16, so that all students are scored on the same.
        solver: how the flow-matching ODE is solved.
        batch: samples that a teacher replica generates at once. Does not change results beyond float rounding.
        actors: teacher replicas. Fixed, and the cluster scales to it.
        patience_hours: how long finished shards wait for a storage that does not answer, and the replicas with them.
        verify: check the finished set instead of generating: every shard, and some rows again through the teacher.
    """

    uri: Uri | None = None
    count: Count = 20_000
    seed: Seed = 1
    shard_rows: Size = 1_000
    noise: Literal["stored", "derived"] = "stored"
    dtype: Dtype = "float16"
    solver: Solver = field(default_factory=Solver)
    batch: Size = 250
    actors: Pool = 2
    patience_hours: Annotated[float, Range(0, 10_000, "0 or more, and at most 10,000")] = 24
    verify: bool = False

    def __post_init__(self) -> None:
        fields.check(self, "pairs")
        _check(
            self.count <= SHARDS * self.shard_rows,
            f"pairs.count {self.count} in shards of pairs.shard_rows {self.shard_rows} rows makes more than {SHARDS:,}"
            " files; make the shards larger.",
        )


@dataclass(frozen=True)
class TrainSettings:
    """Distillation (Alg. 2).

    Attributes:
        uri: folder of checkpoints and exported students; default <run>/student.
        start_steps: the AR steps t that training draws from, in paper numbering (1 is pure noise).
        split: leading AR steps whose embeddings come from the logits head; later ones from the embedding head.
        cross_entropy: weight of the cross-entropy on logits.
        lpips: weight of the perceptual loss on decoded images.
        perceptual: which perceptual network: LPIPS's VGG or AlexNet trunk, or the small one of the digits default.
        batch: samples of one optimiser step over all workers.
        micro_batch: samples that a worker takes through the networks at once, adding up gradients until its share of
            the batch is done; 0 takes the share whole. Less memory, the same student but for rounding.
        epochs: passes over the pair set.
        lr: peak learning rate.
        warmup: optimiser steps of linear warm-up.
        schedule: after the warm-up, constant or cosine to zero.
        betas: of AdamW: the decays of its averages of gradients and of their squares.
        weight_decay: of AdamW, on matrices only.
        clip: largest gradient norm.
        ema: decay of the moving average that is exported.
        seed: of the order of the pairs, of t and of the student's new parameters.
        mask: VAR students, whether a token sees its scale mates (paper) or not (released).
        precision: fp32, tf32 (float32 with TF32 products, on GPUs) or bf16 autocast.
        compile: torch.compile the student's blocks. Changes float rounding only.
        recompute: keep less for the backward pass and compute it again there (activation checkpointing): in the
            student's blocks, the decoder's and LPIPS's trunk's. The same student. Steps of a small VAR with VGG took a
            quarter longer on a CPU; a sample of VAR-d16 takes 391 MB instead of 1,481, of LlamaGen-L 310 of 1,028.
        workers: DDP workers; 0 trains in the driver's process.
        checkpoint_every: optimiser steps between checkpoints.
        keep: newest checkpoints kept.
        log_every: optimiser steps between logged metrics and progress lines.
        snapshots: EMA students exported along the way for the report's curve, evenly spaced, the last is the result.
        export: safetensors, or released: also student.pth, in the layout that the authors' scripts read. Set after
            training, a second run of distill adds that file.
    """

    uri: Uri | None = None
    start_steps: tuple[Size, ...] = (1, 6)
    split: SizeOrOff = 5
    cross_entropy: Weight = 0.1
    lpips: Weight = 1.0
    perceptual: Literal["vgg", "alex", "digits"] = "vgg"
    batch: Size = 64
    micro_batch: SizeOrOff = 0
    epochs: Count = 10
    lr: Positive = 1e-4
    warmup: Annotated[int, Range(0, 10**12, "0 or more, and at most 10^12")] = 100
    schedule: Literal["constant", "cosine"] = "constant"
    betas: tuple[Share, Share] = (0.9, 0.95)
    weight_decay: Weight = 0.05
    clip: Positive = 1.0
    ema: Share = 0.9999
    seed: Seed = 3
    mask: Literal["released", "paper"] = "released"
    precision: Precision = "fp32"
    compile: bool = False
    recompute: bool = False
    workers: PoolOrOff = 0
    checkpoint_every: Count = 500
    keep: Pool = 2
    log_every: Count = 20
    snapshots: Pool = 5
    export: Literal["safetensors", "released"] = "safetensors"

    def __post_init__(self) -> None:
        fields.check(self, "train")
        _check(
            self.lpips + self.cross_entropy > 0,
            "train.lpips and train.cross_entropy are both 0; nothing is learned.",
        )
        _check(
            self.precision != "fp16",
            "train.precision is fp16, whose gradients vanish or overflow without loss scaling; use bf16, tf32 or fp32.",
        )
        steps = self.start_steps
        _check(
            bool(steps) and steps[0] == 1 and list(steps) == sorted(set(steps)),
            f"train.start_steps is {list(steps)}; it must rise and begin with 1, the step of pure noise.",
        )
        if self.workers:
            _check(
                self.batch % self.workers == 0,
                f"train.batch {self.batch} is not a multiple of train.workers {self.workers}; change one of them.",
            )


@dataclass(frozen=True)
class EvaluateSettings:
    """Sampling and scoring.

    Attributes:
        uri: folder of the report; default <run>/report.
        cache: folder in which the statistics of finished samplers are kept, under fingerprints of all that shaped them;
            reports may share one. Default <report>/cache.
        count: samples per sampler.
        seed: of the evaluation's noise; never the pairs'.
        samplers: rows of the report, each {name: FewStep, ...fields of that sampler}. Figures that the paper prints for
            one may stand beside them, ``paper: {fid: 9.94, is: 193.6, precision: 0.8, recall: 0.37, parameters:
            327_000_000, seconds: 0.021, speedup: 6.3}``, and are shown beside ours.
        student: URI of the student's weights, or models:/NAME@best or models:/NAME/3 out of MLflow's model registry;
            default <run>/student/student.safetensors.
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
            statistics are then made here: a folder of them, Parquet with a column image, an .npz with arr_0 alone.
        images: URI of real images beside a reference of statistics alone, for precision, recall and KID: a folder,
            Parquet, or an .npz with arr_0, such as ADM's. What they lack as statistics of a flavour is made of them.
        image_size: side that images are resized to before they are scored, bicubically, as LlamaGen's authors do; 0
            takes the teacher's, but 256 of one that makes 384, for which nobody has a reference.
        reference_flavour: the flavour of statistics that do not say it themselves.
        npz: also write each sampler's images to <report>/samples/<name>.npz, for OpenAI's evaluator.
        precision: of the student: fp32, tf32 (float32 with TF32 products, on GPUs) or bf16 autocast. Where a student
            draws, the decoder follows in fp32 or tf32; where none does, it follows the teacher. Scores are fp32's.
        compile: torch.compile the student's blocks. Changes float rounding only.
        batch: samples that an actor draws at once.
        actors: sampling actors.
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
    register: Name | None = None
    features: Literal["digits", "inception"] = "digits"
    flavour: Literal["torch-fidelity", "pytorch-fid", "both"] = "torch-fidelity"
    inception: Uri | None = None
    reference: Uri | None = None
    images: Uri | None = None
    image_size: SizeOrOff = 0
    reference_flavour: Flavour | None = None
    npz: bool = False
    precision: Precision = "fp32"
    compile: bool = False
    batch: Size = 250
    actors: Pool = 2
    grid: Pool = 12
    curve_count: Annotated[int, Range(0, 10**12, "0, or 2 or more, and at most 10^12")] = 1_000
    timing_batches: tuple[Annotated[int, Range(1, 1 << 16, "1 or more, and at most 65,536")], ...] = (1, 4, 16, 64, 256)
    compare: tuple[Uri, ...] = ()

    def __post_init__(self) -> None:
        fields.check(self, "evaluate")
        _check(
            self.curve_count != 1,
            "evaluate.curve_count is 1, and a covariance needs 2 samples or more; give 2 or more, or 0 for no curve.",
        )
        if self.register is not None:
            _check(
                not set(self.register) & set("/:@'"),
                f"evaluate.register is {self.register!r}; give a name without slash, colon, @ and quote.",
            )
        _check(
            self.precision != "fp16",
            "evaluate.precision is fp16, which only teachers know (teacher.precision); use bf16, tf32 or fp32.",
        )
        if self.features == "inception":
            for name in ("inception", "reference"):
                _check(
                    bool(getattr(self, name)),
                    f"evaluate.features is inception but evaluate.{name} is not set; give its path or URI.",
                )

    @property
    def flavours(self) -> tuple[Flavour, ...]:
        """Those that are scored, the one of the main column first."""
        return ("torch-fidelity", "pytorch-fid") if self.flavour == "both" else (self.flavour,)


@dataclass(frozen=True)
class ClusterSettings:
    """Where the jobs run.

    Attributes:
        gpus: GPUs of one teacher replica, training worker or sampling actor, which uses one at most: 1, a share of one
            where several fit into its memory, or 0 for the CPU.
        cpus: CPU cores of the same.
        device: what torch calls one of those GPUs. "cpu" rehearses a cluster whose GPUs are made up (``ray start
            --num-gpus``): the same replicas on the same nodes, computing on the CPU.
        usd_per_gpu_hour: price that --dry_run multiplies the GPU-hours with.
        heartbeat_minutes: a job of which nothing has finished for so long says what is in work, where and since when.
        stall_minutes: a shard, or a part of an evaluation, that a process is at for longer is taken from it and given
            to another; if it takes that one as long, it has failed. 0 is no limit.
    """

    gpus: Annotated[float, Range(0, 1, "0, 1 or a share of 1: a replica uses one GPU at most")] = 0
    cpus: Annotated[float, Range(math.nextafter(0, 1), 10_000, "above 0, and at most 10,000")] = 1
    device: Literal["cuda", "cpu"] = "cuda"
    usd_per_gpu_hour: Weight | None = None
    heartbeat_minutes: Annotated[float, Range(0.001, 100_000, "from 0.001 to 100,000")] = 10
    stall_minutes: Annotated[float, Range(0, 100_000, "0 or more, and at most 100,000")] = 360

    def __post_init__(self) -> None:
        fields.check(self, "cluster")

    @property
    def runs_on(self) -> str:
        """The torch device type of the models: the CPU without a GPU, else ``device``."""
        return self.device if self.gpus else "cpu"


@dataclass(frozen=True)
class AblationSettings:
    """What ``jobs/ablate.py`` varies, one thing at a time around the rest of the recipe.

    Attributes:
        uri: folder of the table and of all that only the ablation needs; default <run>/ablation.
        seeds: every variant is trained once with each of them as ``train.seed``. Pairs and evaluation keep their own
            seeds: all students are compared on the same noise, and the spread is that of training.
        axes: {name: values}. The name is that of a field (train.lpips), or of a section (train, pairs.solver), whose
            values are then mappings that lie over it, e.g. {split: 32, lpips: 1.0}; evaluate.samplers.split is the
            split of all few-step samplers, which needs no training. Any other name is a title, and its values are
            mappings of fields, for what only makes sense together: {pairs.count: 1000, train.epochs: 8}. Another
            train.start_steps takes the few-step samplers that stood at the base's start steps with it.
    """

    uri: Uri | None = None
    seeds: tuple[Seed, ...] = (3, 13)
    axes: dict[str, list[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        fields.check(self, "ablate")
        seeds = list(self.seeds)
        _check(
            bool(seeds) and len(set(seeds)) == len(seeds), f"ablate.seeds is {seeds}; list one seed or more, each once."
        )
        for name, values in self.axes.items():
            _check(bool(values), f"ablate.axes lists no values of {name}; list one or more, or leave the axis out.")


Measured = Literal[
    "solvers", "precision", "matching", "teacher", "sampling", "training", "generation", "evaluation", "growth"
]


@dataclass(frozen=True)
class BenchmarkSettings:
    """What ``jobs/benchmark.py`` measures.

    Attributes:
        uri: folder of its table; default <run>/benchmark.
        sections: what is measured, in this order.
        batches: batch sizes of teacher and samplers.
        seconds: of measuring for each thing that takes its turn; more scatter less.
    """

    uri: Uri | None = None
    sections: tuple[Measured, ...] = get_args(Measured)
    batches: tuple[Size, ...] = (1, 4, 64)
    seconds: Annotated[float, Range(math.nextafter(0, 1), 86_400, "above 0, and at most 86,400")] = 10.0

    def __post_init__(self) -> None:
        fields.check(self, "benchmark")
        _check(bool(self.sections), "benchmark.sections is empty; name what is to be measured.")
        _check(bool(self.batches), "benchmark.batches is empty; list batch sizes of 1 or more.")


@dataclass(frozen=True)
class Recipe:
    """One experiment.

    Attributes:
        name: of the experiment; the MLflow runs carry it.
        run: folder (path or URI) that holds pairs, student, report and the default MLflow store.
        teacher: network, weights and filter.
        pairs: noise-token pairs.
        train: distillation.
        evaluate: sampling and scoring.
        cluster: resources.
        ablate: what the ablation varies; the three jobs take no notice of it.
        benchmark: what the benchmark measures, likewise.
        preflight: whose inputs a job checks before it begins: of all jobs that follow it, too, or of this one alone.
        dry_run: print the resolved recipe, what is missing for the three jobs and what they will cost; run nothing.
        status: print what is there, what is missing, rate and last activity of a run, without Ray; run nothing.
    """

    name: Name = "digits-llamagen"
    run: Uri = "runs/digits-llamagen"
    teacher: TeacherSettings = field(default_factory=TeacherSettings)
    pairs: PairSettings = field(default_factory=PairSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    evaluate: EvaluateSettings = field(default_factory=EvaluateSettings)
    cluster: ClusterSettings = field(default_factory=ClusterSettings)
    ablate: AblationSettings = field(default_factory=AblationSettings)
    benchmark: BenchmarkSettings = field(default_factory=BenchmarkSettings)
    preflight: Literal["all", "this"] = "all"
    dry_run: bool = False
    status: bool = False

    def __post_init__(self) -> None:
        fields.check(self, "")
        for name, value in leaves(self.resolved()).items():
            storage.check_no_credentials(str(value), name)  # a recipe is printed, logged and stored
        _check(
            self.pairs.seed != self.evaluate.seed,
            f"pairs.seed and evaluate.seed are both {self.pairs.seed}; a student must not be scored on noise it was"
            " trained on, so change evaluate.seed.",
        )
        for name in ("teacher", "train", "evaluate"):
            _check(
                self.cluster.runs_on == "cuda" or getattr(self, name).precision != "tf32",
                f"{name}.precision is tf32 and cluster.gpus is {self.cluster.gpus:g}, but only GPUs have TF32 products;"
                f" set {name}.precision to fp32, or cluster.gpus above 0.",
            )

        _check(
            self.cluster.runs_on == "cuda" or not self.teacher.graphs,
            f"teacher.graphs is true, but the models run on the CPU (cluster.gpus {self.cluster.gpus:g}, cluster.device"
            f" {self.cluster.device}), and CUDA graphs need a GPU; set teacher.graphs to false, or run on GPUs.",
        )

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
            _check(
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


def _check(good: bool, sentence: str) -> None:
    if not good:
        raise Refused(sentence)
