"""Reading official and own weight files strictly, and building the models that a recipe names.

``weight_files`` knows the formats. Layouts (the first that fits): own safetensors; flat state_dicts (VAR, its
tokenizer); ``trainer`` dicts (VAR-DD); ``ema``, ``model``, ``module`` or ``state_dict`` (LlamaGen, LlamaGen-DD). A
moving average is preferred where a file has one. Parameters must match one to one in name and shape; the constant
buffers that the constructors compute may be missing and then stay as built.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from dataclasses import fields
from types import ModuleType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from pipeline import storage
from pipeline.configuration.fields import check_value, kinds
from pipeline.host.errors import Refused
from pipeline.models import weight_files
from pipeline.models.base import Student, Teacher, Tokenizer
from pipeline.models.graphs import Graphs
from pipeline.models.mismatch import advice
from pipeline.models.weight_files import CheckpointError
from pipeline.numerics.compilation import compiled
from pipeline.settings.teacher import TeacherSettings
from pipeline.settings.train import STUDENT

PREFIXES = ("module.", "_orig_mod.")
DERIVED = ("freqs_cis",)  # tables that every loader recomputes


def load(module: nn.Module, uri: str, unpickle: bool = False) -> None:
    """Give ``module`` the weights at ``uri``, cast to its own dtypes.

    A module that was built on the meta device becomes real: so a large one is never drawn at random first. Raises as
    ``weights`` does, before anything is changed.
    """
    found, own = weights(module, uri, unpickle), module.state_dict()
    # What a file lacks or holds in another shape are constants that the constructor made.
    state = {key: found[key].to(value.dtype, copy=True) if key in found else value for key, value in own.items()}
    module.load_state_dict(state, assign=True)


def weights(module: nn.Module, uri: str, unpickle: bool = False) -> dict[str, Tensor]:
    """The tensors at ``uri``, memory-mapped, once it is certain that they fit ``module``, which may be on meta.

    ``unpickle`` reads files that hold more than tensors and plain values, which runs code in them. Raises
    CheckpointError for a file that is unreadable, does not fit or holds no numbers.
    """
    path = storage.local(uri)
    found = {
        key: value for key, value in _clean(weight_files.read(path, uri, unpickle)).items() if not key.endswith(DERIVED)
    }
    own = module.state_dict()
    parameters = {name for name, _ in module.named_parameters()}
    # A buffer that has no value yet is no constant of the constructor's: its value is in the file, as a weight's.
    parameters |= {name for name, value in module.named_buffers() if name in own and value.is_meta}
    missing = [key for key in own if key in parameters and key not in found]
    unexpected = [key for key in found if key not in own]
    misshaped = [
        f"{key} is {tuple(found[key].shape)} in the file and {tuple(own[key].shape)} in the model"
        for key in own
        if key in found and key in parameters and found[key].shape != own[key].shape
    ]
    for what, keys in (("lacks", missing), ("holds unknown", unexpected), ("does not fit:", misshaped)):
        if keys:
            raise CheckpointError(
                f"{uri} {what} {', '.join(keys[:3])}{' and more' if len(keys) > 3 else ''} ({len(keys)} in all) for"
                f" {type(module).__module__}.{type(module).__name__}; {advice(found, own)}"
            )
    for key in parameters:
        if not (found[key].is_floating_point() and found[key].isfinite().all()):
            what = "NaN or infinity" if found[key].is_floating_point() else f"{found[key].dtype} values"
            raise CheckpointError(f"{uri} holds {what} in {key}; it is damaged or of another kind, fetch it again.")
    return {key: value for key, value in found.items() if value.shape == own[key].shape}


def _clean(content: dict[str, Any]) -> dict[str, Tensor]:
    """Tensors only, without the prefixes that DDP and torch.compile leave."""
    out = {}
    for key, value in content.items():
        while key.startswith(PREFIXES):
            key = key[len(next(p for p in PREFIXES if key.startswith(p))) :]
        if isinstance(value, Tensor):
            out[key] = value
    return out


def save(
    weights: nn.Module | dict[str, Tensor],
    uri: str,
    settings: dict[str, Any],
    dtype: torch.dtype | None = None,
) -> None:
    """Write safetensors atomically, with ``settings`` as JSON in the file's metadata; ``dtype`` casts floats."""
    state = weights.state_dict() if isinstance(weights, nn.Module) else weights
    cast = {
        key: value.detach().to(dtype if dtype and value.is_floating_point() else value.dtype)
        for key, value in state.items()
    }
    with storage.replacing(uri) as file:
        weight_files.write_safetensors(file, cast, {"settings": json.dumps(settings, sort_keys=True)})


def release(settings: TeacherSettings, source: str, target: str) -> None:
    """Write the student exported to ``source`` again, as a file that the authors' own scripts read."""
    exported = load_file(storage.local(source))
    content: dict[str, Any] = {}
    for *outer, last in family(settings).Student.released:
        inside = content
        for key in outer:
            inside = inside.setdefault(key, {})
        inside[last] = exported
    with storage.replacing(target) as file:
        torch.save(content, file)


def metadata(uri: str) -> dict[str, Any]:
    """The settings that ``save`` wrote; CheckpointError where there are none."""
    path = storage.local(uri)
    try:
        with safe_open(path, "pt") as file:
            stored = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        weight_files.check_kind(path, uri)
        raise weight_files.unreadable(uri, error) from error
    if "settings" not in stored:
        raise CheckpointError(f"{uri} carries no settings; it was not exported by distill.")
    try:
        return json.loads(stored["settings"])
    except ValueError as error:
        raise CheckpointError(f"{uri} carries settings that are no JSON ({error}); fetch or write it again.") from None


def family(settings: TeacherSettings) -> ModuleType:
    """The package of a family; ValueError where there is none of that name."""
    try:
        package = importlib.import_module(settings.family)
    except ModuleNotFoundError as error:
        raise Refused(
            f"teacher.family is {settings.family!r}, and there is no such package; use pipeline.models.var,"
            " pipeline.models.llamagen or the dotted path of your own."
        ) from error
    return package


def config(settings: TeacherSettings) -> Any:
    """The family's Config with the recipe's values; ValueError for fields that it does not have."""
    kind = family(settings).Config
    known = {f.name for f in fields(kind)}
    unknown = [name for name in settings.config if name not in known]
    if unknown:
        raise Refused(
            f"teacher.config has no field {unknown[0]!r}; {settings.family} knows {', '.join(sorted(known))}."
        )
    values = {name: tuple(v) if isinstance(v, list) else v for name, v in settings.config.items()}
    for name, value in values.items():
        check_value(value, kinds(kind)[name], f"teacher.config.{name}")
    return kind(**values)


def caption_shape(settings: TeacherSettings) -> tuple[int, int] | None:
    """Positions and width (T, D) of the captions that a recipe's teacher takes at most; None if it takes classes.

    A width of 0 says that it takes the prompts themselves, without an encoder. A family's Config says so as
    ``caption``; one that never takes captions needs no such attribute.
    """
    return getattr(config(settings), "caption", None)


def student_options(settings: TeacherSettings, asked: Mapping[str, Any]) -> dict[str, Any]:
    """Of ``asked``, as ``TrainSettings.student_options`` or a student's file has them, what the family's student takes.

    Refused if another one is not as by default.
    """
    kind = family(settings).Student
    for name, value in asked.items():
        if name not in kind.settings and value != STUDENT[name]:
            raise Refused(f"train.{name} is {value}; {kind.no_choice}, use {STUDENT[name]}.")
    return {name: value for name, value in asked.items() if name in kind.settings}


def parameters(settings: TeacherSettings, asked: Mapping[str, Any]) -> dict[str, int]:
    """How many parameters the teacher's transformer and a student of it have, counted without memory.

    The tokenizer, which decodes for both, is counted in neither. ``asked`` as for ``student_options``.
    """
    with torch.device("meta"):
        teacher: Teacher = family(settings).Teacher(config(settings), settings.filter)
        student = _student(settings, teacher.codebook, asked)
    networks = {"teacher": teacher.network, "student": student}
    return {name: sum(weight.numel() for weight in net.parameters()) for name, net in networks.items()}


def check(settings: TeacherSettings) -> None:
    """Hold both weight files against the networks of the recipe, without memory for either; raises as ``weights``."""
    with torch.device("meta"):
        model: Teacher = family(settings).Teacher(config(settings), settings.filter)
    weights(model.tokenizer, settings.tokenizer, settings.unpickle)
    weights(model.network, settings.checkpoint, settings.unpickle)


def check_student(settings: TeacherSettings, uri: str, asked: Mapping[str, Any]) -> None:
    """Hold a student's file against the recipe's networks, without memory for it; raises as ``weights``.

    ``asked`` as for ``student_options``.
    """
    with torch.device("meta"):
        codebook = family(settings).Tokenizer(config(settings)).codebook
        model = _student(settings, codebook, asked)
    weights(model, uri, settings.unpickle)


def checksums(settings: TeacherSettings) -> dict[str, str]:
    """SHA-256 of the teacher's two files; a missing one is named before anything is built."""
    for name in ("tokenizer", "checkpoint"):
        if not getattr(settings, name):
            raise Refused(f"teacher.{name} is not set; give the path or URI of the weights.")
    return {
        "tokenizer": storage.sha256(settings.tokenizer),
        "checkpoint": storage.sha256(settings.checkpoint),
    }


def teacher(settings: TeacherSettings) -> Teacher:
    """The frozen teacher of a recipe with its weights, compiled and recorded if the recipe says so."""
    with torch.device("meta"):
        model: Teacher = family(settings).Teacher(config(settings), settings.filter)
    load(model.tokenizer, settings.tokenizer, settings.unpickle)
    load(model.network, settings.checkpoint, settings.unpickle)
    if settings.compile:
        compiled(model.network, dynamic=True)
    if settings.graphs:
        model.graphs = Graphs()
    return cast(model, settings).eval().requires_grad_(False)


def cast(model: Teacher, settings: TeacherSettings) -> Teacher:
    """The teacher with its transformer, not its tokenizer, in the recipe's precision."""
    if settings.precision == "bf16":
        model.network.to(torch.bfloat16)
    elif settings.precision == "fp16":
        if not hasattr(model.network, "to_float16"):
            raise Refused(
                f"teacher.precision is fp16, which {settings.family} does not know (its network has no to_float16); use"
                " bf16, tf32 or fp32."
            )
        model.network.to_float16()  # type: ignore[operator]
    return model


def tokenizer(settings: TeacherSettings) -> Tokenizer:
    """The frozen tokenizer alone: what a student needs to make images."""
    with torch.device("meta"):
        model: Tokenizer = family(settings).Tokenizer(config(settings))
    load(model, settings.tokenizer, settings.unpickle)
    return model.eval().requires_grad_(False)


def student(settings: TeacherSettings, uri: str, codebook: Tensor, asked: Mapping[str, Any] | None = None) -> Student:
    """A frozen student: its shape from the recipe, its weights from ``uri`` (ours or the authors').

    ``asked`` as for ``student_options``.
    """
    with torch.device("meta"):
        model = _student(settings, codebook, asked or {})
    load(model, uri, settings.unpickle)
    return model.eval().requires_grad_(False)


def new_student(settings: TeacherSettings, teacher: Teacher, asked: Mapping[str, Any], seed: int) -> Student:
    """A student as its teacher leaves it, where the teacher is; ``asked`` as for ``student_options``."""
    return family(settings).Student.from_teacher(teacher, seed, **student_options(settings, asked))


def unfilled_student(
    settings: TeacherSettings, codebook: Tensor, asked: Mapping[str, Any], device: torch.device
) -> Student:
    """A student to train whose weights are still to come: its memory on the device holds anything."""
    with torch.device("meta"):
        model = _student(settings, codebook, asked)
    state = {name: torch.empty_like(weight, device=device) for name, weight in model.named_parameters()}
    model.load_state_dict(state, strict=False, assign=True)  # the constants are real already
    return model.to(device)


def _student(settings: TeacherSettings, codebook: Tensor, asked: Mapping[str, Any]) -> Student:
    return family(settings).Student(config(settings), codebook, **student_options(settings, asked))
