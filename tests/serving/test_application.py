"""The routes over HTTP, without Ray: what is answered, and what of bad input."""

from __future__ import annotations

import base64
import io
import json
import socket
import time
from typing import Any

import numpy as np
import pytest
import requests
from PIL import Image
from serving_app import served

from pipeline import Generator
from pipeline.generator import grid
from pipeline.host.errors import Outage
from pipeline.serving import application, orders
from pipeline.serving.orders import Order
from pipeline.serving.painter import Drawn

JSON = {"Accept": "application/json"}


def post(server: str, content: Any, **headers: str) -> requests.Response:
    return requests.post(f"{server}/images", json=content, headers=headers, timeout=60)


def decoded(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)))


def test_a_png_is_the_generators_image(server: str, tiny_generator: Generator) -> None:
    found = post(server, {"labels": [1], "seeds": [5], "ids": [9]})
    assert (found.status_code, found.headers["content-type"]) == (200, "image/png")
    assert found.headers["server-timing"].startswith("draw;dur=")
    expected = tiny_generator.draw([1] * 4, [5] * 4, ids=[9] * 4)[0].permute(1, 2, 0)
    assert np.array_equal(decoded(found.content), expected)


def test_json_and_png_hold_the_same(server: str) -> None:
    wanted = {"labels": [1, 2], "n": 4, "seed": 5, "steps": [1, 2]}
    found = post(server, wanted, **JSON)
    assert found.headers["content-type"] == "application/json"
    images = found.json()["images"]
    assert [(image["label"], image["seed"], image["id"]) for image in images] == [
        (1, 5, 0),
        (2, 5, 1),
        (1, 5, 2),
        (2, 5, 3),
    ]
    assert all(image["milliseconds"] > 0 for image in images)
    sheet = decoded(post(server, wanted | {"format": "png"}, **JSON).content)
    pixels = np.stack([decoded(base64.b64decode(image["png"])).transpose(2, 0, 1) for image in images])
    assert np.array_equal(sheet, np.asarray(grid.picture(["student"], [pixels], [1, 2, 1, 2])))


@pytest.mark.parametrize(
    ("content", "status", "sentence"),
    [
        ([1], 400, "the body is JSON, but no object"),
        ({"labels": [3]}, 422, "label 3 was asked of a student of 3 classes, counted from 0."),
        ({"prompts": ["a seven"]}, 422, "'a seven' was asked of a student that takes labels from 0 to 2;"),
        ({"labels": [1], "n": 65}, 422, "n is 65 for 1 labels"),
        ({"labels": [1], "steps": [2]}, 422, "sampler FewStep has steps [2]; they must rise, begin with 1"),
        ({"labels": [1], "x": "x" * orders.BODY}, 413, "the body is larger than 65,536 bytes."),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence(server: str, content: Any, status: int, sentence: str) -> None:
    found = post(server, content)
    assert found.status_code == status
    assert found.json().keys() == {"error"}
    assert found.json()["error"].startswith(sentence)


@pytest.mark.parametrize(
    ("method", "path", "headers", "status", "sentence"),
    [
        ("GET", "/nothing", {}, 404, "there is no /nothing; there are /, /health and /images."),
        ("GET", "/images", {}, 405, "/images does not take GET."),
        ("POST", "/images", {"Content-Type": "text/plain"}, 415, "the Content-Type must be application/json."),
        ("POST", "/images", {"Content-Type": "application/json"}, 400, "the body is no JSON"),
        ("POST", "/images", {"Content-Type": "application/json", "Accept": "text/html"}, 406, "Accept takes neither"),
    ],
)
def test_other_requests_are_one_sentence(
    server: str, method: str, path: str, headers: dict[str, str], status: int, sentence: str
) -> None:
    body = json.dumps({"labels": [1]}) if status == 406 else None
    found = requests.request(method, server + path, headers=headers, data=body, timeout=60)
    assert (found.status_code, found.json()["error"].startswith(sentence)) == (status, True), found.text


def test_a_slow_body_is_not_waited_for(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(application, "BODY_SECONDS", 0.2)
    host, port = server.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as slow:
        slow.sendall(
            b"POST /images HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 90\r\n\r\n{"
        )
        begin = time.monotonic()
        assert slow.recv(100).startswith(b"HTTP/1.1 408")
        assert time.monotonic() - begin < 50, "it came before the connection's own end"


def test_health_and_page_are_answered(server: str) -> None:
    assert requests.get(f"{server}/health", timeout=60).json()["status"] == "ok"
    page = requests.get(f"{server}/", timeout=60)
    assert page.headers["content-type"].startswith("text/html")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy


@pytest.mark.parametrize(
    ("error", "status", "sentence"),
    [
        (Outage("too many requests wait for the teacher; try again."), 503, "too many requests wait for the teacher"),
        (RuntimeError("secret of the house"), 500, "the server could not draw this; its log says why."),
    ],
)
def test_a_fault_of_ours_keeps_its_trace(error: Exception, status: int, sentence: str) -> None:
    async def draw(order: Order) -> list[Drawn]:
        raise error

    with served(draw, dict) as address:
        found = post(address, {"labels": [1]})
    assert found.status_code == status
    assert found.json()["error"].startswith(sentence)
    assert "secret" not in found.text
    assert found.headers.get("retry-after") == ("1" if status == 503 else None)
