"""Which changes of code change a digest, and which do not."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.host import provenance

COUNTER = itertools.count()
FILES = {
    "__init__.py": "from {package}.teacher import Teacher\n",
    "teacher.py": '''
"""A teacher."""
import numpy as np
from {package} import layers
from {package}.numbers import SCALE as size

class Teacher:
    """Draws."""

    def draw(self, x):
        """One image."""
        if x < 0:
            raise ValueError("too small")
        return layers.double(x) * size

def unused(x):
    return np.abs(x)
''',
    "layers.py": "def double(x):\n    return 2 * x\n\ndef triple(x):\n    return 3 * x\n",
    "numbers.py": "SCALE = 0.5\nOTHER = 7\n",
}
Edit = Callable[[str, str, str], str]


@pytest.fixture
def edited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Edit:
    """(file, old, new) -> the digest of the package's teacher once that is changed."""
    package = f"family_{next(COUNTER)}"
    (tmp_path / package).mkdir()
    for name, text in FILES.items():
        (tmp_path / package / name).write_text(text.replace("{package}", package))
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()

    def edit(file: str = "layers.py", old: str = "", new: str = "") -> str:
        place = tmp_path / package / file
        text = place.read_text()
        assert old in text
        place.write_text(text.replace(old, new))
        return provenance.digest(f"{package}:Teacher")

    return edit


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("layers.py", "2 * x", "0.5 * x"),
        ("numbers.py", "SCALE = 0.5", "SCALE = 0.25"),
        ("teacher.py", "layers.double", "layers.triple"),
        ("teacher.py", "class Teacher:", "def double(x):\n    return 1\n\nclass Teacher(dict):"),
        ("__init__.py", "from ", "import torch\ntorch.set_default_dtype(torch.float64)\nfrom "),
    ],
)
def test_code_that_is_reached_counts_wherever_it_stands(edited: Edit, file: str, old: str, new: str) -> None:
    assert edited("layers.py", "", "") != edited(file, old, new)


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("teacher.py", '"""Draws."""', '"""Draws an image."""'),
        ("teacher.py", "return layers", "# Doubled.\n        return layers"),
        ("teacher.py", "def draw(self, x)", "def draw(self, x: int)"),
        ("teacher.py", "too small", "negative"),
        ("teacher.py", "np.abs(x)", "np.abs(x) + 1"),
        ("layers.py", "3 * x", "4 * x"),
        ("numbers.py", "OTHER = 7", "OTHER = 8"),
    ],
)
def test_words_and_code_that_is_not_reached_do_not(edited: Edit, file: str, old: str, new: str) -> None:
    assert edited("layers.py", "", "") == edited(file, old, new)


def test_a_local_name_is_not_the_function_of_that_name() -> None:
    """``checkpoints.load`` has a variable like the function that would lead it to all families."""
    reached = {
        name for module, name in provenance.texts("pipeline.digits.networks:scorer") if module.endswith("checkpoints")
    }
    assert {"load", "weights"} <= reached
    assert not {"teacher", "student", "parameters"} & reached


def test_settings_of_training_are_no_part_of_how_a_student_draws() -> None:
    """Or one more of them would have every student's images drawn again."""
    reached = provenance.texts("pipeline.evaluation.artist:load_student")
    assert ("pipeline.models.checkpoints", "student_options") in reached
    assert ("pipeline.settings.train", "TrainSettings") not in reached


def test_what_code_does_not_say_by_name_stands_for_its_module() -> None:
    whole = {name for module, name in provenance.texts("pipeline.noise:nothing") if "noise" in module}
    assert {"gaussian", "uniform", "labels"} <= whole


def test_the_commit_comes_from_the_checkout_or_from_who_submitted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "_of_checkout", lambda: None)
    monkeypatch.setenv("MLFLOW_RUN_CONTEXT", '{"mlflow.source.git.commit": "abc", "source.changed": "true"}')
    assert provenance.version() == {"version": "0.1.0", "commit": "abc", "changed": True}
    monkeypatch.setenv("MLFLOW_RUN_CONTEXT", "no JSON")
    assert provenance.version()["commit"] is None
    monkeypatch.setattr(provenance, "_of_checkout", lambda: ("def", False))
    assert provenance.version()["commit"] == "def"
