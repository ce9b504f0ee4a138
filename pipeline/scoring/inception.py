"""The Inception network behind FID, in the two flavours that papers report; the body is torch-fidelity's.

Both flavours have one body and one file of weights, converted from TensorFlow's of 2015. They differ in what they feed
it, and FID differs with that by some per cent, so a number means something only beside its flavour:

* ``torch-fidelity``, that of ADM's evaluator, of VAR and of LlamaGen: TensorFlow 1's bilinear resize to 299 pixels
  (corners aligned, no half-pixel shift), then (x - 128) / 128;
* ``pytorch-fid``, that of the Distilled Decoding paper's FID: torch's bilinear resize (half-pixel centres, no
  antialiasing), then (x - 127.5) / 127.5.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import warnings
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline import storage
from pipeline.host.errors import Missing, Refused
from pipeline.settings.evaluate import FORMULA, Flavour

SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
FEATURES, CLASSES = 2048, 1008
SIDE = 299  # what the body sees, whatever the size of the images
SPATIAL = 7 * 17 * 17  # features of sFID


class Inception(nn.Module):
    """uint8 images [B, 3, H, W] -> pooled features [B, 2048], logits without bias [B, 1008], spatial features.

    The spatial features [B, 2023] are those of sFID (Nash et al. 2021) as ADM's evaluator has them: the first 7
    channels of TensorFlow's ``mixed_6/conv:0``, channels last. That is the output of the 1x1 branch of ``Mixed_6d``
    after batch normalisation and ReLU: torch-fidelity's table of weights maps ``mixed_6/conv`` to
    ``Mixed_6d.branch1x1``, the graph's raw convolutions are called ``.../Conv2D``, and OpenAI's own port to PyTorch
    (consistency_models) reads the same place. They are None for pytorch-fid, in which no reference for them exists.
    """

    def __init__(self, weights: dict[str, np.ndarray], flavour: Flavour) -> None:
        super().__init__()
        self.flavour, body = flavour, _blank()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")  # and nobody writes
            state = {name: torch.from_numpy(array) for name, array in weights.items()}
        nn.Module.load_state_dict(body, state, assign=True)
        layers: dict[str, Any] = dict(body.named_children())  # in the order in which an image passes them
        self.head: Tensor = layers.pop("fc").weight
        self.layers = nn.ModuleDict(layers)
        self.requires_grad_(False).eval()

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Features, logits and, in the flavour that knows them, spatial features: what the class says."""
        x, spatial = PREPROCESS[self.flavour](pixels), None
        layer: Any
        for name, layer in self.layers.items():
            if name == "Mixed_6d" and self.flavour == "torch-fidelity":
                spatial = layer.branch1x1(x)[:, :7].permute(0, 2, 3, 1).flatten(1)
            x = layer(x)
        features = x.flatten(1)
        # Row by row: a product of matrices rounds a row differently in batches of other sizes.
        logits = torch.stack([self.head.mv(row) for row in features])
        return features, logits, spatial


def like_tensorflow(pixels: Tensor) -> Tensor:
    """uint8 [B, 3, H, W] -> float32 [B, 3, 299, 299] as TensorFlow's graph resizes and scales it."""
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

    resized = interpolate_bilinear_2d_like_tensorflow1x(pixels.float(), size=(SIDE, SIDE), align_corners=False)
    return (resized - 128) / 128


def like_pytorch_fid(pixels: Tensor) -> Tensor:
    """uint8 [B, 3, H, W] -> float32 [B, 3, 299, 299] as pytorch-fid resizes and scales it."""
    resized = F.interpolate(pixels.float() / 255, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
    return 2 * resized - 1


PREPROCESS = {"torch-fidelity": like_tensorflow, "pytorch-fid": like_pytorch_fid}


def check(uri: str) -> str:
    """SHA-256 of the weights at ``uri``, or "formula"; ValueError or FileNotFoundError, one sentence, if they are not
    the official ones or torch-fidelity is missing.
    """
    if importlib.util.find_spec("torch_fidelity") is None:
        raise Refused(
            "evaluate.features is inception, which needs torch-fidelity; pip install 'distilled-decoding[fid]'."
        )
    if uri == FORMULA:
        return FORMULA
    try:
        found = storage.sha256(uri)
    except Missing:
        raise Missing(
            f"evaluate.inception {uri} is not there; fetch weights-inception-2015-12-05-6726825d.pth of the"
            f" torch-fidelity release v0.2.0, or set it to {FORMULA} for a rehearsal whose numbers are no FID."
        ) from None
    return _checked(found, uri)


def weights(uri: str) -> dict[str, np.ndarray]:
    """The network's 566 arrays by name: the official file's, or those of ``formula``."""
    if uri == FORMULA:
        return formula()
    data = storage.local(uri).read_bytes()
    _checked(hashlib.sha256(data).hexdigest(), uri)
    # Read as torch-fidelity reads it: of these very bytes, which are known, and of no others.
    state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=False)
    return {name: value.detach().numpy() for name, value in state.items()}


def formula() -> dict[str, np.ndarray]:
    """Random weights that anybody can make again, for tests and rehearsals: with them, no number is an FID.

    Tensor i of the names in alphabetical order is drawn from ``RandomState(1000 + i)``, in float64, then cast.
    Convolutions: N(0, 2 / fan-in); fc.weight: N(0, 1 / 2048); fc.bias, bn.bias and running_mean: N(0, 0.01); bn.weight:
    N(1, 0.01); running_var: U(0.5, 1.5); num_batches_tracked: 0.
    """
    shapes = _blank().state_dict()
    return {name: _drawn(name, tuple(shapes[name].shape), 1000 + i) for i, name in enumerate(sorted(shapes))}


def _drawn(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    rng = np.random.RandomState(seed)
    if name.endswith("num_batches_tracked"):
        return np.zeros(shape, dtype=np.int64)
    if name.endswith("running_var"):
        value = 0.5 + rng.random_sample(shape)
    elif name.endswith("conv.weight"):
        value = rng.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))
    elif name == "fc.weight":
        value = rng.standard_normal(shape) / np.sqrt(FEATURES)
    else:
        value = 0.1 * rng.standard_normal(shape) + (1 if name.endswith("bn.weight") else 0)
    return value.astype(np.float32)


def _checked(found: str, uri: str) -> str:
    if found != SHA256:
        raise Refused(
            f"evaluate.inception {uri} has SHA-256 {found[:12]}..., not {SHA256[:12]}...;"
            " fetch weights-inception-2015-12-05-6726825d.pth of the torch-fidelity release v0.2.0."
        )
    return found


def _blank() -> nn.Module:
    """torch-fidelity's network without weights, on the meta device."""
    from pipeline.numerics import torchvision_ops  # noqa: F401  isort: skip  before torch_fidelity imports torchvision
    from torch_fidelity import FeatureExtractorInceptionV3

    class Blank(FeatureExtractorInceptionV3):
        def load_state_dict(self, *args: object, **kwargs: object) -> None:
            """The constructor insists on loading a file: it gets an empty one."""

    nothing = io.BytesIO()
    torch.save({}, nothing)
    nothing.seek(0)
    with torch.device("meta"):
        return Blank("inception", ["2048"], feature_extractor_weights_path=nothing)
