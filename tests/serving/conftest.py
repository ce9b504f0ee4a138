"""One tiny student with its teacher, and one server of it without Ray, for the tests of routes and page."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from serving_app import drawing, served
from shared_student import shared
from tiny import tiny

from pipeline import Generator

BATCH = 4


@pytest.fixture(scope="session")
def tiny_generator(tmp_path_factory: pytest.TempPathFactory) -> Generator:
    uri = shared(tiny(tmp_path_factory.mktemp("student"), "llamagen")).student_uri
    return Generator.from_pretrained(uri, "cpu", teacher=True)


@pytest.fixture(scope="session")
def server(tiny_generator: Generator) -> Iterator[str]:
    """Its address."""
    layout = tiny_generator.layout
    about = {"status": "ok", "takes": "labels", "classes": layout.classes, "start_steps": [1, 2], "teacher": True}
    about |= {"image_size": layout.image_size, "batch": BATCH, "device": "cpu"}
    with served(drawing(tiny_generator, BATCH), lambda: about) as address:
        yield address
