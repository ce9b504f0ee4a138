"""The JSON value of report.json: what a report knows, field by field.

``evaluation.summary`` makes it, tables, legends, plots and pages only format it, and reports of other runs are read
with it. A field that is ``NotRequired`` is missing from older reports, or where its line says so. None always means
that there is no such number. Distances have no unit; times say theirs. Keys with spaces stand in a base class.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NotRequired, Required, TypedDict

from pipeline.report.origin import Origin

SamplerFields = dict[str, Any]  # {"name": its class} and all fields of that class

# ---- rows


class SpeedAtBatch(TypedDict):
    """One sampler's time at one batch size.

    Attributes:
        batch: images of a call.
        network_ms: milliseconds an image without decoding, the median of the rounds.
        ms: milliseconds an image with decoding, the median of the rounds.
        rounds: milliseconds an image of every round, decoding included, in the order in which they ran.
        encoder: the text encoder's milliseconds an image in the same rounds, which none of the others holds; missing
            where no prompt is read.
    """

    batch: int
    network_ms: float
    ms: float
    rounds: NotRequired[Sequence[float]]
    encoder: NotRequired[Sequence[float]]


class Quality(TypedDict, total=False):
    """What is measured of images without a reference.

    Attributes:
        inception_score: mean over blocks of 5,000 images; None where the scoring network's classes are the labels.
        inception_score_std: its standard error; None also of fewer than five whole blocks.
        accuracy: share of images whose predicted class is their label; None where the network knows other classes.
        variance: pixel variance within a class, averaged; None where no class has two images. Of images that are drawn
            for prompts it is that of all.
        prompt_agreement: share of images that are all that their prompts name; missing where it was not measured.
        prompt_agreement_of_others: the same of other images' prompts, so what chance gives.
        clip_score: CLIP score with the images' own prompts; missing without a CLIP model or prompts.
        clip_score_std: its standard error; None of a single image.
        clip_score_of_others: CLIP score of the same images with the prompts of others; None of a single image.
    """

    inception_score: float | None
    inception_score_std: float | None
    accuracy: float | None
    variance: float | None
    prompt_agreement: float
    prompt_agreement_of_others: float
    clip_score: float | None
    clip_score_std: float | None
    clip_score_of_others: float | None


class OfFeatures(TypedDict, total=False):
    """What needs the features of single images; None where too few were kept.

    Attributes:
        score_std: standard error of ``score``.
        score_inf: what ``score`` would be of infinitely many images.
        precision: share of images near a real one; None also without real images, and of the digits.
        recall: share of real images near one of these; None where ``precision`` is.
        kid: kernel distance to the real images, the mean over subsets; None also without real images.
        kid_std: its deviation over the subsets.
    """

    score_std: float | None
    score_inf: float | None
    precision: float | None
    recall: float | None
    kid: float | None
    kid_std: float | None


class Pace(TypedDict, total=False):
    """Speed beside the AR teacher's at the same batch; what was not timed is missing.

    Attributes:
        ms: milliseconds an image at batch 1, decoding included.
        speedup: how many times as fast as the teacher at batch 1.
        speedup_std: its standard error.
        throughput_batch: that of ``SpeedBaseline``.
        throughput: images a second at that batch.
        throughput_speedup: how many times as fast as the teacher at that batch.
        throughput_speedup_std: its standard error.
    """

    ms: float
    speedup: float
    speedup_std: float
    throughput_batch: float
    throughput: float
    throughput_speedup: float
    throughput_speedup_std: float


class Paces(Pace, total=False):
    """A row's speed.

    Attributes:
        with_encoder: the same with the text encoder's time in it, in the teacher's too; missing without prompts.
    """

    with_encoder: Pace


class Row(Quality, OfFeatures, Paces, total=False):
    """A row of the table. That of the real images has ``name``, ``type``, ``count`` and its ``Quality`` alone.

    Attributes:
        name: what the report calls it, distinct among the rows.
        student: the name of the student that drew it; missing of the recipe's own, and where none drew.
        type: as the paper's tables group samplers, AR, baseline, DD, DD + AR; "real" of the real images.
        departs: in what it asks more of its student than that was trained for; mostly empty.
        parameters: of the transformer that draws; None where no network is asked.
        paper: the figures that the paper prints for it; empty where it prints none.
        sampler: the sampler itself; missing of the real images.
        steps: network evaluations an image.
        count: images.
        score: Fréchet distance to the reference, called ``Results.title``; missing of the real images.
        pixel_score: Fréchet distance of pixels; None without real images.
        sfid: Fréchet distance of spatial features; None where either side has none.
        second_score: the distance in the second flavour; None where one flavour is scored.
        dinov2_score: Fréchet distance of DINOv2's features; missing where they are not scored.
        seconds: of all actors, to draw and score these images.
        speeds: times by batch size; empty where none were measured.
        score_over_teacher: ``score`` over the teacher's; None without a teacher, and of the real images.
        variance_over_teacher: ``variance`` over the teacher's; None without a teacher.
    """

    name: Required[str]
    student: str
    type: str
    departs: list[str]
    parameters: int | None
    paper: dict[str, float]
    sampler: SamplerFields
    steps: int
    count: int
    score: float
    pixel_score: float | None
    sfid: float | None
    second_score: float | None
    dinov2_score: float
    seconds: float
    speeds: Sequence[SpeedAtBatch]
    score_over_teacher: float | None
    variance_over_teacher: float | None


# ---- beside the rows


class EncoderTime(TypedDict):
    """The text encoder at one batch size.

    Attributes:
        batch: prompts of a call.
        ms: milliseconds a prompt, the median of the rounds.
        ms_std: its standard error.
    """

    batch: int
    ms: float
    ms_std: float


class SpeedBaseline(TypedDict):
    """What the rows' speed is compared with.

    Attributes:
        teacher: the AR teacher's times, whether it is a row or not; empty where none were measured.
        throughput_batch: the largest batch above 1 at which all samplers were timed; None without one.
        encoder: the text encoder's own times; missing without prompts.
    """

    teacher: Sequence[SpeedAtBatch]
    throughput_batch: int | None
    encoder: NotRequired[Sequence[EncoderTime]]


class Difference(TypedDict):
    """How far two rows are apart whose images are pairs, of the same conditions and noise.

    Attributes:
        first: name of a row.
        second: name of the other.
        difference: distance of the first to the reference minus that of the second.
        std: standard error of the difference, as of pairs; None where too few features were kept.
        count: images of each row.
        indistinguishable: whether the two are less than two standard errors apart, or than 1.3 % of the larger
            distance; None where the error is not known and the latter does not decide.
    """

    first: str
    second: str
    difference: float
    std: float | None
    count: int
    indistinguishable: bool | None


class Agreement(TypedDict):
    """Whether flow matching left the teacher's distribution alone.

    Attributes:
        fm_to_ar: distance of the flow-matched teacher's images to the AR teacher's.
        ar_to_ar: distance between two draws of the AR teacher.
        ratio: the first over the second.
    """

    fm_to_ar: float
    ar_to_ar: float
    ratio: float


class CurvePoint(TypedDict):
    """One student exported along the way, drawn with one sampler.

    Attributes:
        step: optimiser steps that it had been trained for.
        name: of the sampler, as its row has it.
        score: distance to the reference.
    """

    step: int
    name: str
    score: float


class TrainingCurve(TypedDict):
    """Distance over training.

    Attributes:
        count: images of each point.
        steps_per_epoch: optimiser steps; None where the student's file does not say.
        teachers: distance of the teachers by their names, of as many images.
        points: in the order of the steps.
    """

    count: int
    steps_per_epoch: NotRequired[int | None]
    teachers: dict[str, float]
    points: Sequence[CurvePoint]


class PairSetPoint(TypedDict):
    """One report's row in the comparison over the count of pairs.

    Attributes:
        pairs: of which the row's student was distilled.
        name: of the sampler, as this report's row has it.
        score: distance to the reference.
    """

    pairs: int
    name: str
    score: float


class PairSetCurvePoint(PairSetPoint):
    """One student exported along the way, in the comparison.

    Attributes:
        x: epochs or optimiser steps, as ``PairSetCurve.axis`` says.
    """

    x: float


class PairSetCurve(TypedDict):
    """Distance over training, of every report.

    Attributes:
        count: images of each point.
        axis: "epochs" where every report knows its own, else "optimiser step".
        points: report after report.
    """

    count: int
    axis: str
    points: Sequence[PairSetCurvePoint]


_Sha256 = TypedDict("_Sha256", {"SHA-256": str})


class ComparedReport(_Sha256):
    """Another report that stands beside this one.

    Attributes:
        uri: of its report.json.
        SHA-256: of that file.
        pairs: of which its student was distilled.
    """

    uri: str
    pairs: int


class OtherReport(_Sha256):
    """A report of another run as it was read.

    Attributes:
        uri: of its report.json.
        SHA-256: of that file.
        results: what it holds.
    """

    uri: str
    results: Results


class PairSets(TypedDict):
    """Scores over the count of pairs, out of several reports.

    Attributes:
        count: images of each score.
        points: report after report, this one first.
        curve: None where a report has none, or one of another number of images.
        reports: the others.
    """

    count: int
    points: Sequence[PairSetPoint]
    curve: PairSetCurve | None
    reports: Sequence[ComparedReport]


# ---- the whole


class Results(TypedDict):
    """The whole report.

    Attributes:
        name: the recipe's.
        title: what the distance is called, "FID (pytorch-fid)" or "FD".
        second_title: what it is called in the second flavour; None where one is scored.
        dinov2_title: what the distance of DINOv2's features is called; missing where they are not scored.
        meaning: what the distance is, for a reader.
        fingerprint: of all that shapes draws, reference and timing.
        shown: fingerprint of what the report shows beside its measurements, and of its form.
        rows: of the table, real images first where there are any.
        speed: what the rows' speed is compared with.
        alike: pairs of rows, by their names, that are too close to be told apart, the nearest first.
        differences: of rows of several students; missing where the report is of one.
        agreement: None unless both teachers are listed.
        curve: None without students exported along the way.
        notes: what a reader must know of student and samplers, in sentences.
        made: how the numbers were made.
        pair_sets: None where the recipe names no other report.
        grid: the prompts of the sample grid's columns; missing of classes.
        files: names of the report's files; missing until they are written.
    """

    name: str
    title: str
    second_title: NotRequired[str | None]
    dinov2_title: NotRequired[str]
    meaning: str
    fingerprint: str
    shown: NotRequired[str]
    rows: list[Row]
    speed: NotRequired[SpeedBaseline]
    alike: NotRequired[Sequence[Sequence[str]]]
    differences: NotRequired[list[Difference]]
    agreement: Agreement | None
    curve: TrainingCurve | None
    notes: NotRequired[list[str]]
    made: Origin
    pair_sets: NotRequired[PairSets | None]
    grid: NotRequired[list[str]]
    files: NotRequired[list[str]]
