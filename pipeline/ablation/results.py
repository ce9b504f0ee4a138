"""The JSON value of ablation.json, field by field; ``report`` makes and formats it. None: there is no such number."""

from __future__ import annotations

from typing import Any, NotRequired, TypedDict

_AfterEqualCodes = TypedDict("_AfterEqualCodes", {"after equal codes": float})


class Shares(_AfterEqualCodes):
    """How two pair sets' codes differ on the same noise.

    Attributes:
        all: share of the codes that differ.
        after equal codes: share of those that differ among the codes that follow equal ones.
    """

    all: float


class ChangedCodes(Shares):
    """How a pair set's codes differ from the base's.

    Attributes:
        rows: pairs that were compared.
    """

    rows: int


class PairsSource(TypedDict):
    """Where a variant's pairs are.

    Attributes:
        uri: of the set.
        fingerprint: of the set.
        count: the first pairs of it that the students saw.
    """

    uri: str
    fingerprint: str
    count: int


_Sha256 = TypedDict("_Sha256", {"SHA-256": str | None})


class TrialSource(_Sha256):
    """Where one seed's numbers are from.

    Attributes:
        seed: of the training.
        student: URI of its folder.
        report: URI of its folder.
        SHA-256: of the student's file; None where the report was not made.
        mlflow_run: id of the run that distilled it; None where nobody knows.
    """

    seed: int
    student: str
    report: str
    mlflow_run: str | None


class Numbers(TypedDict):
    """What is measured of a variant, column after column.

    Attributes:
        scores: by column and seed, distances to the reference; None where a trial was lost.
        mean: over the seeds; None where all are lost.
        spread: standard deviation (n - 1) over the seeds; None of fewer than two.
        pairs: where its pairs are.
        teacher: the distance of its AR teacher; None where none is listed, or it was lost.
        trials: where the numbers are from, seed after seed.
        codes: None of the base's own set, and of sets of other noise.
    """

    scores: list[list[float | None]]
    mean: list[float | None]
    spread: list[float | None]
    pairs: PairsSource
    teacher: float | None
    trials: list[TrialSource]
    codes: ChangedCodes | None


class AblationRow(Numbers):
    """A line of the table.

    Attributes:
        axis: what is varied; empty of the base on top.
        value: what it is set to, as the recipe lists it; None of the base on top.
        base: whether that is the base's own value.
    """

    axis: str
    value: Any
    base: bool


class PowerLaw(TypedDict):
    """(distance - teacher's) = factor * x^exponent, by least squares of the logarithms.

    Attributes:
        axis: whose values are x.
        column: whose distances they are.
        over: the field that x is.
        factor: above the teacher's distance at x = 1.
        exponent: below 0 where more is better.
        error: standard error of the exponent, from how far the points lie off the line.
        points: distances that were fitted, of all seeds.
        lowest: x of the first point.
        highest: x of the last one.
    """

    axis: str
    column: str
    over: str
    factor: float
    exponent: float
    error: float
    points: int
    lowest: float
    highest: float


class AblationResults(TypedDict):
    """The JSON value of ablation.json.

    Attributes:
        name: the recipe's.
        title: what the distance is called.
        count: images of each score.
        evaluation_seed: of the images' noise.
        seeds: of the trainings.
        columns: names of the few-step samplers.
        rows: the base on top, then every axis with its values.
        laws: power laws of the axes whose values are numbers.
        mlflow_run: id of the ablation's run.
    """

    name: str
    title: str
    count: int
    evaluation_seed: int
    seeds: list[int]
    columns: list[str]
    rows: list[AblationRow]
    laws: list[PowerLaw]
    mlflow_run: NotRequired[str]
