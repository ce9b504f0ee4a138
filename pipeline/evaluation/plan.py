"""What an evaluation has to draw, under which fingerprint, and all that can be refused before it does.

Knows samplers, files and fingerprints, and nothing of Ray: ``evaluate`` carries a plan out.
"""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np

from pipeline import noise, storage
from pipeline.evaluation import equal_code, students, unseen
from pipeline.evaluation.draws import Draw, Line
from pipeline.evaluation.unseen import UnseenPrompts
from pipeline.generator import folder
from pipeline.host.errors import Refused
from pipeline.models import checkpoints
from pipeline.models.base import Layout
from pipeline.models.conditions import Conditioning
from pipeline.numerics import compilation
from pipeline.pairs import manifest
from pipeline.recipe import Recipe, fingerprint
from pipeline.sampling import sample_files, selection
from pipeline.sampling.samplers import Autoregressive, FewStep, FlowMatched, OneStepStar, Sampler
from pipeline.scoring import instruments

FEATURE_BYTES = 512 << 20  # of a sampler that are kept: precision, recall, KID and standard errors need features
REAL_FEATURES = 10_000  # of real images that are kept, evenly spread: as many as ADM's reference holds
GRID_IMAGES = 32  # of a row of the table that are kept, so that another evaluate.grid up to it draws nothing again
FORMAT = 3  # of the cached statistics
NAMELESS_CODE = re.compile(r"[0-9a-f]{24}\.npz")  # a file of statistics that does not name the code behind them


@dataclass(frozen=True)
class EvaluationPlan:
    """A recipe that passed the cheap checks, with what they found; ``notes`` are for whoever reads the report.

    ``beside`` are the plans of other students by their names: as if each were the recipe's own, so that its images have
    the fingerprints that they have in a report of its own.
    """

    recipe: Recipe
    layout: Layout
    samplers: list[Sampler]
    real: int
    facts: dict[str, Any]
    students: dict[str, str] = field(default_factory=dict)
    snapshots: dict[int, str] = field(default_factory=dict)
    exported: dict[str, Any] = field(default_factory=dict)
    prompts: UnseenPrompts | None = None  # that no pair was made of; None for a teacher that takes classes
    beside: dict[str, EvaluationPlan] = field(default_factory=dict)
    registered: str = ""  # the student's version in the model registry, where the recipe names one
    notes: tuple[str, ...] = ()

    @property
    def built(self) -> dict[str, Any]:
        """The settings with which the student was built: its own file knows best."""
        asked = self.recipe.train.student_options
        return {name: self.exported.get(name, value) for name, value in asked.items()}

    @property
    def device(self) -> str:
        return self.recipe.cluster.runs_on

    @property
    def side(self) -> int:
        """Pixels across an image that is scored."""
        return instruments.side(self.recipe.evaluate, self.layout.image_size)

    @property
    def conditioning(self) -> Conditioning:
        """What samples are drawn for, by id."""
        return self.prompts or partial(noise.labels, classes=self.layout.classes)

    @property
    def grid_columns(self) -> int:
        """Columns of the sample grid."""
        return min(self.recipe.evaluate.grid, self.recipe.evaluate.count)

    @property
    def has_agreement(self) -> bool:
        """Whether it can be measured how far images are what their prompts ask for."""
        digits = self.recipe.evaluate.features == "digits"
        return digits and self.prompts is not None and self.facts["outside the grammar"] is None

    @property
    def first_real(self) -> int:
        """Images of the reference that come before those that are compared with."""
        return int(self.facts["reference"].get("first", 0))

    def prompts_of_real(self, places: np.ndarray) -> np.ndarray | None:
        """The prompts [B] of the real images at ``places``; None where nobody knows them."""
        return self.prompts(places) if self.prompts and self.facts["reference"].get("described") else None

    @property
    def student(self) -> str:
        return folder.weights_of(self.recipe.evaluate.student or self.recipe.student_uri)

    def of(self, draw: Draw) -> EvaluationPlan:
        """The plan of the student that draws: another one's, or this."""
        return self.beside[draw.owner] if draw.owner else self

    def lines(self) -> list[Line]:
        """The rows of the report: of a sampler that draws with a student one for each, the recipe's own first."""
        papers, names = selection.published(self.recipe.evaluate.samplers), selection.names(self.samplers)
        own, others = self._table(), {who: (selection.names(p.samplers), p._table()) for who, p in self.beside.items()}
        out = []
        for i, (name, draw, paper) in enumerate(zip(names, own, papers, strict=True)):
            out.append(Line(name, draw, paper))
            if draw.student:
                out += [
                    Line(f"{theirs[i]} of {who}", dataclasses.replace(draws[i], owner=who), {})
                    for who, (theirs, draws) in others.items()
                ]
        return out

    def table(self) -> list[Draw]:
        """One draw per row of the report."""
        return [line.draw for line in self.lines()]

    def _table(self) -> list[Draw]:
        """One draw per sampler of this student."""
        settings, classes = self.recipe.evaluate, self.layout.classes or 1
        keep = min(settings.count, FEATURE_BYTES // (self.facts["dim"] * 4))
        if keep < settings.count:
            keep -= keep % classes
        images = min(settings.count, max(GRID_IMAGES, settings.grid))
        return [self._draw(sampler, keep=keep, images=images, classes=classes) for sampler in self.samplers]

    def reference(self) -> Draw:
        return Draw(None, self.real, keep=min(self.real, REAL_FEATURES))

    def teacher_again(self) -> Draw | None:
        """Another draw of the AR teacher, the yardstick for the flow-matched one; None unless both are
        listed.
        """
        kinds = {type(sampler) for sampler in self.samplers}
        if not {Autoregressive, FlowMatched} <= kinds:
            return None
        return self._draw(Autoregressive(), first=self.recipe.evaluate.count)

    def departures(self, sampler: Sampler) -> list[str]:
        """In what a sampler asks its student for more than it was trained for."""
        return students.departures(self.exported, self.layout, sampler)

    def curve(self) -> dict[int, list[Draw]]:
        """The few-step samplers of every exported student; step 0 holds the teacher's for the horizontal
        lines.
        """
        few_step = [sampler for sampler in self.samplers if isinstance(sampler, FewStep)]
        count = self.recipe.evaluate.curve_count
        if not (few_step and self.snapshots and count):
            return {}
        of_teacher = [sampler for sampler in self.samplers if isinstance(sampler, Autoregressive | FlowMatched)]
        teachers = [self._draw(sampler, count=count) for sampler in of_teacher or [Autoregressive()]]
        return {0: teachers} | {
            step: [self._draw(sampler, count=count, student=uri) for sampler in few_step]
            for step, uri in sorted(self.snapshots.items())
        }

    def draws(self) -> list[Draw]:
        """All that is to be drawn, those of one student together."""
        out = [self.reference()] if self.real else []
        rows = self.table()
        out += [draw for draw in rows if not draw.owner]
        out += [draw for draw in [self.teacher_again()] if draw]
        out += [draw for draws in self.curve().values() for draw in draws]
        out += [draw for who in self.beside for draw in rows if draw.owner == who]
        return list(dict.fromkeys(out))

    def request(self, draw: Draw) -> str:
        """Fingerprint of all in the recipe and its files that shapes the statistics of a draw.

        Device, batch and compilation are not in it: they change float rounding, as another version of torch does, and
        the statistics say with which they were made.
        """
        if draw.owner:
            return self.of(draw).request(dataclasses.replace(draw, owner=""))
        evaluate = self.recipe.evaluate
        facts: dict[str, Any] = {"format": FORMAT, "features": self.facts["features"], "images": draw.images}
        facts |= {"count": draw.count, "first": draw.first, "keep": draw.keep}
        if draw.sampler is None:
            facts["reference"] = self.facts["reference"]
        else:
            facts |= {key: self.facts[key] for key in ("family", "config", "filter", "precision", "teacher")}
            facts |= {"sampler": [type(draw.sampler).__name__, dataclasses.asdict(draw.sampler)]}
            facts |= {"seed": evaluate.seed, "student": self.students.get(draw.student)} | self.built
        if self.side != self.layout.image_size:
            facts["image_size"] = self.side
        if draw.sampler and self.prompts:
            facts |= {"prompts": self.facts["prompts"], "encoder": self.facts["encoder"]}
        if draw.student:
            facts["student_precision"] = evaluate.precision
        if isinstance(draw.sampler, FlowMatched):
            facts["solver"] = dataclasses.asdict(self.recipe.pairs.solver)
        if isinstance(draw.sampler, OneStepStar):
            facts["pairs"] = self.facts["pairs"]
        return fingerprint(facts)

    def code(self, draw: Draw) -> str:
        """Digest of all code that shapes the statistics of a draw, or of the oldest that is its equal."""
        return self.facts["code"][equal_code.REAL if draw.sampler is None else type(draw.sampler).__name__]

    def key(self, draw: Draw) -> str:
        """Fingerprint of everything that shapes the statistics of a draw."""
        return fingerprint({"asked": self.request(draw), "code": self.code(draw)})

    def fingerprint(self) -> str:
        """Fingerprint of the whole report; compiled and recorded networks are timed anew, not drawn with again."""
        timing = [list(self.recipe.evaluate.timing_batches), self.recipe.teacher.compile, self.recipe.evaluate.compile]
        # Not named where they are off: the reports from before there was a choice stay.
        timing += ["graphs"] * self.recipe.records("teacher") + ["student's graphs"] * self.recipe.records("evaluate")
        drawn = {"draws": [self.key(draw) for draw in self.draws()], "reference": self.facts["reference"]}
        return fingerprint(drawn | {"timing": timing})

    def samples(self) -> dict[Draw, str]:
        """The .npz of images that each sampler leaves, where the recipe wants them."""
        if not self.recipe.evaluate.npz:
            return {}
        images = self.images
        return {line.draw: storage.join(images, sample_files.file_name(line.name)) for line in self.lines()}

    @cached_property
    def images(self) -> str:
        """The folder of the samplers' images."""
        return self._as_it_was("samples") or self.recipe.samples_uri

    @cached_property
    def shelf(self) -> str:
        """The folder of the statistics."""
        return self.recipe.evaluate.cache or self._as_it_was("cache") or self.recipe.cache_uri

    def _as_it_was(self, name: str) -> str:
        """<report>/NAME, where earlier versions put what lies beside the report now, as long as it holds any; else "".

        Nothing is moved or drawn again for it; who moves the folder to the new place finds it used there.
        """
        earlier = storage.join(self.recipe.report_uri, name)
        return earlier if any(".npz" in one for one in storage.listing(earlier)) else ""

    def cache(self, draw: Draw) -> str:
        """The file of a draw's statistics, named by what was asked for and by which code made it."""
        return storage.join(self.shelf, f"{self.request(draw)[:24]}-{self.code(draw)[:12]}.npz")

    def stale(self, draws: list[Draw]) -> list[str]:
        """Why draws are made again of which there are statistics: a sentence for each reason."""
        names, out = set(storage.listing(self.shelf)), []
        if any(NAMELESS_CODE.fullmatch(name) for name in names):
            out.append(f"Statistics in {self.shelf} that do not say which code drew them are not used.")
        requests = {name.partition("-")[0] for name in names}
        if changed := [draw.name for draw in draws if self.request(draw)[:24] in requests]:
            out.append(f"Drawn again, because the code that shapes them has changed: {', '.join(changed)}.")
        return out

    def _draw(self, sampler: Sampler, count: int = 0, student: str = "", **more: Any) -> Draw:
        uri = (student or self.student) if sampler.student else ""
        return Draw(sampler, count or self.recipe.evaluate.count, student=uri, **more)


# ---- the checks


def prepare(recipe: Recipe) -> EvaluationPlan:
    """Everything that can be wrong and is cheap to find; ValueError, one sentence each, before any
    sampling.
    """
    plan = inputs(recipe)
    if any(sampler.frequencies for sampler in plan.samplers):
        pairs = manifest.facts_of(recipe, plan.facts["teacher"])
        inventory = manifest.read(recipe.pairs_uri, pairs.fingerprint)
        plan.facts["pairs"] = {"fingerprint": inventory["fingerprint"], "count": inventory["count"]}
    return _with_students(plan) if any(sampler.student for sampler in plan.samplers) else plan


def inputs(recipe: Recipe) -> EvaluationPlan:
    """The checks of all that is there before the first pair: samplers, teacher, scoring network, reference, folder.

    Other students are among it. Raises as ``prepare`` does, which adds what needs the pair set and the student.
    """
    settings = recipe.evaluate
    config = checkpoints.config(recipe.teacher)
    layout = config.layout
    listed = selection.build(settings.samplers, layout, recipe.train.split)
    side = instruments.side(settings, layout.image_size)
    features = instruments.check(settings, side, layout.classes)
    facts = {
        "family": recipe.teacher.family,
        "config": json.loads(json.dumps(dataclasses.asdict(config))),
        "filter": dataclasses.asdict(recipe.teacher.filter),
        "precision": recipe.teacher.precision,
        "teacher": checkpoints.checksums(recipe.teacher),
        "features": features,
        "reference": instruments.check_reference(settings, side),
        "dim": instruments.DIMENSIONS[settings.features],
        "code": equal_code.of_draws(recipe.teacher.family, map(type, [*listed, Autoregressive()])),
    }
    for name in ("teacher", "evaluate"):
        if getattr(recipe, name).compile:
            compilation.check(f"{name}.compile", recipe.cluster.runs_on)
    prompts = unseen.prompts(recipe)
    if prompts:
        facts |= unseen.facts(recipe, prompts)
        facts["reference"] |= unseen.reference(recipe, prompts)
    pixels = settings.count * 3 * side**2  # of a sampler, in parts and again in one file
    for place in (recipe.report_uri, settings.cache or recipe.cache_uri):
        storage.check_writable(place)
    if settings.npz:
        storage.check_writable(recipe.samples_uri, (len(listed) + 1) * pixels)
    real, notes = facts["reference"]["images"], _notes(facts, prompts)
    return _with_others(EvaluationPlan(recipe, layout, listed, real, facts, prompts=prompts, notes=notes))


def _with_others(plan: EvaluationPlan) -> EvaluationPlan:
    """The plan with those of other students beside it, whose files are there; one in the registry is still to be
    fetched. Refuses those that do not fit, and two names for one student.
    """
    recipe, teacher, beside, notes = plan.recipe, plan.facts["teacher"], dict[str, EvaluationPlan](), list(plan.notes)
    named = recipe.evaluate.students
    if named and not any(sampler.student for sampler in plan.samplers):
        raise Refused(
            f"evaluate.students names {', '.join(named)}, and no sampler of evaluate.samplers draws with a student;"
            " list one, e.g. {name: FewStep, steps: [1]}, or leave them out."
        )
    for name, address in named.items():
        if address.startswith("models:/"):
            continue
        settings = dataclasses.replace(recipe.evaluate, student=address, students={}, curve_count=0)
        uri = folder.weights_of(address)
        exported = students.beside(recipe, name, uri, teacher)
        beside[name] = dataclasses.replace(
            plan,
            recipe=dataclasses.replace(recipe, evaluate=settings),
            samplers=selection.build(settings.samplers, plan.layout, exported.get("split", recipe.train.split)),
            students={uri: storage.sha256(uri)},
            exported=exported,
        )
        notes += students.about_beside(name, uri, exported, teacher)
    plan = dataclasses.replace(plan, beside=beside, notes=tuple(notes))
    _check_distinct(plan)
    return plan


def _check_distinct(plan: EvaluationPlan) -> None:
    """Refuse two names for one student: their rows would differ by nothing."""
    seen = {plan.students[plan.student]: "the recipe's own student"} if plan.students else {}
    for name, other in plan.beside.items():
        sha256 = other.students[other.student]
        if sha256 in seen:
            raise Refused(
                f"evaluate.students: {name}, at {other.student}, has the same weights as {seen[sha256]}; leave one of"
                " them out."
            )
        seen[sha256] = name


def _notes(facts: dict[str, Any], prompts: UnseenPrompts | None) -> tuple[str, ...]:
    """Why it is not measured how far images are what their prompts ask for, where it might be."""
    place = facts.get("outside the grammar")
    if place is None or prompts is None:
        return ()
    return (f"Prompt agreement is not measured: prompt {place} is no caption of the digits.",)


def _with_students(plan: EvaluationPlan) -> EvaluationPlan:
    """The plan with the student and those exported along the way; refuses one of another teacher or pair set."""
    recipe, facts = plan.recipe, plan.facts
    of_pairs = manifest.facts_of(recipe, facts["teacher"]).fingerprint
    wanted = {"family": facts["family"], "teacher": facts["teacher"], "pairs_fingerprint": of_pairs}
    exported = students.exported(plan.student, wanted)
    samplers = selection.build(recipe.evaluate.samplers, plan.layout, exported.get("split", recipe.train.split))
    snapshots, left_out = students.snapshots(recipe, plan.student, exported)
    plan = dataclasses.replace(
        plan,
        samplers=samplers,
        snapshots=snapshots,
        students={uri: storage.sha256(uri) for uri in [plan.student, *snapshots.values()]},
        exported=exported,
        notes=(*plan.notes, *students.about_split(recipe, plan.student, exported), *left_out),
    )
    _check_distinct(plan)
    return plan
