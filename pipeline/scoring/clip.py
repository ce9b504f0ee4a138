"""CLIP score: how well images fit their prompts, by a CLIP model out of a folder in Hugging Face's layout.

The convention is Hessel et al.'s without prefix and factor, which is also torchmetrics': the mean over images of
100 x max(cos, 0) of CLIP's two embeddings. Prompts are read as their users wrote them. Scores of another model or of
another convention do not compare, so the report names both. transformers is imported where a model is loaded: nobody
else pays for it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pipeline import storage
from pipeline.host.errors import Missing, Refused

CONFIG, PREPARATION, INDEX = "config.json", "preprocessor_config.json", "model.safetensors.index.json"
TOKENIZERS = ({"tokenizer.json"}, {"vocab.json", "merges.txt"})  # either will do
OPTIONAL = {"tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"}
BICUBIC = 3  # as preprocessor_config.json says it, with PIL's number
TEXTS = 250  # prompts that are embedded at once
CONVENTION = "mean of 100 x max(cos, 0), prompts as they are and without a prefix"


@dataclass
class ClipSums:
    """Sums over images, float64: images, scores, squares of scores; then images that were also given another prompt,
    and their scores with that.
    """

    sums: np.ndarray = field(default_factory=lambda: np.zeros(5))

    def add(self, own: np.ndarray, others: np.ndarray) -> None:
        """Scores [B] of images with their own prompts, and [B] or [0] with others'."""
        self.sums = self.sums + np.array([len(own), own.sum(), (own**2).sum(), len(others), others.sum()])

    def merge(self, other: ClipSums) -> None:
        """Add the images of another part."""
        self.sums = self.sums + other.sums

    def mean(self) -> float | None:
        """The CLIP score; None without images."""
        count, total = self.sums[:2]
        return float(total / count) if count else None

    def error(self) -> float | None:
        """Its standard error; None of fewer than two images."""
        count, total, squares = self.sums[:3]
        if count < 2:
            return None
        return float(np.sqrt(max(squares / count - (total / count) ** 2, 0) / (count - 1)))

    def floor(self) -> float | None:
        """The score of the same images with other images' prompts; None where there was no other."""
        count, total = self.sums[3:]
        return float(total / count) if count else None


@dataclass(frozen=True)
class Preparation:
    """How uint8 images become what CLIP sees: ``side`` pixels, mean and deviation of the channels on a scale of 1."""

    side: int
    mean: tuple[float, float, float]
    deviation: tuple[float, float, float]

    def __call__(self, pixels: Tensor) -> Tensor:
        """uint8 [B, 3, H, W], H = W, -> float32 [B, 3, side, side].

        Resized as PIL does, which CLIP's own code asks: first across, then down, rounded after either.
        """
        resized = pixels.float()
        for size in ((pixels.shape[-2], self.side), (self.side, self.side)):
            resized = F.interpolate(resized, size=size, mode="bicubic", antialias=True).round().clamp(0, 255)
        mean, deviation = (torch.tensor(values, device=pixels.device) for values in (self.mean, self.deviation))
        return (resized / 255 - mean[:, None, None]) / deviation[:, None, None]


@dataclass(frozen=True)
class Clip:
    """A CLIP model of transformers on a device, in float32, with its tokenizer."""

    model: Any
    tokenizer: Any
    preparation: Preparation
    length: int  # tokens of a prompt that it reads at most

    @torch.no_grad()
    def of_images(self, pixels: Tensor) -> Tensor:
        """uint8 images [B, 3, H, W] -> unit embeddings float32 [B, D]."""
        seen = self.model.vision_model(pixel_values=self.preparation(pixels)).pooler_output
        return F.normalize(self.model.visual_projection(seen), dim=-1)

    @torch.no_grad()
    def of_texts(self, texts: Sequence[str]) -> Tensor:
        """Prompts -> unit embeddings float32 [B, D]."""
        parts = []
        for start in range(0, len(texts), TEXTS):
            some = list(texts[start : start + TEXTS])
            options = {"padding": True, "truncation": True, "max_length": self.length, "return_tensors": "pt"}
            tokens = self.tokenizer(some, **options).to(self.model.device)
            read = self.model.text_model(tokens.input_ids, attention_mask=tokens.attention_mask).pooler_output
            parts.append(F.normalize(self.model.text_projection(read), dim=-1))
        return torch.cat(parts)

    def scores(self, images: np.ndarray, texts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Embedded images [B, D] and their prompts [B] -> scores float64 [B] with their own prompts, and [B] with
        those of the images before them, the first with the last one's; [0] of a single image.
        """
        read = self.of_texts(texts.tolist()).double().cpu().numpy()
        own, others = (100 * np.maximum((images * some).sum(1), 0) for some in (read, np.roll(read, 1, axis=0)))
        return own, others[: len(others) if len(others) > 1 else 0]


def check(uri: str) -> dict[str, str]:
    """SHA-256 of the weights and of everything else that a score depends on, without loading them.

    Raises Missing or Refused, one sentence, for a folder that is not there or holds no CLIP model.
    """
    if importlib.util.find_spec("transformers") is None:
        raise Missing("evaluate.clip needs transformers; pip install 'distilled-decoding[text]'.")
    names = _files(uri)
    config = _config(uri)
    preparation(uri, config)
    heads = {"visual_projection.weight": "vision_config", "text_projection.weight": "text_config"}
    wanted = {head: [config["projection_dim"], (config.get(of) or {}).get("hidden_size")] for head, of in heads.items()}
    weights = [name for name in names if name.endswith(".safetensors")]
    for name in weights:
        for head, shape in _shapes(storage.join(uri, name), wanted).items():
            expected = wanted.pop(head)
            if None not in expected and shape != expected:
                raise Refused(
                    f"evaluate.clip {uri} has {head} of {shape}, and its config.json says {expected}; fetch both again."
                )
    if wanted:
        raise Refused(f"evaluate.clip {uri} holds no CLIP model: {', '.join(wanted)} is not in {', '.join(weights)}.")
    return {"clip": _digest(uri, weights), "clip reads": _digest(uri, [name for name in names if name not in weights])}


def load(uri: str, device: torch.device | str) -> Clip:
    """The model at ``uri`` on ``device``, of which ``check`` found nothing wrong; Refused where tensors are missing."""
    from pipeline.numerics import torchvision_ops  # noqa: F401  isort: skip  before transformers imports torchvision
    from transformers import AutoTokenizer, CLIPModel
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    config = _config(uri)
    with tempfile.TemporaryDirectory(prefix="dd-clip-") as folder:  # transformers wants all files side by side
        for name in _files(uri):
            Path(folder, name).symlink_to(storage.local(storage.join(uri, name)).resolve())
        options = {"local_files_only": True, "use_safetensors": True, "dtype": torch.float32}
        kind: Any = CLIPModel
        model, info = kind.from_pretrained(folder, output_loading_info=True, **options)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if lost := [*info["missing_keys"], *info["mismatched_keys"]]:
        raise Refused(
            f"evaluate.clip {uri} lacks {len(lost)} tensors that its config.json asks for, {lost[0]} first; fetch it"
            " again."
        )
    model.eval().requires_grad_(False).to(device)
    return Clip(model, tokenizer, preparation(uri, config), model.config.text_config.max_position_embeddings)


def preparation(uri: str, config: dict[str, Any]) -> Preparation:
    """What preprocessor_config.json says; Refused where that is not what ``Preparation`` does."""
    said = storage.read_json(storage.join(uri, PREPARATION))
    side = (config.get("vision_config") or {}).get("image_size", 224)
    sizes = {_side(said[key]) for key in ("size", "crop_size") if key in said}
    found = f"evaluate.clip {uri} says in {PREPARATION}"
    if sizes != {side}:
        raise Refused(f"{found} that images have {sizes} pixels across, and its model sees {side}; fetch both again.")
    if said.get("resample", BICUBIC) != BICUBIC:
        raise Refused(f"{found} resample {said['resample']}; only bicubic, {BICUBIC}, is known here.")
    mean, deviation = said.get("image_mean"), said.get("image_std")
    if not all(isinstance(values, list) and len(values) == 3 for values in (mean, deviation)):
        raise Refused(f"{found} image_mean {mean} and image_std {deviation}; three numbers are wanted of each.")
    return Preparation(side, tuple(mean), tuple(deviation))


def _side(size: Any) -> Any:
    """Pixels across, as old and new files say it: 224, {shortest_edge: 224}, {height: 224, width: 224}."""
    return next(iter(size.values()), None) if isinstance(size, dict) else size


def _config(uri: str) -> dict[str, Any]:
    config = storage.read_json(storage.join(uri, CONFIG))
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind != "clip":
        raise Refused(
            f"evaluate.clip {uri} holds a model of type {kind}, not clip; give the folder of a CLIPModel, such as"
            " hf://openai/clip-vit-large-patch14."
        )
    return {"projection_dim": 512} | config


def _files(uri: str) -> list[str]:
    """The files of a folder that make its model, sorted; Missing or Refused where some are not there."""
    there = set(storage.listing(uri))
    if not there:
        raise Missing(f"evaluate.clip {uri} is no folder or is empty; give one in Hugging Face's layout.")
    weights = {name for name in there if name.startswith("model") and name.endswith(".safetensors")}
    needed = {CONFIG, PREPARATION} | next((some for some in TOKENIZERS if some <= there), TOKENIZERS[0])
    lost = sorted(needed - there) + ["model.safetensors"] * (not weights)
    if lost:
        raise Refused(
            f"evaluate.clip {uri} lacks {', '.join(lost)}; give a CLIP model's whole folder in Hugging Face's layout."
        )
    if "model.safetensors" in weights:  # beside which parts of it would be a second copy
        weights = {"model.safetensors"}
    else:
        needed.add(INDEX)
    every = needed | weights | (OPTIONAL & there) | set.union(*TOKENIZERS) & there
    return sorted(every)


def _shapes(uri: str, wanted: dict[str, list[Any]]) -> dict[str, list[int]]:
    """The shapes of those tensors that are in a file of weights."""
    try:
        with safe_open(storage.local(uri), "pt") as file:
            return {name: list(file.get_slice(name).get_shape()) for name in sorted(wanted.keys() & set(file.keys()))}
    except SafetensorError as error:
        raise Refused(f"evaluate.clip: {uri} is no safetensors file or damaged ({error}); fetch it again.") from None


def _digest(uri: str, names: list[str]) -> str:
    """SHA-256 of a file, or of the names and SHA-256 of several."""
    sums = [[name, storage.sha256(storage.join(uri, name))] for name in names]
    return sums[0][1] if len(sums) == 1 else hashlib.sha256(json.dumps(sums).encode()).hexdigest()
