"""What is strict about a recipe's YAML, always with the file's name."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.configuration import recipe_file
from pipeline.host.errors import Refused

ROOT = Path(__file__).parents[2]


def refusal(tmp_path: Path, data: bytes) -> str:
    place = tmp_path / "mine.yaml"
    place.write_bytes(data)
    with pytest.raises(Refused) as refused:
        recipe_file.read(str(place))
    assert str(refused.value).startswith(str(place)), "the file comes first"
    assert "<unicode string>" not in str(refused.value)
    return str(refused.value).removeprefix(str(place))


@pytest.mark.faults("recipe: key twice")
@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("train:\n  lr: 1\ntrain:\n  warmup: 7\n", ", line 3: train stands twice, first in line 1"),
        ("train:\n  lr: 1\n  epochs: 2\n  lr: 2\n", ", line 4: lr stands twice, first in line 2"),
        ("train: {lr: 1, lr: 2}", ", line 1: lr stands twice"),
        ("evaluate:\n  samplers:\n  - {name: Skip,\n     n: 1, n: 2}", ", line 4: n stands twice, first in line 4"),
        ('a: &x {b: 1, "b": 2}\nc: *x', ", line 1: b stands twice"),
        ("a: {c: 1}\n? a\n: 3", ", line 2: a stands twice, first in line 1"),
    ],
)
def test_a_key_that_stands_twice_is_refused(tmp_path: Path, text: str, sentence: str) -> None:
    assert refusal(tmp_path, text.encode()).startswith(sentence)


def test_anchors_and_merge_keys_are_fine() -> None:
    text = "a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}\nc: *a"
    assert recipe_file.parse(text) == {"a": {"x": 1, "y": 2}, "b": {"x": 3, "y": 2}, "c": {"x": 1, "y": 2}}


@pytest.mark.faults("recipe: another encoding")
@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ("name: ok\nrun: größer".encode("latin-1"), " is not UTF-8 text (line 2)"),
        ("name: x".encode("utf-16"), " is not UTF-8 text (line 1)"),
        (b"\x89PNG\r\n\x1a\n\x00", " is not UTF-8 text (line 1)"),
        (b"name: a\x00b", ", line 1: the character '\\x00' is not allowed"),
        (b"train:\n\tlr: 1", ", line 2, column 1: "),
        (b"", " holds no settings"),
        (b"# nothing\n", " holds no settings"),
        (b"- a\n- b", " holds a list, no settings"),
        (b"text", " holds the value 'text', no settings"),
        (b"name: a\n---\nname: b", ", line 2, column 1: expected a single document"),
        (b"name: !!python/object:os.system x", ", line 1, column 7: "),
        (b"1: x", ", line 1: the key 1 is no text; put it in quotes"),
        (b"on: x", ", line 1: the key on is no text"),
        (b"? [a]\n: x", ", line 1: the key ? is no text"),
        (b"a: &a [*a]", ", line 1: an anchor refers to what it stands in"),
        (b"a: [1", ", line 1, column 6: "),
        (b"a: " + b"[" * 1000, ", "),
        (b"a: " + b"9" * 5000, ", "),
        (
            b"a0: &a0 [1]\n"
            + b"".join(b"a%d: &a%d [%s]\n" % (i, i, b",".join([b"*a%d" % (i - 1)] * 9)) for i in range(1, 9)),
            ", line 1 and later stand for more than 100,000 values",
        ),
    ],
)
def test_what_is_no_recipe_is_refused_with_its_place(tmp_path: Path, data: bytes, sentence: str) -> None:
    assert refusal(tmp_path, data).startswith(sentence)


def test_tabs_and_second_documents_get_a_hint(tmp_path: Path) -> None:
    assert "YAML indents with spaces, not tabs" in refusal(tmp_path, b"train:\n\tlr: 1")
    assert "a recipe is one document" in refusal(tmp_path, b"name: a\n---\nname: b")


def test_what_cannot_be_opened_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no file .*nowhere\.yaml"):
        recipe_file.read(str(tmp_path / "nowhere.yaml"))
    with pytest.raises(Refused, match=rf"{tmp_path} cannot be read \(Is a directory\)"):
        recipe_file.read(str(tmp_path))
    with pytest.raises(Refused, match="cannot be read"):
        recipe_file.read("a\0b")


@pytest.mark.parametrize("head", [b"", b"\xef\xbb\xbf"], ids=["plain", "BOM"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"], ids=["LF", "CRLF"])
def test_a_byte_order_mark_and_windows_lines_are_fine(tmp_path: Path, head: bytes, end: bytes) -> None:
    (tmp_path / "a.yaml").write_bytes(head + b"name: gr\xc3\xb6\xc3\x9fer" + end + b"train: {lr: 1e-4}" + end)
    assert recipe_file.read(str(tmp_path / "a.yaml")) == {"name": "größer", "train": {"lr": 1e-4}}


@pytest.mark.faults("output: cannot print")
def test_a_recipe_is_utf8_in_any_locale_and_prints_in_any(tmp_path: Path) -> None:
    """As a container without a locale has it: files are read as UTF-8, and what stdout cannot print is replaced."""
    (tmp_path / "a.yaml").write_text("name: größer\nteacher: {config: {depth: 2}}", encoding="utf-8")
    bare = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(ROOT)}
    code = (
        "import sys; from pipeline.command_line import main\n"
        "main(None, lambda recipe: recipe.name + ' 1 \\xb1 2')\n"
        "sys.argv.append('--print_config')\n"
        "main(None, print)"
    )
    command = [sys.executable, "-c", code, "--config", str(tmp_path / "a.yaml")]
    done = subprocess.run(command, env=os.environ | bare, capture_output=True)
    first, _, printed = done.stdout.decode("ascii").partition("\n")
    assert (done.returncode, first, done.stderr) == (0, "gr??er 1 ? 2", b"")
    assert recipe_file.parse(printed)["name"] == "größer", "it is read back whatever printed it"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(
            ("1e-4", 1e-4),
            ("1.0e-4", 1e-4),
            ("1.2e6", 1.2e6),
            ("30_000", 30_000),
            ("0x10", 16),
            ("-1", -1),
            ("+2.", 2.0),
        ),
        *((".5", 0.5), ("1E5", 1e5), (".inf", float("inf")), ("30,000", "30,000"), ("010", "010"), ("1:30", "1:30")),
        *(("2024-01-01", "2024-01-01"), ("on", True), ("no", False), ("null", None), ("~", None), ("1e", "1e")),
        *(("1.2.3", "1.2.3"), ("'3'", "3"), ("e5", "e5"), ("'-'", "-"), ("0", 0), ("_1", "_1")),
    ],
)
def test_numbers_are_those_of_yaml_1_2(text: str, value: object) -> None:
    found = recipe_file.parse(f"a: {text}")
    assert found == {"a": value}
    assert type(found["a"]) is type(value)
