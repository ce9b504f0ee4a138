"""All that the report needs of one sampler's images, batch by batch, in a form that travels and merges.

Images are rounded as a PNG would round them before anything looks at them.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.metrics import ClassVariance, InceptionScore, Moments
from pipeline.models.convnet import to_uint8
from pipeline.scoring import Features

SCORE_BLOCK = 5_000  # images of one Inception Score, in the order of their ids, as ADM's evaluator has it
THUMBNAIL = 32  # pixel statistics are those of grey thumbnails of at most this side


@dataclass
class Statistics:
    """All that the report needs of one sampler's images; parts of consecutive ids merge in the order of their
    ids.

    ``right`` counts images whose predicted class is their label, ``labelled`` those that were asked.
    ``features`` (for precision and recall) and ``images`` (for the grid) hold the kept rows.
    """

    moments: Moments
    pixels: Moments
    variance: ClassVariance
    score: InceptionScore
    right: int = 0
    labelled: int = 0
    seconds: float = 0.0
    features: list[np.ndarray] = field(default_factory=list)
    images: list[np.ndarray] = field(default_factory=list)

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
        )

    def merge(self, other: Statistics) -> None:
        """Add the part that follows this one."""
        self.moments.merge(other.moments)
        self.pixels.merge(other.pixels)
        self.variance.merge(other.variance)
        self.score.merge(other.score)
        self.right += other.right
        self.labelled += other.labelled
        self.seconds += other.seconds
        self.features += other.features
        self.images += other.images

    def pack(self) -> bytes:
        """As an npz file; nothing in it is pickled."""
        self.moments.flush()
        self.pixels.flush()
        arrays: dict[str, Any] = {
            f"{name}.{key}": value
            for name in ("moments", "pixels", "variance", "score")
            for key, value in vars(getattr(self, name)).items()
            if not key.startswith("_")
        }
        arrays["counts"] = np.array([self.right, self.labelled, self.seconds])
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
        )
        for key, value in arrays.items():
            if "." in key:
                name, attribute = key.split(".")
                setattr(getattr(out, name), attribute, int(value) if value.ndim == 0 else value)
        out.right, out.labelled = int(arrays["counts"][0]), int(arrays["counts"][1])
        out.seconds = float(arrays["counts"][2])
        out.features = [arrays["features"]] if "features" in arrays else []
        out.images = [arrays["images"]] if "images" in arrays else []
        return out

    @torch.no_grad()
    def add(
        self,
        images: Tensor,
        labels: np.ndarray | None,
        network: Features,
        place: np.ndarray,
        keep: bool,
        grid: int,
    ) -> None:
        """Score a batch: images [B, 3, H, W] in [-1, 1]; ``place`` [B] counts the sampler's images from 0.

        Labels may be unknown (None). ``keep`` keeps the features, and the first ``grid`` images of all are
        kept.
        """
        pixels = to_uint8(images)
        features, logits = (out.float().cpu().numpy() for out in network(pixels))
        small = thumbnails(pixels)
        self.moments.add(features)
        self.pixels.add(small)
        self.score.add(logits, place // SCORE_BLOCK)
        if labels is not None:
            self.variance.add(small, labels)
            if network.names_labels:
                self.right += int((logits.argmax(1) == labels).sum())
                self.labelled += len(labels)
        if keep:
            self.features.append(features)
        if (place < grid).any():
            self.images.append(pixels.cpu().numpy()[place < grid])


def thumbnails(pixels: Tensor) -> np.ndarray:
    """uint8 [B, 3, H, W] -> grey float32 [B, P] in [-1, 1], P = 32 x 32 or the image's own size if
    smaller.
    """
    grey = (pixels.float() / 127.5 - 1).mean(1, keepdim=True)
    side = min(grey.shape[-1], THUMBNAIL)
    return F.adaptive_avg_pool2d(grey, side).flatten(1).cpu().numpy()
