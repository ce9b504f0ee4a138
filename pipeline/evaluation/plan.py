"""What an evaluation has to draw, under which fingerprint, and all that can be refused before it does.

Knows samplers, files and fingerprints, and nothing of Ray: ``evaluate`` carries a plan out.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipeline import storage
from pipeline.evaluation import sample_files, scoring, tally
from pipeline.host import provenance
from pipeline.host.errors import Missing, Refused
from pipeline.models import checkpoints
from pipeline.models.base import Layout
from pipeline.numerics import compilation
from pipeline.pairs import manifest
from pipeline.pairs.facts import PairFacts
from pipeline.recipe import Recipe, fingerprint
from pipeline.sampling import listed as sampler_list
from pipeline.sampling.samplers import Autoregressive, FewStep, FlowMatched, OneStepStar, Sampler

ITEM = 1_000  # images of one unit of work; divides tally.SCORE_BLOCK
KEEP = 512 << 20  # bytes of a sampler's features that are kept: precision, recall, KID and standard errors need them
REAL_KEPT = 10_000  # real images whose features are, evenly spread: as many as ADM's reference holds
GRID = 32  # images that are kept of a row of the table, so that another evaluate.grid up to it draws nothing again
FORMAT = 3  # of the cached statistics
OLDER = re.compile(r"[0-9a-f]{24}\.npz")  # a file of them that does not name the code that made it
# What shapes statistics: how images are looked at, and how a sampler's are drawn. ``artist`` imports this module.
SCORED = (
    "pipeline.evaluation.artist:looked_at",
    "pipeline.evaluation.scoring:features",
    "pipeline.evaluation.scoring:real",
)
DRAWN = ("pipeline.evaluation.artist:drawn", "pipeline.evaluation.artist:load", "pipeline.noise:labels")
SNAPSHOT = re.compile(r"step-(\d+)\.safetensors")  # students exported along the way


@dataclass(frozen=True)
class Draw:
    """Images that are scored as one set: ``count`` samples from id ``first``, or as many real images
    (sampler None).

    ``keep`` is how many images' features are kept, of whole rounds of ``classes`` images, so that they are as balanced
    as all; ``images`` how many of the first images are, for the grid.
    """

    sampler: Sampler | None
    count: int
    first: int = 0
    student: str = ""
    keep: int = 0
    images: int = 0
    classes: int = 1

    @property
    def name(self) -> str:
        """What is drawn, by whom, for people."""
        if self.sampler is None:
            return "real images"
        step = SNAPSHOT.search(self.student)
        name = f"{self.sampler.name} at step {int(step[1])}" if step else self.sampler.name
        return f"{name} from id {self.first}" if self.first else name

    def places(self, item: int) -> range:
        """The images of one unit of work, counted from 0."""
        return range(item * ITEM, min((item + 1) * ITEM, self.count))

    def kept(self, places: np.ndarray) -> np.ndarray:
        """Of which images at ``places`` [B] the features are kept, [B]: of all, or of rounds that are evenly spread."""
        if self.keep >= self.count:
            return np.full(len(places), True)
        rounds = self.count // self.classes
        return (places < rounds * self.classes) & tally.spread(
            places // self.classes, self.keep // self.classes, rounds
        )

    def rounds(self) -> np.ndarray:
        """The round of classes that each kept image belongs to, [keep]."""
        places = np.arange(self.count)
        return places[self.kept(places)] // self.classes

    @property
    def items(self) -> int:
        return math.ceil(self.count / ITEM)


@dataclass(frozen=True)
class Plan:
    """A recipe that passed the cheap checks, with what they found; ``notes`` are for whoever reads the report."""

    recipe: Recipe
    layout: Layout
    samplers: list[Sampler]
    real: int
    facts: dict[str, Any]
    students: dict[str, str] = field(default_factory=dict)
    snapshots: dict[int, str] = field(default_factory=dict)
    exported: dict[str, Any] = field(default_factory=dict)
    registered: str = ""  # the student's version in the model registry, where the recipe names one
    notes: tuple[str, ...] = ()

    @property
    def mask(self) -> str:
        """The student's attention mask: its own file knows best."""
        return self.exported.get("mask", self.recipe.train.mask)

    @property
    def device(self) -> str:
        return self.recipe.cluster.runs_on

    @property
    def side(self) -> int:
        """Pixels across an image that is scored."""
        return scoring.side(self.recipe.evaluate, self.layout.image_size)

    @property
    def student(self) -> str:
        return self.recipe.evaluate.student or storage.join(self.recipe.student_uri, "student.safetensors")

    def table(self) -> list[Draw]:
        """One draw per row of the report."""
        settings, classes = self.recipe.evaluate, self.layout.classes
        keep = min(settings.count, KEEP // (self.facts["dim"] * 4))
        if keep < settings.count:
            keep -= keep % classes
        images = min(settings.count, max(GRID, settings.grid))
        return [self._draw(sampler, keep=keep, images=images, classes=classes) for sampler in self.samplers]

    def reference(self) -> Draw:
        return Draw(None, self.real, keep=min(self.real, REAL_KEPT))

    def second(self) -> Draw | None:
        """Another draw of the AR teacher, the yardstick for the flow-matched one; None unless both are
        listed.
        """
        kinds = {type(sampler) for sampler in self.samplers}
        if not {Autoregressive, FlowMatched} <= kinds:
            return None
        return self._draw(Autoregressive(), first=self.recipe.evaluate.count)

    def curve(self) -> dict[int, list[Draw]]:
        """The few-step samplers of every exported student; step 0 holds the teacher's for the horizontal
        lines.
        """
        few = [sampler for sampler in self.samplers if isinstance(sampler, FewStep)]
        count = self.recipe.evaluate.curve_count
        if not (few and self.snapshots and count):
            return {}
        listed = [sampler for sampler in self.samplers if isinstance(sampler, Autoregressive | FlowMatched)]
        teachers = [self._draw(sampler, count=count) for sampler in listed or [Autoregressive()]]
        return {0: teachers} | {
            step: [self._draw(sampler, count=count, student=uri) for sampler in few]
            for step, uri in sorted(self.snapshots.items())
        }

    def draws(self) -> list[Draw]:
        """All that is to be drawn, those of one student together."""
        out = [self.reference()] if self.real else []
        out += self.table()
        out += [draw for draw in [self.second()] if draw]
        out += [draw for draws in self.curve().values() for draw in draws]
        return list(dict.fromkeys(out))

    def asked(self, draw: Draw) -> str:
        """Fingerprint of all in the recipe and its files that shapes the statistics of a draw.

        Device, batch and compilation are not in it: they change float rounding, as another version of torch does, and
        the statistics say with which they were made.
        """
        evaluate = self.recipe.evaluate
        facts: dict[str, Any] = {"format": FORMAT, "features": self.facts["features"], "images": draw.images}
        facts |= {"count": draw.count, "first": draw.first, "keep": draw.keep}
        if draw.sampler is None:
            facts["reference"] = self.facts["reference"]
        else:
            facts |= {key: self.facts[key] for key in ("family", "config", "filter", "precision", "teacher")}
            facts |= {"sampler": [type(draw.sampler).__name__, dataclasses.asdict(draw.sampler)]}
            facts |= {"seed": evaluate.seed, "student": self.students.get(draw.student), "mask": self.mask}
        if self.side != self.layout.image_size:
            facts["image_size"] = self.side
        if draw.student:
            facts["student_precision"] = evaluate.precision
        if isinstance(draw.sampler, FlowMatched):
            facts["solver"] = dataclasses.asdict(self.recipe.pairs.solver)
        if isinstance(draw.sampler, OneStepStar):
            facts["pairs"] = self.facts["pairs"]
        return fingerprint(facts)

    def code(self, draw: Draw) -> str:
        """Digest of all code that shapes the statistics of a draw."""
        return self.facts["code"]["real images" if draw.sampler is None else type(draw.sampler).__name__]

    def key(self, draw: Draw) -> str:
        """Fingerprint of everything that shapes the statistics of a draw."""
        return fingerprint({"asked": self.asked(draw), "code": self.code(draw)})

    def fingerprint(self) -> str:
        """Fingerprint of the whole report; compiled and recorded networks are timed anew, not drawn with again."""
        timing = [list(self.recipe.evaluate.timing_batches), self.recipe.teacher.compile, self.recipe.evaluate.compile]
        if self.recipe.teacher.graphs:  # not named where they are off: the reports from before there was a choice stay
            timing.append("graphs")
        drawn = {"draws": [self.key(draw) for draw in self.draws()], "reference": self.facts["reference"]}
        return fingerprint(drawn | {"timing": timing})

    def samples(self) -> dict[Draw, str]:
        """The .npz of images that each sampler leaves, where the recipe wants them."""
        if not self.recipe.evaluate.npz:
            return {}
        names = map(sample_files.file_name, sampler_list.names(self.samplers))
        folder = storage.join(self.recipe.report_uri, "samples")
        return {draw: storage.join(folder, name) for draw, name in zip(self.table(), names, strict=True)}

    @property
    def shelf(self) -> str:
        """The folder of the statistics."""
        return self.recipe.evaluate.cache or storage.join(self.recipe.report_uri, "cache")

    def cache(self, draw: Draw) -> str:
        """The file of a draw's statistics, named by what was asked for and by which code made it."""
        return storage.join(self.shelf, f"{self.asked(draw)[:24]}-{self.code(draw)[:12]}.npz")

    def stale(self, draws: list[Draw]) -> list[str]:
        """Why draws are made again of which there are statistics: a sentence for each reason."""
        there, out = set(storage.listing(self.shelf)), []
        if any(OLDER.fullmatch(name) for name in there):
            out.append(f"Statistics in {self.shelf} that do not say which code drew them are not used.")
        known = {name.partition("-")[0] for name in there}
        if changed := [draw.name for draw in draws if self.asked(draw)[:24] in known]:
            out.append(f"Drawn again, because the code that shapes them has changed: {', '.join(changed)}.")
        return out

    def _draw(self, sampler: Sampler, count: int = 0, student: str = "", **more: Any) -> Draw:
        uri = (student or self.student) if sampler.student else ""
        return Draw(sampler, count or self.recipe.evaluate.count, student=uri, **more)


# ---- the checks


def prepare(recipe: Recipe) -> Plan:
    """Everything that can be wrong and is cheap to find; ValueError, one sentence each, before any
    sampling.
    """
    plan = inputs(recipe)
    if any(sampler.frequencies for sampler in plan.samplers):
        pairs = PairFacts.of(recipe, plan.facts["teacher"])
        inventory = manifest.read(recipe.pairs_uri, pairs.fingerprint)
        plan.facts["pairs"] = {"fingerprint": inventory["fingerprint"], "count": inventory["count"]}
    return _with_students(plan) if any(sampler.student for sampler in plan.samplers) else plan


def inputs(recipe: Recipe) -> Plan:
    """The checks of all that is there before the first pair: samplers, teacher, scoring network, reference, folder.

    Raises as ``prepare`` does, which adds what needs the pair set and the student.
    """
    settings = recipe.evaluate
    config = checkpoints.config(recipe.teacher)
    layout = config.layout
    listed = sampler_list.build(settings.samplers, layout, recipe.train.split)
    side = scoring.side(settings, layout.image_size)
    features = scoring.check(settings, side, layout.classes)
    facts = {
        "family": recipe.teacher.family,
        "config": json.loads(json.dumps(dataclasses.asdict(config))),
        "filter": dataclasses.asdict(recipe.teacher.filter),
        "precision": recipe.teacher.precision,
        "teacher": checkpoints.checksums(recipe.teacher),
        "features": features,
        "reference": scoring.check_reference(settings, side),
        "dim": scoring.DIMENSIONS[settings.features],
        "code": _code(recipe, [*listed, Autoregressive()]),
    }
    for name in ("teacher", "evaluate"):
        if getattr(recipe, name).compile:
            compilation.check(f"{name}.compile", recipe.cluster.runs_on)
    pixels = settings.count * 3 * side**2  # of a sampler, in parts and again in one file
    storage.check_writable(recipe.report_uri, (len(listed) + 1) * pixels if settings.npz else 0)
    return Plan(recipe, layout, listed, facts["reference"]["images"], facts)


def _code(recipe: Recipe, listed: list[Sampler]) -> dict[str, str]:
    """Digests of the code behind real images' statistics and behind those of each kind of sampler."""
    out, family = {"real images": provenance.digest(*SCORED)}, recipe.teacher.family
    for sampler in listed:
        kind = type(sampler)
        roots = [*SCORED, *DRAWN, f"{kind.__module__}:{kind.__name__}", f"{family}:Config", f"{family}:Teacher"]
        roots.append(f"{family}:Tokenizer")
        if sampler.student:
            roots += ["pipeline.evaluation.artist:load_student", f"{family}:Student"]
        if sampler.frequencies:
            roots.append("pipeline.pairs.shards:token_frequencies")
        out[kind.__name__] = provenance.digest(*roots)
    return out


def _with_students(plan: Plan) -> Plan:
    """Look at the student and the students exported along the way; refuse one of another teacher or pair
    set.
    """
    recipe = plan.recipe
    if not storage.exists(plan.student):
        raise Missing(f"there is no student at {plan.student}; run jobs/distill.py first or set evaluate.student.")
    # the authors' own files are .pth and .pt and say nothing of themselves
    exported = checkpoints.metadata(plan.student) if plan.student.endswith(".safetensors") else {}
    if exported:
        _check_student(plan, exported)
    listed = sampler_list.build(recipe.evaluate.samplers, plan.layout, exported.get("split", recipe.train.split))
    found, left_out = _snapshots(plan, exported)
    students = {uri: storage.sha256(uri) for uri in [plan.student, *found.values()]}
    plan = dataclasses.replace(plan, samplers=listed, snapshots=found, students=students, exported=exported)
    return dataclasses.replace(plan, notes=(*_of_heads(plan), *left_out))


def _of_heads(plan: Plan) -> list[str]:
    """What a reader must know of where the heads' split comes from."""
    recipe, split = plan.recipe, plan.exported.get("split")
    if split is None:
        return [
            f"The student's file {plan.student} does not say with which split and start steps it was trained; the split"
            f" is the recipe's, {recipe.train.split} where a sampler names none."
        ]
    if split != recipe.train.split and any(entry.get("split") is None for entry in recipe.evaluate.samplers):
        return [f"train.split is {recipe.train.split}, but the student was trained with {split}, and so it draws."]
    return []


def _snapshots(plan: Plan, exported: dict[str, Any]) -> tuple[dict[int, str], list[str]]:
    """({step: URI} of the students exported on the way to this one, what is said of others in the folder)."""
    recipe = plan.recipe
    names = storage.listing(recipe.student_uri) if recipe.evaluate.curve_count else []
    found = {int(m[1]): storage.join(recipe.student_uri, m[0]) for m in map(SNAPSHOT.fullmatch, names) if m}
    ours = {step: uri for step, uri in found.items() if _on_the_way(checkpoints.metadata(uri), exported)}
    if len(ours) == len(found):
        return found, []
    lost = ", ".join(f"{step:,}" for step in sorted(found.keys() - ours.keys()))
    return ours, [
        f"The curve over training leaves out the students of step {lost} in {recipe.student_uri}, which are of another"
        f" run or later than {plan.student}."
    ]


def _on_the_way(earlier: dict[str, Any], student: dict[str, Any]) -> bool:
    """Whether a student was exported by the run that made ``student``, and not after it; files that say nothing do not
    count.
    """
    run = "recipe_fingerprint" if "recipe_fingerprint" in student else "mlflow_run"
    same = run in student and earlier.get(run) == student[run]
    return same and earlier.get("step", 0) <= student.get("step", math.inf)


def departures(plan: Plan, sampler: Sampler) -> list[str]:
    """In what a sampler asks its student for more than it was trained for, as far as the student's file says so."""
    known = plan.exported
    out: list[str] = []
    if not sampler.student or not known:
        return out
    split = getattr(sampler, "split")  # noqa: B009  every sampler with a student has one, Sampler has not
    if split != known.get("split", split):
        out.append(f"split {split}, trained with {known['split']}")
    asked = sampler.jumps(plan.layout)
    if beyond := [step for step in asked if step not in known.get("start_steps", asked)]:
        at, trained = (", ".join(map(str, steps)) for steps in (beyond, known["start_steps"]))
        out.append(f"jumps from step {at}, trained from {trained}")
    return out


def _check_student(plan: Plan, settings: dict[str, Any]) -> None:
    pairs = PairFacts.of(plan.recipe, plan.facts["teacher"])
    wanted = {"family": plan.facts["family"], "teacher": plan.facts["teacher"]}
    for key, value in (wanted | {"pairs_fingerprint": pairs.fingerprint}).items():
        if settings.get(key) != value:
            raise Refused(
                f"the student at {plan.student} was distilled with {key} {settings.get(key)}, but this"
                f" recipe has {value}; use the recipe that it was distilled with, or set evaluate.student."
            )
