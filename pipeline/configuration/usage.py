"""What ``--help`` prints: every field of a recipe with its meaning, out of the docstrings that declare them."""

from __future__ import annotations

import inspect
import json
import re
import shutil
import sys
import textwrap
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

from pipeline.configuration.fields import dotted, kinds

NARROW, WIDE = 40, 100  # columns, whatever the terminal says
START = """\
usage: {program} [--config FILE]... [--FIELD VALUE]...

{doc}

Without --config, the recipe is jobs/recipes/digits-llamagen.yaml. Every field below is a key of the YAML file and a
flag; flags lie over files, and a later file lies over an earlier one: mappings key by key, lists as a whole.
"""
OWN = {
    "--config FILE": "a recipe, e.g. jobs/recipes/var-d16.yaml; may be given several times.",
    "--print_config": "print the whole recipe that files and flags give, as YAML, and end.",
    "--help, -h": "print this and end.",
}


def text(doc: str | None, section: Any) -> str:
    """The help of a job with the docstring ``doc``, whose recipe is of the dataclass ``section``."""
    width = min(max(shutil.get_terminal_size().columns, NARROW), WIDE)
    start = START.format(program=Path(sys.argv[0]).name, doc=inspect.cleandoc(doc or ""))
    out = [_wrapped(part, width, "") for part in start.split("\n\n")]
    out.append("\n".join(f"  {flag}\n{_wrapped(meaning, width, '      ')}" for flag, meaning in OWN.items()))
    return "\n\n".join([*out, *_sections(section, "", width)])


def meanings(section: Any) -> dict[str, str]:
    """What the docstring of a dataclass says of each field, below "Attributes:"."""
    listed = inspect.cleandoc(section.__doc__ or "").partition("Attributes:\n")[2]
    found = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", listed, re.M)
    return {name: " ".join(meaning.split()) for name, meaning in found}


def _sections(section: Any, name: str, width: int) -> list[str]:
    """The plain fields of a section in one block, then the sections in it, each under its name."""
    own, inner = [], []
    meaning, default = meanings(section), section()
    for key, wanted in kinds(section).items():
        place = dotted(name, key)
        if is_dataclass(wanted.of):
            summary = inspect.cleandoc(wanted.of.__doc__ or "").splitlines()[0]
            first, *others = _sections(wanted.of, place, width)
            inner += [f"{_wrapped(f'{place}: {summary}', width, '')}\n{first}", *others]
        else:
            said = f"{meaning[key]} [{wanted.text}; default {json.dumps(getattr(default, key))}]"
            own.append(f"  --{place}\n{_wrapped(said, width, '      ')}")
    return ["\n".join(own), *inner]


def _wrapped(paragraph: str, width: int, indent: str) -> str:
    text = " ".join(paragraph.split())
    return textwrap.fill(text, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
