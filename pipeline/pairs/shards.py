"""The rows of a pair set: Parquet shards and their checks.

``manifest`` owns the folder around them, ``stream`` reads them for training. The columns are sample_id uint64,
label int32 (or prompt, a string, of a teacher that takes captions), noise [n * C], float16 unless ``pairs.dtype`` says
float32 (left out and derived again when ``pairs.noise`` is derived), and tokens uint16 [n]: lists of a fixed length,
which pandas, DuckDB, polars and datasets read, with the shape in the field's metadata. Shards of earlier versions have
Arrow's tensor type instead and are read as well. b is rows, n the tokens of an image, C the dimension of a code.

A shard holds a CRC-32 of its own bytes, so that a single flipped bit is noticed wherever it is, and one of every page,
for readers of single columns. Shards of earlier versions have neither: only the manifest's SHA-256 finds such a bit.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import noise, storage
from pipeline.host.errors import Refused
from pipeline.models.conditions import Conditioning
from pipeline.pairs import manifest
from pipeline.pairs.facts import PairFacts
from pipeline.pairs.manifest import Shard
from pipeline.pairs.rows import Rows, noise_of

FREQUENCIES = 2 << 30  # bytes of the largest table of token frequencies
CHECKERS = 8  # threads that read shards: reading, SHA-256 and Parquet release the GIL
SEAL = b"CRC-32 of all other bytes: "  # in the footer's metadata, before eight hexadecimal digits
UNSEALED = b"00000000"  # in their place while the shard is written


# ---- one shard


def schema(facts: PairFacts) -> pa.Schema:
    """The columns of a shard; noise only where it is stored."""
    condition = pa.field("prompt", pa.string()) if facts.captions else pa.field("label", pa.int32())
    columns = [pa.field("sample_id", pa.uint64()), condition]
    if facts.noise_is_stored:
        columns.append(_lists("noise", pa.from_numpy_dtype(facts.dtype), [facts.length, facts.dim]))
    return pa.schema([*columns, _lists("tokens", pa.uint16(), [facts.length])])


def _lists(name: str, kind: pa.DataType, shape: list[int]) -> pa.Field:
    """A column of one array a row, flat; Arrow's own tensor type is refused by datasets."""
    return pa.field(name, pa.list_(kind, int(np.prod(shape))), metadata={"shape": json.dumps(shape)})


def _earlier_schema(facts: PairFacts) -> pa.Schema:
    """The columns of the shards of earlier versions."""
    tensors = {
        field.name: pa.fixed_shape_tensor(field.type.value_type, json.loads(field.metadata[b"shape"]))
        for field in schema(facts)
        if field.metadata
    }
    return pa.schema([field.with_type(tensors.get(field.name, field.type)) for field in schema(facts)])


def table(facts: PairFacts, rows: Rows) -> pa.Table:
    """Rows -> an Arrow table with the columns of a shard; ValueError for codes that the vocabulary lacks."""
    low, high = int(rows.tokens.min()), int(rows.tokens.max())
    if not 0 <= low <= high < facts.codes:
        raise Refused(f"tokens run from {low} to {high}; they must lie in the vocabulary of {facts.codes}.")
    arrays = {
        "sample_id": pa.array(rows.ids.astype(np.uint64)),
        "prompt": pa.array(rows.conditions, pa.string()) if facts.captions else None,
        "label": None if facts.captions else pa.array(rows.conditions.astype(np.int32)),
        "noise": None if rows.noise is None else _flat(rows.noise),
        "tokens": _flat(rows.tokens.astype(np.uint16)),
    }
    columns = schema(facts)
    return pa.table([arrays[name] for name in columns.names], schema=columns)


def write_shard(uri: str, facts: PairFacts, rows: pa.Table, host: str = "") -> Shard:
    """Commit the ``table`` of one shard atomically; the same rows give the same bytes under one version of pyarrow.

    ``host`` is the machine that made the rows.
    """
    rows = rows.select(schema(facts).names).combine_chunks()
    number = facts.shard_of(rows["sample_id"][0].as_py())
    name = facts.shard_name(number, rows.num_rows)
    data = _sealed(_encoded(rows))
    storage.write_bytes(storage.join(uri, name), data)
    return Shard(name, number, rows.num_rows, len(data), hashlib.sha256(data).hexdigest(), host)


def _encoded(table: pa.Table) -> bytes:
    """The table as Parquet, with a place for the seal."""
    buffer = pa.BufferOutputStream()
    # A dictionary suits tokens (12 bits instead of 32); noise is written faster without.
    with pq.ParquetWriter(
        buffer,
        table.schema,
        use_dictionary=["tokens.list.element"],
        compression="zstd",
        compression_level=1,
        write_page_checksum=True,
    ) as writer:
        writer.write_table(table, row_group_size=table.num_rows)
        writer.add_key_value_metadata({"seal": (SEAL + UNSEALED).decode()})
    return buffer.getvalue().to_pybytes()


def _sealed(data: bytes) -> bytes:
    """The same file with the CRC-32 of its other bytes in the place of ``UNSEALED``."""
    at = data.rindex(SEAL) + len(SEAL)
    return data[:at] + _checksum(data, at) + data[at + len(UNSEALED) :]


def _checksum(data: bytes, at: int) -> bytes:
    """CRC-32, in hexadecimal, of all bytes but the eight from ``at`` on; no change of a single bit leaves it alike."""
    view = memoryview(data)
    return b"%08x" % zlib.crc32(view[at + len(UNSEALED) :], zlib.crc32(view[:at]))


def _seal_fits(data: bytes) -> bool | None:
    """Whether the file's bytes are those that were sealed; None for one without a seal."""
    at = data.rfind(SEAL) + len(SEAL)
    if at < len(SEAL):
        return None
    return data[at : at + len(UNSEALED)] == _checksum(data, at)


def load_shard(uri: str, facts: PairFacts, name: str) -> Rows:
    """The rows of a shard as they are stored; ValueError naming the file for one that is damaged."""
    return _decode(storage.read_bytes(storage.join(uri, name)), uri, facts, name)


def read_shard(uri: str, facts: PairFacts, name: str) -> Rows:
    """The rows of a shard with their noise, stored or derived."""
    rows = load_shard(uri, facts, name)
    return rows._replace(noise=noise_of(facts, rows))


def inspect_shard(
    uri: str, facts: PairFacts, name: str, sha256: str | None = None, conditioning: Conditioning | None = None
) -> Shard:
    """Read a committed shard whole and check it; ValueError naming the file and what to do.

    With ``conditioning`` its conditions, too, must be those of its ids.
    """
    data = storage.read_bytes(storage.join(uri, name))
    digest = hashlib.sha256(data).hexdigest()
    rows = _decode(data, uri, facts, name)
    if sha256 is not None and digest != sha256:
        raise _damaged(uri, name, "its bytes are not those that the manifest lists")
    if conditioning and not np.array_equal(rows.conditions, conditioning(rows.ids)):
        raise _damaged(uri, name, "its prompts are not those of its ids in captions.uri")
    return Shard(name, facts.shard_of(rows.ids[0].item()), len(rows.ids), len(data), digest)


def _decode(data: bytes, uri: str, facts: PairFacts, name: str) -> Rows:
    """Parquet bytes -> rows, after every check that the content alone allows."""
    whole = _seal_fits(data)
    if whole is False:  # nothing of it is given to the parser
        raise _damaged(uri, name, "its bytes do not fit the CRC-32 in it")
    try:
        table = pq.read_table(pa.BufferReader(data), use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise _damaged(uri, name, str(error).strip().splitlines()[0]) from None
    if not table.schema.equals(schema(facts) if whole else _earlier_schema(facts)):
        seal = "" if whole else " or it lost its CRC-32"
        raise _damaged(uri, name, f"its columns are {', '.join(table.schema.names)} of other names or types{seal}")
    ids = table["sample_id"].to_numpy().astype(np.int64)
    conditions = _conditions(table)
    if not np.array_equal(ids, facts.ids_of(name)):
        first, last = facts.ids_of(name)[[0, -1]]
        raise _damaged(uri, name, f"its {len(ids)} rows are not the ids from {first} to {last}")
    if not facts.captions and not np.array_equal(conditions, facts.labels(ids)):
        raise _damaged(uri, name, "its labels are not those of its ids")
    tokens = _checked(_array(table["tokens"], (facts.length,)), uri, facts, name)
    shape = (facts.length, facts.dim)
    return Rows(ids, conditions, _array(table["noise"], shape) if facts.noise_is_stored else None, tokens)


def _conditions(table: pa.Table) -> np.ndarray:
    """The column of conditions: int64 labels [b], or prompts [b] in an object array of str."""
    if "prompt" in table.column_names:
        return np.array(table["prompt"].to_pylist(), dtype=object)
    return table["label"].to_numpy().astype(np.int64)


def _checked(tokens: np.ndarray, uri: str, facts: PairFacts, name: str) -> np.ndarray:
    """The same tokens; ValueError for a code that the vocabulary lacks."""
    if tokens.max() >= facts.codes:
        raise _damaged(uri, name, f"it holds the code {tokens.max()}, outside the vocabulary")
    return tokens


def _damaged(uri: str, name: str, why: str) -> Refused:
    return Refused(
        f"{storage.join(uri, name)} is damaged ({why}); delete it and run generate_pairs again with the same recipe,"
        " which makes it anew."
    )


def _flat(array: np.ndarray) -> pa.FixedSizeListArray:
    """[b, ...] -> one flat list a row."""
    return pa.FixedSizeListArray.from_arrays(pa.array(array.reshape(-1)), array[0].size)


def _array(column: pa.ChunkedArray, shape: tuple[int, ...]) -> np.ndarray:
    """One list, or one of Arrow's tensors, a row -> [b, *shape]."""
    rows = column.combine_chunks()
    rows = rows.storage if isinstance(rows, pa.ExtensionArray) else rows
    return rows.flatten().to_numpy().reshape(-1, *shape)


# ---- a whole set


def verify(uri: str, conditioning: Conditioning | None = None) -> dict[str, Any]:
    """Check schema, ids, conditions and SHA-256 of every shard; the manifest, or ValueError for the first bad shard.

    Labels follow from the ids; prompts are held against those of ``conditioning``.
    """
    inventory = manifest.read(uri)
    facts = PairFacts.from_json(inventory["facts"])
    with ThreadPoolExecutor(CHECKERS) as pool:
        args = [(uri, facts, shard["name"], shard["sha256"], conditioning) for shard in inventory["shards"]]
        for _ in pool.map(inspect_shard, *zip(*args, strict=True)):
            pass
    return inventory


def token_frequencies(uri: str, by_class: bool = False) -> np.ndarray:
    """How often each code stands at each position: int64 [n, V], or with ``by_class`` [classes, n, V].

    Raises ValueError where the table by class would be too large (1,000 classes x 680 tokens x 4,096 codes are 22 GB).
    """
    inventory = manifest.read(uri)
    facts = PairFacts.from_json(inventory["facts"])
    length, codes, groups = facts.length, facts.codes, facts.layout.classes if by_class else 1
    size = groups * length * codes
    if 8 * size > FREQUENCIES:
        raise Refused(f"token frequencies of {groups} classes need {8 * size / 1e9:.0f} GB; count over all classes.")
    counts = np.zeros(size, dtype=np.int64)
    names = [shard["name"] for shard in inventory["shards"]]
    for name, tokens in zip(names, tokens_of(uri, facts, names), strict=True):
        group = noise.labels(facts.ids_of(name), groups)
        cell = (group[:, None] * length + np.arange(length)) * codes + tokens
        counts += np.bincount(cell.ravel(), minlength=size)
    shape = (length, codes)
    return counts.reshape((groups, *shape) if by_class else shape)


def tokens_of(uri: str, facts: PairFacts, names: Sequence[str]) -> Iterator[np.ndarray]:
    """The tokens of each shard, uint16 [b, n], in order; nothing else is read, and ``CHECKERS`` shards at once."""
    with ThreadPoolExecutor(CHECKERS) as pool:
        shards: deque[Future[np.ndarray]] = deque()
        for name in names:
            shards.append(pool.submit(_read_tokens, uri, facts, name))
            if len(shards) == CHECKERS:
                yield shards.popleft().result()
        while shards:
            yield shards.popleft().result()


def _read_tokens(uri: str, facts: PairFacts, name: str) -> np.ndarray:
    """The tokens of one shard, uint16 [b, n], by the pages that hold them; their own CRC-32 is checked."""
    with storage.reading(storage.join(uri, name)) as file:
        try:
            table = pq.ParquetFile(file, page_checksum_verification=True).read(["tokens"], use_threads=False)
        except (pa.ArrowException, OSError) as error:
            raise _damaged(uri, name, str(error).strip().splitlines()[0]) from None
    tokens, (_, rows) = _array(table["tokens"], (facts.length,)), facts.number_and_rows(name)
    if len(tokens) != rows:
        raise _damaged(uri, name, f"it has {len(tokens)} rows of {rows}")
    return _checked(tokens, uri, facts, name)
