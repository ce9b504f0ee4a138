"""All that the report needs of one sampler's images, part by part, in a form that travels and merges.

Images are rounded as a PNG would round them before anything looks at them. A part is summed up at once, however it was
batched, so that batches change no sum.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import IO, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.models.convnet import to_uint8
from pipeline.scoring.clip import ClipSums
from pipeline.scoring.dinov2 import FEATURES
from pipeline.scoring.instruments import Features
from pipeline.scoring.metrics import ClassVariance, InceptionScore, Moments

SCORE_BLOCK = 5_000  # images of one Inception Score, in the order of their ids, as ADM's evaluator has it
THUMBNAIL = 32  # pixel statistics are those of grey thumbnails of at most this side


@dataclass(frozen=True)
class Sight:
    """What the networks saw of uint8 images [B, 3, H, W]: arrays with a row per image, float32."""

    pixels: np.ndarray
    features: np.ndarray
    logits: np.ndarray
    spatial: np.ndarray | None
    thumbnails: np.ndarray
    second: np.ndarray | None = None  # features in the other flavour
    clip: np.ndarray | None = None  # CLIP's embeddings
    dinov2: np.ndarray | None = None  # DINOv2's features

    @classmethod
    @torch.no_grad()
    def of(cls, images: Tensor, network: Features) -> Sight:
        """Images [B, 3, H, W] in [-1, 1], rounded."""
        pixels = to_uint8(images)
        features, logits, spatial = network(pixels)
        deep = None if spatial is None else _rows(spatial)
        second = None if network.second is None else _rows(network.second(pixels))
        embedded = None if network.clip is None else _rows(network.clip.of_images(pixels))
        further = None if network.dinov2 is None else _rows(network.dinov2(pixels))
        scored = _rows(features), _rows(logits), deep, thumbnails(pixels)
        return cls(pixels.cpu().numpy(), *scored, second, embedded, further)

    @classmethod
    def joined(cls, parts: Sequence[Sight]) -> Sight:
        """The rows of all parts."""
        columns: Any = zip(*(vars(part).values() for part in parts), strict=True)
        rows: Any = (None if column[0] is None else np.concatenate(column) for column in columns)
        return cls(*rows)


@dataclass
class Statistics:
    """All that the report needs of one sampler's images; parts of consecutive ids merge in the order of their
    ids.

    ``second`` are the moments in the other flavour, where two are scored; ``clip`` the CLIP scores of images whose
    prompts are known; ``dinov2`` the moments of DINOv2's features, where they are wanted. ``right`` counts images whose
    predicted class is their label, ``labelled`` those that were asked. ``agreement`` [2, 2] counts images that are all
    that their prompts name and those that were asked, for their own prompts and, below, for other images'. ``features``
    (for what needs the rows themselves) and ``images`` (for the grid) hold the kept rows. ``machines`` says on what the
    parts were made, each kind once; ``origin`` says all else of how, on which no more than rounding depends.
    """

    moments: Moments
    pixels: Moments
    variance: ClassVariance
    score: InceptionScore
    spatial: Moments | None = None
    second: Moments | None = None
    clip: ClipSums | None = None
    dinov2: Moments | None = None
    right: int = 0
    labelled: int = 0
    agreement: np.ndarray = field(default_factory=lambda: np.zeros((2, 2), dtype=np.int64))
    seconds: float = 0.0
    features: list[np.ndarray] = field(default_factory=list)
    images: list[np.ndarray] = field(default_factory=list)
    machines: list[dict[str, str]] = field(default_factory=list)
    origin: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def empty(cls, network: Features, classes: int, side: int, count: int) -> Statistics:
        """For ``count`` images of ``side`` pixels and ``classes`` labels."""
        pixels = min(side, THUMBNAIL) ** 2
        blocks = math.ceil(count / SCORE_BLOCK)
        return cls(
            Moments(network.dim),
            Moments(pixels),
            ClassVariance(classes, pixels),
            InceptionScore(blocks, network.classes),
            Moments(network.spatial) if network.spatial else None,
            Moments(network.dim) if network.second else None,
            ClipSums() if network.clip else None,
            Moments(FEATURES) if network.dinov2 else None,
        )

    def merge(self, other: Statistics) -> None:
        """Add the part that follows this one."""
        self.moments.merge(other.moments)
        self.pixels.merge(other.pixels)
        self.variance.merge(other.variance)
        self.score.merge(other.score)
        if self.spatial and other.spatial:
            self.spatial.merge(other.spatial)
        if self.second and other.second:
            self.second.merge(other.second)
        if self.clip and other.clip:
            self.clip.merge(other.clip)
        if self.dinov2 and other.dinov2:
            self.dinov2.merge(other.dinov2)
        self.right += other.right
        self.labelled += other.labelled
        self.agreement = self.agreement + other.agreement
        self.seconds += other.seconds
        self.features += other.features
        self.images += other.images
        self.machines += [machine for machine in other.machines if machine not in self.machines]

    def pack(self) -> bytes:
        """As an npz file; nothing in it is pickled."""
        named = ("moments", "pixels", "variance", "score", "spatial", "second", "clip", "dinov2")
        sums = {name: getattr(self, name) for name in named}
        for moments in (self.moments, self.pixels, self.spatial, self.second, self.dinov2):
            if moments:
                moments.flush()
        arrays: dict[str, Any] = {
            f"{name}.{key}": _packed(value) if isinstance(sum_, Moments) and key == "m2" else value
            for name, sum_ in sums.items()
            if sum_
            for key, value in vars(sum_).items()
            if not key.startswith("_")
        }
        arrays["made"] = np.array(json.dumps(self.origin | {"machines": self.machines}))
        arrays["counts"] = np.array([self.right, self.labelled, self.seconds])
        if self.agreement.any():
            arrays["agreement"] = self.agreement
        for key in ("features", "images"):
            if getattr(self, key):
                arrays[key] = np.concatenate(getattr(self, key))
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        return buffer.getvalue()

    @classmethod
    def unpack(cls, data: bytes) -> Statistics:
        """The inverse of ``pack``."""
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
        dim, pixels = len(arrays["moments.mean"]), len(arrays["pixels.mean"])
        out = cls(
            Moments(dim),
            Moments(pixels),
            ClassVariance(len(arrays["variance.n"]), pixels),
            InceptionScore(*arrays["score.p"].shape),
            Moments(len(arrays["spatial.mean"])) if "spatial.mean" in arrays else None,
            Moments(dim) if "second.mean" in arrays else None,
            ClipSums() if "clip.sums" in arrays else None,
            Moments(len(arrays["dinov2.mean"])) if "dinov2.mean" in arrays else None,
        )
        for key, value in arrays.items():
            if "." in key:
                name, attribute = key.split(".")
                sum_ = getattr(out, name)
                if isinstance(sum_, Moments) and attribute == "m2":
                    value = _unpacked(value, len(sum_.mean))
                setattr(sum_, attribute, int(value) if value.ndim == 0 else value)
        out.right, out.labelled = int(arrays["counts"][0]), int(arrays["counts"][1])
        out.seconds = float(arrays["counts"][2])
        out.agreement = arrays.get("agreement", out.agreement)
        out.features = [arrays["features"]] if "features" in arrays else []
        out.images = [arrays["images"]] if "images" in arrays else []
        out.origin = json.loads(str(arrays["made"]))
        out.machines = out.origin.pop("machines")
        return out

    def add(
        self,
        sight: Sight,
        labels: np.ndarray | None,
        network: Features,
        place: np.ndarray,
        keep: np.ndarray,
        images: int,
    ) -> None:
        """Take in rows of images; ``place`` [B] counts the sampler's images from 0.

        Labels or prompts [B] may be unknown (None); ``network`` says what its logits mean for them. Features are kept
        of the rows in ``keep`` [B], and the first ``images`` of all are.
        """
        self.moments.add(sight.features)
        self.pixels.add(sight.thumbnails)
        self.score.add(sight.logits, place // SCORE_BLOCK)
        if self.spatial and sight.spatial is not None:
            self.spatial.add(sight.spatial)
        if self.second and sight.second is not None:
            self.second.add(sight.second)
        if self.dinov2 and sight.dinov2 is not None:
            self.dinov2.add(sight.dinov2)
        if len(self.variance.n) == 1:  # of prompts each stands for itself: the variance is that of all images
            self.variance.add(sight.thumbnails, np.zeros(len(place), dtype=np.int64))
        elif labels is not None:
            self.variance.add(sight.thumbnails, labels)
        if labels is not None and labels.dtype == object:
            self._add_agreement(sight, labels, network)
            if network.clip and self.clip and sight.clip is not None:
                self.clip.add(*network.clip.scores(sight.clip, labels))
        elif labels is not None and network.names_labels:
            self.right += int((sight.logits.argmax(1) == labels).sum())
            self.labelled += len(labels)
        if keep.any():
            self.features.append(sight.features[keep])
        if (place < images).any():
            self.images.append(sight.pixels[place < images])

    def _add_agreement(self, sight: Sight, prompts: np.ndarray, network: Features) -> None:
        """Count the images that are what their prompts ask for, and what those half the rows further on ask for."""
        if network.satisfied is None:
            return
        for row, moved in enumerate((0, len(prompts) // 2)):
            if row and not moved:
                continue  # a single image has no other's prompt
            satisfied = network.satisfied(sight.pixels, sight.logits, np.roll(prompts, moved))
            self.agreement[row] += (int(satisfied.sum()), len(prompts))


def _rows(out: Tensor) -> np.ndarray:
    return out.float().cpu().numpy()


class Outline(NamedTuple):
    """What is read of packed statistics without the rest: seconds, images of the grid, how they were made."""

    seconds: float
    images: np.ndarray | None
    origin: dict[str, Any]


def outline(file: IO[bytes]) -> Outline:
    """The small parts of packed statistics."""
    with np.load(file, allow_pickle=False) as arrays:
        images = arrays["images"] if "images" in arrays.files else None
        return Outline(float(arrays["counts"][2]), images, json.loads(str(arrays["made"])))


def _packed(m2: np.ndarray) -> np.ndarray:
    """One half of a symmetric matrix [D, D], [D (D + 1) / 2]: a part of 2048 features with sFID has 90 MB without."""
    return m2[np.triu_indices(len(m2))]


def _unpacked(half: np.ndarray, dim: int) -> np.ndarray:
    """The inverse of ``_packed``."""
    out = np.zeros((dim, dim))
    out[np.triu_indices(dim)] = half
    return out + np.triu(out, 1).T


def spread(place: np.ndarray, keep: int, count: int) -> np.ndarray:
    """Which of the images at ``place`` [B] are among ``keep`` out of ``count``, evenly spread over all."""
    return (place + 1) * keep // count > place * keep // count


def thumbnails(pixels: Tensor) -> np.ndarray:
    """uint8 [B, 3, H, W] -> grey float32 [B, P] in [-1, 1], P = 32 x 32 or the image's own size if
    smaller.
    """
    grey = (pixels.float() / 127.5 - 1).mean(1, keepdim=True)
    side = min(grey.shape[-1], THUMBNAIL)
    return F.adaptive_avg_pool2d(grey, side).flatten(1).cpu().numpy()
