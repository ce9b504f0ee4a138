"""A recipe's YAML file as nested mappings, and the one reading of single values that files and flags share.

Stricter than YAML: UTF-8 alone, one document, text for keys, and no key twice, which YAML forbids and PyYAML takes
silently. Looser in one thing: 1e-4 is a number, as in YAML 1.2. Every refusal names the file and, where it can, the
line.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from pipeline.host.errors import Missing, Refused

MERGE = "tag:yaml.org,2002:merge"
MOST = 100_000  # values of a file: with anchors, a few lines can stand for billions
HINTS = {"\\t": "; YAML indents with spaces, not tabs", "another document": "; a recipe is one document"}


class Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the numbers of YAML 1.2: no octal 010, no 1:30 for 90, no dates, but 1e-4."""


Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in found if not tag.endswith((":int", ":float", ":timestamp"))]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F]+)$"), list("-+0123456789")
)
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"[-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*|[0-9][0-9_]*(?=[eE]))([eE][-+]?[0-9]+)?$"
        r"|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"
    ),
    list("-+.0123456789"),
)


def read(place: str) -> dict[str, Any]:
    """What a recipe's file holds; Refused or Missing, one sentence with the file, for one that is no recipe."""
    try:
        data = Path(place).expanduser().read_bytes() if place else b""
    except FileNotFoundError:
        raise Missing(f"there is no file {place}; give the recipe's path.") from None
    except (OSError, ValueError, RuntimeError) as error:  # a folder, no permission; a NUL; no such user's home
        reason = getattr(error, "strerror", None) or error
        raise Refused(f"{place} cannot be read ({reason}); give the path of a recipe.") from None
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise Refused(f"{place} is not UTF-8 text (line {line}); save it in that encoding.") from None
    try:
        found = parse(text)
    except Refused as error:
        raise Refused(f"{place}, {error}") from None
    if not isinstance(found, dict):
        what = "holds no settings" if found is None else f"holds {_noun(found)}, no settings"
        raise Refused(f"{place} {what}; a recipe looks like jobs/recipes/digits-llamagen.yaml.")
    return found


def scalar(text: str) -> Any:
    """The value of a flag or of quoted text: a number, true, a list, ... or the text itself where it is none.

    Raises Refused for a list or a mapping with a mistake in it.
    """
    try:
        return parse(text) if text.strip() else text
    except Refused:
        if text.lstrip().startswith(("[", "{")):
            raise
        return text


def parse(text: str) -> Any:
    """The value of a YAML text; Refused, one sentence with the line, for what is no YAML or not strict enough."""
    try:
        loader = Loader(text)
        node = loader.get_single_node()
        for count, inside in enumerate(_nodes(node)):
            if count > MOST:
                raise Refused(f"line 1 and later stand for more than {MOST:,} values; a recipe is smaller.")
            if isinstance(inside, yaml.MappingNode):
                _check_keys(inside)
        return loader.construct_document(node) if node else None
    except Refused:
        raise
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        problem = " ".join(filter(None, (error.context, error.problem)))
        hint = next((hint for sign, hint in HINTS.items() if sign in problem), "")
        raise Refused(f"{where}{problem}{hint}.") from None
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        raise Refused(f"line {line}: the character {chr(error.character)!a} is not allowed in YAML.") from None
    except (ValueError, RecursionError) as error:  # a whole number of thousands of digits, thousands of brackets
        raise Refused(f"line 1 or later: {error}.") from None


def _nodes(node: yaml.Node | None, outer: tuple[int, ...] = ()) -> Iterator[yaml.Node]:
    """Every value in a document, aliases followed; Refused for one that holds itself."""
    if node is None:
        return
    if id(node) in outer:
        raise Refused(f"line {node.start_mark.line + 1}: an anchor refers to what it stands in.")
    yield node
    if isinstance(node, yaml.CollectionNode):
        for part in (part for parts in node.value for part in (parts if isinstance(parts, tuple) else (parts,))):
            yield from _nodes(part, (*outer, id(node)))


def _check_keys(node: yaml.MappingNode) -> None:
    """Refused for a key that stands twice, or that is no text; a merge key (<<) is YAML's own."""
    seen: dict[str, int] = {}
    for key, _ in node.value:
        line = key.start_mark.line + 1
        if key.tag == MERGE:
            continue
        if key.tag != "tag:yaml.org,2002:str":
            name = getattr(key, "value", None)
            raise Refused(
                f"line {line}: the key {name if isinstance(name, str) else '?'} is no text; put it in quotes."
            )
        if key.value in seen:
            raise Refused(
                f"line {line}: {key.value} stands twice, first in line {seen[key.value]}, and only one of them would"
                " count; make them one."
            )
        seen[key.value] = line


def _noun(value: Any) -> str:
    return "a list" if isinstance(value, list) else f"the value {str(value)[:40]!r}"
