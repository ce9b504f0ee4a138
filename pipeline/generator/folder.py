"""The folder of a student, as the Hugging Face Hub has models: ``distill`` writes it and ``Generator`` reads it.

config.json            what the student is: family, shapes, split, start steps, guidance distilled in, conditions
model.safetensors      its weights
tokenizer.safetensors  the decoder's weights; with train.tokenizer link config.json names their URI and SHA-256 instead
README.md              the model card (``card``)

Folders of before have the weights as student.safetensors, and recipe.json says the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pipeline import storage
from pipeline.host.errors import Missing, Refused
from pipeline.models import checkpoints
from pipeline.recipe import Recipe
from pipeline.settings.teacher import Filter, TeacherSettings
from pipeline.settings.text import TextSettings
from pipeline.settings.train import STUDENT

CONFIG, WEIGHTS, TOKENIZER, CARD = "config.json", "model.safetensors", "tokenizer.safetensors", "README.md"
EARLIER, RECIPE = "student.safetensors", "recipe.json"  # what folders of before have in the place of WEIGHTS and CONFIG
FORMAT = "distilled-decoding 1"
FILES = (".safetensors", ".pth", ".pt")  # how the name of a file of weights ends
NEEDED = ("family", "config", "split", "start_steps", "tokenizer", "conditions")  # keys of config.json


@dataclass(frozen=True)
class Description:
    """What a student's folder says of it.

    Attributes:
        settings: family, shapes, and the URI of the decoder's weights; there is no teacher in it.
        weights: URI of the student's weights.
        options: those of ``TrainSettings.student_options``.
        split: leading AR steps whose tokens are codes.
        start_steps: the AR steps from which it was trained to jump.
        text: the encoder of its prompts, None for a student of classes.
        recipe: what distill was given, None where only the shared files are there.
    """

    settings: TeacherSettings
    weights: str
    options: dict[str, Any]
    split: int
    start_steps: tuple[int, ...]
    text: TextSettings | None
    recipe: dict[str, Any] | None

    def teacher(self) -> TeacherSettings:
        """Of the teacher that the student was distilled from; Refused where the folder does not say which it was."""
        if self.recipe is None:
            raise Refused("the student's folder has no recipe.json to say which teacher it had; draw without it.")
        settings = self.recipe["teacher"]
        return TeacherSettings(**settings | {"filter": Filter(**settings["filter"])})


def weights(uri: str) -> str:
    """Where a student's folder has its weights, or will have them."""
    usual, earlier = storage.join(uri, WEIGHTS), storage.join(uri, EARLIER)
    return usual if storage.exists(usual) or not storage.exists(earlier) else earlier


def weights_of(uri: str) -> str:
    """The weights at ``uri``, which is their file or a student's folder."""
    return uri if uri.endswith(FILES) else weights(uri)


def beside(file: str) -> list[str]:
    """URIs of what a student's folder holds for sharing beside its weights ``file``; nothing where it is no folder."""
    uri = file.rpartition("/")[0]
    names = storage.listing(uri) if storage.exists(storage.join(uri, CONFIG)) else []
    return [storage.join(uri, name) for name in (CONFIG, TOKENIZER, CARD) if name in names]


def described(recipe: Recipe, checksums: Mapping[str, str]) -> dict[str, Any]:
    """The content of config.json of a recipe's finished student; the decoder's weights are written if it wants them.

    What the student's weights say of themselves is in it, too. ``checksums`` are SHA-256 of the teacher's two files.
    """
    uri, settings = recipe.student_uri, recipe.teacher
    about = checkpoints.metadata(weights(uri))
    config = checkpoints.config(settings)
    tokenizer = _decoder(recipe, checksums)
    if "file" in tokenizer:
        _copy_decoder(recipe, checksums)
    caption = checkpoints.caption_shape(settings)
    return {
        "format": FORMAT,
        **about,
        "tokenizer": tokenizer,
        "conditions": {"captions": list(caption)} if caption else {"classes": config.layout.classes},
        "text": asdict(recipe.text) if caption else None,
        "filter": recipe.resolved()["teacher"]["filter"],
        "pairs_seed": recipe.pairs.seed,
        "image_size": config.layout.image_size,
    }


def with_decoder_as_asked(recipe: Recipe, checksums: Mapping[str, str]) -> str:
    """Have the folder of a described student hold its decoder's weights, or name them, as ``train.tokenizer`` says now.

    Returns what was changed as a sentence, "" where nothing had to be. Nothing else of the folder is written, and at
    every moment config.json leads to a decoder that is there.
    """
    uri, place = recipe.student_uri, storage.join(recipe.student_uri, CONFIG)
    content, wanted = storage.read_json(place), _decoder(recipe, checksums)
    own, there = "file" in wanted, storage.exists(storage.join(uri, TOKENIZER))
    if content["tokenizer"] == wanted and own == there:
        return ""
    if own:
        _copy_decoder(recipe, checksums)
    storage.write_json(place, content | {"tokenizer": wanted})
    if own:
        return f"{storage.join(uri, TOKENIZER)} holds the decoder's weights now."
    if there:
        storage.remove(storage.join(uri, TOKENIZER))
    return f"{place} names the decoder's weights at {wanted['uri']} now, and the folder holds no copy of them."


def _decoder(recipe: Recipe, checksums: Mapping[str, str]) -> dict[str, Any]:
    """What config.json says of the decoder's weights: the file in the folder, or their URI and SHA-256."""
    if recipe.train.tokenizer == "copy":
        return {"file": TOKENIZER, "made of": checksums["tokenizer"]}
    return {"uri": recipe.teacher.tokenizer, "sha256": checksums["tokenizer"]}


def _copy_decoder(recipe: Recipe, checksums: Mapping[str, str]) -> None:
    of = {"uri": recipe.teacher.tokenizer, "sha256": checksums["tokenizer"]}
    checkpoints.save(checkpoints.tokenizer(recipe.teacher), storage.join(recipe.student_uri, TOKENIZER), {"of": of})


def read(uri: str) -> Description:
    """What the folder at ``uri`` says; Missing or Refused, one sentence, for one that holds no student."""
    about = content(uri)
    found, tokenizer = weights(uri), about["tokenizer"]
    decoder = storage.join(uri, tokenizer["file"]) if "file" in tokenizer else tokenizer["uri"]
    for what, file in (("weights", found), ("decoder", decoder)):
        if not storage.exists(file):
            raise Missing(f"the student at {uri} has no {what}: there is no {file}; fetch the folder again.")
    if "sha256" in tokenizer and storage.sha256(decoder) != tokenizer["sha256"]:
        raise Refused(f"{decoder} is not the decoder that the student at {uri} was trained with; its SHA-256 differs.")
    return Description(
        TeacherSettings(family=about["family"], config=about["config"], tokenizer=decoder),
        found,
        {name: about.get(name, value) for name, value in STUDENT.items()},
        about["split"],
        tuple(about["start_steps"]),
        TextSettings(**about["text"]) if about.get("text") else None,
        storage.read_json(owner)["recipe"] if storage.exists(owner := storage.join(uri, RECIPE)) else None,
    )


def content(uri: str) -> dict[str, Any]:
    """What config.json of the folder at ``uri`` says, or would say in one of before; raises as ``read`` does."""
    place = storage.join(uri, CONFIG)
    found = storage.read_json(place) if storage.exists(place) else _of_before(uri)
    lacking = [key for key in NEEDED if key not in found] if isinstance(found, dict) else [*NEEDED]
    if lacking:
        raise Refused(f"{place} does not describe a student of Distilled Decoding: it has no {lacking[0]}.")
    return found


def _of_before(uri: str) -> dict[str, Any]:
    """The content of config.json, put together from the files of a folder of before."""
    student, place = storage.join(uri, EARLIER), storage.join(uri, RECIPE)
    if not (storage.exists(student) and storage.exists(place)):
        raise Missing(f"there is no student at {uri}: no {CONFIG}; give the folder that jobs/distill.py wrote.")
    about, owner = checkpoints.metadata(student), storage.read_json(place)
    recipe = owner["recipe"]
    return {
        **about,
        "tokenizer": {"uri": recipe["teacher"]["tokenizer"], "sha256": about["teacher"]["tokenizer"]},
        "conditions": {},
        "text": recipe["text"] if recipe.get("captions", {}).get("uri") else None,
    }
