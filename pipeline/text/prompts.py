"""A list of prompts in a file: prompt of a sample = row (skip + id mod the rows behind skip), in any order.

Parquet is read one column and one row group at a time, so a list of any size is open in little memory. A text file is
fetched whole, once on a machine, and read in blocks of lines. A prompt is given as the file has it: bytes that are no
UTF-8 become U+FFFD, null becomes the empty prompt, and nothing else is changed.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.host.errors import Refused, Unfinished

LINES = 8192  # of a text file that are read at once
MARK = b"\xef\xbb\xbf"  # some editors write it before UTF-8; it is no part of the first prompt
LOOKED_AT = 4096  # prompts that the log's line is about


@dataclass(frozen=True)
class RowBlock:
    """Rows that are read at once: a row group of a Parquet file, or the lines of a text file from a byte on.

    ``place`` is the group's number, or the first byte; ``size`` the bytes of the lines, 0 for a row group.
    """

    uri: str
    place: int
    rows: int
    size: int = 0


@dataclass
class PromptList:
    """The prompts of a file or folder, by sample id; ``len`` counts those behind ``skip``, ``rows`` counts all.

    It can be pickled; what it read last stays behind. ``name`` as for ``open``; ``digests`` are those of the files of
    a folder.
    """

    uri: str
    column: str
    skip: int
    name: str
    blocks: list[RowBlock]
    digests: list[list[Any]] | None = None
    starts: list[int] = field(init=False, repr=False)
    _read: tuple[int, pa.Array] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        self.starts = [0]
        for block in self.blocks:
            self.starts.append(self.starts[-1] + block.rows)

    @classmethod
    def open(cls, uri: str, column: str, skip: int = 0, name: str = "captions") -> PromptList:
        """The prompts at ``uri``, of whose files only the indices are read, unless it is a text file.

        ``name`` is the section of the recipe that sets ``uri``, ``column`` and ``skip``, for sentences. Refused or
        Missing for what is not there, is neither text nor Parquet, lacks the column or has no rows behind ``skip``.
        """
        if storage.is_folder(uri):
            found = _of_folder(uri, column, skip, name)
        elif uri.endswith(".txt"):
            found = cls(uri, "", skip, name, _lines(uri))
        else:
            found = cls(uri, column, skip, name, _row_groups(uri, column, name)[0])
        if not found.rows:
            raise Refused(f"{name}.uri {uri} holds no prompts; give a list with at least one.")
        if not len(found):
            raise Refused(
                f"{name}.uri {uri} has {found.rows:,} rows, and {name}.skip leaves out {skip:,}; skip fewer or give"
                " a longer list."
            )
        return found

    @property
    def rows(self) -> int:
        """Rows of the whole list."""
        return self.starts[-1]

    def __len__(self) -> int:
        return max(0, self.rows - self.skip)

    def __call__(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """Sample ids [B], 0 to 2^64 - 1, in any order -> their prompts, an object array [B] of str.

        Ids that lie near one another are cheap: every block is read once for all of its rows.
        """
        wanted = np.asarray(ids, dtype=np.uint64) % np.uint64(len(self)) + np.uint64(self.skip)
        out = np.empty(len(wanted), dtype=object)
        of_block = np.searchsorted(np.asarray(self.starts, dtype=np.uint64), wanted, side="right") - 1
        for i in np.unique(of_block):
            places = np.flatnonzero(of_block == i)
            rows = wanted[places] - np.uint64(self.starts[i])
            for place, value in zip(places, self._block(int(i)).take(pa.array(rows)).to_pylist(), strict=True):
                out[place] = (value or b"").decode("utf-8", "replace")
        return out

    def facts(self) -> dict[str, Any]:
        """What determines every prompt: {"sha256", "rows", "column"}; the column of a text file is "".

        SHA-256 of a file's bytes; of a folder, over its Parquet files' names, sizes and footers, not their times.
        """
        if self.digests is None:
            digest = storage.sha256(self.uri)
        else:
            digest = hashlib.sha256(repr(self.digests).encode()).hexdigest()
        return {"sha256": digest, "rows": self.rows, "column": self.column}

    def _block(self, i: int) -> pa.Array:
        """The bytes of a block's prompts; the last one read is kept."""
        if self._read is None or self._read[0] != i:
            self._read = None  # two at once would be twice the memory
            block = self.blocks[i]
            self._read = i, _text(block) if block.size else _cells(block, self.column, self.name)
        return self._read[1]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_read": None}


def described(prompts: PromptList) -> str:
    """For a log, one line about a list: its rows, and what the first 4,096 of them are like."""
    texts = list(prompts(range(min(len(prompts), LOOKED_AT))))
    empty = sum(not text.strip() for text in texts) / len(texts)
    return (
        f"{prompts.rows:,} prompts in {prompts.uri}; of the first {len(texts):,} from row {prompts.skip:,} on"
        f" {len(set(texts)):,} are distinct, {empty:.1%} are empty, and the longest has"
        f" {max(map(len, texts)):,} characters"
    )


def hashes(texts: Sequence[str] | np.ndarray) -> np.ndarray:
    """64 bits of each text's BLAKE2b, uint64 [B]: 24 MB for three million, to count what two lists have in common."""
    joined = b"".join(hashlib.blake2b(text.encode(), digest_size=8).digest() for text in texts)
    return np.frombuffer(joined, dtype="<u8").astype(np.uint64)


# ---- Parquet


def _of_folder(uri: str, column: str, skip: int, name: str) -> PromptList:
    """The Parquet files directly inside a folder, by name; hidden ones are nobody's."""
    sizes = {
        file: size
        for file, size in storage.sizes(uri).items()
        if file.endswith(".parquet") and not file.startswith(".")
    }
    if not sizes:
        raise Refused(
            f"{name}.uri {uri} is a folder without .parquet files directly inside it; name the folder that holds them,"
            " or a file."
        )
    blocks, digests = [], []
    for file in sorted(sizes):
        groups, footer = _row_groups(storage.join(uri, file), column, name)
        blocks += groups
        digests.append([file, sizes[file], footer])
    return PromptList(uri, column, skip, name, blocks, digests)


def _row_groups(uri: str, column: str, name: str) -> tuple[list[RowBlock], str]:
    """The row groups of a Parquet file, and the SHA-256 of its footer; Refused where the column cannot serve."""
    with _parquet(uri, name), storage.reading(uri) as file:
        table = pq.ParquetFile(file)
        kinds = {part.name: part.type for part in table.schema_arrow}
        blocks = [RowBlock(uri, i, table.metadata.row_group(i).num_rows) for i in range(table.num_row_groups)]
        footer = _footer(file)
    if column not in kinds:
        alike = get_close_matches(column.lower(), [other.lower() for other in kinds], 3)
        meant = " or ".join(other for other in kinds if other.lower() in alike)
        advice = f"did you mean {meant}?" if meant else f"set {name}.column to one of them."
        raise Refused(f"{name}.uri {uri} has no column {column}, but {', '.join(list(kinds)[:20])}; {advice}")
    if not _is_text(kinds[column]):
        texts = [other for other, kind in kinds.items() if _is_text(kind)]
        advice = f"set {name}.column to one of text ({', '.join(texts[:20])})" if texts else "give a list with one"
        raise Refused(f"{name}.uri {uri} has a column {column} of {kinds[column]}, not of text; {advice}.")
    return [block for block in blocks if block.rows], footer


def _footer(file: Any) -> str:
    """SHA-256 of the bytes in which Parquet says where everything lies."""
    file.seek(-8, io.SEEK_END)
    length = int.from_bytes(file.read(4), "little")
    file.seek(-8 - length, io.SEEK_END)
    return hashlib.sha256(file.read(length)).hexdigest()


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _is_text(kind.value_type)
    tests = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")
    return any(getattr(pa.types, f"is_{name}")(kind) for name in tests)


def _cells(block: RowBlock, column: str, name: str) -> pa.Array:
    """The bytes of a column in a row group; pyarrow would call text what is no UTF-8."""
    with _parquet(block.uri, name), storage.reading(block.uri) as file:
        cells = pq.ParquetFile(file).read_row_group(block.place, columns=[column]).column(column)
        if pa.types.is_dictionary(cells.type):
            cells = pa.chunked_array([chunk.dictionary_decode() for chunk in cells.chunks], cells.type.value_type)
        return pc.cast(cells, pa.large_binary()).combine_chunks()


@contextmanager
def _parquet(uri: str, name: str) -> Iterator[None]:
    """One sentence for a file that is no Parquet or is damaged; what its storage says passes."""
    try:
        yield
    except (Refused, Unfinished):
        raise
    except (pa.ArrowException, OSError, EOFError, ValueError) as error:
        reason = " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
        raise Refused(
            f"{name}.uri {uri} is no Parquet file or damaged ({reason}); give Parquet, or a text file whose name ends"
            " in .txt."
        ) from None


# ---- text


def _lines(uri: str) -> list[RowBlock]:
    """The blocks of a text file, of ``LINES`` lines each."""
    blocks = []
    with storage.local(uri).open("rb") as file:
        start = len(MARK) if file.read(len(MARK)) == MARK else 0
        file.seek(start)
        while lines := list(islice(file, LINES)):
            size = sum(map(len, lines))
            blocks.append(RowBlock(uri, start, len(lines), size))
            start += size
    return blocks


def _text(block: RowBlock) -> pa.Array:
    """The bytes of a block's lines, without their ends, of which Windows has two letters."""
    with storage.local(block.uri).open("rb") as file:
        file.seek(block.place)
        data = file.read(block.size)
    lines = data.removesuffix(b"\n").split(b"\n")
    return pa.array([line.removesuffix(b"\r") for line in lines], pa.large_binary())
