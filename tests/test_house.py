"""Rooms on floors, imports that run one way, heavy packages at home, nothing too long."""

import ast
from pathlib import Path

import pytest

import pipeline

ROOT = Path(__file__).parents[1]
MODULES = sorted((ROOT / "pipeline").rglob("*.py"))
PACKAGE = ROOT / "pipeline" / "__init__.py"
TESTS = sorted((ROOT / "tests").rglob("test_*.py"))
HOMES = {  # package -> the modules that may import it
    "ray": {
        "pairs.passes",
        "pairs.stragglers",
        "services.cluster",
        "services.heartbeat",
        "services.metrics",
        "services.parts",
        "services.ray_address",
        "training.loop",
        "training.step",
        "evaluation.artist",
        "serving.deployment",
        "workflow.distill",
        "workflow.drawing",
    },
    "mlflow": {"services.mlflow_store", "services.tracking", "services.registry"},
    "yaml": {"configuration.recipe_file", "services.tracking", "command_line", "generator.sample", "workflow.costs"},
    "lpips": {"training.perceptual"},
    "torch_fidelity": {"scoring.dinov2", "scoring.inception"},
    "PIL": {
        "generator.generator",
        "generator.grid",
        "generator.targets",
        "scoring.real_images",
        "serving.replies",
    },
    "starlette": {"serving.application", "serving.server"},
    "matplotlib": {"report.lettering", "report.plots", "ablation.report", "benchmark.growth"},
    "mlxtend": {"digits.networks"},
    "triton": {"flow.kernel", "flow.passes"},
    "transformers": {"digits.text_encoder", "scoring.clip", "scoring.dinov2", "text.encoder"},
    "tokenizers": {"digits.text_encoder"},
    "ftfy": {"text.cleaning"},
    "bs4": {"text.cleaning"},
    "onnxscript": {"generator.export"},
    "onnxruntime": {"generator.export"},
}
# The floors from the ground up. A room imports from the floors below its own and from itself, never from its neighbours
# and never upward. The modules of the root stand among them under their own names.
FLOORS = [
    {"host", "noise", "report"},
    {"configuration", "files", "numerics"},
    {"flow", "storage"},
    {"settings"},
    {"recipe"},
    {"command_line", "models", "services"},
    {"text"},
    {"digits", "models.llamagen", "models.var", "pairs", "sampling"},
    {"generator"},
    {"scoring", "serving", "training"},
    {"evaluation"},
    {"workflow"},
    {"ablation", "benchmark"},
    {"device"},
]
INTERFACE = {"Config", "Tokenizer", "Teacher", "Student"}  # of a family of models
AT_THE_ROOT, IN_A_ROOM, DEEP = 4, 12, 3  # modules, modules, folders below the root of the repository
FUNCTION, MODULE, UNDOCUMENTED = 60, 400, 6  # lines


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


GRAPH = {name_of(path): imports(path) for path in MODULES}
GRAPH["pipeline"] = set()  # what a user imports from there, ``test_the_package_offers_the_generator_alone`` knows
LEAVES = {name_of(path) for path in MODULES if path.name != "__init__.py"}


def room_of(module: str) -> str:
    """pipeline.flow.solvers -> flow; pipeline.noise -> noise; pipeline.models.var.student -> models.var."""
    parts = module.split(".")[1:]
    folder = ".".join(parts[:-1])
    return folder or parts[0]


def definitions(path: Path) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]


def length(node: ast.FunctionDef) -> int:
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1


# ---- imports


@pytest.mark.parametrize("package", HOMES)
def test_heavy_packages_have_one_home(package: str) -> None:
    users = {
        module.removeprefix("pipeline.")
        for module, used in GRAPH.items()
        if any(u == package or u.startswith(package + ".") for u in used)
    }
    assert users == HOMES[package]


def test_every_room_has_its_floor() -> None:
    rooms = {room_of(module) for module, path in zip(GRAPH, MODULES, strict=True) if path.name != "__init__.py"}
    assert rooms == set.union(*FLOORS)


def test_imports_run_down() -> None:
    """So there is no cycle between rooms either."""
    floor = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
    upward = [
        f"{module} imports {u}"
        for module in LEAVES
        for u in GRAPH[module] & LEAVES
        if room_of(module) != room_of(u) and floor[room_of(u)] >= floor[room_of(module)]
    ]
    assert not upward


def test_there_is_no_cycle_within_a_room() -> None:
    own = {module: {u for u in used if u in GRAPH and u != module} for module, used in GRAPH.items()}
    while own:
        leaves = [module for module, used in own.items() if not used & own.keys()]
        assert leaves, f"these import one another: {sorted(own)}"
        for module in leaves:
            del own[module]


def test_a_room_hands_nothing_on() -> None:
    """Its ``__init__`` is a docstring; of a family of models the four names that a recipe's family stands for."""
    for path in MODULES:
        if path.name == "__init__.py":
            module = ast.parse(path.read_text())
            assert ast.get_docstring(module), path
            assert (
                len(module.body) == 1
                or path == PACKAGE
                or room_of(f"{name_of(path)}.x") in {"models.var", "models.llamagen"}
            ), path


def test_the_package_offers_the_generator_alone() -> None:
    """And imports it when somebody asks, for a job that imports one of the rooms imports the package first."""
    assert {name for name in imports(PACKAGE) if name.startswith("pipeline")} == {
        "pipeline.generator.generator",
        "pipeline.generator.generator.Generator",
    }
    assert pipeline.__all__ == ["Generator"]
    inside = [node for node in ast.parse(PACKAGE.read_text()).body if isinstance(node, ast.ImportFrom)]
    assert {node.module for node in inside} == {"__future__", "typing"}


def test_nobody_imports_the_jobs() -> None:
    assert not [module for module, used in GRAPH.items() if any(u.split(".")[0] == "jobs" for u in used)]


def test_nothing_runs_what_it_reads() -> None:
    """No eval, no shell, no unpickling: recipes, URIs and files are data. ``teacher.unpickle`` is asked for."""
    banned = {"eval", "exec", "os.system", "os.popen", "pickle.load", "pickle.loads", "yaml.load", "joblib.load"}
    sources = [*MODULES, *sorted(ROOT.glob("jobs/*.py")), *sorted(ROOT.glob("cluster/*.py"))]
    for path in sources:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name, given = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
            assert name not in banned, f"{path.name}:{node.lineno}"
            assert given.get("shell", "False") == "False", f"{path.name}:{node.lineno}"
            assert given.get("allow_pickle", "False") == "False", f"{path.name}:{node.lineno}"
            if name == "torch.load" and path.name != "inception.py":  # which knows the bytes by their SHA-256
                assert given["weights_only"] in {"True", "not unpickle"}, f"{path.name}:{node.lineno}"


# ---- names


def test_a_class_has_its_name_alone() -> None:
    """But for the four names of a family's interface, by which a recipe's family is looked up."""
    places: dict[str, list[str]] = {}
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(name_of(path))
    assert not {name: found for name, found in places.items() if len(found) > 1 and name not in INTERFACE}


# ---- sizes


def test_no_room_is_too_full() -> None:
    full = dict.fromkeys((path.parent for path in MODULES), 0)
    for path in MODULES:
        full[path.parent] += path.name != "__init__.py"
    assert full.pop(ROOT / "pipeline") <= AT_THE_ROOT
    assert not {folder.name: number for folder, number in full.items() if number > IN_A_ROOM}
    assert max(len(folder.relative_to(ROOT).parts) for folder in full) <= DEEP


def test_nothing_is_too_long() -> None:
    long = [f"{path.name}: {len(path.read_text().splitlines())} lines" for path in MODULES]
    assert not [line for line in long if int(line.split()[-2]) > MODULE]
    functions = [(f"{path.name}: {node.name}", length(node)) for path in MODULES for node in definitions(path)]
    assert not [name for name, lines in functions if lines > FUNCTION]


def test_public_functions_say_what_they_do() -> None:
    silent = [
        f"{path.name}: {node.name}"
        for path in MODULES
        for node in definitions(path)
        if not node.name.startswith("_") and length(node) > UNDOCUMENTED and not ast.get_docstring(node)
    ]
    assert not silent


# ---- tests


def test_tests_stand_where_their_module_does() -> None:
    """tests/flow/test_solvers.py tests pipeline/flow/solvers.py, or what its own docstring says of the room."""
    for path in TESTS:
        inside = path.relative_to(ROOT / "tests")
        room = ROOT.joinpath(*(["cluster"] if inside.parts[0] == "cluster" else ["pipeline", *inside.parts[:-1]]))
        assert room.is_dir(), f"{inside} has no room"
        module = room / path.name.removeprefix("test_")
        named = ast.get_docstring(ast.parse(path.read_text()))
        assert module.exists() or named, f"{inside} tests no module of its room"
