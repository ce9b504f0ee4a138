"""Which code shapes a result: a digest that changes when that code does, and the version and commit that it is of.

The digest follows names, not files. From a function or class it goes to whatever that names in its module and, through
the imports, in others, and takes in the text of each: a constant, a base class, a helper three modules away, a family
outside this package. Comments, docstrings, formatting and the sentences of errors are no part of it, nor is code that
nothing leads to, so a result stays as long as what made it stays.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sysconfig
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache, lru_cache
from pathlib import Path
from typing import TypedDict

PACKAGE = "distilled-decoding"
# They carry bytes, weights that are known by their SHA-256, and sentences: no number depends on how.
CARRIERS = {
    f"pipeline.{name}" for name in ("host.errors", "host.progress", "models.mismatch", "report.names", "storage")
}
WHOLE, ALWAYS = "*", ""  # of a module: all of it; what stands outside definitions
Symbol = tuple[str, str]  # (module, name at its top level)


@dataclass(eq=False)  # one object for one text, by which its answers are remembered
class Module:
    """A module as text: its definitions by name, what each imported name is, and all that stands outside definitions.

    ``imported`` maps a local name to (module, name), the name empty for a module itself.
    """

    name: str
    definitions: dict[str, list[ast.stmt]] = field(default_factory=dict)
    imported: dict[str, Symbol] = field(default_factory=dict)
    stars: list[str] = field(default_factory=list)
    others: list[ast.stmt] = field(default_factory=list)


def digest(*roots: str) -> str:
    """SHA-256 of the code behind ``roots``, each "module:name", or "module" for all of it.

    Names that cannot be found, where code is looked up as it runs, stand for the whole of their module.
    """
    content = json.dumps(sorted((*symbol, text) for symbol, text in texts(*roots).items()))
    return hashlib.sha256(content.encode()).hexdigest()


def texts(*roots: str) -> dict[Symbol, str]:
    """What ``digest`` is of: the code of every name that the roots lead to; of other people's packages the name."""
    parted = [root.partition(":") for root in roots]
    waiting: list[Symbol] = [(place, name or WHOLE) for place, _, name in parted]
    asked = {place.split(".")[0] for place, _ in waiting}
    out: dict[Symbol, str] = {}
    while waiting:
        symbol = waiting.pop()
        if symbol in out or symbol[0] in CARRIERS:
            continue
        out[symbol] = ""
        if symbol[0].split(".")[0] in asked or _is_ours(symbol[0].split(".")[0]):
            module = _parsed(symbol[0], source(symbol[0]))
            out[symbol], named = _looked_up(module, symbol[1])
            waiting += [*named, (module.name, ALWAYS)]
    return out


def source(name: str) -> str:
    """The text of a module; of one that is not written in Python a line that stands for its bytes."""
    found = importlib.util.find_spec(name)
    path = found.origin if found else None
    if not path or not os.path.isfile(path):
        return ""
    if not path.endswith(".py"):
        return repr(hashlib.sha256(Path(path).read_bytes()).hexdigest())
    return Path(path).read_text()


@cache
def _is_ours(package: str) -> bool:
    """Whether a package is a folder of the user's, neither installed nor Python's own."""
    try:
        found = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return False
    places = [*(found.submodule_search_locations or []), found.origin] if found else []
    place = Path(next(filter(None, places), ""))
    installed = {"site-packages", "dist-packages"} & set(place.parts)
    return place.exists() and place != Path() and not installed and not place.is_relative_to(_STANDARD)


_STANDARD = sysconfig.get_path("stdlib")


@lru_cache(4096)
def _parsed(name: str, text: str) -> Module:
    """A module's text, sorted; imports count wherever they stand, in functions too."""
    tree, out = _Plain().visit(ast.parse(text)), Module(name)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                out.imported[alias.asname or alias.name.split(".")[0]] = (
                    (alias.name, "") if alias.asname else (alias.name.split(".")[0], "")
                )
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(name, node)
            out.stars += [base for alias in node.names if alias.name == "*"]
            out.imported |= {alias.asname or alias.name: (base, alias.name) for alias in node.names}
    for statement in tree.body:
        names = _defined(statement)
        for one in names:
            out.definitions.setdefault(one, []).append(statement)
        if not names and not isinstance(statement, ast.Import | ast.ImportFrom):
            out.others.append(statement)
    return out


def _absolute(name: str, node: ast.ImportFrom) -> str:
    """The module that a ``from`` names; a relative one counts from the package."""
    if not node.level:
        return node.module or ""
    spec = importlib.util.find_spec(name)
    package = name if spec and spec.submodule_search_locations is not None else name.rpartition(".")[0]
    return importlib.util.resolve_name("." * node.level + (node.module or ""), package)


def _defined(statement: ast.stmt) -> list[str]:
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [statement.name]
    targets: list[ast.expr] = []
    if isinstance(statement, ast.Assign):
        targets = statement.targets
    elif isinstance(statement, ast.AnnAssign | ast.AugAssign):
        targets = [statement.target]
    named = [node for target in targets for node in ast.walk(target)]
    plain = all(isinstance(node, ast.Name | ast.Tuple | ast.List | ast.expr_context) for node in named)
    return [node.id for node in named if isinstance(node, ast.Name)] if plain else []


@lru_cache(1 << 16)
def _looked_up(module: Module, name: str) -> tuple[str, list[Symbol]]:
    """(the text that a name of a module stands for, the names that it leads to)."""
    if name == WHOLE:
        parts = [(module.name, one) for one in module.definitions]
        return "", [*parts, *((star, WHOLE) for star in module.stars)]
    if name == ALWAYS:
        return _text(module.others), _leads(module, module.others)
    if name in module.definitions:
        return _text(module.definitions[name]), _leads(module, module.definitions[name])
    if name in module.imported:  # handed on, as a package's __init__ does
        return "", [_target(module.imported[name])]
    return "", [(module.name, WHOLE)]


def _text(statements: Iterable[ast.stmt]) -> str:
    return "\n".join(map(ast.unparse, statements))


def _leads(module: Module, statements: Iterable[ast.AST], bound: frozenset[str] = frozenset()) -> list[Symbol]:
    """The names of this and of other modules that code uses; ``bound`` are those that a function around it binds."""
    out: list[Symbol] = []
    for node in statements:
        inside = bound
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            inside = bound | {own.arg if isinstance(own, ast.arg) else own.id for own in _own(node)}
        if isinstance(node, ast.Attribute):
            dotted = _dotted(node)
            if dotted and dotted[0] in module.imported and dotted[0] not in bound:
                out.append(_inside(module.imported[dotted[0]], dotted[1:]))
                continue
        elif isinstance(node, ast.Name) and node.id not in bound:
            if node.id in module.definitions:
                out.append((module.name, node.id))
            elif node.id in module.imported:
                out.append(_target(module.imported[node.id]))
        out += _leads(module, ast.iter_child_nodes(node), inside)
    return out


def _own(function: ast.AST) -> Iterator[ast.arg | ast.Name]:
    """The arguments of a function and the names that it assigns, not those of functions inside it."""
    for node in ast.iter_child_nodes(function):
        if isinstance(node, ast.arg) or (isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)):
            yield node
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | ast.ClassDef):
            yield from _own(node)


def _dotted(node: ast.expr) -> list[str]:
    """["flow", "Solver"] of the expression flow.Solver; nothing of one that begins otherwise."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return [node.id, *reversed(names)] if isinstance(node, ast.Name) else []


def _inside(imported: Symbol, names: list[str]) -> Symbol:
    """What ``names`` lead to from an imported name: through modules as far as they are any."""
    module = _target(imported)
    while module[1] == WHOLE and names:
        deeper = f"{module[0]}.{names[0]}"
        module = (deeper, WHOLE) if _exists(deeper) else (module[0], names[0])
        names = names[1:]
    return module


def _target(imported: Symbol) -> Symbol:
    """What an import brings: a whole module, or a name of one."""
    base, name = imported
    if not name:
        return base, WHOLE
    deeper = f"{base}.{name}"
    return (deeper, WHOLE) if _exists(deeper) else (base, name)


@cache
def _exists(module: str) -> bool:
    """Whether there is a module of ours of that name; those of others are not imported to find out."""
    if not _is_ours(module.split(".")[0]):
        return False
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # the parent is no package
        return False


class _Plain(ast.NodeTransformer):
    """Code without what shapes no number: docstrings and other bare strings, types of arguments, what errors say."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns = None
        return self.generic_visit(node)

    def visit_arg(self, node: ast.arg) -> ast.AST:
        node.annotation = None
        return node

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        bare = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        return ast.copy_location(ast.Pass(), node) if bare else self.generic_visit(node)

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        return ast.copy_location(ast.Raise(), node)


# ---- whose code it is


class Version(TypedDict):
    """The installed package's number, the commit of the checkout that the code is in, whether its files differ."""

    version: str | None
    commit: str | None
    changed: bool | None


def version() -> Version:
    """Whose code runs.

    Where the code runs without its repository the commit is what MLFLOW_RUN_CONTEXT says (``cluster/submit.py`` sets
    it); None where nobody knows.
    """
    number = None
    with suppress(importlib.metadata.PackageNotFoundError):
        number = importlib.metadata.version(PACKAGE)
    here = _of_checkout() or _of_context()
    return {"version": number, "commit": here[0] if here else None, "changed": here[1] if here else None}


def now() -> str:
    """The time, to the second, in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


@cache
def _of_checkout() -> tuple[str, bool] | None:
    """(commit, whether tracked files differ from it) of the repository that holds this file, not one around it."""
    folder = Path(__file__).parents[1]  # the package, not this room

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout.strip()

    with suppress(OSError, subprocess.SubprocessError):
        git("ls-files", "--error-unmatch", str(Path(__file__).relative_to(folder)))
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--", "."))
    return None


def _of_context() -> tuple[str, bool | None] | None:
    """The same out of the tags that a submitted job brings along."""
    with suppress(ValueError, AttributeError):
        tags = json.loads(os.environ.get("MLFLOW_RUN_CONTEXT", ""))
        if commit := tags.get("mlflow.source.git.commit"):
            changed = tags.get("source.changed")
            return commit, None if changed is None else changed == "true"
    return None
