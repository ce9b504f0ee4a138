"""The tests of the suite that a GPU is needed for, or that are of what only GPUs have, and what pytest said of them."""

from __future__ import annotations

import re
import sys

FILES = (
    "flow/test_kernel",
    "numerics/test_precision",
    "models/test_float16",
    "models/test_graphs",
    "models/test_replays",
)
NAMES = "gpu or cuda or kernel or wait_for"  # in a test's name; the tests that compile on a GPU come last
FINISHED = (0, 1)  # statuses of pytest that has run all tests, whether or not some failed
LINE = re.compile(r"^(tests/\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED)\b", re.M)
COUNTED = {"passed": ("PASSED",), "failed": ("FAILED", "ERROR"), "skipped": ("SKIPPED",)}


def command() -> list[str]:
    """pytest in this process's Python, in the root of the repository; a line for every test as soon as it is done."""
    files = [f"tests/{name}.py" for name in FILES]
    return [sys.executable, "-m", "pytest", "-v", "-rfE", "-p", "no:cacheprovider", "-k", NAMES, *files]


def counted(said: str) -> tuple[dict[str, float | None], dict[str, list[str]]]:
    """Tests by how they ended, and the names of those that failed or were skipped, from all that pytest has printed."""
    ended = dict(LINE.findall(said))
    names = {key: [name for name, end in ended.items() if end in ends] for key, ends in COUNTED.items()}
    values: dict[str, float | None] = {key: len(found) for key, found in names.items()}
    return values, {"Failed": names["failed"], "Skipped": names["skipped"]}
