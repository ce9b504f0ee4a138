"""Files of reference statistics: mean and covariance of real images' features, in the layouts that people publish.

| file                                    | arrays                                 | flavour                          |
|-----------------------------------------|----------------------------------------|----------------------------------|
| ours, <report>/reference.npz            | mu, sigma (mu_s, sigma_s), flavour, .. | as it says                       |
| ADM's .npz                              | mu, sigma, mu_s, sigma_s (arr_0)       | torch-fidelity, TensorFlow's own |
| the Distilled Decoding authors' .pth    | m, s                                   | pytorch-fid, whose copy they run |
| .npz of pytorch-fid, of MAR, of others  | mu, sigma                              | evaluate.reference_flavour says  |
"""

from __future__ import annotations

import io
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline import storage
from pipeline.host.errors import Refused
from pipeline.scoring import inception
from pipeline.scoring.metrics import Gaussian
from pipeline.settings.evaluate import FORMULA, EvaluateSettings, Flavour


@dataclass(frozen=True)
class References:
    """What a file says of real images: (mean, covariance) of pooled and, for sFID, of spatial features.

    ``flavour`` is None where nothing tells it; ``stated`` says whether the file itself does. ``weights`` is the SHA-256
    of the network, or "formula"; ``count`` the images, where known.
    """

    pooled: Gaussian
    spatial: Gaussian | None
    flavour: Flavour | None
    stated: bool = False
    weights: str = inception.SHA256
    count: int | None = None


def read(uri: str) -> References | None:
    """The statistics at ``uri``; None where it is images: a folder, Parquet, an .npz with arr_0 and no mu.

    Raises ValueError, one sentence, for a file of another layout.
    """
    if storage.is_folder(uri) or uri.endswith(".parquet"):
        return None
    path = storage.local(uri)
    try:
        arrays = _npz(path) if uri.endswith(".npz") else _pth(path)
    except MemoryError:
        raise
    except Exception as error:  # whatever a damaged file makes numpy or torch stumble over
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise Refused(
            f"evaluate.reference {uri} could not be read ({reason}); give ADM's or"
            " pytorch-fid's .npz, the authors' statistic.pth, or a folder of images."
        ) from None
    names = set(arrays)
    if {"mu", "sigma"} <= names:
        spatial = (arrays["mu_s"], arrays["sigma_s"]) if {"mu_s", "sigma_s"} <= names else None
        statistics = References((arrays["mu"], arrays["sigma"]), spatial, None)
        if "flavour" in names:
            facts: dict[str, Any] = {key: str(arrays[key]) for key in ("flavour", "weights")}
            facts |= {"stated": True, "count": int(arrays["count"])}
            statistics = References(statistics.pooled, spatial, **facts)
        elif spatial or "arr_0" in names:
            statistics = References(statistics.pooled, spatial, "torch-fidelity")
    elif {"m", "s"} <= names:
        statistics = References((arrays["m"], arrays["s"]), None, "pytorch-fid")
    elif "arr_0" in names:
        return None
    else:
        raise Refused(
            f"evaluate.reference {uri} holds {', '.join(sorted(names)) or 'nothing'}; it must hold mu and sigma, m and"
            " s, or images as arr_0."
        )
    _check_shapes(statistics, uri)
    return statistics


def check(statistics: References, settings: EvaluateSettings) -> Flavour:
    """The flavour of statistics, once it is certain that they were made by the network that scores; ValueError, one
    sentence, where they were not or nobody says.
    """
    uri, said = settings.reference, settings.reference_flavour
    if (statistics.weights == FORMULA) != (settings.inception == FORMULA):
        theirs, ours = (
            "random weights" if name == FORMULA else "trained weights"
            for name in (statistics.weights, settings.inception)
        )
        raise Refused(
            f"evaluate.reference {uri} was made with {theirs} and evaluate.inception is {ours}; give a folder of images"
            " as the reference, or the other weights."
        )
    if statistics.stated and said and said != statistics.flavour:
        raise Refused(
            f"evaluate.reference_flavour is {said}, but {uri} says that it is {statistics.flavour}; leave the field"
            " out."
        )
    flavour = said or statistics.flavour
    if flavour is None:
        raise Refused(
            f"evaluate.reference {uri} holds mu and sigma alone, which does not tell the flavour; set"
            " evaluate.reference_flavour to torch-fidelity (copies of ADM's, such as adm_in256_stats.npz) or"
            " pytorch-fid (what its --save-stats writes)."
        )
    if flavour not in settings.flavours:
        raise Refused(
            f"evaluate.reference {uri} is of flavour {flavour} and evaluate.flavour is {settings.flavour}, whose"
            f" features differ; set evaluate.flavour to {flavour}, or give another reference."
        )
    return flavour


def packed(statistics: References) -> bytes:
    """Statistics as our .npz, which says its flavour, its network and how many images it saw."""
    arrays: dict[str, Any] = {"mu": statistics.pooled[0], "sigma": statistics.pooled[1]}
    if statistics.spatial:
        arrays |= {"mu_s": statistics.spatial[0], "sigma_s": statistics.spatial[1]}
    buffer = io.BytesIO()
    np.savez(
        buffer,
        **arrays,
        flavour=np.array(statistics.flavour),
        weights=np.array(statistics.weights),
        count=np.array(statistics.count),
    )
    return buffer.getvalue()


def _npz(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz, numbers as float64; of arr_0, which may be gigabytes, the name alone."""
    with np.load(path, allow_pickle=False) as file:
        small = {name: file[name] for name in file.files if not name.startswith("arr_")}
        arrays = {name: np.empty(0) for name in file.files} | small
    return {name: _double(array) for name, array in arrays.items()}


def _pth(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file of ``torch.save``; nothing in it is run. numpy 1 and 2 spell one name differently."""
    construct = np._core.multiarray._reconstruct  # type: ignore[attr-defined]
    harmless = [
        construct,
        (construct, "numpy.core.multiarray._reconstruct"),
        np.ndarray,
        np.dtype,
        type(np.dtype(np.float32)),
        type(np.dtype(np.float64)),
    ]
    try:
        with torch.serialization.safe_globals(harmless):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # with a long story about trust
        raise Refused("it is damaged, or holds more than arrays and would have to be run") from None
    if not isinstance(content, dict):
        raise Refused(f"it holds a {type(content).__name__}, not a dictionary")
    return {str(key): _double(np.asarray(value)) for key, value in content.items()}


def _double(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float64) if np.issubdtype(array.dtype, np.floating) else array


def _check_shapes(statistics: References, uri: str) -> None:
    wanted = [("pooled", statistics.pooled, inception.FEATURES), ("spatial", statistics.spatial, inception.SPATIAL)]
    for name, gaussian, dim in wanted:
        if gaussian is None:
            continue
        mean, cov = gaussian
        if mean.shape != (dim,) or cov.shape != (dim, dim):
            raise Refused(
                f"evaluate.reference {uri} has a {name} mean of shape {mean.shape} and covariance of {cov.shape};"
                f" Inception statistics have ({dim},) and ({dim}, {dim})."
            )
        if not (np.isfinite(mean).all() and np.isfinite(cov).all()):
            raise Refused(f"evaluate.reference {uri} holds NaN or infinity; it is damaged, fetch it again.")
