"""What an ablation makes: the base recipe and its variants, each with every seed, and nothing of it twice.

A variant is the base with one setting changed; a trial is a variant with a seed, as the recipe that the three jobs get.
Pair sets and students lie where their fingerprints say, so trials that agree on one share it, with the base recipe's
own pair set and student too:

    <run>/pairs, <run>/student             where a trial's facts are those of the recipe itself
    <run>/ablation/pairs/<fingerprint>     the other pair sets
    <run>/ablation/students/<fingerprint>  the other students
    <run>/ablation/reports/<axis>/<value>/seed-<n>
    <run>/ablation/cache                   statistics of their images, those of the real ones once

Knows recipes, files and fingerprints, and nothing of Ray: ``ablate`` carries a plan out.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, cast

from pipeline import storage
from pipeline.command_line import with_settings
from pipeline.generator import folder
from pipeline.host.errors import Refused
from pipeline.models import checkpoints
from pipeline.pairs import manifest
from pipeline.pairs.facts import PairFacts
from pipeline.recipe import Recipe, leaves
from pipeline.sampling import selection
from pipeline.sampling.samplers import FewStep
from pipeline.scoring import instruments
from pipeline.settings.evaluate import EvaluateSettings
from pipeline.training import plan as training_plan

SPLIT = "evaluate.samplers.split"  # the only axis that is no field: a sampler's split needs no training
SECTIONS = ("teacher.", "pairs.", "train.")
OWN = ("pairs.uri", "pairs.verify", "train.uri", "train.seed")  # set by the ablation itself, or no setting of a result
TEACHER = "teacher"  # the report of the base's; those of other teachers say after it whose they are
SHORT = 12  # hexadecimal digits of a fingerprint that name a folder


@dataclass(frozen=True)
class Variant:
    """The base with ``axis`` set to ``value``; the base itself has no axis.

    ``samplers`` holds one sampler for each column of the table: the base's few-step samplers, with what the variant
    makes of them.
    """

    axis: str
    value: Any
    recipe: Recipe
    samplers: list[FewStep]

    @property
    def makes(self) -> tuple[Any, ...]:
        """Equal for two variants of the same settings, whatever axis they are on."""
        return self.recipe.teacher, self.recipe.pairs, self.recipe.train, self.samplers

    @property
    def label(self) -> str:
        return f"{self.axis} {text(self.value)}" if self.axis else "base"

    @property
    def folder(self) -> str:
        """Of its reports: the axis and the value, in letters that any file system has."""
        return f"{_plain(self.axis)}/{_plain(text(self.value))}" if self.axis else "base"


@dataclass(frozen=True)
class Trial:
    """A variant with a seed: the recipe of its three jobs, and the fingerprints of its pair set and its student."""

    label: str
    seed: int
    recipe: Recipe
    pairs: str
    student: str

    @property
    def name(self) -> str:
        return f"{self.label}, seed {self.seed}"


@dataclass(frozen=True)
class AblationPlan:
    """``trials[i]`` are those of ``variants[i]``, one a seed; the base comes first.

    ``rows`` are the values as they are listed, (axis, value, index of the variant): where two values mean the same
    recipe, or one is the base's, they share a variant. ``sets`` holds the recipe that makes each pair set, as large as
    the largest of its trials. ``teachers`` score the AR teachers, by the names of their reports, if the recipe lists
    one; ``teacher_of[i]`` is the name of that of ``variants[i]``.
    """

    recipe: Recipe
    variants: list[Variant]
    trials: list[list[Trial]]
    rows: list[tuple[str, Any, int]]
    sets: dict[str, Recipe]
    columns: list[str]
    teachers: dict[str, Recipe]
    teacher_of: list[str]

    @property
    def students(self) -> dict[str, Trial]:
        """Fingerprint of each student -> the first trial that needs it."""
        out: dict[str, Trial] = {}
        for trial in (trial for some in self.trials for trial in some):
            out.setdefault(trial.student, trial)
        return out

    def at(self, *names: str) -> str:
        """A place in the ablation's folder."""
        return storage.join(self.recipe.ablation_uri, *names)


def build(recipe: Recipe) -> AblationPlan:
    """Every variant, seed and place; ValueError or FileNotFoundError, one sentence, for what cannot be made.

    Each trial passes the checks of training before anything is begun. Nothing is written.
    """
    base = _base(recipe)
    variants, rows = [base], []
    for axis, values in recipe.ablate.axes.items():
        for value in values:
            variant = _varied(base, axis, value)
            same = (i for i, other in enumerate(variants) if other.makes == variant.makes)
            i = next(same, len(variants))
            variants += [variant] if i == len(variants) else []
            rows.append((axis, value, i))
    _check_folders(variants)
    trials = _trials(recipe, variants)
    _check_changes(variants, trials)
    sets: dict[str, Recipe] = {}
    for trial in (trial for some in trials for trial in some):
        largest = sets.setdefault(trial.pairs, trial.recipe)
        if trial.recipe.pairs.count > largest.pairs.count:
            sets[trial.pairs] = trial.recipe
    return AblationPlan(recipe, variants, trials, rows, sets, _columns(variants), *_teachers(recipe, variants))


def titled(axis: str) -> bool:
    """Whether an axis has a title, and fields in its values, instead of the name of a field or section."""
    return axis.partition(".")[0] not in (field.name for field in fields(Recipe))


def text(value: Any) -> str:
    """A value of an axis as a reader writes it: [1, 21], {name: paper, evaluations: 10}."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {text(inside)}" for key, inside in value.items())
    return value if isinstance(value, str) else json.dumps(value)


def _plain(name: str) -> str:
    return "-".join("".join(c if c.isalnum() or c in "._-" else " " for c in name).split())


# ---- variants


def _base(recipe: Recipe) -> Variant:
    """The recipe as it is, scored on its few-step samplers alone."""
    few = [entry for entry in recipe.evaluate.samplers if entry.get("name") == "FewStep"]
    if not few:
        raise Refused(
            "evaluate.samplers lists no FewStep, and an ablation compares few-step samplers; list one, e.g."
            " {name: FewStep, steps: [1]}."
        )
    if not recipe.ablate.axes:
        raise Refused(
            "ablate.axes is empty, so there is nothing to vary; list fields with their values, e.g."
            " {train.start_steps: [[1, 11], [1, 31]]}, as jobs/recipes/ablate-digits.yaml does."
        )
    settings = replace(_alone(recipe), samplers=few)
    base = replace(recipe, evaluate=settings, dry_run=False)
    return Variant("", None, base, _samplers(base, recipe.train.start_steps))


def _varied(base: Variant, axis: str, value: Any) -> Variant:
    """The base with one setting changed, its samplers following; ValueError for what is no setting of a student."""
    settings = value if titled(axis) and isinstance(value, dict) else {axis: value}
    for name in (leaf for key, inside in settings.items() for leaf in leaves(inside, key)):
        if name in OWN or (name != SPLIT and not name.startswith(SECTIONS)):
            raise Refused(
                f"ablate.axes has {name}, which cannot be varied; use fields of teacher, pairs and train other than"
                f" {', '.join(OWN)}, or {SPLIT}; an axis with a title of its own has values like"
                " {pairs.count: 1000, train.epochs: 8}."
            )
    try:
        if axis == SPLIT:
            entries = [entry | {"split": value} for entry in base.recipe.evaluate.samplers]
            recipe = replace(base.recipe, evaluate=replace(base.recipe.evaluate, samplers=entries))
        else:
            recipe = with_settings(base.recipe, settings)
        return Variant(axis, value, recipe, _samplers(recipe, base.recipe.train.start_steps))
    except ValueError as error:
        raise Refused(f"ablate.axes varies {axis}, and {text(value)} is refused: {error}") from None


def _samplers(recipe: Recipe, before: tuple[int, ...]) -> list[FewStep]:
    """The few-step samplers of a variant; what stood at the base's start steps ``before`` follows the variant's.

    The sampler of one step stays: every student starts there.
    """
    layout, out = checkpoints.config(recipe.teacher).layout, []
    for entry in recipe.evaluate.samplers:
        moves = len(before) > 1 and tuple(entry.get("steps", (1,))) == before
        moved = entry | {"steps": list(recipe.train.start_steps)} if moves else entry
        out += selection.build([moved], layout, recipe.train.split)
    return cast(list[FewStep], out)


def _columns(variants: list[Variant]) -> list[str]:
    """What the table calls each few-step sampler; one that follows train.start_steps has no steps in its name."""
    names = selection.names(variants[0].samplers)
    moves = [len({variant.samplers[i].steps for variant in variants}) > 1 for i in range(len(names))]
    return ["DD at its start steps" if moving else name for name, moving in zip(names, moves, strict=True)]


def _check_folders(variants: list[Variant]) -> None:
    found: dict[str, Variant] = {}
    for variant in variants:
        other = found.setdefault(variant.folder, variant)
        if other is not variant:
            raise Refused(
                f"ablate.axes lists {text(other.value)} and {text(variant.value)} for {variant.axis}, which would share"
                f" the folder {variant.folder}; take one of them out."
            )


# ---- trials


def _trials(recipe: Recipe, variants: list[Variant]) -> list[list[Trial]]:
    """Every variant with every seed, in its place, after the checks of training and evaluation."""
    hashed: dict[tuple[str, str], dict[str, str]] = {}

    def facts_of(varied: Recipe) -> PairFacts:
        """``PairFacts.of``, but a teacher's files are read once."""
        teacher = varied.teacher
        files = teacher.tokenizer, teacher.checkpoint
        hashed[files] = hashed.get(files) or checkpoints.checksums(teacher)
        return PairFacts.of(varied, hashed[files])

    mine = facts_of(recipe)
    own = {mine.fingerprint: recipe.pairs_uri, _student(recipe, mine): recipe.student_uri}

    def place(kind: str, key: str) -> str:
        return own.get(key) or storage.join(recipe.ablation_uri, kind, key[:SHORT])

    def trial(variant: Variant, seed: int) -> Trial:
        """One variant with one seed, its folders by fingerprint."""
        varied = replace(variant.recipe, train=replace(variant.recipe.train, seed=seed))
        facts = facts_of(varied)
        pairs, student = facts.fingerprint, _student(varied, facts)
        # Two columns may become one sampler, e.g. when train.start_steps is [1].
        samplers = [{"name": "FewStep"} | asdict(sampler) for sampler in dict.fromkeys(variant.samplers)]
        uri = storage.join(recipe.ablation_uri, "reports", variant.folder, f"seed-{seed}")
        varied = replace(
            varied,
            pairs=replace(varied.pairs, uri=place("pairs", pairs)),
            train=replace(varied.train, uri=place("students", student)),
            evaluate=replace(varied.evaluate, uri=uri, samplers=samplers),
        )
        _check(varied, facts, variant)
        return Trial(variant.label, seed, varied, pairs, student)

    return [[trial(variant, seed) for seed in recipe.ablate.seeds] for variant in variants]


def _student(recipe: Recipe, facts: PairFacts) -> str:
    """The fingerprint of the recipe's student."""
    return training_plan.TrainingPlan(recipe, facts.layout, facts.checksums, facts.fingerprint).fingerprint


def _check(recipe: Recipe, facts: PairFacts, variant: Variant) -> None:
    """What the three jobs would refuse, as far as nothing has to be there yet."""
    layout = checkpoints.config(recipe.teacher).layout
    try:
        training_plan.check_batch(training_plan.check(replace(recipe, dry_run=True), facts))
        instruments.check(recipe.evaluate, layout.image_size, layout.classes)
    except ValueError as error:
        if not variant.axis:
            raise
        raise Refused(f"ablate.axes varies {variant.axis}, and {text(variant.value)} is refused: {error}") from None


def _check_changes(variants: list[Variant], trials: list[list[Trial]]) -> None:
    """ValueError for a value that makes the base's students again and samples from them in the same way."""
    outcomes = [
        (variant.samplers, [trial.student for trial in some]) for variant, some in zip(variants, trials, strict=True)
    ]
    for variant, outcome in zip(variants[1:], outcomes[1:], strict=True):
        if outcome == outcomes[0]:
            raise Refused(
                f"ablate.axes varies {variant.axis}, and {text(variant.value)} makes the base's students again: it says"
                " how they are made, not what they are; take it out."
            )


def _teachers(recipe: Recipe, variants: list[Variant]) -> tuple[dict[str, Recipe], list[str]]:
    """The recipes that score the variants' AR teachers, what the students are compared with, by name; whose each is.

    Variants with the same settings of the teacher share one. There is none where the recipe lists no AR teacher.
    """
    listed = [entry for entry in recipe.evaluate.samplers if entry.get("name") == "Autoregressive"]
    settings = replace(_alone(recipe), samplers=listed, timing_batches=())
    out: dict[str, Recipe] = {}
    names = []
    for variant in variants:
        teacher = variant.recipe.teacher
        same = (name for name, other in out.items() if other.teacher == teacher)
        name = next(same, f"{TEACHER} of {variant.label}" if out else TEACHER)
        uri = storage.join(recipe.ablation_uri, "reports", TEACHER, *([variant.folder] if out else []))
        evaluate = replace(settings, uri=uri)
        out.setdefault(name, replace(recipe, teacher=teacher, evaluate=evaluate, dry_run=False))
        names.append(name)
    return (out if listed else {}), names


def _alone(recipe: Recipe) -> EvaluateSettings:
    """How the recipe evaluates, for reports beside its own, which score the real images once for all of them."""
    cache = recipe.evaluate.cache or storage.join(recipe.ablation_uri, "cache")
    return replace(recipe.evaluate, uri=None, cache=cache, student=None, students={}, register=None, curve_count=0)


# ---- what is there


def describe(plan: AblationPlan) -> str:
    """The plan of a dry run: variants, pair sets and students, and which of them are there; nothing is written."""
    trials = [trial for some in plan.trials for trial in some]
    lines = [json.dumps(plan.recipe.resolved(), indent=2), f"ablation  {plan.at()}"]
    for variant, some in zip(plan.variants, plan.trials, strict=True):
        seeds = ", ".join(f"{trial.seed}: {trial.student[:SHORT]}" for trial in some)
        lines.append(f"variant   {variant.label}; pairs {some[0].pairs[:SHORT]}; students by seed {seeds}")
    for key, recipe in plan.sets.items():
        count = (manifest.complete(recipe.pairs_uri) or {"count": 0})["count"]
        state = f"{min(count, recipe.pairs.count):,} of {recipe.pairs.count:,} are in a complete set"
        lines.append(f"pairs     {key[:SHORT]} at {recipe.pairs_uri}; {state}")
    for key, trial in plan.students.items():
        exists = storage.exists(folder.weights(trial.recipe.student_uri))
        lines.append(f"student   {key[:SHORT]} at {trial.recipe.student_uri}; {'there' if exists else 'to train'}")
    done = sum(storage.exists(storage.join(trial.recipe.report_uri, "report.json")) for trial in trials)
    lines.append(f"reports   {done} of {len(trials)} are there, as far as they are of these students")
    left = sum(line.endswith("to train") for line in lines)
    lines.append(f"in all    {len(plan.sets)} pair sets, {len(plan.students)} students, {left} of them to train")
    return "\n".join(lines)
