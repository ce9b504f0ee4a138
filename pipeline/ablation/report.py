"""From the reports of an ablation's trials to its table, plot and numbers.

``summarise`` computes one JSON value, the others only format what it found.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from statistics import fmean, stdev
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from pipeline.ablation import scaling
from pipeline.ablation.plan import SPLIT, AblationPlan, Variant, text, titled
from pipeline.ablation.results import AblationResults, AblationRow, ChangedCodes, Numbers, Shares, TrialSource
from pipeline.models import checkpoints
from pipeline.pairs import manifest, shards
from pipeline.pairs.facts import PairFacts
from pipeline.recipe import leaves
from pipeline.report.markdown import as_markdown
from pipeline.report.names import metric_name
from pipeline.report.plots import line, png
from pipeline.report.results import Results
from pipeline.report.tables import Table

COMPARED = 4096  # rows of two pair sets whose codes are compared
PANELS = 3  # panels side by side

# ---- numbers


def summarise(plan: AblationPlan, scored: dict[str, Results]) -> AblationResults:
    """Everything that the table says, as JSON values; ``scored`` are the trials' reports by name, the lost left out."""
    reports = list(scored.values())
    codes = {key: _codes(plan, key) for key in plan.sets}
    variants = [_numbers(plan, i, scored, codes[trials[0].pairs]) for i, trials in enumerate(plan.trials)]
    rows: list[AblationRow] = [{"axis": "", "value": None, "base": True, **variants[0]}]
    for axis in dict.fromkeys(axis for axis, _, _ in plan.rows):
        listed = [(value, i) for one, value, i in plan.rows if one == axis]
        if 0 not in [i for _, i in listed]:
            listed.insert(0, (_base_value(plan.variants[0], axis, [value for value, _ in listed]), 0))
        rows += [{"axis": axis, "value": value, "base": i == 0, **variants[i]} for value, i in listed]
    results: AblationResults = {
        "name": plan.recipe.name,
        "title": reports[0]["title"] if reports else "distance",
        "count": plan.recipe.evaluate.count,
        "evaluation_seed": plan.recipe.evaluate.seed,
        "seeds": list(plan.recipe.ablate.seeds),
        "columns": plan.columns,
        "rows": rows,
        "laws": scaling.laws(plan.columns, rows),
    }
    return json.loads(json.dumps(results))


def _numbers(plan: AblationPlan, i: int, scored: dict[str, Results], codes: ChangedCodes | None) -> Numbers:
    """Scores of one variant: by column and seed, None where a trial was lost; their mean and standard deviation."""
    scores: list[list[float | None]] = [[] for _ in plan.columns]
    trials: list[TrialSource] = []
    for trial in plan.trials[i]:
        found = scored.get(trial.name)
        rows = [row for row in found["rows"] if "sampler" in row] if found else []
        by_sampler = {json.dumps(row["sampler"], sort_keys=True): row["score"] for row in rows}
        for column, sampler in zip(scores, plan.variants[i].samplers, strict=True):
            key = json.dumps({"name": "FewStep"} | asdict(sampler), sort_keys=True)
            column.append(by_sampler.get(key))
        student = found["made"]["student"] if found else None
        trials.append(
            {
                "seed": trial.seed,
                "student": trial.recipe.student_uri,
                "report": trial.recipe.report_uri,
                "SHA-256": student.get("SHA-256") if student else None,
                "mlflow_run": student.get("mlflow_run") if student else None,
            }
        )
    complete = [[score for score in column if score is not None] for column in scores]
    recipe = plan.trials[i][0].recipe
    of_teacher = scored[plan.teacher_of[i]]["rows"] if plan.teacher_of[i] in scored else []
    return {
        "scores": scores,
        "mean": [fmean(column) if column else None for column in complete],
        "spread": [stdev(column) if len(column) > 1 else None for column in complete],
        "pairs": {"uri": recipe.pairs_uri, "fingerprint": plan.trials[i][0].pairs, "count": recipe.pairs.count},
        "teacher": next((row["score"] for row in of_teacher if "sampler" in row), None),
        "trials": trials,
        "codes": codes,
    }


def _base_value(base: Variant, axis: str, values: Sequence[Any]) -> Any:
    """What the base has in the place of an axis's values; of a section, the settings that they name."""
    if axis == SPLIT:
        return base.samplers[0].split
    tree: Any = base.recipe.resolved()
    for key in [] if titled(axis) else axis.split("."):
        tree = tree[key]
    if not isinstance(tree, dict):
        return tree
    named = {name for value in values for name in leaves(value)}
    return {name: value for name, value in leaves(tree).items() if name in named}


def _codes(plan: AblationPlan, key: str) -> ChangedCodes | None:
    """Of how many codes a pair set differs from the base's on the same noise; None for the base's own and for others.

    Only sets of one seed and one layout share noise; how it is rounded may differ.
    """
    mine, base = plan.sets[key], plan.sets[plan.trials[0][0].pairs]
    complete = [manifest.complete(recipe.pairs_uri) for recipe in (mine, base)]
    layouts = [checkpoints.config(recipe.teacher).layout for recipe in (mine, base)]
    if mine is base or not all(complete) or layouts[0] != layouts[1] or mine.pairs.seed != base.pairs.seed:
        return None
    rows = min(COMPARED, mine.pairs.count, base.pairs.count)
    ours, theirs = (first_tokens(recipe.pairs_uri, rows) for recipe in (mine, base))
    return {**differing(ours, theirs, layouts[0].groups), "rows": rows}


def first_tokens(uri: str, count: int) -> np.ndarray:
    """The tokens of the first ``count`` rows of a complete set, uint16 [count, n]; fewer if it has fewer."""
    inventory = manifest.read(uri)
    facts = PairFacts.from_json(inventory["facts"])
    names = [shard["name"] for shard in inventory["shards"] if facts.rows_of(shard["number"], count)]
    return np.concatenate(list(shards.tokens_of(uri, facts, names)))[:count]


def differing(ours: np.ndarray, theirs: np.ndarray, groups: Sequence[int]) -> Shares:
    """Shares of the codes [rows, n] of two sets that differ: of all, and of those that follow equal codes.

    A teacher that has drawn another code goes on from there, so one difference brings others along; the second share
    looks no further than the first AR step with a difference. ``groups`` are the tokens of each AR step.
    """
    other = ours != theirs
    step = np.repeat(np.arange(len(groups)), groups)
    first = np.where(other.any(1), step[other.argmax(1)], len(groups))
    alike = step[None] <= first[:, None]
    return {"all": float(other.mean()), "after equal codes": float(other[alike].mean())}


def scalars(results: AblationResults) -> dict[str, float]:
    """The table's means for MLflow, a chart each: {"train.lpips_1/DD_1_step/mean": 20.1, ...}."""
    out: dict[str, float] = {}
    for row in results["rows"]:
        means = zip(results["columns"], row["mean"], strict=True)
        name = metric_name(_label(row))
        out |= {f"{name}/{metric_name(column)}/mean": mean for column, mean in means if mean is not None}
    return out


def _label(row: AblationRow) -> str:
    return f"{row['axis']} {text(row['value'])}" if row["axis"] else "base"


# ---- Markdown


def table(results: AblationResults) -> str:
    """One line per value of each axis, the base on top: mean and spread of every few-step sampler."""
    base = results["rows"][0]
    coded = any(row["codes"] for row in results["rows"])
    taught = len({row["teacher"] for row in results["rows"]}) > 1
    headers = ["varied", "value"] + ([f"{results['title']}, its AR teacher"] if taught else [])
    for column in results["columns"]:
        headers += [f"{results['title']}, {column}", "/ base"]
    headers += ["codes that differ", "after equal codes"] if coded else []
    lines = []
    for row in results["rows"]:
        value = "-" if not row["axis"] else text(row["value"]) + (" (base)" if row["base"] else "")
        cells = [row["axis"] or "base", value] + ([_pair(row["teacher"], None)] if taught else [])
        for mean, spread, of_base in zip(row["mean"], row["spread"], base["mean"], strict=True):
            cells += [_pair(mean, spread), f"{mean / of_base:.2f}" if mean is not None and of_base else "-"]
        codes = row["codes"]
        shares = [f"{share:.2%}" for share in (codes["all"], codes["after equal codes"])] if codes else ["-", "-"]
        cells += shares if coded else []
        lines.append(cells)
    return as_markdown(Table(headers, lines, text=2))


def _pair(mean: float | None, spread: float | None) -> str:
    if mean is None:
        return "-"
    return f"{mean:.2f}" if spread is None else f"{mean:.2f} ± {spread:.2f}"


def markdown(results: AblationResults) -> str:
    """Table, plot, how to read them and where each number comes from."""
    title, seeds = results["title"], results["seeds"]
    spread = (
        f"mean ± standard deviation (n - 1) over the training seeds {', '.join(map(str, seeds))}; a difference that is"
        " not well beyond it says nothing"
        if len(seeds) > 1
        else f"one training seed, {seeds[0]}, so nothing here says how far chance moves a number"
    )
    legend = [
        f"* **{title}**: Fréchet distance of {results['count']:,} images to the reference, lower is better; {spread}.",
        "* Every line changes one thing of the base recipe. The pairs' and the evaluation's seeds stay, so all students"
        f" are scored on the same labels and the same noise (seed {results['evaluation_seed']}).",
        "* **/ base**: over the base's mean, 1.00 is no change.",
    ]
    teacher = results["rows"][0]["teacher"]
    if teacher is not None:
        legend.append(f"* The AR teacher's own {title} on these labels is {teacher:.2f}.")
    if "DD at its start steps" in results["columns"]:
        legend.append(
            "* **DD at its start steps**: Alg. 3 at the line's own train.start_steps, which it was trained for."
        )
    if any(row["codes"] for row in results["rows"]):
        rows = max(row["codes"]["rows"] for row in results["rows"] if row["codes"])
        legend.append(
            f"* **codes that differ** from the base's on the same noise, over the first {rows:,} pairs; **after equal"
            " codes** leaves out those that only follow an earlier difference. Neither needs training."
        )
    legend.append(
        "* The paper's own ablations are its figures 7 and 8, curves of FID over training with 5,000 images; compare"
        " which way a change goes, and by which factor, never the values."
    )
    laws = scaling.sentences(results["laws"], title)
    parts = [
        f"# {results['name']}: ablation",
        table(results),
        "\n".join(legend),
        *(["## Power laws", "\n".join(laws)] if laws else []),
        "![distance over the values of each axis](ablation.png)",
        "## Where the numbers come from",
        "\n".join(_sources(results)),
    ]
    return "\n\n".join(parts) + "\n"


def _sources(results: AblationResults) -> list[str]:
    """A line per variant: its pairs, and its students and reports by seed."""
    out = []
    for row in results["rows"]:
        if row["axis"] and row["base"]:
            continue
        out.append(f"* {_label(row)}: the first {row['pairs']['count']:,} pairs of `{row['pairs']['uri']}`")
        for trial in row["trials"]:
            sha256 = (trial["SHA-256"] or "not made")[:12]
            out.append(
                f"  * seed {trial['seed']}: student {sha256} in `{trial['student']}`, `{trial['report']}/report.md`"
            )
    return out


# ---- the plot


def plot(results: AblationResults) -> bytes:
    """A panel per axis as PNG: the distance at each value, a line through the means, a dot per seed."""
    axes_of = {row["axis"]: [one for one in results["rows"] if one["axis"] == row["axis"]] for row in results["rows"]}
    del axes_of[""]
    wide, high = min(PANELS, len(axes_of)), -(-len(axes_of) // PANELS)
    figure = Figure(figsize=(4.6 * wide, 3.6 * high), dpi=120, layout="constrained")
    panels = figure.subplots(high, wide, squeeze=False).ravel()
    for panel, (axis, rows) in zip(panels, axes_of.items(), strict=False):
        _panel(panel, axis, rows, results)
    for panel in panels[len(axes_of) :]:
        panel.set_axis_off()
    highest = max(
        (s for row in results["rows"] for column in row["scores"] for s in column if s is not None), default=1
    )
    for panel in panels[: len(axes_of)]:
        panel.set_ylim(0, 1.1 * highest)
    panels[0].legend(frameon=False, fontsize=8, loc="lower left")
    return png(figure)


def _panel(panel: Any, axis: str, rows: list[AblationRow], results: AblationResults) -> None:
    """The values of one axis, in the order of the recipe."""
    places = range(len(rows))
    for i, column in enumerate(results["columns"]):
        means = [np.nan if row["mean"][i] is None else row["mean"][i] for row in rows]
        panel.plot(places, means, **line(i), label=column)
        dots = [
            (x, score) for x, row in zip(places, rows, strict=True) for score in row["scores"][i] if score is not None
        ]
        panel.scatter(*zip(*dots, strict=True), s=16, color=line(i)["color"], zorder=3) if dots else None
    teachers = [np.nan if row["teacher"] is None else row["teacher"] for row in rows]
    if len(set(teachers)) == 1 and rows[0]["teacher"] is not None:
        panel.axhline(teachers[0], linestyle="--", linewidth=1.5, color="#555555", label="teacher, AR")
    elif not np.isnan(teachers).all():
        panel.plot(places, teachers, linestyle="--", linewidth=1.5, color="#555555", label="teacher, AR")
    names = [text(row["value"]).replace(", ", ",\n" if isinstance(row["value"], dict) else ", ") for row in rows]
    labels = [name + ("\n(base)" if row["base"] else "") for name, row in zip(names, rows, strict=True)]
    panel.set_xticks(list(places), labels, fontsize=8)
    panel.set_title(axis, fontsize=10)
    panel.set_ylabel(f"{results['title']}, {results['count']:,} images", fontsize=8)
    panel.set_xlim(-0.4, len(rows) - 0.6)
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)
