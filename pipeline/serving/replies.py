"""Images as a client gets them: a PNG, or JSON with one PNG an image and its milliseconds."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from pipeline.generator import grid
from pipeline.serving.orders import Form, Order
from pipeline.serving.painter import Drawn

KINDS: dict[str, Form] = {"image/png": "png", "application/json": "json"}
LEVEL = 1  # of zlib: pictures of networks hardly get smaller with more, and take several times as long


def form(accept: str) -> Form | None:
    """What an Accept header prefers, a PNG where it does not say; None where it takes neither."""
    best: tuple[float, Form | None] = (0.0, None)
    for kind, answer in KINDS.items():
        weight = max((q for pattern, q in _ranges(accept) if _matches(pattern, kind)), default=0.0)
        best = max(best, (weight, answer), key=lambda found: found[0])
    return best[1]


def _ranges(accept: str) -> list[tuple[str, float]]:
    """(media range, its weight) of an Accept header."""
    out = []
    for part in (accept or "*/*").split(","):
        pattern, *parameters = (piece.strip().lower() for piece in part.split(";"))
        weights = [piece.removeprefix("q=") for piece in parameters if piece.startswith("q=")]
        try:
            out.append((pattern, float(weights[0]) if weights else 1.0))
        except ValueError:
            continue
    return out


def _matches(pattern: str, kind: str) -> bool:
    return pattern in ("*/*", kind) or (pattern.endswith("/*") and kind.startswith(pattern.removesuffix("*")))


def picture(order: Order, drawn: Sequence[Drawn]) -> bytes:
    """A PNG: the image as it is, or a grid of several that says above each what it is of."""
    if len(drawn) == 1:
        return _png(Image.fromarray(drawn[0].pixels.transpose(1, 2, 0)))
    wanted = [sample.wanted for sample in order.samples]
    return _png(grid.picture([order.model], [np.stack([one.pixels for one in drawn])], wanted))


def listed(order: Order, drawn: Sequence[Drawn], milliseconds: float) -> dict[str, Any]:
    """The content of a JSON answer; ``milliseconds`` are those from the request to the answer."""
    images = [
        {
            "png": base64.b64encode(_png(Image.fromarray(one.pixels.transpose(1, 2, 0)))).decode(),
            "label" if isinstance(sample.wanted, int) else "prompt": sample.wanted,
            "seed": sample.seed,
            "id": sample.id,
            "milliseconds": round(one.milliseconds, 2),
            "in_batch": one.company,
            "batch": one.size,
        }
        for sample, one in zip(order.samples, drawn, strict=True)
    ]
    return {"model": order.model, "images": images, "milliseconds": round(milliseconds, 2)}


def _png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, format="PNG", compress_level=LEVEL)
    return out.getvalue()
