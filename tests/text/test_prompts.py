"""Lists of prompts: every form of file, any order of ids, odd prompts, and what determines a list."""

from __future__ import annotations

import hashlib
import os
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3server

from pipeline import storage
from pipeline.host.errors import Missing, Outage, Refused
from pipeline.text import prompts
from pipeline.text.prompts import PromptList

ODD = [
    'with, a comma and "quotes"',
    "two\nlines\r\nand a\ttab",
    "",
    "   ",
    "long " * 20_000,
    "emoji 😀 東京 한글 مرحبا",
    "NUL \x00 and \x1b[31m and \x7f",
    "twice",
    "twice",
    "<b>html</b> https://example.com 5 € e\u0301 \u202e",
]
MANY = [f"prompt {i}" for i in range(23)]


def parquet(place: Path, cells: Any, kind: pa.DataType | None = None, rows: int = 4, column: str = "caption") -> str:
    """A file with the cells as a column of the type, in groups of so many rows, beside a column of numbers."""
    table = pa.table({"id": list(range(len(cells))), column: pa.array(cells, kind)})
    place.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, place, row_group_size=rows)
    return str(place)


def text(place: Path, data: bytes) -> str:
    place.write_bytes(data)
    return str(place)


def read(uri: str, column: str = "caption", skip: int = 0) -> list[str]:
    """All prompts behind ``skip``."""
    found = PromptList.open(uri, column, skip)
    return list(found(range(len(found))))


def refused(sentence: str, *arguments: Any, **named: Any) -> None:
    with pytest.raises(Refused, match=sentence) as caught:
        PromptList.open(*arguments, **named)
    assert "\n" not in str(caught.value)


# ---- what is read


def test_rows_are_numbered_across_files_and_row_groups(tmp_path: Path) -> None:
    for name, part in {"b": MANY[:10], "c": MANY[10:11], "a/x": ["not this"], "d": MANY[11:]}.items():
        parquet(tmp_path / f"{name}.parquet", part)
    parquet(tmp_path / ".c.parquet", ["hidden"])
    (tmp_path / "LICENSE.txt").write_text("no prompt")
    found = PromptList.open(str(tmp_path), "caption")
    assert (len(found), found.rows, len(found.blocks)) == (23, 23, 7)
    assert list(found(range(23))) == MANY


@pytest.mark.parametrize("form", ["file", "folder", "text"])
def test_ids_of_any_order_and_size(tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "LINES", 4)
    if form == "text":
        uri = text(tmp_path / "a.txt", "\n".join(MANY).encode())
    elif form == "file":
        uri = parquet(tmp_path / "a.parquet", MANY)
    else:
        parquet(tmp_path / "f" / "0.parquet", MANY[:9])
        parquet(tmp_path / "f" / "1.parquet", MANY[9:])
        uri = str(tmp_path / "f")
    found = PromptList.open(uri, "caption", skip=3)
    assert len(found.blocks) > 5
    ids = [2**64 - 1, 19, 20, 0, 5, 5, 2**63, 41, 10**12]
    column = found(np.array(ids, dtype=np.uint64))
    assert column.dtype == object
    assert list(column) == [MANY[3 + i % 20] for i in ids] == list(found(ids))
    assert found([]).shape == (0,)
    assert found(range(0)).dtype == object


def test_a_block_is_read_once_for_all_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = PromptList.open(parquet(tmp_path / "a.parquet", MANY), "caption")
    read_groups, cells = [], prompts._cells
    monkeypatch.setattr(prompts, "_cells", lambda block, *rest: read_groups.append(block.place) or cells(block, *rest))
    found([20, 0, 21, 1, 22, 2])
    assert read_groups == [0, 5]
    found([20, 21])
    assert read_groups == [0, 5], "the last one is kept"


def test_it_travels_without_what_it_has_read(tmp_path: Path) -> None:
    found = PromptList.open(parquet(tmp_path / "a.parquet", ["x" * 10_000] * 8), "caption", skip=1, name="some.where")
    found([0])
    assert len(pickle.dumps(found)) < 3000
    again = pickle.loads(pickle.dumps(found))
    assert list(again([6, 7])) == ["x" * 10_000] * 2
    assert again.facts() == found.facts()
    (tmp_path / "a.parquet").write_bytes(b"x")
    with pytest.raises(Refused, match=r"^some\.where\.uri .* is no Parquet file or damaged"):
        again([1])


def test_no_more_than_a_row_group_is_in_memory(tmp_path: Path) -> None:
    """A list of 64 MB with groups of 1 MB: reading all of it takes some groups' memory."""
    uri = parquet(tmp_path / "a.parquet", [f"{i:08}" * 128 for i in range(65_536)], rows=1024)
    found = PromptList.open(uri, "caption")
    before = pa.default_memory_pool().max_memory()
    for start in range(0, len(found), 512):
        found(range(start, start + 512))
    assert pa.default_memory_pool().max_memory() - before < 16 << 20


# ---- what a prompt may be


KINDS = [pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary()]
KINDS += [pa.dictionary(pa.int32(), pa.string()), pa.dictionary(pa.int8(), pa.binary())]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_column_of_text_gives_odd_prompts_as_they_are(tmp_path: Path, kind: pa.DataType) -> None:
    inner = kind.value_type if pa.types.is_dictionary(kind) else kind
    cells = [cell.encode() for cell in ODD] if "binary" in str(inner) else ODD
    array = pa.array([*cells, None], inner)
    assert read(parquet(tmp_path / "a.parquet", array.dictionary_encode() if inner != kind else array)) == [*ODD, ""]


def test_what_is_no_utf8_is_repaired_once(tmp_path: Path) -> None:
    """pyarrow's strings are not checked: such a column is written without a word."""
    cells = [b"caf\xe9", b"\xed\xa0\x80", b"\xf0\x9f\x98", "é".encode()]
    expected = ["caf\ufffd", "\ufffd\ufffd\ufffd", "\ufffd", "é"]
    offsets = np.cumsum([0, *map(len, cells)]).astype(np.int32)
    strings = pa.StringArray.from_buffers(4, pa.py_buffer(offsets), pa.py_buffer(b"".join(cells)))
    for array in (pa.array(cells, pa.binary()), strings, strings.cast(pa.binary()).cast(pa.binary())):
        found = read(parquet(tmp_path / "a.parquet", array, array.type))
        assert found == expected
    assert read(text(tmp_path / "a.txt", b"\n".join(cells))) == expected
    assert all(value.encode() for value in found)


def test_a_line_of_text_ends_at_the_newline_alone(tmp_path: Path) -> None:
    uri = text(tmp_path / "a.txt", '\ufeffa, "b" \r\n\n\t \x0b\x0c\x85\u2028 c\r\r\nNUL \x00\nlast'.encode())
    assert read(uri) == ['a, "b" ', "", "\t \x0b\x0c\x85\u2028 c\r", "NUL \x00", "last"]
    assert read(text(tmp_path / "b.txt", b"one\ntwo\n")) == ["one", "two"], "the last newline begins no prompt"
    assert read(text(tmp_path / "c.txt", b"\n")) == [""]
    assert read(text(tmp_path / "d.txt", b"\xef")) == ["\ufffd"]


# ---- what determines a list


def test_facts_of_a_file_are_of_its_bytes(tmp_path: Path) -> None:
    uri = parquet(tmp_path / "a.parquet", MANY, column="TEXT")
    digest = hashlib.sha256((tmp_path / "a.parquet").read_bytes()).hexdigest()
    assert PromptList.open(uri, "TEXT", skip=2).facts() == {"sha256": digest, "rows": 23, "column": "TEXT"}
    uri = text(tmp_path / "a.txt", b"a\nb")
    digest = hashlib.sha256(b"a\nb").hexdigest()
    assert PromptList.open(uri, "ignored").facts() == {"sha256": digest, "rows": 2, "column": ""}


def test_facts_of_a_folder_change_with_its_content_and_not_with_time_or_place(tmp_path: Path) -> None:
    def facts(folder: Path) -> dict[str, Any]:
        return PromptList.open(str(folder), "caption").facts()

    for folder in (tmp_path / "x", tmp_path / "y"):
        parquet(folder / "0.parquet", MANY[:5])
        parquet(folder / "1.parquet", MANY[5:])
    os.utime(tmp_path / "y" / "0.parquet", (0, 0))
    (tmp_path / "y" / "README.md").write_text("of no matter")
    before = facts(tmp_path / "x")
    assert before == facts(tmp_path / "y")
    assert (before["rows"], before["column"], len(before["sha256"])) == (23, "caption", 64)
    size = (tmp_path / "y" / "0.parquet").stat().st_size
    parquet(tmp_path / "y" / "0.parquet", ["prompt /", *MANY[1:5]])
    assert (tmp_path / "y" / "0.parquet").stat().st_size == size, "so it is the footer that tells"
    changed = facts(tmp_path / "y")
    (tmp_path / "x" / "1.parquet").rename(tmp_path / "x" / "2.parquet")
    assert len({fact["sha256"] for fact in (before, changed, facts(tmp_path / "x"))}) == 3


def test_hashes_count_what_two_lists_have_in_common() -> None:
    first, second = prompts.hashes(MANY), prompts.hashes(np.array(["prompt 3", "Prompt 3", "é", "prompt 7"], object))
    assert first.dtype == np.uint64
    assert first.nbytes == 8 * len(MANY)
    assert int(np.isin(second, first).sum()) == 2
    expected = int.from_bytes(hashlib.blake2b("é".encode(), digest_size=8).digest(), "little")
    assert int(second[2]) == expected
    assert prompts.hashes([]).shape == (0,)


def test_a_line_for_the_log(tmp_path: Path) -> None:
    found = PromptList.open(parquet(tmp_path / "a.parquet", [*ODD, None, "last"]), "caption", skip=1)
    assert prompts.described(found) == (
        f"12 prompts in {tmp_path}/a.parquet; of the first 11 from row 1 on 9 are distinct, 27.3% are empty, and the"
        " longest has 100,000 characters"
    )


# ---- what is refused


def test_a_column_that_is_not_there_is_answered_with_those_that_are(tmp_path: Path) -> None:
    table = pa.table({"URL": ["u"], "TEXT": ["t"], "top_caption": ["c"], "similarity": [0.3], "all_captions": [["c"]]})
    uri = str(tmp_path / "a.parquet")
    pq.write_table(table, uri)
    known = "URL, TEXT, top_caption, similarity, all_captions"
    refused(rf"^captions\.uri .*a\.parquet has no column text, but {known}; did you mean TEXT\?$", uri, "text")
    refused(r"no column caption, but .*; did you mean top_caption or all_captions\?$", uri, "caption")
    refused(r"^x\.y\.uri .* no column zzz, but .*; set x\.y\.column to one of them\.$", uri, "zzz", name="x.y")
    sentence = (
        r"a column similarity of double, not of text; set captions\.column to one of text \(URL, TEXT, top_caption\)"
    )
    refused(sentence, uri, "similarity")
    refused(r"a column all_captions of list<.*>, not of text", uri, "all_captions")
    refused(r"a column id of int64, not of text; give a list with one", parquet(tmp_path / "b.parquet", [1]), "id")


def test_an_empty_list_is_refused(tmp_path: Path) -> None:
    sentence = r"holds no prompts; give a list with at least one\.$"
    refused(sentence, text(tmp_path / "a.txt", b""), "")
    refused(sentence, text(tmp_path / "b.txt", b"\xef\xbb\xbf"), "")
    refused(sentence, parquet(tmp_path / "a.parquet", [], pa.string()), "caption")
    parquet(tmp_path / "f" / "a.parquet", [], pa.string())
    refused(sentence, str(tmp_path / "f"), "caption")
    parquet(tmp_path / "f" / "b.parquet", ["x"])
    assert read(str(tmp_path / "f")) == ["x"]


def test_a_skip_must_leave_rows(tmp_path: Path) -> None:
    uri = parquet(tmp_path / "a.parquet", MANY)
    for skip in (23, 10**12):
        sentence = rf"a\.parquet has 23 rows, and evaluate\.captions\.skip leaves out {skip:,}; skip fewer or give a"
        refused(sentence, uri, "caption", skip=skip, name="evaluate.captions")
    assert read(uri, skip=22) == ["prompt 22"]


def test_what_is_not_there_or_no_list_is_one_sentence(tmp_path: Path) -> None:
    for name in ("a.parquet", "a.txt", "folder"):
        with pytest.raises(Missing, match=re.escape(f"{tmp_path / name} could not be read: there is no such file")):
            PromptList.open(str(tmp_path / name), "caption")
    (tmp_path / "f" / "inside").mkdir(parents=True)
    parquet(tmp_path / "f" / "inside" / "a.parquet", ["x"])
    refused(
        r"f is a folder without \.parquet files directly inside it; name the folder", str(tmp_path / "f"), "caption"
    )
    sentence = r"is no Parquet file or damaged \(.+\); give Parquet, or a text file whose name ends in \.txt\.$"
    refused(sentence, text(tmp_path / "a.csv", b"caption\nx\n"), "caption")
    refused(sentence, text(tmp_path / "a.parquet", b""), "caption")
    whole = Path(parquet(tmp_path / "b.parquet", MANY)).read_bytes()
    refused(sentence, text(tmp_path / "b.parquet", whole[: len(whole) // 2]), "caption")


def test_a_file_damaged_inside_is_named_when_it_is_read(tmp_path: Path) -> None:
    uri = parquet(tmp_path / "a.parquet", MANY, rows=23)
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    inside = slice(4, len(data) - 8 - int.from_bytes(data[-8:-4], "little"))
    data[inside] = b"\xff" * len(data[inside])
    (tmp_path / "a.parquet").write_bytes(data)
    found = PromptList.open(uri, "caption")
    with pytest.raises(Refused, match=r"a\.parquet is no Parquet file or damaged") as caught:
        found([0])
    assert "\n" not in str(caught.value)


# ---- in a bucket


@pytest.mark.parametrize("form", ["file", "folder", "text"])
def test_lists_in_a_bucket(
    s3_server: s3server.Relay, tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    uri = f"s3://{s3server.BUCKET}/prompts-{form}"
    local = {"file": "a.parquet", "folder": "f/a.parquet", "text": "a.txt"}[form]
    if form == "text":
        text(tmp_path / local, "\n".join(MANY).encode())
    else:
        parquet(tmp_path / local, MANY)
    storage.write_bytes(f"{uri}/{Path(local).name}", (tmp_path / local).read_bytes())
    there = uri if form == "folder" else f"{uri}/{Path(local).name}"
    here = str(tmp_path / "f") if form == "folder" else str(tmp_path / local)
    assert read(there, skip=2) == MANY[2:] == read(here, skip=2)
    assert PromptList.open(there, "caption").facts() == PromptList.open(here, "caption").facts()
    with pytest.raises(Missing):
        PromptList.open(f"{uri}/nowhere.parquet", "caption")


def test_an_outage_is_not_called_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = PromptList.open(parquet(tmp_path / "a.parquet", MANY), "caption")

    def out(uri: str) -> Any:
        raise Outage("the disk fails")

    monkeypatch.setattr(storage, "reading", out)
    with pytest.raises(Outage):
        found([0])
