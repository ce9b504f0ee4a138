"""pytest tests/test_imports.py: imports run one way, and heavy packages stay where they belong."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted((ROOT / "pipeline").rglob("*.py"))
HOMES = {  # package -> the modules that may import it
    "ray": {"artist", "cluster", "heartbeat", "ray_address", "passes", "distill", "evaluate", "training_step"},
    "mlflow": {"mlflow_store", "tracking", "model_registry"},
    "yaml": {"command_line", "recipe_file", "costs", "tracking"},
    "lpips": {"losses"},
    "torch_fidelity": {"inception"},
    "PIL": {"real_images"},
    "matplotlib": {"plots", "ablation_report", "growth"},
    "mlxtend": {"digits"},
    "triton": {"flow_triton"},
}
FLOW = {f"pipeline.{name}" for name in ("flow", "flow_oracle", "flow_solvers", "flow_triton", "posterior")}
LOWEST = FLOW | {f"pipeline.{name}" for name in ("ahead", "compilation", "noise", "precision", "progress", "storage")}
LOWEST |= {
    "pipeline.configuration.addresses",
    "pipeline.errors",
    "pipeline.configuration.fields",
    "pipeline.files.hub",
    "pipeline.files.local",
    "pipeline.host.signals",
    "pipeline.files.failures",
    "pipeline.numerics.torchvision_ops",
}


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


@pytest.mark.parametrize("package", HOMES)
def test_heavy_packages_have_one_home(package: str) -> None:
    users = {
        module.rsplit(".", 1)[-1]
        for module, used in GRAPH.items()
        if any(u == package or u.startswith(package + ".") for u in used)
    }
    assert users <= HOMES[package]


def test_there_is_no_cycle() -> None:
    own = {module: {u for u in used if u in GRAPH and u != module} for module, used in GRAPH.items()}
    while own:
        leaves = [module for module, used in own.items() if not used & own.keys()]
        assert leaves, f"these import one another: {sorted(own)}"
        for module in leaves:
            del own[module]


def test_the_lowest_modules_know_nothing_of_the_others() -> None:
    for module in LOWEST:
        assert not {u for u in GRAPH[module] if u in GRAPH and u not in LOWEST | {"pipeline"}}, module


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
