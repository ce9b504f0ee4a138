"""Which network looks at images for the report, what its distance is called, and what it is compared with.

The digits scorer's Fréchet distance is called FD, that of Inception FID, with the flavour in brackets; that of an
Inception with random weights is neither and says so.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline import storage
from pipeline.digits import networks
from pipeline.digits.agreement import agreement
from pipeline.digits.captioned import CaptionedDigits
from pipeline.host.errors import Missing, Refused
from pipeline.scoring import clip, dinov2, inception, real_images, references
from pipeline.scoring.clip import Clip
from pipeline.scoring.real_images import ImageRows, RealImages
from pipeline.scoring.references import References
from pipeline.settings.evaluate import FORMULA, EvaluateSettings, Flavour

Satisfied = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
DIMENSIONS = {"digits": 64, "inception": inception.FEATURES}


@dataclass(frozen=True)
class Features:
    """A network with what the report must know of it.

    Called with uint8 images [B, 3, H, W] it returns features [B, dim], logits [B, classes] and, where ``spatial`` is
    their number, the spatial features of sFID, else None; float32. ``names_labels`` says whether its classes are the
    teacher's labels. ``second`` gives the features [B, dim] in another flavour, where two are scored, and ``clip``
    compares images with prompts, where the recipe wants that; ``dinov2`` gives the features [B, 1024] of FD-DINOv2,
    where it wants those. ``satisfied`` says which images [B] are all that their prompts name: (uint8 images, logits,
    prompts) -> bool; None where that is not measured.
    """

    dim: int
    classes: int
    spatial: int
    names_labels: bool
    network: Callable[[Tensor], tuple[Tensor, Tensor, Tensor | None]]
    second: Callable[[Tensor], Tensor] | None = None
    clip: Clip | None = None
    satisfied: Satisfied | None = None
    dinov2: Callable[[Tensor], Tensor] | None = None

    def __call__(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.network(pixels)


def features(
    settings: EvaluateSettings, device: torch.device | str, weights: dict[str, np.ndarray] | None = None
) -> Features:
    """The scoring network of a recipe on ``device``; ``weights`` are those of ``weights``, read here if not given."""
    beside = clip.load(settings.clip, device) if settings.clip else None
    further = dinov2.load(settings.dinov2).to(device) if settings.dinov2 else None
    if settings.features == "digits":
        scorer = networks.scorer().to(device)
        network = lambda pixels: (*scorer(pixels.float() / 127.5 - 1), None)  # noqa: E731
        return Features(DIMENSIONS["digits"], networks.CLASSES, 0, True, network, None, beside, _satisfied, further)
    arrays = weights or inception.weights(settings.inception or "")
    network, *others = (inception.Inception(arrays, flavour).to(device) for flavour in settings.flavours)
    spatial = inception.SPATIAL if settings.flavours[0] == "torch-fidelity" else 0
    second = (lambda pixels: others[0](pixels)[0]) if others else None
    return Features(inception.FEATURES, inception.CLASSES, spatial, False, network, second, beside, dinov2=further)


def _satisfied(pixels: np.ndarray, logits: np.ndarray, prompts: np.ndarray) -> np.ndarray:
    return agreement(pixels, logits, prompts.tolist()).all_named()


def weights(settings: EvaluateSettings) -> dict[str, np.ndarray] | None:
    """The Inception network's arrays, once for all who score; None for the digits scorer, which ships."""
    return None if settings.features == "digits" else inception.weights(settings.inception or "")


def title(settings: EvaluateSettings) -> str:
    """What the distance is called in tables and plots."""
    if settings.features == "digits":
        return "FD"
    if settings.inception == FORMULA:
        return "FD of a random Inception (not FID)"
    return f"FID ({settings.flavours[0]})"


def second_title(settings: EvaluateSettings) -> str | None:
    """What the distance in the second flavour is called, where there is one."""
    if settings.features == "digits" or len(settings.flavours) == 1:
        return None
    kind = "FD of a random Inception" if settings.inception == FORMULA else "FID"
    return f"{kind} ({settings.flavours[1]})"


def dinov2_title(settings: EvaluateSettings) -> str:
    """What the distance of DINOv2's features is called."""
    return "FD of a random DINOv2 (not FD-DINOv2)" if settings.dinov2 == FORMULA else "FD-DINOv2"


def meaning(settings: EvaluateSettings, described: bool = False) -> str:
    """What the distance is, for a reader of the report; ``described``: to the images of the prompts themselves."""
    if settings.features == "digits":
        digits = "the real digits that the prompts describe" if described else "the 5,000 real digits"
        return (
            f"Fréchet distance of 64 features of the digits scorer to {digits}. It is not FID and"
            " compares with nothing outside this recipe"
        )
    if settings.inception == FORMULA:
        return (
            "Fréchet distance of features of an Inception network with random weights, in the flavour"
            f" {settings.flavours[0]}. It is not FID: a rehearsal, which compares with nothing"
        )
    comparability = {
        "torch-fidelity": "comparable with ADM, VAR and LlamaGen; the Distilled Decoding paper's are pytorch-fid's",
        "pytorch-fid": "as in the Distilled Decoding paper; ADM, VAR and LlamaGen report torch-fidelity's",
    }
    return (
        f"Fréchet distance of Inception features to the reference, preprocessed as {settings.flavours[0]} does,"
        f" {comparability[settings.flavours[0]]}, which scales and resizes images differently"
    )


def check(settings: EvaluateSettings, image_size: int, classes: int) -> dict[str, str]:
    """What identifies the scoring networks: SHA-256 of their weights, and the flavour; ValueError, one sentence, where
    one is missing or cannot serve.
    """
    beside = _check_clip(settings, classes)
    if settings.dinov2:
        beside |= {"dinov2": dinov2.check(settings.dinov2)}
    if settings.features == "digits" and settings.images:
        raise Refused("evaluate.images is set and evaluate.features is digits, which brings its own; leave it out.")
    if settings.features == "digits":
        if image_size != 32 or classes not in (networks.CLASSES, 0):  # 0 of a teacher that takes captions
            raise Refused(
                f"evaluate.features is digits, which scores 32x32 images of {networks.CLASSES} classes, but"
                f" the teacher makes {image_size}x{image_size} images of {classes or 'prompts'}; use evaluate.features"
                " inception."
            )
        return {"scorer": storage.sha256("package://digits/scorer.safetensors")} | beside
    return {"inception": inception.check(settings.inception or ""), "flavour": settings.flavour} | beside


def _check_clip(settings: EvaluateSettings, classes: int) -> dict[str, str]:
    """What identifies the CLIP model of a recipe; {} without one."""
    if not settings.clip:
        return {}
    if classes:
        raise Refused(
            f"evaluate.clip is {settings.clip}, and the teacher takes classes, which are no words; leave it out."
        )
    return clip.check(settings.clip)


def side(settings: EvaluateSettings, image_size: int) -> int:
    """Pixels across an image that is scored, of a teacher that makes ``image_size``."""
    return settings.image_size or (256 if image_size == 384 else image_size)


def check_reference(settings: EvaluateSettings, image_size: int) -> dict[str, Any]:
    """What samples are compared with, as facts for fingerprints and report: SHA-256, images, who made the statistics.

    Raises ValueError, one sentence, for a reference that is missing, of another flavour or network, or of no use.
    """
    if settings.features == "digits":
        return {"images": real_images.DIGITS, "statistics": "made here"}
    uri = settings.reference or ""
    for name, place in (("reference", uri), ("images", settings.images)):
        if place and not storage.exists(place):
            raise Missing(f"evaluate.{name} {place} is not there; check the path, or fetch ADM's.")
    files, images = statistics(settings), real(settings, image_size)
    facts: dict[str, Any] = {"SHA-256": real_images.fingerprint(uri), "images": len(images) if images else 0}
    if isinstance(images, ImageRows) and images.row_count > len(images):
        facts["rows without an image"] = images.row_count - len(images)
    if settings.images:
        facts["images SHA-256"] = real_images.fingerprint(settings.images)
        if not images:
            raise Refused(f"evaluate.images {settings.images} holds no images; precision, recall and KID need some.")
    if settings.dinov2 and not images:
        raise Refused(
            f"evaluate.dinov2 is set, and evaluate.reference {uri} holds statistics of Inception's features alone; give"
            " real images as evaluate.images, or leave evaluate.dinov2 out."
        )
    first, *others = settings.flavours
    if first in files:
        facts |= {"statistics": "read", "count": files[first].count, "sFID": files[first].spatial is not None}
    else:
        facts["statistics"] = "made here"
    if others:
        facts["second"] = "read" if others[0] in files else "made here"
    if "made here" in facts.values():
        _check_count(settings, facts["images"], list(files))
    return facts


def _check_count(settings: EvaluateSettings, count: int, flavours: list[Flavour]) -> None:
    """Refuse images too few for statistics; warn of those whose covariance is singular."""
    uri = settings.images or settings.reference
    if flavours and not count:
        raise Refused(
            f"evaluate.flavour is both, and evaluate.reference {uri} holds statistics of {flavours[0]} alone; give real"
            " images or ADM's .npz as evaluate.images, or one flavour."
        )
    if count < 2:
        raise Refused(
            f"evaluate.reference {uri} holds {count} images; a covariance needs 2 or more, and FID tens of thousands."
        )
    if count <= DIMENSIONS[settings.features]:
        print(
            f"warning: evaluate.reference {uri} holds {count} images for {DIMENSIONS[settings.features]} features, so"
            " its covariance is singular and a distance to it says little; give tens of thousands.",
            file=sys.stderr,
        )


def statistics(settings: EvaluateSettings) -> dict[Flavour, References]:
    """The statistics that a recipe's reference holds, and its file of images, by flavour; empty where all are images.

    Raises ValueError, one sentence, for those of a flavour or a network that the recipe does not score with.
    """
    out: dict[Flavour, References] = {}
    if file := references.read(settings.reference or ""):
        out[references.check(file, settings)] = file
    beside = references.read(settings.images) if settings.images else None
    if (
        beside
        and beside.flavour in settings.flavours
        and (beside.weights == FORMULA) == (settings.inception == FORMULA)
    ):
        out.setdefault(beside.flavour, beside)
    return out


def real(settings: EvaluateSettings, image_size: int) -> RealImages | None:
    """The real images of a recipe, or None where its reference holds statistics alone."""
    if settings.features == "digits":
        described = real_images.has_placements(settings)
        return CaptionedDigits(settings.captions.uri or "") if described else real_images.Digits()
    return real_images.of_file(settings.images or settings.reference or "", image_size)
