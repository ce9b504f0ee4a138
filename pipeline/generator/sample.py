"""The command line of jobs/sample.py: which student, of what, how many, and where the images go."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from pipeline import storage
from pipeline.generator import folder, grid, spread
from pipeline.generator.arguments import Parser, truth
from pipeline.generator.generator import Generator, checked, located
from pipeline.generator.request import Request
from pipeline.generator.targets import targets
from pipeline.host.errors import Refused
from pipeline.host.progress import Progress
from pipeline.models import checkpoints
from pipeline.models.base import Layout
from pipeline.sampling import selection
from pipeline.sampling.samplers import FewStep, FlowMatched, Sampler

GRID = 1_024  # images of a picture at most
MOST = 10_000  # actors


def main(doc: str | None, args: Sequence[str] | None = None) -> None:
    """The body of jobs/sample.py."""
    parser(doc).carry_out(sample, args)


def parser(doc: str | None) -> Parser:
    """What jobs/sample.py takes."""
    out = Parser(doc)
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
    add("--device", type=_device, metavar="cpu|cuda", help="by default a GPU if there is one")
    add("--actors", type=_pool, metavar="N", help=f"Ray actors that draw an .npz or a folder: {spread.RULE}")
    add("--out", required=True, metavar="PLACE",
        help="a grid (.png), an .npz in ADM's form, or a folder of pictures; the same command goes on with the latter"
             " two where it was stopped")  # fmt: skip
    return out


def _whole(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 0 to 2^63 - 1")
    return int(text)


def _pool(text: str) -> int:
    if _whole(text) > MOST:
        raise argparse.ArgumentTypeError(f"{text} is more than {MOST:,}")
    return int(text)


def _device(text: str) -> str:
    try:
        return str(torch.device(text))
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{text!r} is no device of torch's") from None


def sample(asked: argparse.Namespace) -> str:
    """Draw what was asked for and write it; returns a sentence.

    Raises Refused or Missing, one sentence, before any work, for what is wrong.
    """
    entry, student = _entry(asked.sampler), located(asked.student)
    description = folder.read(student)
    layout = checkpoints.config(description.settings).layout
    (sampler,) = selection.build([entry], layout, description.split)
    if sampler.frequencies:
        raise Refused(f"--sampler {asked.sampler} draws from a pair set's token frequencies; jobs/evaluate.py has it.")
    wanted = _wanted(asked, description, layout)
    checked(description, layout, wanted)
    count = asked.count or min(len(wanted), 64)
    samplers = (sampler, FlowMatched()) if asked.teacher else (sampler,)
    alone = not asked.teacher and isinstance(sampler, FewStep)
    places = [asked.out, _beside(asked.out)][: len(samplers)]
    if asked.out.endswith(".png"):
        if count > GRID or asked.actors:
            what = f"of {count:,} images is none to look at" if count > GRID else "is drawn without actors"
            raise Refused(f"a grid {what}; give --out an .npz, or a folder.")
        places, (_, device) = places[:1], spread.plan(0, asked.device, count, asked.out)
        _write_grid(asked, Generator(description, device, "fp32", not alone), samplers, wanted, count)
    else:
        actors, device = spread.plan(asked.actors, asked.device, count, storage.resolve(asked.out))
        uris = tuple(map(storage.resolve, places))
        student = storage.resolve(student)
        request = Request(student, not alone, samplers, uris, wanted, asked.seed, asked.first, count, device)
        _write_parts(request, description, layout, actors)
    return f"{count:,} images of {sampler.name} are in {' and '.join(places)}."


def _write_parts(request: Request, description: folder.Description, layout: Layout, actors: int) -> None:
    """The files of a request, those that are there already as they are; room and networks are looked at before."""
    places = targets(request)
    units = spread.missing(places)
    left = sum(len(request.ids(item)) for _, item in units)
    twice = 2 * left * 3 * layout.image_size**2  # of an .npz: its parts, and then it
    storage.check_writable(request.places[0].rpartition("/")[0] or "/", twice * request.places[0].endswith(".npz"))
    generator = Generator(description, "cpu" if actors else request.device, "fp32", request.teacher) if units else None
    spread.make(request, places, units, None if actors else generator, actors)


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


def _wanted(asked: argparse.Namespace, description: folder.Description, layout: Layout) -> Sequence[Any]:
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
    if description.text:
        raise Refused("this student draws from prompts; give --prompt TEXT or --prompts FILE.")
    return range(layout.classes)


def _write_grid(
    asked: argparse.Namespace, generator: Generator, samplers: Sequence[Sampler], wanted: Sequence[Any], count: int
) -> None:
    """The picture of all samplers, drawn and written at once."""
    ids = range(asked.first, asked.first + count)
    these = [wanted[i % len(wanted)] for i in ids]
    rows = []
    with Progress(count * len(samplers), "images") as progress:
        for sampler in samplers:
            batches = []
            for images in generator.batches(sampler, these, asked.seed, ids):
                batches.append(images.numpy())
                progress.update(len(images))
            rows.append(np.concatenate(batches))
    with storage.replacing(asked.out) as file:
        grid.picture([sampler.name for sampler in samplers], rows, these).save(file, format="PNG")


def _beside(place: str) -> str:
    """Where the teacher's images go."""
    path = Path(place.rstrip("/"))
    return f"{place[: -len(path.suffix)]}-teacher{path.suffix}" if path.suffix else f"{place.rstrip('/')}-teacher"
