"""The command line of jobs/sample.py: which student, of what, how many, and where the images go."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import yaml
from PIL import Image

from pipeline import storage
from pipeline.command_line import Output, stop
from pipeline.generator.generator import Generator
from pipeline.host import signals
from pipeline.host.errors import Refused, Unfinished
from pipeline.host.progress import Progress
from pipeline.sampling import sample_files, selection
from pipeline.sampling.samplers import FewStep, FlowMatched, Sampler

PART = 1_000  # images that are in memory at once, on their way into files
GRID = 1_024  # images of a picture at most
GAP = 2  # white pixels between them


class Parser(argparse.ArgumentParser):
    """Says what is wrong as all jobs do: in one sentence, with exit status 2."""

    def error(self, message: str) -> NoReturn:
        stop(Refused(f"{message}; --help lists what there is."))


def main(doc: str | None, args: Sequence[str] | None = None) -> None:
    """The body of jobs/sample.py."""
    signals.install()
    with redirect_stdout(Output(sys.stdout)):
        asked = parser(doc).parse_args(args)
        try:
            print(sample(asked), flush=True)
        except (Refused, Unfinished) as error:
            stop(error, error.status)


def parser(doc: str | None) -> Parser:
    """What jobs/sample.py takes."""
    out = Parser(description=doc, allow_abbrev=False)
    add = out.add_argument
    add("--student", required=True, metavar="URI", help="folder of a student: a path, hf://, s3:// or gs://")
    add("--labels", metavar="3,7", help="classes, in turn; by default all of them")
    add("--prompts", metavar="FILE", help="a text file with a prompt a line, in turn")
    add("--prompt", metavar="TEXT", help="one prompt")
    add("--count", type=_whole, metavar="N", help="images; by default one for each class or prompt, 64 at most")
    add("--seed", type=_whole, default=0, metavar="N", help="of the noise, by default 0")
    add("--first", type=_whole, default=0, metavar="N", help="sample id of the first image, by default 0")
    add("--sampler", metavar="YAML", help="as in a recipe; by default {name: FewStep, steps: [1]}")
    add("--teacher", type=truth, nargs="?", const=True, default=False, metavar="true",
        help="also the teacher's images of the same noise: below, or in a second .npz or folder")  # fmt: skip
    add("--device", metavar="cpu|cuda", help="by default a GPU if there is one")
    add("--out", required=True, metavar="PLACE", help="a grid (.png), an .npz in ADM's form, or a folder of pictures")
    return out


def _whole(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 0 to 2^63 - 1")
    return int(text)


def truth(text: str) -> bool:
    """The type of an argument that is true or false."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


def sample(asked: argparse.Namespace) -> str:
    """Draw what was asked for and write it; returns a sentence.

    Raises Refused or Missing, one sentence, before any work, for what is wrong.
    """
    entry = _entry(asked.sampler)
    alone = not asked.teacher and isinstance(entry, dict) and entry.get("name") == FewStep.__name__
    generator = Generator.from_pretrained(asked.student, asked.device, teacher=not alone)
    (sampler,) = selection.build([entry], generator.layout, generator.description.split)
    if sampler.frequencies:
        raise Refused(f"--sampler {asked.sampler} draws from a pair set's token frequencies; jobs/evaluate.py has it.")
    wanted = _wanted(asked, generator)
    count = asked.count or min(len(wanted), 64)
    _check_place(asked.out, count)
    samplers: list[Sampler] = [sampler, FlowMatched()] if asked.teacher else [sampler]
    drawing = [_drawn(generator, one, wanted, count, asked) for one in samplers]
    if asked.out.endswith(".png"):
        _write_grid(asked.out, [np.concatenate([*parts]) for parts in drawing])
        places = [asked.out]
    else:
        places = [asked.out, _beside(asked.out)][: len(samplers)]
        for place, parts in zip(places, drawing, strict=True):
            (_write_npz if place.endswith(".npz") else _write_folder)(place, parts, count, asked.first)
    return f"{count:,} images of {sampler.name} are in {' and '.join(places)}."


def _entry(text: str | None) -> Any:
    """A sampler as a recipe lists it; Refused for what is no YAML."""
    if text is None:
        return {"name": FewStep.__name__, "steps": [1]}
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise Refused(
            f"--sampler is {text}, which is no YAML; write it as '{{name: FewStep, steps: [1, 6]}}'."
        ) from None


def _wanted(asked: argparse.Namespace, generator: Generator) -> Sequence[Any]:
    """The labels or prompts to go through in turn."""
    given = [name for name in ("labels", "prompts", "prompt") if getattr(asked, name) is not None]
    if len(given) > 1:
        raise Refused(f"--{given[0]} and --{given[1]} are both given; give one of them.")
    if asked.prompt is not None:
        return [asked.prompt]
    if asked.prompts:
        lines = storage.read_bytes(asked.prompts).decode(errors="replace").splitlines()
        if not any(line.strip() for line in lines):
            raise Refused(f"--prompts {asked.prompts} holds no prompt; write one a line.")
        return lines
    if asked.labels is not None:
        try:
            return [int(part) for part in asked.labels.split(",")]
        except ValueError:
            raise Refused(f"--labels is {asked.labels}; write classes with commas between them, as 3,7.") from None
    if generator.description.text:
        raise Refused("this student draws from prompts; give --prompt TEXT or --prompts FILE.")
    return range(generator.layout.classes)


def _check_place(place: str, count: int) -> None:
    """Refused for a grid that nobody could look at, and for a folder that holds something."""
    if place.endswith(".png"):
        if count > GRID:
            raise Refused(f"a grid of {count:,} images is none to look at; give --out an .npz, or a folder.")
    elif not place.endswith(".npz") and storage.listing(place):
        raise Refused(f"the folder --out {place} is not empty; name another.")


def _drawn(
    generator: Generator, sampler: Sampler, wanted: Sequence[Any], count: int, asked: argparse.Namespace
) -> Iterator[np.ndarray]:
    """uint8 images [B, 3, H, W], a part after the other."""
    with Progress(count, "images") as progress:
        for start in range(0, count, PART):
            rows = range(start, min(start + PART, count))
            these = [wanted[(asked.first + row) % len(wanted)] for row in rows]
            yield generator.draw_with(sampler, these, asked.seed, [asked.first + row for row in rows]).numpy()
            progress.update(len(rows))


def grid(rows: list[np.ndarray]) -> np.ndarray:
    """A picture, uint8 [H, W, 3], of each sampler's images [B, 3, h, w]: as many columns as rows of samples, the
    samplers' rows one below the other.
    """
    count, _, height, width = rows[0].shape
    columns = min(count, max(1, round((count * len(rows)) ** 0.5)))
    lines = -(-count // columns)
    sheet = np.full((lines * len(rows) * (height + GAP) - GAP, columns * (width + GAP) - GAP, 3), 255, dtype=np.uint8)
    for k, images in enumerate(rows):
        for i, image in enumerate(images):
            top, left = ((i // columns) * len(rows) + k) * (height + GAP), (i % columns) * (width + GAP)
            sheet[top : top + height, left : left + width] = image.transpose(1, 2, 0)
    return sheet


def _write_grid(place: str, rows: list[np.ndarray]) -> None:
    with storage.replacing(place) as file:
        Image.fromarray(grid(rows)).save(file, format="PNG")


def _write_npz(place: str, parts: Iterator[np.ndarray], count: int, first: int) -> None:
    """uint8 [count, H, W, 3] as ``arr_0``, which OpenAI's evaluator reads."""
    key = f"sample-{count}-{first}"
    if storage.exists(place):
        storage.remove(place)
    for item, images in enumerate(parts):
        sample_files.write_part(place, key, item, images)
    sample_files.join(place, key, -(-count // PART))


def _write_folder(place: str, parts: Iterator[np.ndarray], count: int, first: int) -> None:
    """A PNG for each image, named after its sample id."""
    number = first
    for images in parts:
        for image in images:
            with storage.replacing(storage.join(place, f"{number:0{len(str(first + count - 1))}d}.png")) as file:
                Image.fromarray(image.transpose(1, 2, 0)).save(file, format="PNG")
            number += 1


def _beside(place: str) -> str:
    """Where the teacher's images go."""
    path = Path(place.rstrip("/"))
    return f"{place[: -len(path.suffix)]}-teacher{path.suffix}" if path.suffix else f"{place.rstrip('/')}-teacher"
