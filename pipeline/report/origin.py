"""How the numbers of a report came about: the part ``made`` of report.json, field by field, for ``results``."""

from __future__ import annotations

from typing import Any, NotRequired, TypedDict


class MachineLoad(TypedDict):
    """What others did on a machine while something was timed there; None where the system does not say.

    Attributes:
        average: the system's load average over the minute before, ourselves included.
        before: cores that others kept busy in the second before.
        during: cores that others kept busy meanwhile.
        gpu: per cent of the time that the GPU worked just before.
        busy: whether others took so much that times are longer than on a quiet machine.
    """

    average: float
    before: float | None
    during: float | None
    gpu: float | None
    busy: bool


class Measurement(TypedDict):
    """Where and when speed was measured. Where it was not, ``device`` is None and there are ``key``, ``threads`` alone.

    Attributes:
        key: fingerprint of all that shapes the times.
        device: the name of the GPU or CPU.
        threads: of torch.
        cores: of the machine.
        measured: when, in UTC.
        calls: how often each sampler was called, in words.
        load: what else the machine did.
    """

    key: NotRequired[str | None]
    device: str | None
    threads: int | None
    cores: NotRequired[int]
    measured: NotRequired[str]
    calls: NotRequired[str]
    load: NotRequired[MachineLoad]


_HowNetworksRan = TypedDict(
    "_HowNetworksRan",
    {
        "compiled teacher": NotRequired[bool],
        "compiled student": NotRequired[bool],
        "CUDA graphs of the teacher": NotRequired[bool],
        "CUDA graphs of students and decoder": NotRequired[bool],
        "runs on": NotRequired[str],
    },
)


class Timing(Measurement, _HowNetworksRan):
    """Where, when and how speed was measured.

    Attributes:
        compiled teacher: whether ``torch.compile`` made the teacher faster.
        compiled student: whether it made the student faster.
        CUDA graphs of the teacher: whether its steps were recorded once and played again.
        CUDA graphs of students and decoder: whether theirs were; missing in reports from before there was a choice.
        runs on: "cuda" or "cpu", where the networks were.
    """


_Sha256 = TypedDict("_Sha256", {"SHA-256": str})
_TeacherFiles = TypedDict("_TeacherFiles", {"tokenizer SHA-256": str, "checkpoint SHA-256": str})


class TeacherOrigin(_TeacherFiles):
    """The teacher that was drawn with.

    Attributes:
        family: the module of its family.
        config: its architecture's numbers, as the family has them.
        filter: guidance and filter of its probabilities.
        precision: of its networks, fp32, fp16, bf16 or tf32.
        tokenizer SHA-256: of the tokenizer's file.
        checkpoint SHA-256: of the transformer's file.
    """

    family: str
    config: dict[str, Any]
    filter: dict[str, Any]
    precision: str


class StudentOrigin(_Sha256):
    """The student that was drawn with, and what distillation wrote into its file (nothing into the authors' own).

    Attributes:
        uri: of its file.
        SHA-256: of that file.
        mask: its attention mask.
        precision: in which it drew.
        step: optimiser steps that it was trained for.
        steps_per_epoch: of its training, None where the pairs were not counted.
        start_steps: AR steps that it was trained to jump from.
        split: leading AR steps of the logits head.
        pairs_count: pairs that it was distilled from.
        pairs_fingerprint: of their set.
        mlflow_run: id of the run that distilled it.
        registry: models:/NAME/VERSION, where it came from the registry.
    """

    uri: str
    mask: str
    precision: str
    step: NotRequired[int]
    steps_per_epoch: NotRequired[int | None]
    start_steps: NotRequired[list[int]]
    split: NotRequired[int]
    pairs_count: NotRequired[int]
    pairs_fingerprint: NotRequired[str]
    mlflow_run: NotRequired[str]
    registry: NotRequired[str]


class PairsOrigin(TypedDict):
    """The pair set whose token frequencies were drawn from.

    Attributes:
        fingerprint: of the set.
        count: pairs in it.
    """

    fingerprint: str
    count: int


_PromptFiles = TypedDict("_PromptFiles", {"SHA-256": str, "also among the pairs' prompts": int | None})


class PromptsOrigin(_PromptFiles):
    """The prompts that were drawn.

    Attributes:
        uri: of a file or folder.
        column: of Parquet; empty of text.
        rows: of the whole list.
        skip: rows at its beginning that were left out.
        chosen: fingerprint of the rows that count, where those without an image do not; missing where all do.
        SHA-256: of what is at ``uri``.
        also among the pairs' prompts: how many of those drawn; None where no pairs' prompts are named.
    """

    uri: str
    column: str
    rows: int
    skip: int
    chosen: NotRequired[str]


class EncoderOrigin(TypedDict):
    """What made features of the prompts.

    Attributes:
        uri: of its folder.
        weights: SHA-256 of its files.
        tokenizer: SHA-256 of its tokenizer.
        length: tokens of a prompt that it reads at most.
        clean: the rules by which prompts were rewritten before; empty where they were not.
        precision: in which it worked.
    """

    uri: str
    weights: str
    tokenizer: str
    length: int
    clean: str
    precision: str


_ReferenceFiles = TypedDict(
    "_ReferenceFiles",
    {
        "SHA-256": NotRequired[str],
        "images SHA-256": NotRequired[str],
        "sFID": NotRequired[bool],
        "rows without an image": NotRequired[int],
    },
)


class ReferenceOrigin(_ReferenceFiles):
    """What images were compared with; of classes of digits ``uri``, ``images`` and ``statistics`` alone.

    Attributes:
        uri: of statistics or of images, or "the digits".
        images: real images there, 0 where there are statistics alone.
        SHA-256: of what is at ``uri``.
        images SHA-256: of the recipe's file of images, where it names one.
        statistics: "read" from a file, or "made here".
        count: images behind statistics that were read; None where their file does not say.
        sFID: whether statistics that were read have spatial features.
        rows without an image: of Parquet, which were left out; missing where there are none.
        second: ``statistics`` of the second flavour, where two are scored.
        described: whether the images are those of the prompts that were drawn, as far as is known; missing of classes.
        first: images there that come before those of the prompts.
        cut: how images of another size were cut; missing of classes.
    """

    uri: str
    images: int
    statistics: str
    count: NotRequired[int | None]
    second: NotRequired[str]
    described: NotRequired[bool]
    first: NotRequired[int]
    cut: NotRequired[str]


class ReportOrigin(TypedDict):
    """Who wrote the report.

    Attributes:
        version: of this package; None where it is not installed.
        commit: of its checkout; None where nobody knows.
        changed: whether its files differ from that commit.
        written: when, in UTC.
        command: the command line.
    """

    version: str | None
    commit: str | None
    changed: bool | None
    written: str
    command: str


_OriginOfNumbers = TypedDict(
    "_OriginOfNumbers",
    {
        "features SHA-256": dict[str, str],
        "pixels across an image": NotRequired[int],
        "real images": NotRequired[int],
        "Inception Score": NotRequired[dict[str, Any] | None],
        "KID": NotRequired[dict[str, Any] | None],
        "precision and recall": NotRequired[dict[str, Any] | None],
        "CLIP": NotRequired[dict[str, str]],
        "DINOv2": NotRequired[dict[str, str]],
        "features kept": NotRequired[dict[str, int]],
        "standard error and limit": NotRequired[str],
    },
)


class Conditions(TypedDict):
    """What samples were drawn for.

    Attributes:
        classes: labels, which samples take in turn; missing of prompts.
        prompts: which were drawn; missing of classes.
        encoder: what made features of them; missing of classes, and of a teacher that needs none.
    """

    classes: NotRequired[int]
    prompts: NotRequired[PromptsOrigin]
    encoder: NotRequired[EncoderOrigin]


class Origin(_OriginOfNumbers, Conditions):
    """What somebody needs who wants the same numbers.

    Attributes:
        count: images a sampler.
        seed: of noise and uniform draws.
        samplers: [class, fields] of each by its name.
        teacher: who drew the teacher's rows.
        solver: settings of flow matching.
        student: who drew the student's rows; None without any.
        students: who drew the rows of other students, by their names; missing without any.
        pairs: the set whose token frequencies were drawn from; None where no sampler does.
        features: the kind of scoring network, digits or inception.
        flavour: how Inception saw images; None of the digits.
        weights: where Inception's came from; None of the digits.
        dimensions: of a feature.
        features SHA-256: of the scoring network's files by their names, and the flavour.
        reference: what images were compared with.
        pixels across an image: as it was scored.
        real images: in the reference; 0 where it is statistics alone.
        Inception Score: its blocks; None of the digits.
        KID: its subsets, kernel and seed; None where no features were kept.
        precision and recall: k and how many images; None where there were none, and of the digits.
        CLIP: {"model", "convention"} of the CLIP score; missing without one.
        DINOv2: {"weights", "flavour"} of FD-DINOv2; missing without it.
        features kept: {"images", "real images"}, how many.
        standard error and limit: how they were estimated.
        sampling: when, on which machines, by which code, and in how many seconds of all actors.
        timing: where and how speed was measured.
        report: who wrote it.
        fingerprint: that of ``Results``.
    """

    count: int
    seed: int
    samplers: NotRequired[dict[str, list[Any]]]
    teacher: TeacherOrigin
    solver: NotRequired[dict[str, Any]]
    student: StudentOrigin | None
    students: NotRequired[dict[str, StudentOrigin]]
    pairs: NotRequired[PairsOrigin | None]
    features: NotRequired[str]
    flavour: NotRequired[str | None]
    weights: NotRequired[str | None]
    dimensions: int
    reference: ReferenceOrigin
    sampling: NotRequired[dict[str, Any]]
    timing: Timing
    report: NotRequired[ReportOrigin]
    fingerprint: NotRequired[str]
