"""From the command line to a recipe, and from a job's errors to one sentence and an exit status.

``parse`` turns ``--config recipe.yaml --train.lr 1e-4`` into a ``Recipe`` and is strict about typos.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import yaml

from pipeline import signals
from pipeline.errors import Refused, Unfinished
from pipeline.recipe import Recipe

DEFAULT = Path(__file__).parents[1] / "jobs" / "recipes" / "digits-llamagen.yaml"


def parse(doc: str | None, args: list[str] | None = None) -> Recipe:
    """Command line and YAML -> Recipe; without a ``--config``, the digits default. A later file lies over earlier ones.

    Bad keys, types and values end the program with one sentence and exit status 2.
    """
    from jsonargparse import ArgumentError, ArgumentParser

    given = sys.argv[1:] if args is None else args
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--config", nargs="?", action="append")
    files = list(filter(None, first.parse_known_args(given)[0].config or []))
    if not files:
        # The default is not a layer below the user's recipe, which must say all that it means.
        files, given = [str(DEFAULT)], ["--config", str(DEFAULT), *given]

    parser = ArgumentParser(description=doc, exit_on_error=False)
    parser.add_argument("--config", action="config", help="a recipe, e.g. jobs/recipes/digits-llamagen.yaml")
    parser.add_class_arguments(Recipe)
    try:
        settings = parser.parse_args(given)
        for file in files:
            _check_sections(yaml.safe_load(Path(file).read_text()), Recipe().resolved(), "")
        settings = parser.instantiate_classes(settings)
        del settings["config"]
        return Recipe(**settings)
    except (ArgumentError, ValueError) as error:
        stop(error)


def with_settings(recipe: Recipe, settings: dict[str, Any]) -> Recipe:
    """The recipe with other values of the dotted fields, or of the whole sections, in ``settings``.

    As strict as ``parse``, and raises ValueError, one sentence, where that would end the program.
    """
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Recipe)
    tree = recipe.resolved()
    for name, value in settings.items():
        *sections, last = name.split(".")
        inside = tree
        for key in sections:
            inside = inside[key] if isinstance(inside.get(key), dict) else {}
        if last not in inside:
            raise Refused(f"a recipe has no field {name}; see pipeline/recipe.py for those that there are.")
        _check_sections(value, inside[last], name)
        inside[last] = inside[last] | value if isinstance(inside[last], dict) else value
    try:
        return Recipe(**parser.instantiate_classes(parser.parse_object(tree)))
    except (ArgumentError, ValueError) as error:
        raise Refused(" ".join(str(error).split())) from error


def _check_sections(given: Any, known: Any, name: str) -> None:
    """jsonargparse passes over a section that is not a mapping, like ``pairs: 3``."""
    if isinstance(known, dict):
        if not isinstance(given, dict):
            raise Refused(f"the section {name} of the recipe is {given!r}; it must hold named settings.")
        for key in given.keys() & known.keys():
            _check_sections(given[key], known[key], f"{name}.{key}".lstrip("."))


def main(doc: str | None, job: Callable[[Recipe], str]) -> None:
    """The body of a job script: parse the command line, run, print the summary.

    ``Refused`` ends the program with its sentence and exit status 2, ``Unfinished`` with status 1. Whatever else is
    raised is a bug and keeps its traceback. Ctrl-C, SIGTERM and SIGHUP end it in one line with status 130, 143 and 129.
    """
    signals.install()
    recipe = parse(doc)
    try:
        print(job(recipe))
    except (Refused, Unfinished) as error:
        stop(error, error.status)


def stop(error: Exception, status: int = 2) -> NoReturn:
    """End the program with what is wrong, on one line."""
    print("error: " + " ".join(str(error).split()), file=sys.stderr)
    raise SystemExit(status)
