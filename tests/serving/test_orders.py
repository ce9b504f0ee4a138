"""The JSON of a request, and what is said of one that cannot be used."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pipeline.host.errors import Refused
from pipeline.serving import orders
from pipeline.serving.orders import Malformed, Order, Sample


def parsed(**content: Any) -> Order:
    return orders.parse(json.dumps(content).encode())


def test_what_is_left_out_is_as_in_the_generator() -> None:
    assert parsed(labels=[3, 7]) == Order((Sample(3, 0, 0, (1,)), Sample(7, 0, 1, (1,))))
    assert parsed(labels=[3, 7], seeds=[5, 6]).samples == (Sample(3, 5, 0, (1,)), Sample(7, 6, 0, (1,)))
    found = parsed(prompts=["a seven"], seed=5, ids=[9], steps=[1, 21], format="json")
    assert found == Order((Sample("a seven", 5, 9, (1, 21)),), form="json")


def test_labels_come_in_turn() -> None:
    assert [(one.wanted, one.id) for one in parsed(labels=[3, 7], n=3).samples] == [(3, 0), (7, 1), (3, 2)]


def test_the_teacher_takes_all_steps() -> None:
    assert parsed(labels=[1], model="teacher") == Order((Sample(1, 0, 0, ()),), model="teacher")


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b"[1]", b"3", b"null", b"[" * 50_000])
def test_what_is_no_object_is_malformed(body: bytes) -> None:
    with pytest.raises(Malformed, match=r"send "):
        orders.parse(body)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({}, "neither labels nor prompts are given"),
        ({"labels": [1], "prompts": ["x"]}, "labels and prompts are given; give one of the two"),
        ({"lables": [1]}, "there is no field 'lables'; there are labels, prompts"),
        ({"labels": 3}, "labels must be a list of whole numbers from 0"),
        ({"labels": []}, "labels must be a list"),
        ({"labels": [True]}, "labels must be a list of whole numbers"),
        ({"labels": [1.0]}, "labels must be a list of whole numbers"),
        ({"labels": [-1]}, "labels must be a list of whole numbers"),
        ({"labels": [1], "seed": 2**63}, "seed must be a whole number from 0 to 2^63 - 1"),
        ({"labels": [1], "seed": [1]}, "seed must be a whole number"),
        ({"labels": [1], "seed": 1, "seeds": [1]}, "seed and seeds are both given"),
        ({"labels": [1, 2], "seeds": [1]}, "1 seeds were given for 2 images"),
        ({"labels": [1, 2], "ids": [1]}, "1 ids were given for 2 images"),
        ({"labels": [1], "n": 65}, "n is 65 for 1 labels; it must be from that number to 64"),
        ({"labels": [1] * 65}, "n is 65 for 65 labels"),
        ({"labels": [1, 2], "n": 1}, "n is 1 for 2 labels"),
        ({"labels": [1], "n": "2"}, "n must be a whole number"),
        ({"prompts": "a seven"}, "prompts must be a list of texts"),
        ({"prompts": [7]}, "prompts must be a list of texts"),
        ({"prompts": ["x" * 1_001]}, "a prompt has 1,001 characters; it may have 1,000"),
        ({"prompts": ["\ud800"]}, "half a surrogate pair"),
        ({"labels": [1], "steps": list(range(1, 10))}, "steps lists 9; a request may list 8"),
        ({"labels": [1], "steps": []}, "steps must be a list"),
        ({"labels": [1], "steps": [1], "model": "teacher"}, "steps are given for the teacher"),
        ({"labels": [1], "model": "other"}, "model must be one of student, teacher"),
        ({"labels": [1], "format": ["png"]}, "format must be one of png, json"),
    ],
)
def test_bad_values_are_one_sentence(content: dict[str, Any], sentence: str) -> None:
    with pytest.raises(Refused) as caught:
        parsed(**content)
    assert not isinstance(caught.value, Malformed)
    assert str(caught.value).startswith(sentence) or sentence in str(caught.value)
