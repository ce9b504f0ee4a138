"""The rows of a pair set: Parquet shards and their checks.

``manifest`` owns the folder around them, ``pair_stream`` reads them for training. The columns are sample_id uint64,
label int32, noise [n, C], float16 unless ``pairs.dtype`` says float32 (left out and derived again when ``pairs.noise``
is derived), and tokens uint16 [n], in canonical Arrow types that pandas, DuckDB and others read. b is rows, n the
tokens of an image, C the dimension of a code, V the vocabulary.
"""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import manifest, noise, storage
from pipeline.errors import Refused
from pipeline.manifest import Facts, Shard

FREQUENCIES = 2 << 30  # bytes of the largest table of token frequencies
CHECKERS = 8  # threads that check shards: reading, SHA-256 and Parquet release the GIL


class Rows(NamedTuple):
    """Rows as stored: ids and labels int64 [b], noise [b, n, C] or None if derived, tokens uint16 [b, n]."""

    ids: np.ndarray
    labels: np.ndarray
    noise: np.ndarray | None
    tokens: np.ndarray

    def take(self, index: np.ndarray | slice) -> Rows:
        """The rows at ``index``."""
        return Rows(*(None if column is None else column[index] for column in self))  # type: ignore[arg-type]

    @staticmethod
    def join(parts: list[Rows]) -> Rows:
        """One after the other."""
        columns = zip(*parts, strict=True)
        return Rows(*(None if column[0] is None else np.concatenate(column) for column in columns))  # type: ignore[arg-type]


# ---- one shard


def schema(known: Facts) -> pa.Schema:
    """The columns of a shard; noise only where it is stored."""
    length, dim = manifest.noise_shape(known)
    columns = [pa.field("sample_id", pa.uint64()), pa.field("label", pa.int32())]
    if known["noise"] == "stored":
        kind = pa.from_numpy_dtype(manifest.noise_dtype(known))
        columns.append(pa.field("noise", pa.fixed_shape_tensor(kind, [length, dim])))
    return pa.schema([*columns, pa.field("tokens", pa.fixed_shape_tensor(pa.uint16(), [length]))])


def row_bytes(known: Facts) -> int:
    """Bytes of a row in memory, and at most about as many on disk."""
    length, dim = manifest.noise_shape(known)
    size = np.dtype(manifest.noise_dtype(known)).itemsize
    return 12 + 2 * length + (size * length * dim if known["noise"] == "stored" else 0)


def table(known: Facts, rows: Rows) -> pa.Table:
    """Rows -> an Arrow table with the columns of a shard; ValueError for codes that the vocabulary lacks."""
    vocabulary = known["layout"]["vocabulary"]
    low, high = int(rows.tokens.min()), int(rows.tokens.max())
    if not 0 <= low <= high < vocabulary:
        raise Refused(f"tokens run from {low} to {high}; they must lie in the vocabulary of {vocabulary}.")
    arrays = {
        "sample_id": pa.array(rows.ids.astype(np.uint64)),
        "label": pa.array(rows.labels.astype(np.int32)),
        "noise": None if rows.noise is None else _tensor(rows.noise),
        "tokens": _tensor(rows.tokens.astype(np.uint16)),
    }
    wanted = schema(known)
    return pa.table([arrays[name] for name in wanted.names], schema=wanted)


def write_shard(uri: str, known: Facts, made: pa.Table) -> Shard:
    """Commit the table of one shard atomically; the same rows give the same bytes."""
    made = made.select(schema(known).names).combine_chunks()
    number = made["sample_id"][0].as_py() // known["shard_rows"]
    name = manifest.shard_name(number, made.num_rows, known["shard_rows"])
    buffer = pa.BufferOutputStream()
    # A dictionary suits tokens (12 bits instead of 32); noise is written twice as fast without.
    pq.write_table(
        made,
        buffer,
        use_dictionary=["tokens.list.element"],
        compression="zstd",
        compression_level=1,
        row_group_size=made.num_rows,
    )
    data = buffer.getvalue().to_pybytes()
    storage.write_bytes(storage.join(uri, name), data)
    return Shard(name, number, made.num_rows, len(data), hashlib.sha256(data).hexdigest())


def load_shard(uri: str, known: Facts, name: str) -> Rows:
    """The rows of a shard as they are stored; ValueError naming the file for one that is damaged."""
    return _decode(storage.read_bytes(storage.join(uri, name)), uri, known, name)


def read_shard(uri: str, known: Facts, name: str) -> Rows:
    """The rows of a shard with their noise, stored or derived."""
    rows = load_shard(uri, known, name)
    return rows._replace(noise=noise_of(known, rows))


def inspect_shard(uri: str, known: Facts, name: str, sha256: str | None = None) -> Shard:
    """Read a committed shard whole and check it; ValueError naming the file and what to do."""
    data = storage.read_bytes(storage.join(uri, name))
    found = hashlib.sha256(data).hexdigest()
    rows = _decode(data, uri, known, name)
    if sha256 is not None and found != sha256:
        raise _damaged(uri, name, "its bytes are not those that the manifest lists")
    return Shard(name, rows.ids[0].item() // known["shard_rows"], len(rows.ids), len(data), found)


def _decode(data: bytes, uri: str, known: Facts, name: str) -> Rows:
    """Parquet bytes -> rows, after every check that the content alone allows."""
    try:
        read = pq.read_table(pa.BufferReader(data), use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise _damaged(uri, name, str(error).strip().splitlines()[0]) from None
    if not read.schema.equals(schema(known)):
        raise _damaged(uri, name, f"its columns are {', '.join(read.schema.names)} of other names or types")
    ids = read["sample_id"].to_numpy().astype(np.int64)
    labels = read["label"].to_numpy().astype(np.int64)
    number, rows = manifest.number_and_rows(name, known["shard_rows"])
    first = number * known["shard_rows"]
    if not np.array_equal(ids, np.arange(first, first + rows)):
        raise _damaged(uri, name, f"its {len(ids)} rows are not the ids from {first} to {first + rows - 1}")
    if not np.array_equal(labels, noise.labels(ids, known["layout"]["classes"])):
        raise _damaged(uri, name, "its labels are not those of its ids")
    tokens = _array(read["tokens"])
    if tokens.max() >= known["layout"]["vocabulary"]:
        raise _damaged(uri, name, f"it holds the code {tokens.max()}, outside the vocabulary")
    return Rows(ids, labels, _array(read["noise"]) if "noise" in read.column_names else None, tokens)


def _damaged(uri: str, name: str, why: str) -> Refused:
    return Refused(
        f"{storage.join(uri, name)} is damaged ({why}); delete it and run generate_pairs again with the same recipe,"
        " which makes it anew, bit for bit."
    )


def _tensor(array: np.ndarray) -> pa.ExtensionArray:
    return pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(array))


def _array(column: pa.ChunkedArray) -> np.ndarray:
    return column.combine_chunks().to_numpy_ndarray()


def noise_of(known: Facts, rows: Rows) -> np.ndarray:
    """Stored noise, or noise made again from the ids: [b, n, C] of the set's dtype."""
    return manifest.gaussian(known, rows.ids) if rows.noise is None else rows.noise


# ---- a whole set


def verify(uri: str) -> dict[str, Any]:
    """Check schema, ids, labels and SHA-256 of every shard; the manifest, or ValueError for the first bad shard."""
    found = manifest.read(uri)
    with ThreadPoolExecutor(CHECKERS) as pool:
        args = [(uri, found["facts"], shard["name"], shard["sha256"]) for shard in found["shards"]]
        for _ in pool.map(inspect_shard, *zip(*args, strict=True)):
            pass
    return found


def first_tokens(uri: str, count: int) -> np.ndarray:
    """The tokens of the first ``count`` rows of a complete set, uint16 [count, n]; fewer if it has fewer."""
    found = manifest.read(uri)
    size = found["facts"]["shard_rows"]
    names = [shard["name"] for shard in found["shards"] if shard["number"] * size < count]
    return np.concatenate([load_shard(uri, found["facts"], name).tokens for name in names])[:count]


def token_frequencies(uri: str, by_class: bool = False) -> np.ndarray:
    """How often each code stands at each position: int64 [n, V], or with ``by_class`` [classes, n, V].

    Raises ValueError where the table by class would be too large (1,000 classes x 680 tokens x 4,096 codes are 22 GB).
    """
    found = manifest.read(uri)
    known, layout = found["facts"], found["facts"]["layout"]
    length, vocabulary = sum(layout["groups"]), layout["vocabulary"]
    groups = layout["classes"] if by_class else 1
    size = groups * length * vocabulary
    if 8 * size > FREQUENCIES:
        raise Refused(f"token frequencies of {groups} classes need {8 * size / 1e9:.0f} GB; count over all classes.")
    counts = np.zeros(size, dtype=np.int64)
    for shard in found["shards"]:
        rows = load_shard(uri, known, shard["name"])
        group = rows.labels if by_class else np.zeros_like(rows.labels)
        cell = (group[:, None] * length + np.arange(length)) * vocabulary + rows.tokens
        counts += np.bincount(cell.ravel(), minlength=size)
    shape = (length, vocabulary)
    return counts.reshape((groups, *shape) if by_class else shape)
