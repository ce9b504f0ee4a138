"""The README and its pages: links lead somewhere, files are there, commands parse, snippets run. Nothing is started."""

from __future__ import annotations

import re
import shlex
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.ablation.plan import titled
from pipeline.command_line import CONFIG, DEFAULT, FIELDS, PRINT, parse, with_settings
from pipeline.device import check
from pipeline.generator import export, sample
from pipeline.models import checkpoints
from pipeline.sampling import selection
from pipeline.serving import serve
from pipeline.settings.train import TrainSettings
from pipeline.training.state import TrainingState

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs").glob("*.md"))
ALL = [README, *PAGES, ROOT / "cluster" / "README.md"]
LINES, MAP_LINES = 200, 19  # of the README, of its map of the code
KINDS = (".py", ".yaml", ".md", ".sh", ".png", ".toml")  # of files that the repository has
ELSEWHERE = (
    "s3://",
    "gs://",
    "runs/",
)  # what a snippet reads that a test has not; another test may, as tests/pairs does
# Of the jobs that take no recipe.
OWN = {"sample": sample, "export": export, "serve": serve, "gpu_check": check}
OWN = {job: module.parser(None) for job, module in OWN.items()}
OF_OWN = {flag for parser in OWN.values() for action in parser._actions for flag in action.option_strings}
SEPARATORS = {"&&", "||", "|", ";", "&"}
NOT_OURS = {"AWS_MAX_ATTEMPTS"}  # botocore reads it

each_page = pytest.mark.parametrize("page", ALL, ids=lambda page: str(page.relative_to(ROOT)))


def fenced(page: Path, language: str) -> list[str]:
    """The blocks of code of a language."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.S | re.M)
    return [block for kind, block in found if kind == language]


def prose(page: Path) -> str:
    """The page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M)


def codes(page: Path) -> list[str]:
    """What stands in backticks, a line break in it taken for a space."""
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose(page))]


def links(text: str) -> list[str]:
    """Where the links and pictures of a text lead, other sites left out."""
    return [place for place in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in place]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub names them."""
    headings = [re.sub(r"[^\w\- ]", "", line.lower()) for line in re.findall(r"^#+ +(.+?) *$", prose(page), re.M)]
    return {heading.replace(" ", "-") for heading in headings}


def commands(page: Path) -> list[list[str]]:
    """The commands of a page, in blocks and in backticks, as words; continued lines are one, comments are left out."""
    lines = [line for block in fenced(page, "bash") for line in re.sub(r"\\\n\s*", "", block).splitlines()]
    lines += [code for code in codes(page) if code.startswith(("python ", "make ", "ray "))]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def jobs(words: list[str]) -> list[tuple[str, list[str]]]:
    """(job, its arguments) of the jobs that a command runs or submits."""
    found = []
    for place, word in enumerate(words):
        after = words[place + 1 :]
        if word == "cluster/submit.py":
            job, after = after[0], after[1:]
        elif word == "cluster/three_jobs.sh":
            job = "generate_pairs"
        elif match := re.fullmatch(r"jobs/(\w+)\.py", word):
            job = match[1]
        else:
            continue
        end = next((i for i, other in enumerate(after) if other in SEPARATORS), len(after))
        found.append((job, after[:end]))
    return found


# ---- places


def test_the_readme_is_short() -> None:
    assert len(README.read_text().splitlines()) <= LINES


def test_the_map_has_every_room_and_nothing_else() -> None:
    (found,) = [block for block in fenced(README, "") if "pipeline/" in block]
    assert len(found.splitlines()) <= MAP_LINES
    named = {name for line in found.splitlines() for name in re.findall(r"^((?:\s*\w+/)+)", line)}
    rooms = {room for names in named for room in names.split() if names.startswith(" ")}
    assert rooms == {f"{path.parent.name}/" for path in (ROOT / "pipeline").glob("*/__init__.py")}
    outside = {name for names in named for name in names.split()} - rooms
    assert {name for name in outside if not (ROOT / name).is_dir()} == set()


def test_the_readme_leads_to_every_page() -> None:
    assert {f"docs/{page.name}" for page in PAGES} <= {place.partition("#")[0] for place in links(prose(README))}


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for place in links(prose(page)):
        name, _, anchor = place.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(place)
    assert broken == []


@each_page
def test_files_that_are_named_are_there(page: Path) -> None:
    """Of the repository, of the package, or beside the page; ``pairs/replica`` is a module's file."""
    missing = []
    for code in codes(page):
        first = code.partition("/")[0]
        ours = (ROOT / first).is_dir() or (ROOT / "pipeline" / first).is_dir()
        if not re.fullmatch(r"[\w./-]+", code) or "/" not in code or not (ours or code.endswith(KINDS)):
            continue
        if code.startswith(("/", "runs/")):
            continue
        places = [ROOT / code, ROOT / "pipeline" / code, ROOT / "pipeline" / f"{code}.py", page.parent / code]
        if not any(place.exists() for place in places):
            missing.append(code)
    assert missing == []


def test_what_contributing_names_stands_in_a_file_that_it_links() -> None:
    """Of each row of its table: functions, classes and constants; fields of a recipe are none of them."""
    page = ROOT / "docs" / "contributing.md"
    rows = [line for line in page.read_text().splitlines() if line.startswith("|")]
    assert len(rows) > 12
    missing = []
    for row in rows:
        files = [(page.parent / place.partition("#")[0]).resolve() for place in links(row)]
        source = "\n".join(file.read_text() for file in files if file.suffix == ".py")
        for name in re.findall(r"`([\w.]+)`", row):
            if name in FIELDS or name in NOT_OURS:
                continue
            last = name.rpartition(".")[2]
            if not re.search(rf"^\s*(?:def|class) {last}\b|^{last}\b.* = ", source, re.M):
                missing.append((row[:40], name))
    assert missing == []


# ---- commands


@each_page
def test_commands_run_what_is_there(page: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    settings = set(re.findall(r"^(\w+) \?=", (ROOT / "Makefile").read_text(), re.M))
    for words in commands(page):
        scripts = [word for before, word in pairwise(words) if before in ("python", "bash")]
        assert [word for word in scripts if not (ROOT / word).is_file()] == [], words
        if words[0] == "make":
            assert {word.partition("=")[0] for word in words[1:]} <= targets | settings, words
        for job, _ in jobs(words):
            assert (ROOT / "jobs" / f"{job}.py").is_file(), words


@each_page
def test_commands_of_jobs_parse(page: Path, tmp_path: Path) -> None:
    """With their recipes, and a small one in the place of the reader's own."""
    (tmp_path / "mine.yaml").write_text("name: mine\n")
    for job, arguments in (found for words in commands(page) for found in jobs(words)):
        own = [
            str(ROOT / word)
            if (ROOT / word).is_file()
            else str(tmp_path / "mine.yaml")
            if word.endswith("yaml")
            else word
            for word in arguments
        ]
        if job in OWN:
            OWN[job].parse_args(own)
        elif job != "train_digits":
            check_parses(own, f"{job} {' '.join(arguments)}")


@pytest.mark.parametrize("page", [README, *PAGES], ids=lambda page: page.name)
def test_flags_in_the_text_are_flags(page: Path) -> None:
    for code in codes(page):
        first, *rest = code.split(" ")
        if first in (CONFIG, PRINT, "--help"):
            continue
        if first.startswith("--"):
            if first in OF_OWN:
                continue
            assert first.removeprefix("--") in FIELDS, code
            if rest:
                check_parses(shlex.split(code), code)


def check_parses(arguments: list[str], command: str) -> None:
    """``parse`` takes them, or prints what was asked for."""
    status = 0
    try:
        parse(None, arguments)
    except SystemExit as end:
        status = end.code
    assert status == 0, command


# ---- snippets


def run(page: Path) -> dict[str, Any]:
    """What a page's Python leaves behind, one snippet after the other as a reader would run them.

    Those that read what only a run or a bucket has are compiled alone.
    """
    names: dict[str, Any] = {"__name__": "snippets"}
    for snippet in fenced(page, "python"):
        code = compile(snippet, str(page), "exec", dont_inherit=True)
        if not any(place in snippet for place in ELSEWHERE):
            exec(code, names)
    return names


@each_page
def test_snippets_of_python_compile_and_run(page: Path) -> None:
    run(page)


def test_the_smallest_family_draws_as_its_page_says() -> None:
    names = run(ROOT / "docs" / "your-own-teacher.md")
    assert names["codes"].shape == (8, 16)
    assert names["images"].shape == (8, 3, 8, 8)
    assert names["images"].abs().max() <= 1
    assert names["drawn"].shape == (8, 16, 4)


@pytest.mark.parametrize("lpips", [0.0, 1.0])
def test_the_student_of_the_smallest_family_can_be_trained(lpips: float) -> None:
    student = run(ROOT / "docs" / "your-own-teacher.md")["student"]
    TrainingState(student, TrainSettings(lpips=lpips))
    assert {p.requires_grad for p in student.embeddings.parameters()} == {lpips > 0}
    assert all(p.requires_grad for p in student.logits.parameters())


@each_page
def test_snippets_of_yaml_lie_over_a_recipe(page: Path, tmp_path: Path) -> None:
    for snippet in fenced(page, "yaml"):
        (tmp_path / "mine.yaml").write_text(snippet)
        recipe = parse(None, [CONFIG, str(DEFAULT), CONFIG, str(tmp_path / "mine.yaml")])
        for axis, values in recipe.ablate.axes.items():
            for value in values:
                with_settings(recipe, value if titled(axis) else {axis: value})


def test_samplers_of_the_pages_are_samplers() -> None:
    layout = checkpoints.config(parse(None, []).teacher).layout
    found = [code for page in [README, *PAGES] for code in codes(page) if re.match(r"\{name: [A-Z]", code)]
    assert len(found) > 6
    for code in found:
        selection.build([yaml.safe_load(code)], layout, layout.steps)
