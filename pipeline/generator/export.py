"""The command line of jobs/export.py: which student, and the file into which its graph goes.

Either kind of file is made of the same torch.export program: .pt2 is that program, .onnx what torch's own exporter
makes of it. Both say in their metadata what they are.
"""

from __future__ import annotations

import argparse
import json
import shutil
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from pipeline import storage
from pipeline.generator import folder, graph
from pipeline.generator.arguments import Parser
from pipeline.generator.generator import located
from pipeline.generator.graph import Interface
from pipeline.host import provenance
from pipeline.host.errors import Refused
from pipeline.models import checkpoints

FORMAT = "distilled-decoding export 1"
METADATA = "metadata.json"  # the name of a .pt2 archive's extra file
ENDINGS = (".pt2", ".onnx")
PACKAGES = ("onnx", "onnxscript", "onnxruntime")  # of the extra
READER = "torch-fidelity"
MEGABYTE = 1 << 20


def main(doc: str | None, args: Sequence[str] | None = None) -> None:
    """The body of jobs/export.py."""
    parser(doc).carry_out(export, args)


def parser(doc: str | None) -> Parser:
    """What jobs/export.py takes."""
    out = Parser(doc)
    add = out.add_argument
    add("--student", required=True, metavar="URI", help="folder of a student: a path, hf://, s3:// or gs://")
    add("--for", dest="reader", choices=[READER], help="inputs as torch-fidelity gives them: one, of flat noise")
    add("--out", required=True, metavar="FILE", help="a torch.export archive (.pt2) or an ONNX file (.onnx)")
    return out


def export(asked: argparse.Namespace) -> str:
    """Write the file that was asked for; returns a sentence about it.

    Raises Refused or Missing, one sentence, before any work, for what is wrong.
    """
    _check_place(asked.out, asked.reader)
    student = located(asked.student)
    description = folder.read(student)
    if asked.reader and description.text:
        raise Refused(f"--for {READER} draws from noise alone, and this student takes prompts; leave it out.")
    storage.check_writable(_around(asked.out))
    interface = interface_of(description, asked.reader)
    about = metadata(student, description, interface)
    with TemporaryDirectory(dir=storage.scratch()) as place:
        file = Path(place, Path(asked.out).name)
        write(program(interface), interface, about, file)
        said = _compared(interface, file)
        size = sum(part.stat().st_size for part in Path(place).iterdir())
        _deliver(Path(place), asked.out)
    inputs = ", ".join(f"{name} {one['dtype']} {one['shape']}" for name, one in interface.described()["inputs"].items())
    return f"{asked.out} ({size / MEGABYTE:.1f} MB) draws in one step from {inputs}; {said}."


def _check_place(place: str, reader: str | None) -> None:
    """Refused for what cannot be written here."""
    if not place.endswith(ENDINGS):
        raise Refused(f"--out {place} ends as neither kind of file does; name one that ends in .pt2 or .onnx.")
    if storage.is_folder(place):
        raise Refused(f"--out {place} is a folder; name a file.")
    if reader and not place.endswith(".onnx"):
        raise Refused(f"--out {place} is nothing that {READER} reads; for it name one that ends in .onnx.")
    lacking = [package for package in PACKAGES if find_spec(package) is None]
    if place.endswith(".onnx") and lacking:
        raise Refused(f"--out {place} needs {lacking[0]}; pip install 'distilled-decoding[export]'.")


def interface_of(description: folder.Description, reader: str | None) -> Interface:
    """The graph of a student's folder with its inputs."""
    settings = description.settings
    tokenizer = checkpoints.tokenizer(settings)
    student = checkpoints.student(settings, description.weights, tokenizer.codebook, description.options)
    if reader:
        return graph.for_torch_fidelity(student, tokenizer, description.split)
    caption = checkpoints.caption_shape(settings)
    if caption:
        return graph.of_prompts(student, tokenizer, description.split, caption)
    return graph.of_classes(student, tokenizer, description.split)


def metadata(uri: str, description: folder.Description, interface: Interface) -> dict[str, str]:
    """What a file says of itself, each value text, most of it JSON: format, inputs, outputs, steps, student."""
    about: dict[str, Any] = {
        "format": FORMAT,
        "made by": provenance.version(),
        **interface.described(),
        "steps": "1",
        "weights": {"sha256": storage.sha256(description.weights)},
        "student": folder.content(uri),
    }
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in about.items()}


def program(interface: Interface) -> ExportedProgram:
    """The graph as torch.export captures it, with axes of any size where an input names them."""
    sizes = {"batch": Dim("batch")}
    if interface.longest > 1:
        sizes["positions"] = Dim("positions", min=1, max=interface.longest)
    shapes = tuple({axis: sizes[name] for axis, name in given.axes.items()} for given in interface.inputs.values())
    # Strict, for otherwise ``len`` of a tensor is the number that it happens to be in the example. Without gradients,
    # for the networks compute their logits otherwise in training.
    with torch.no_grad():
        return torch.export.export(interface.graph.eval(), interface.examples, dynamic_shapes=shapes, strict=True)


def write(captured: ExportedProgram, interface: Interface, about: dict[str, str], file: Path) -> None:
    """A .pt2 for ``torch.export.load``, with the metadata as an extra file in it, or an .onnx with its properties."""
    if file.suffix == ".pt2":
        torch.export.save(captured, file, extra_files={METADATA: json.dumps(about, indent=2)})
        return
    model = _translated(captured, interface)
    model.model.metadata_props.update(about)
    model.save(file)  # weights of more than 1.5 GB into NAME.onnx.data beside it


def _translated(captured: ExportedProgram, interface: Interface) -> Any:
    """The program as torch's ONNX exporter has it."""
    from onnxscript import opset18

    def remainder(number: Any, divisor: Any) -> Any:
        """torch's exporter has it for constant divisors alone, and that of captions is their length."""
        return opset18.Mod(number, divisor)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's about its own calls, and that two inputs share the name "batch"
        return torch.onnx.export(
            captured,
            dynamo=True,
            verbose=False,
            input_names=list(interface.inputs),
            output_names=list(graph.OUTPUTS),
            dynamic_shapes=tuple(given.axes for given in interface.inputs.values()),
            custom_translation_table={torch.ops.aten.remainder.Scalar: remainder},
        )


def run(file: Path, given: dict[str, Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """Pixels and images that the file draws of its inputs by name, in their order, on the CPU."""
    if file.suffix == ".pt2":
        with torch.no_grad():
            pixels, images = torch.export.load(file).module()(*given.values())
        return pixels.numpy(), images.numpy()
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    pixels, images = session.run(list(graph.OUTPUTS), {name: value.numpy() for name, value in given.items()})
    return pixels, images


def _compared(interface: Interface, file: Path) -> str:
    """How far the file's images are from the student's own, in words; in another batch than the captured one."""
    given = {name: torch.cat([one.example, one.example[:1]]) for name, one in interface.inputs.items()}
    pixels, images = run(file, given)
    with torch.no_grad():
        own_pixels, own_images = (tensor.numpy() for tensor in interface.graph(*given.values()))
    furthest, others = np.abs(images - own_images).max(), int((pixels != own_pixels).sum())
    return (
        f"of {len(images)} images that it drew, values in [0, 1] differ from the student's by at most {furthest:.1e},"
        f" and {others:,} of {pixels.size:,} bytes"
    )


def _deliver(place: Path, out: str) -> None:
    """Every file of the folder to where ``out`` lies, itself last: who sees it has all of it."""
    for part in sorted(place.iterdir(), key=lambda part: part.name == Path(out).name):
        with part.open("rb") as source, storage.replacing(storage.join(_around(out), part.name)) as file:
            shutil.copyfileobj(source, file, MEGABYTE)


def _around(out: str) -> str:
    """The folder of a file."""
    folder_uri, slash, _ = out.rpartition("/")
    return folder_uri or slash or "."
