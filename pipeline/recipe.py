"""Every knob of the three jobs as frozen dataclasses: one experiment, one YAML file, three commands.

Checks that need no file and no network are made here, before anything expensive starts. ``command_line`` makes recipes
out of YAML and flags.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from pipeline import storage
from pipeline.errors import Refused
from pipeline.flow import Solver
from pipeline.noise import Dtype
from pipeline.precision import Precision

Flavour = Literal["torch-fidelity", "pytorch-fid"]
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

    guidance: float = 2.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        _check(self.guidance >= 0, f"teacher.filter.guidance is {self.guidance}; it must not be negative.")
        _check(self.temperature > 0, f"teacher.filter.temperature is {self.temperature}; it must be above 0.")
        _check(self.top_k >= 0, f"teacher.filter.top_k is {self.top_k}; use 0 to keep every code.")
        _check(
            0 < self.top_p <= 1,
            f"teacher.filter.top_p is {self.top_p}; it must be above 0, and 1 keeps every code.",
        )


@dataclass(frozen=True)
class TeacherSettings:
    """The teacher: which network, which weights, which p.

    Attributes:
        family: dotted path of the package with Config, Tokenizer, Teacher and Student.
        config: fields of the family's Config, the shape of the nets.
        tokenizer: URI of the tokenizer's weights (a path, s3://, gs://, hf:// or package://, the installed assets).
        checkpoint: URI of the transformer's weights.
        filter: guidance, temperature, top-k and top-p.
        precision: of the transformer: fp32, tf32 (float32 with TF32 products, on GPUs) or bf16. Flow matching is always
            in full float32.
        compile: torch.compile the transformer's blocks. Changes float rounding only.
        graphs: record what a GPU does in every AR step as a CUDA graph and replay it, in generations from the first
            step on whose batch size comes twice in a row. Changes nothing but speed; the graphs take memory.
        unpickle: read .pt and .pth files (students' too) that hold more than tensors and plain values. Reading them
            runs code that they bring along: only for files that you trust.
    """

    family: str = "pipeline.models.var"
    config: dict[str, Any] = field(default_factory=dict)
    tokenizer: str = ""
    checkpoint: str = ""
    filter: Filter = field(default_factory=Filter)
    precision: Precision = "fp32"
    compile: bool = False
    graphs: bool = False
    unpickle: bool = False


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

    uri: str | None = None
    count: int = 20_000
    seed: int = 1
    shard_rows: int = 1_000
    noise: Literal["stored", "derived"] = "stored"
    dtype: Dtype = "float16"
    solver: Solver = field(default_factory=Solver)
    batch: int = 250
    actors: int = 2
    patience_hours: float = 24
    verify: bool = False

    def __post_init__(self) -> None:
        for name in ("count", "shard_rows", "batch", "actors"):
            _check(getattr(self, name) >= 1, f"pairs.{name} is {getattr(self, name)}; it must be 1 or more.")
        _check(self.patience_hours >= 0, f"pairs.patience_hours is {self.patience_hours}; it must not be negative.")


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
        betas: AdamW's.
        weight_decay: AdamW's, on matrices only.
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

    uri: str | None = None
    start_steps: tuple[int, ...] = (1, 6)
    split: int = 5
    cross_entropy: float = 0.1
    lpips: float = 1.0
    perceptual: Literal["vgg", "alex", "digits"] = "vgg"
    batch: int = 64
    micro_batch: int = 0
    epochs: int = 10
    lr: float = 1e-4
    warmup: int = 100
    schedule: Literal["constant", "cosine"] = "constant"
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.05
    clip: float = 1.0
    ema: float = 0.9999
    seed: int = 3
    mask: Literal["released", "paper"] = "released"
    precision: Precision = "fp32"
    compile: bool = False
    recompute: bool = False
    workers: int = 0
    checkpoint_every: int = 500
    keep: int = 2
    log_every: int = 20
    snapshots: int = 5
    export: Literal["safetensors", "released"] = "safetensors"

    def __post_init__(self) -> None:
        positive = ("batch", "epochs", "checkpoint_every", "keep", "log_every", "snapshots")
        for name in positive:
            _check(getattr(self, name) >= 1, f"train.{name} is {getattr(self, name)}; it must be 1 or more.")
        for name in ("lpips", "cross_entropy", "weight_decay", "warmup", "workers", "split", "micro_batch"):
            _check(getattr(self, name) >= 0, f"train.{name} is {getattr(self, name)}; it must not be negative.")
        _check(
            self.lpips + self.cross_entropy > 0,
            "train.lpips and train.cross_entropy are both 0; nothing is learned.",
        )
        _check(0 <= self.ema < 1, f"train.ema is {self.ema}; it must be from 0 (no averaging) to below 1.")
        _check(self.lr > 0, f"train.lr is {self.lr}; it must be above 0.")
        _check(self.clip > 0, f"train.clip is {self.clip}; it must be above 0.")
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
        flavour: how Inception sees images: torch-fidelity (as ADM, VAR and LlamaGen score) or pytorch-fid (as the
            paper's FID). Their numbers do not compare.
        inception: URI of the Inception weights, or formula: random ones, for rehearsals without the file (features:
            inception).
        reference: what samples are compared with (features: inception). URI of statistics: ADM's .npz, pytorch-fid's
            .npz, the authors' statistic.pth, or the reference.npz of an earlier report. Or of real images, whose
            statistics are then made here: a folder of them, Parquet with a column image, an .npz with arr_0 alone.
        reference_flavour: the flavour of statistics that do not say it themselves.
        npz: also write each sampler's images to <report>/samples/<name>.npz, for OpenAI's evaluator.
        precision: of the student: fp32, tf32 (float32 with TF32 products, on GPUs) or bf16 autocast. Where a student
            draws, the decoder follows in fp32 or tf32; where none does, it follows the teacher. Scores are fp32's.
        compile: torch.compile the student's blocks. Changes float rounding only.
        batch: samples that an actor draws at once.
        actors: sampling actors.
        grid: columns of the sample grid, one noise each.
        curve_count: samples per exported student for the curve over training; 0 leaves the curve out.
        timing_batches: batch sizes whose speed is measured, 1 always among them; none are with an empty list.
        compare: URIs of report.json files of runs that differ in pairs.count alone, for scores over its size.
    """

    uri: str | None = None
    cache: str | None = None
    count: int = 5_000
    seed: int = 2
    samplers: list[dict[str, Any]] = field(default_factory=list)
    student: str | None = None
    register: str | None = None
    features: Literal["digits", "inception"] = "digits"
    flavour: Flavour = "torch-fidelity"
    inception: str | None = None
    reference: str | None = None
    reference_flavour: Flavour | None = None
    npz: bool = False
    precision: Precision = "fp32"
    compile: bool = False
    batch: int = 250
    actors: int = 2
    grid: int = 12
    curve_count: int = 1_000
    timing_batches: tuple[int, ...] = (1, 4, 16, 64, 256)
    compare: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("batch", "actors", "grid"):
            _check(getattr(self, name) >= 1, f"evaluate.{name} is {getattr(self, name)}; it must be 1 or more.")
        if self.register is not None:
            _check(
                bool(self.register.strip()) and not set(self.register) & set("/:@'"),
                f"evaluate.register is {self.register!r}; give a name without slash, colon, @ and quote.",
            )
        _check(self.count >= 2, f"evaluate.count is {self.count}; a covariance needs 2 samples or more.")
        if self.features == "inception":
            for name in ("inception", "reference"):
                _check(
                    bool(getattr(self, name)),
                    f"evaluate.features is inception but evaluate.{name} is not set; give its path or URI.",
                )


@dataclass(frozen=True)
class ClusterSettings:
    """Where the jobs run.

    Attributes:
        gpus: GPUs of one teacher replica, training worker or sampling actor; 0 runs on the CPU.
        cpus: CPU cores of the same.
        device: what torch calls one of those GPUs. "cpu" rehearses a cluster whose GPUs are made up (``ray start
            --num-gpus``): the same replicas on the same nodes, computing on the CPU.
        usd_per_gpu_hour: price that --dry_run multiplies the GPU-hours with.
        heartbeat_minutes: a job of which nothing has finished for so long says what is in work, where and since when.
        stall_minutes: a shard, or a part of an evaluation, that a process is at for longer is taken from it and given
            to another; if it takes that one as long, it has failed. 0 is no limit.
    """

    gpus: float = 0
    cpus: float = 1
    device: Literal["cuda", "cpu"] = "cuda"
    usd_per_gpu_hour: float | None = None
    heartbeat_minutes: float = 10
    stall_minutes: float = 360

    def __post_init__(self) -> None:
        _check(
            self.heartbeat_minutes > 0, f"cluster.heartbeat_minutes is {self.heartbeat_minutes}; it must be above 0."
        )
        _check(self.stall_minutes >= 0, f"cluster.stall_minutes is {self.stall_minutes}; use 0 for never.")
        _check(self.gpus >= 0, f"cluster.gpus is {self.gpus}; it must not be negative.")
        _check(self.cpus > 0, f"cluster.cpus is {self.cpus}; it must be above 0.")

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

    uri: str | None = None
    seeds: tuple[int, ...] = (3, 13)
    axes: dict[str, list[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        seeds = list(self.seeds)
        _check(
            bool(seeds) and len(set(seeds)) == len(seeds), f"ablate.seeds is {seeds}; list one seed or more, each once."
        )
        for name, values in self.axes.items():
            _check(bool(values), f"ablate.axes lists no values of {name}; list one or more, or leave the axis out.")


Measured = Literal["solvers", "matching", "teacher", "sampling", "training", "generation", "evaluation", "growth"]


@dataclass(frozen=True)
class BenchmarkSettings:
    """What ``jobs/benchmark.py`` measures.

    Attributes:
        uri: folder of its table; default <run>/benchmark.
        sections: what is measured, in this order.
        batches: batch sizes of teacher and samplers.
        seconds: of measuring for each thing that takes its turn; more scatter less.
    """

    uri: str | None = None
    sections: tuple[Measured, ...] = get_args(Measured)
    batches: tuple[int, ...] = (1, 4, 64)
    seconds: float = 10.0

    def __post_init__(self) -> None:
        _check(bool(self.sections), "benchmark.sections is empty; name what is to be measured.")
        _check(
            bool(self.batches) and min(self.batches) >= 1,
            f"benchmark.batches is {list(self.batches)}; list batch sizes of 1 or more.",
        )
        _check(self.seconds > 0, f"benchmark.seconds is {self.seconds}; it must be above 0.")


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
        dry_run: print the resolved recipe and the plan, run nothing.
    """

    name: str = "digits-llamagen"
    run: str = "runs/digits-llamagen"
    teacher: TeacherSettings = field(default_factory=TeacherSettings)
    pairs: PairSettings = field(default_factory=PairSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    evaluate: EvaluateSettings = field(default_factory=EvaluateSettings)
    cluster: ClusterSettings = field(default_factory=ClusterSettings)
    ablate: AblationSettings = field(default_factory=AblationSettings)
    benchmark: BenchmarkSettings = field(default_factory=BenchmarkSettings)
    dry_run: bool = False

    def __post_init__(self) -> None:
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
