"""From the command line to a recipe, and from a job's errors to one sentence and an exit status.

``parse`` turns ``--config recipe.yaml --train.lr 1e-4`` into a ``Recipe``. A flag is a field's whole dotted name with
its value, nothing is cut short, and flags lie over files wherever they stand.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Any, NoReturn

import yaml

from pipeline.configuration import fields, recipe_file, usage
from pipeline.files.places import resolve
from pipeline.host import events, signals
from pipeline.host.errors import Refused, Unfinished
from pipeline.recipe import Recipe, fingerprint

DEFAULT = Path(__file__).parents[1] / "jobs" / "recipes" / "digits-llamagen.yaml"
CONFIG, PRINT = "--config", "--print_config"
OTHERS = {"-c": CONFIG, "--recipe": CONFIG, "--file": CONFIG, "--print": PRINT}  # what else people try
RECIPE = fields.kind(Recipe)
ANY = fields.kind(Any)
FIELDS = dict(fields.named(Recipe))  # sections, too


def parse(doc: str | None, args: list[str] | None = None) -> Recipe:
    """Command line and YAML -> Recipe; without a ``--config``, the digits default. A later file lies over earlier ones.

    Bad keys, types and values end the program with one sentence and exit status 2; ``--help`` and ``--print_config``
    with status 0.
    """
    given = sys.argv[1:] if args is None else args
    try:
        if {"-h", "--help"} & set(given):
            _answer(usage.text(doc, Recipe))
        files, flags, printing = _split(given)
        # The default is not a layer below the user's recipe, which must say all that it means.
        recipe = _recipe([_of_file(file) for file in files or [str(DEFAULT)]] + flags)
    except Refused as error:
        stop(error)
    if printing:
        _answer(yaml.safe_dump(recipe.resolved(), sort_keys=False).rstrip())
    return recipe


def with_settings(recipe: Recipe, settings: dict[str, Any]) -> Recipe:
    """The recipe with other values of the dotted fields in ``settings``; those of whole sections lie over them.

    As strict as ``parse``, and raises ValueError, one sentence, where that would end the program.
    """
    return _recipe([recipe.resolved()] + [_nested(name.split("."), value) for name, value in settings.items()])


def _recipe(layers: Sequence[dict[str, Any]]) -> Recipe:
    tree: dict[str, Any] = {}
    for layer in layers:
        tree = fields.laid_over(tree, fields.converted(layer, RECIPE, "", recipe_file.scalar))
    return fields.built(Recipe, tree)


def _of_file(place: str) -> dict[str, Any]:
    """The settings of a file; what is wrong with one is said with the file's name."""
    tree = recipe_file.read(place)
    try:
        return fields.converted(tree, RECIPE, "", recipe_file.scalar)
    except Refused as error:
        raise Refused(f"{place}: {error}") from None


def _nested(path: list[str], value: Any) -> dict[str, Any]:
    """[a, b, c] and 3 -> {a: {b: {c: 3}}}."""
    for key in reversed(path):
        value = {key: value}
    return value


# ---- flags


def _split(given: list[str]) -> tuple[list[str], list[dict[str, Any]], bool]:
    """(the files of --config, every other flag as a nested mapping, whether --print_config is there)."""
    files: list[str] = []
    flags: list[dict[str, Any]] = []
    printing, rest = False, list(given)
    while rest:
        word, equals, value = rest.pop(0).partition("=")
        name, path = _flag(word)
        switch = name == PRINT or (path and FIELDS.get(".".join(path), ANY).of is bool)
        if not equals and name != PRINT and rest and not rest[0].startswith("--"):
            value, equals = rest.pop(0), "="
        if not equals and not switch:
            raise Refused(f"{name} has no value; write {name} {'FILE' if name == CONFIG else 'VALUE'}.")
        if name == PRINT:
            printing = True
        elif name == CONFIG:
            if not value.strip():
                raise Refused(f"{CONFIG} is empty (is a variable of the shell not set?); give the recipe's path.")
            files.append(value)
        else:
            free = ".".join(path) not in FIELDS  # an entry of a mapping whose values have no type of their own
            flags.append(_nested(path, (recipe_file.scalar(value) if free else value) if equals else True))
    return files, flags, printing


def _flag(word: str) -> tuple[str, list[str]]:
    """(a flag as it is called here, the keys that lead to its field); Refused, with a hint, for one that is none.

    A hyphen may stand for an underscore. What follows the name of a free mapping is one key of it.
    """
    if not word.startswith("-"):
        hint = f"{CONFIG} {word}" if word.endswith((".yaml", ".yml")) else f"{CONFIG} FILE"
        raise Refused(f"{word!r} belongs to no flag; a recipe is given as {hint}, and a field as --NAME VALUE.")
    field = word.removeprefix("--").replace("-", "_")
    if word.startswith("--"):
        if f"--{field}" in (CONFIG, PRINT):
            return f"--{field}", []
        if field in FIELDS:
            return f"--{field}", field.split(".")
        for free in (name for name, kind in FIELDS.items() if kind.of is dict):
            if word.startswith(f"--{free}.") and word != f"--{free}.":
                return word, [*free.split("."), word.removeprefix(f"--{free}.")]
    known = [CONFIG, PRINT, "--help", *(f"--{name}" for name in FIELDS)]
    if word in OTHERS:
        raise Refused(f"there is no flag {word}; did you mean {OTHERS[word]}?")
    raise Refused(fields.unknown(word, known, "there is no flag"))


# ---- a job


def main(doc: str | None, job: Callable[[Recipe], str]) -> None:
    """The body of a job script: parse the command line, run, print the summary.

    ``Refused`` ends the program with its sentence and exit status 2, ``Unfinished`` with status 1. Whatever else is
    raised is a bug and keeps its traceback. Ctrl-C, SIGTERM and SIGHUP end it in one line with status 130, 143 and 129.
    """
    signals.install()
    with redirect_stdout(Output(sys.stdout)):
        recipe = parse(doc)
        try:
            with _events(recipe):
                summary = job(recipe)
                events.tell("finished", status=0, text=summary.splitlines()[-1] if summary else "")
                print(summary, flush=True)
        except (Refused, Unfinished) as error:
            stop(error, error.status)


@contextmanager
def _events(recipe: Recipe) -> Iterator[None]:
    """The log of events that the recipe asks for, around a job; none of what only prints something.

    Where it is standard output, that has nothing else: whatever the job prints goes to standard error.
    """
    place = recipe.events
    if place is None or recipe.dry_run or recipe.status:
        yield
        return
    out = place == events.STDOUT
    job = Path(sys.argv[0]).stem
    with events.written(place if out else resolve(place), job=job, run=resolve(recipe.run)):
        events.tell("started", name=recipe.name, recipe=fingerprint(recipe.resolved()), process=os.getpid())
        with redirect_stdout(sys.stderr) if out else nullcontext():
            yield


class Output:
    """Standard output as jobs need it: whatever it cannot print or deliver, the work goes on.

    Characters that its encoding lacks become question marks, and what a closed pipe (``| head``) would get is dropped.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = io.StringIO() if stream is None else stream  # None: closed when the program started
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        return self._forgiving(lambda: self._stream.write(text)) or len(text)

    def flush(self) -> None:
        self._forgiving(self._stream.flush)

    def _forgiving(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except BrokenPipeError:
            # What is still in the buffer would be tried again at exit, and fail again.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
            return None


def _answer(text: str) -> NoReturn:
    print(text, flush=True)
    raise SystemExit(0)


def stop(error: Exception, status: int = 2) -> NoReturn:
    """End the program with what is wrong, on one line."""
    print("error: " + " ".join(str(error).split()), file=sys.stderr)
    raise SystemExit(status)
