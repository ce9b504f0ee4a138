"""The networks that look at images for the report, and the real images they are compared with.

The digits scorer's Fréchet distance is called FD, that of torch-fidelity's Inception network FID; both see
uint8 images. torch-fidelity and ADM's files keep FID comparable with ADM, VAR and LlamaGen; pytorch-fid,
which the Distilled Decoding paper used, scales and resizes images a little differently, and a few per cent of
FID go with that.
"""

from __future__ import annotations

import importlib.util
import io
import math
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline import digits, storage
from pipeline.recipe import EvaluateSettings

INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
DIGITS = 5_000  # real digits, all of them
DIMENSIONS = {"digits": 64, "inception": 2048}


@dataclass(frozen=True)
class Features:
    """A network with what the report must know of it.

    Called with uint8 images [B, 3, H, W] it returns features [B, dim] and logits [B, classes], float32.
    ``names_labels`` says whether its classes are the teacher's labels.
    """

    title: str
    dim: int
    classes: int
    names_labels: bool
    network: Callable[[Tensor], tuple[Tensor, Tensor]]

    def __call__(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        return self.network(pixels)


def features(settings: EvaluateSettings, device: torch.device | str) -> Features:
    """The scoring network of a recipe on ``device``."""
    if settings.features == "digits":
        scorer = digits.scorer().to(device)
        return Features(
            "FD",
            DIMENSIONS["digits"],
            digits.CLASSES,
            True,
            lambda pixels: scorer(pixels.float() / 127.5 - 1),
        )
    inception = _inception(settings).to(device)
    return Features("FID", DIMENSIONS["inception"], 1008, False, inception)


def check(settings: EvaluateSettings, image_size: int, classes: int) -> dict[str, str]:
    """SHA-256 of the files behind the score; ValueError, one sentence, where one is missing or cannot
    serve.
    """
    if settings.features == "digits":
        if (image_size, classes) != (32, digits.CLASSES):
            raise ValueError(
                f"evaluate.features is digits, which scores 32x32 images of {digits.CLASSES} classes, but"
                f" the teacher makes {image_size}x{image_size} images of {classes}; use evaluate.features"
                " inception."
            )
        return {"scorer": storage.sha256("package://digits/scorer.safetensors")}
    inception, reference = _both_uris(settings)
    if importlib.util.find_spec("torch_fidelity") is None:
        raise ValueError(
            "evaluate.features is inception, which needs torch-fidelity; pip install 'distilled-decoding[fid]'."
        )
    found = storage.sha256(inception)
    if found != INCEPTION_SHA256:
        raise ValueError(
            f"evaluate.inception {inception} has SHA-256 {found[:12]}..., not {INCEPTION_SHA256[:12]}...;"
            " fetch weights-inception-2015-12-05-6726825d.pth of the torch-fidelity release v0.2.0."
        )
    reference_gaussian(reference)
    return {"inception": found, "reference": storage.sha256(reference)}


def reference_gaussian(uri: str) -> tuple[np.ndarray, np.ndarray]:
    """Mean [2048] and covariance [2048, 2048] out of an ADM or pytorch-fid ``.npz`` (its ``mu`` and
    ``sigma``).
    """
    try:
        with np.load(storage.local(uri), allow_pickle=False) as file:
            mean, cov = (file[key].astype(np.float64) for key in ("mu", "sigma"))
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"evaluate.reference {uri} is no npz file with mu and sigma ({error}); fetch ADM's."
        ) from error
    if mean.shape != (2048,) or cov.shape != (2048, 2048):
        raise ValueError(
            f"evaluate.reference {uri} has mu of shape {mean.shape} and sigma of {cov.shape}; Inception"
            " statistics have (2048,) and (2048, 2048)."
        )
    return mean, cov


class ReferenceImages:
    """The real images: 5,000 digits, or the images that ADM's reference file holds beside its statistics.

    ``len`` is 0 for a file without images; such a reference gives FID, but no precision and recall.
    """

    def __init__(self, settings: EvaluateSettings) -> None:
        self.digits = settings.features == "digits"
        self.uri = "" if self.digits else _both_uris(settings)[1]
        self.count = DIGITS if self.digits else self._shape()[0]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, rows: slice) -> tuple[Tensor, np.ndarray | None]:
        """Images float32 [B, 3, H, W] in [-1, 1] and labels [B], or None where they are not known."""
        if self.digits:
            images, labels = digits.images_and_labels()
            return images[rows], labels[rows].numpy()
        pixels = torch.from_numpy(self._read(rows.start, rows.stop)).permute(0, 3, 1, 2)
        return pixels.float() / 127.5 - 1, None

    def _shape(self) -> tuple[int, ...]:
        with zipfile.ZipFile(storage.local(self.uri)) as archive:
            if "arr_0.npy" not in archive.namelist():
                return (0,)
            with archive.open("arr_0.npy") as file:
                return _header(file)

    def _read(self, start: int, stop: int) -> np.ndarray:
        """Rows of arr_0, uint8 [B, H, W, 3], without the two gigabytes around them."""
        with zipfile.ZipFile(storage.local(self.uri)) as archive, archive.open("arr_0.npy") as file:
            count, *shape = _header(file)
            size = math.prod(shape)
            file.seek(start * size, io.SEEK_CUR)
            data = file.read((min(stop, count) - start) * size)
        return np.frombuffer(bytearray(data), dtype=np.uint8).reshape(-1, *shape)


def _header(file: Any) -> tuple[int, ...]:
    """Shape of an open .npy of uint8 images; leaves ``file`` at the first pixel."""
    version = np.lib.format.read_magic(file)
    reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = reader(file)
    if dtype != np.uint8 or fortran or len(shape) != 4 or shape[3] != 3:
        raise ValueError(f"the reference's arr_0 is {dtype} of shape {shape}; it must be uint8 [N, H, W, 3].")
    return shape


def _both_uris(settings: EvaluateSettings) -> tuple[str, str]:
    return settings.inception or "", settings.reference or ""  # the recipe has refused to leave them out


def _inception(settings: EvaluateSettings) -> nn.Module:
    from pipeline import torchvision_ops  # noqa: F401  isort: skip  before torch_fidelity imports torchvision
    from torch_fidelity import FeatureExtractorInceptionV3

    path = str(storage.local(_both_uris(settings)[0]))
    wanted = ["2048", "logits_unbiased"]
    return FeatureExtractorInceptionV3("inception", wanted, feature_extractor_weights_path=path)
