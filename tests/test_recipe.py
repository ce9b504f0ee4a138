"""Command line and YAML in, a checked Recipe or one sentence out."""

from __future__ import annotations

import dataclasses
import io
import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from pipeline import storage
from pipeline.command_line import DEFAULT, Output, main, parse, with_settings
from pipeline.configuration import fields
from pipeline.flow.matching import Solver
from pipeline.host.errors import Refused, Unfinished
from pipeline.models import checkpoints
from pipeline.recipe import Recipe, fingerprint
from pipeline.sampling import samplers, selection
from pipeline.scoring import metrics
from pipeline.services import cluster
from pipeline.settings.pairs import PairSettings
from pipeline.settings.teacher import Filter

SETTINGS = """
name: mine
teacher:
  family: pipeline.models.llamagen
  config: {layers: 3, multipliers: [1, 2]}
  filter: {guidance: 1.5}
pairs:
  solver: {name: fixed, evaluations: 8}
train: {start_steps: [1, 3], betas: [0.8, 0.9]}
evaluate:
  samplers:
    - {name: FewStep, steps: [1, 2]}
    - name: Autoregressive
"""


@pytest.fixture
def config(tmp_path: Path) -> str:
    place = tmp_path / "mine.yaml"
    place.write_text(SETTINGS)
    return str(place)


def test_a_file_and_flags_make_a_recipe(config: str) -> None:
    flags = ["--pairs.count", "100", "--teacher.config.layers", "4", "--train.lr", "1e-5", "--pairs.noise=derived"]
    got = parse(None, ["--config", config, *flags, "--dry_run", "true", "--teacher.filter.top_k", "7"])
    assert got.name == "mine"
    assert got.teacher.config == {"layers": 4, "multipliers": [1, 2]}
    assert got.teacher.filter == Filter(guidance=1.5, top_k=7)
    assert got.pairs == PairSettings(count=100, noise="derived", solver=Solver("fixed", 8))
    assert (got.train.start_steps, got.train.betas, got.train.lr) == ((1, 3), (0.8, 0.9), 1e-5)
    assert got.evaluate.samplers == [{"name": "FewStep", "steps": [1, 2]}, {"name": "Autoregressive"}]
    assert got.dry_run
    assert got.pairs_uri == "runs/digits-llamagen/pairs"


def test_a_recipe_stands_alone_and_none_means_the_digits_default(config: str) -> None:
    default = yaml.safe_load(DEFAULT.read_text())
    got = parse(None, [])
    assert (got.name, got.pairs.count) == (default["name"], default["pairs"]["count"])
    assert parse(None, ["--pairs.count", "77"]).teacher == got.teacher
    mine = parse(None, [f"--config={config}"])
    assert mine.pairs.count == PairSettings().count, "nothing of the digits default leaks into another recipe"
    assert mine.teacher.tokenizer == ""


@pytest.mark.parametrize("name", sorted(path.name for path in DEFAULT.parent.glob("*.yaml")))
def test_every_shipped_recipe_parses(name: str) -> None:
    below = name.replace("-released", "")  # what is laid over another recipe has no meaning without it
    found = parse(None, [f"--config={DEFAULT.parent / file}" for file in dict.fromkeys([below, name])])
    assert found.name == name.removesuffix(".yaml")
    assert (found.evaluate.precision == "tf32") == (found.cluster.gpus > 0), "as the authors sampled"


# how the paper calls the samplers of a recipe; the others are none of its rows
TEACHERS = {"var-d16": "VAR-d16", "var-d20": "VAR-d20", "var-d24": "VAR-d24"}
TEACHERS |= {"llamagen-b": "LlamaGen-B", "llamagen-l": "LlamaGen-L", "llamagen-t2i-xl": "LlamaGen-t2i-XL"}
BASELINES = {"var-d16": "d16", "llamagen-l": "L"}


def paper_row(recipe: str, sampler: samplers.Sampler) -> tuple[str, int] | None:
    """(model, #Step) of the paper's row of a sampler."""
    model, family = TEACHERS[recipe], TEACHERS[recipe].split("-")[0]
    match sampler:
        case samplers.Autoregressive():
            return model, 256 if family == "LlamaGen" else 10
        case samplers.FewStep(steps=steps):
            return f"{model}-DD", len(steps)
        case samplers.WithTeacher(start=start, resume=resume) if "t2i" not in recipe:
            return f"{family}-pre-trained-{start}-{resume}", (start > 1) + (resume - start) + 1
        case samplers.Skip(n=n) if recipe in BASELINES:
            return f"{family}-skip-{n} ({BASELINES[recipe]})", (256 if family == "LlamaGen" else 10) - n
        case samplers.OneStepStar() if recipe in BASELINES:
            return f"{family}-onestep*", 1
    return None


def paper_tables() -> dict[tuple[str, int], dict[str, float]]:
    """The figures of tests/goldens/paper_tables.md by (model, #Step), as recipes hold them."""
    found = {}
    for line in (Path(__file__).parent / "goldens" / "paper_tables.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) != 8 or not cells[6].isdigit():
            continue
        texts = dict(zip(("fid", "is", "precision", "recall", "parameters"), cells[1:6], strict=True))
        texts |= dict(zip(("seconds", "speedup"), cells[7].rstrip("x)").split(" ("), strict=False))
        units = {"M": 1e6, "B": 1e9}
        found[cells[0], int(cells[6])] = {
            key: round(float(text.rstrip("MB")) * units.get(text[-1], 1), 6)
            for key, text in texts.items()
            if text != "-"
        }
    return found


OVERLAID = [(name, overlay) for name in TEACHERS for overlay in ("", "-released")]


@pytest.mark.parametrize(("name", "overlay"), [pair for pair in OVERLAID if pair != ("llamagen-t2i-xl", "-released")])
def test_recipes_hold_the_figures_of_the_papers_tables(name: str, overlay: str) -> None:
    files = [f"--config={DEFAULT.parent / file}.yaml" for file in dict.fromkeys([name, name + overlay])]
    recipe, table = parse(None, files), paper_tables()
    layout = checkpoints.config(recipe.teacher).layout
    built = selection.build(recipe.evaluate.samplers, layout, recipe.train.split)
    for sampler, figures in zip(built, selection.published(recipe.evaluate.samplers), strict=True):
        row = paper_row(name, sampler)
        assert figures == (table[row] if row else {}), sampler


def test_the_recipe_of_text_to_image_builds_the_papers_teacher() -> None:
    """By its number of parameters; prompts, images and weights that nobody may ship are left to the user."""
    recipe = parse(None, [f"--config={DEFAULT.parent / 'llamagen-t2i-xl.yaml'}"])
    layout = checkpoints.config(recipe.teacher).layout
    assert (layout.classes, layout.image_size, layout.length) == (0, 256, 256)
    assert checkpoints.caption_shape(recipe.teacher) == (recipe.text.length, 2048)
    with torch.device("meta"):
        teacher = checkpoints.family(recipe.teacher).Teacher(checkpoints.config(recipe.teacher), recipe.teacher.filter)
    assert sum(weight.numel() for weight in teacher.network.parameters()) == 777_678_080
    left = {"captions.uri", "evaluate.captions.uri", "evaluate.inception", "evaluate.reference"}
    assert recipe.placeholders().keys() == left
    with pytest.raises(Refused, match=r"captions.uri says CHANGE; set it to the URI of a Parquet file or folder"):
        recipe.check_filled("captions")


def test_a_later_file_lies_over_an_earlier_one(config: str, tmp_path: Path) -> None:
    (tmp_path / "short.yaml").write_text("pairs: {count: 9}")
    got = parse(None, ["--config", config, "--config", str(tmp_path / "short.yaml")])
    assert (got.name, got.pairs.count, got.pairs.solver) == ("mine", 9, Solver("fixed", 8))


def test_files_lie_over_mappings_as_flags_do(tmp_path: Path) -> None:
    """teacher.config, filter, solver and ablate.axes key by key; lists as a whole."""
    (tmp_path / "over.yaml").write_text(
        "teacher: {config: {prefix_mask: released}, filter: {top_k: 9}}\npairs: {solver: {tolerance: 1e-4}}\n"
        "train: {start_steps: [1]}\nablate: {axes: {train.lr: [1]}}\nevaluate: {samplers: [{name: FlowMatched}]}\n"
    )
    below = ["--config", str(DEFAULT.with_name("digits-var.yaml"))]
    below += ["--config", str(DEFAULT.with_name("ablate-digits.yaml"))]
    plain, laid = parse(None, below), parse(None, [*below, "--config", str(tmp_path / "over.yaml")])
    flags = ["--teacher.config.prefix_mask", "released", "--teacher.filter", "{top_k: 9}", "--pairs.solver.tolerance"]
    flags += ["1e-4", "--train.start_steps", "[1]", "--ablate.axes.train.lr", "[1]", "--evaluate.samplers"]
    assert parse(None, [*below, *flags, "[{name: FlowMatched}]"]) == laid
    assert laid.teacher.config == plain.teacher.config | {"prefix_mask": "released"}
    assert laid.teacher.filter == replace(plain.teacher.filter, top_k=9)
    assert laid.ablate.axes == plain.ablate.axes | {"train.lr": [1]}
    assert (laid.train.start_steps, laid.evaluate.samplers) == ((1,), [{"name": "FlowMatched"}])
    with pytest.raises(ValueError, match="top_k"):
        with_settings(laid, {"teacher": {"filter": {"top_k": -1}}})
    assert with_settings(laid, {"teacher": {"filter": {"top_p": 0.5}}}).teacher.filter.top_k == 9


def test_flags_lie_over_files_wherever_they_stand(config: str) -> None:
    assert parse(None, ["--pairs.solver.evaluations", "6", "--config", config]).pairs.solver == Solver("fixed", 6)


def test_switches_may_stand_bare_and_hyphens_for_underscores() -> None:
    got = parse(None, ["--dry-run", "--pairs.verify", "--status", "--train.lr=3", "--pairs.shard-rows", "7"])
    assert (got.dry_run, got.pairs.verify, got.status, got.train.lr, got.pairs.shard_rows) == (True, True, True, 3, 7)
    assert not parse(None, ["--status", "false"]).status


def test_help_explains_every_field(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stopped:
        parse("What this job does.", ["--pairs.count", "3", "-h"])
    out = capsys.readouterr().out
    assert stopped.value.code == 0
    assert "What this job does." in out
    assert max(map(len, out.splitlines())) <= 80
    for name, kind in fields.named(Recipe):
        if dataclasses.is_dataclass(kind.of):
            continue
        _, _, after = out.partition(f"\n  --{name}\n      ")
        meaning = " ".join(after.split("\n  --")[0].split())
        assert len(meaning.partition(" [")[0]) > 10, f"{name} has a meaning"
        assert kind.text[:30] in meaning, f"{name} says what it may be"
    assert "<class" not in out


def refused(args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stopped:
        parse(None, args)
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1, "one line"
    return error


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--pairs.cuont", "3"], "--pairs.cuont"),
        (["--pairs.count", "many"], "pairs.count"),
        (["--pairs.noise", "kept"], "pairs.noise"),
        (["--pairs.solver.name", "euler"], "pairs.solver.name"),
        (["--pairs.solver.evaluations", "7"], "choose one of 5, 6, 8"),
        (["--train.start_weights", "[2]"], "train.start_weights has 1 numbers for the 2 steps of train.start_steps"),
        (["--train.start_weights", "[1, 0]"], "train.start_weights[1] is 0.0; it must be above 0, and finite"),
        (["--train.start_steps", "[2, 3]"], "train.start_steps is [2, 3]; it must rise and begin with 1"),
        (["--evaluate.samplers", "[1]"], "evaluate.samplers"),
        (["--pairs.count", "0"], "pairs.count is 0; it must be 1 or more"),
        (["--pairs.seed", "2"], "pairs.seed and evaluate.seed are both 2"),
        (["--teacher.filter.top_p", "0"], "teacher.filter.top_p is 0"),
        (["--train.batch", "9", "--train.workers", "2"], "train.batch 9 is not a multiple of train.workers 2"),
        (["--train.workers", "[4, 2]"], "train.workers is [4, 2]; the first number must be below the second"),
        (["--train.workers", "[1, 2, 3]"], "train.workers is [1, 2, 3]; it must be a whole number, 0 or more"),
        (["--train.workers", "[0, 2]"], "train.workers[0] is 0; it must be 1 or more"),
        (["--train.workers", "some"], "or a list of 2, each a whole number, 1 or more"),
        (["--train.batch", "4", "--train.workers", "[1, 5]"], "train.batch 4 is too small for train.workers [1, 5]"),
        (["--evaluate.features", "inception"], "evaluate.inception is not set"),
        (["stray"], "'stray' belongs to no flag; a recipe is given as --config FILE, and a field as --NAME VALUE"),
        (["jobs/recipes/x.yaml"], "a recipe is given as --config jobs/recipes/x.yaml"),
        (["--conf", "x.yaml"], "there is no flag --conf; did you mean --config?"),
        (["--con=x.yaml"], "there is no flag --con; did you mean --config?"),
        (["-c", "x.yaml"], "there is no flag -c; did you mean --config?"),
        (["--recipe", "x.yaml"], "there is no flag --recipe; did you mean --config?"),
        (["--train.ep", "3"], "there is no flag --train.ep; did you mean --train.epochs?"),
        (["--verify"], "there is no flag --verify; did you mean --pairs.verify?"),
        (["--seed", "3"], "did you mean --pairs.seed or --train.seed or --evaluate.seed?"),
        (["--teacher.config.", "3"], "there is no flag --teacher.config."),
        (["-1"], "there is no flag -1"),
        (["--config"], "--config has no value; write --config FILE"),
        (["--config="], "--config is empty (is a variable of the shell not set?)"),
        (["--pairs.count"], "--pairs.count has no value; write --pairs.count VALUE"),
        (["--pairs.count", "--dry_run"], "--pairs.count has no value"),
        (["--dry_run", "jobs/recipes/x.yaml"], "dry_run is 'jobs/recipes/x.yaml'; it must be true or false"),
        (["--run", ""], "run is empty (is a variable of the shell not set?)"),
        (["--pairs", "3"], "the section pairs of the recipe is 3; it must hold named settings"),
        (["--train", "{lr: 1, lr: 2}"], "train, line 1: lr stands twice"),
        (["--train.betas", "[1,"], "train.betas, line 1, column 4: "),
    ],
)
def test_bad_flags_are_one_sentence(
    config: str, flags: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sentence in refused(["--config", config, *flags], capsys)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("pairs: {cuont: 3}", "cuont"),
        ("teacher: {filter: 1}", "the section teacher.filter of"),
        ("pairs: [1", "parsing"),
        ("speed: 3", "speed"),
        ("pairs: 3", "the section pairs of"),
        ("pairs: ", "the section pairs of the recipe has no value"),
        ("run: \nname: x", "run has no value; it must be a path or a URI"),
        ("pairs: {count: }", "pairs.count has no value; it must be a whole number"),
        ("train: {lr: ~}", "train.lr has no value; it must be a number"),
        ("train: {start_steps: null}", "train.start_steps has no value"),
        ("name: 2024", "name is 2024; it must be a name"),
        ("train: {lr: 1, lr: 2}", "line 1: lr stands twice"),
    ],
)
def test_bad_files_are_one_sentence(
    text: str, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    found = refused(["--config", str(DEFAULT), "--config", str(tmp_path / "bad.yaml")], capsys)
    assert found.startswith(f"error: {tmp_path / 'bad.yaml'}")
    assert sentence in found
    assert "nowhere.yaml" in refused(["--config", str(tmp_path / "nowhere.yaml")], capsys)


def test_the_printed_config_parses_to_the_same_recipe(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse(None, ["--config", config, "--print_config"])
    assert stopped.value.code == 0
    again = tmp_path / "again.yaml"
    again.write_text(capsys.readouterr().out)
    assert parse(None, ["--config", str(again)]) == parse(None, ["--config", config])


def test_main_prints_the_summary_and_one_sentence_for_bad_input(
    config: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["job", "--config", config])
    main("doc", lambda recipe: f"made {recipe.name}")
    assert capsys.readouterr().out == "made mine\n"

    def ends(job, code: int) -> str:
        with pytest.raises(SystemExit) as stopped:
            main("doc", job)
        assert stopped.value.code == code
        return capsys.readouterr().err

    assert "there is no such file" in ends(lambda recipe: storage.sha256("/no/file"), 2)
    assert "must be 1 or more" in ends(lambda recipe: PairSettings(count=0), 2)

    def unfinished(recipe: Recipe) -> str:
        raise Unfinished("2 of 6 shards\nwere not made")

    assert ends(unfinished, 1) == "error: 2 of 6 shards were not made\n"


def test_main_keeps_the_traceback_of_a_bug(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["job", "--config", config])
    with pytest.raises(ValueError, match="invalid literal"):
        main("doc", lambda recipe: str(int("a bug")))


def test_main_keeps_the_traceback_of_an_error_that_a_library_raised_in_a_line_of_ours(
    config: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """C code has no frame of its own, so numpy's error ends in a line of this package; it is a bug all the same."""
    monkeypatch.setattr(sys, "argv", ["job", "--config", config])
    with pytest.raises(ValueError, match="mismatch"):
        main("doc", lambda recipe: str(metrics.mmd2(np.zeros((3, 2)), np.zeros((3, 4)))))


def test_a_fingerprint_ignores_order_and_sees_values() -> None:
    assert fingerprint({"a": 1, "b": {"c": [2]}}) == fingerprint({"b": {"c": [2]}, "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})
    assert fingerprint({}) == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"


# ---- what a recipe leaves to its user


def test_what_says_change_is_refused_by_who_needs_it() -> None:
    recipe = parse(None, ["--config", str(DEFAULT.with_name("var-d16.yaml"))])
    (name, what), *others = recipe.placeholders().items()
    assert (name, others) == ("evaluate.inception", [])
    assert what.startswith("URI of weights-inception-2015-12-05-6726825d.pth")
    recipe.check_filled("teacher", "pairs", "train")
    with pytest.raises(Refused, match=r"evaluate.inception says CHANGE; set it to the URI of weights-inception"):
        recipe.check_filled("teacher", "evaluate")
    with pytest.raises(Refused, match="run says CHANGE"):
        replace(recipe, run="CHANGE: folder that all nodes share").check_filled()
    assert cluster.portable(recipe).placeholders() == recipe.placeholders()


# ---- standard output


def test_a_closed_pipe_stops_no_job() -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w", encoding="ascii") as stream:
        output = Output(stream)
        for _ in range(2):
            print("1 ± 2", file=output, flush=True)
        stream.flush()


def test_a_stdout_that_was_never_open_stops_no_job() -> None:
    print("a", file=Output(None), flush=True)


def test_what_an_encoding_lacks_is_replaced() -> None:
    raw = io.BytesIO()
    output = Output(io.TextIOWrapper(raw, encoding="ascii"))
    print("1 ± 2", file=output, flush=True)
    assert raw.getvalue() == b"1 ? 2\n"
