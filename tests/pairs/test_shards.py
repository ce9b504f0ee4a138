"""Shards, folders and the training stream, with made-up tokens and no teacher."""

from __future__ import annotations

import io
import json
import re
import shutil
import threading
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tiny import tiny, tiny_text, with_pairs

from pipeline import noise, storage
from pipeline.host.errors import Refused, Unfinished
from pipeline.models.conditions import Labels, Prompts
from pipeline.pairs import dataset_card, manifest
from pipeline.pairs import shards as pairs
from pipeline.pairs import stream as pair_stream
from pipeline.pairs.facts import PairFacts, conditioning
from pipeline.pairs.manifest import Gap, Shard
from pipeline.pairs.rows import Rows
from pipeline.pairs.stream import Pairs, PairStream
from pipeline.recipe import Recipe
from pipeline.services import tracking
from pipeline.settings.cluster import ClusterSettings

PAGE = Path(__file__).parents[2] / "docs" / "pairs.md"
GOLDEN = Path(__file__).parents[1] / "goldens" / "pairs"  # a set that commit 0845e7b made of ``some_rows``


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return tiny(tmp_path)


def some_rows(facts: PairFacts, first: int, count: int) -> Rows:
    """Rows with tokens that are a formula of id and position."""
    ids = first + np.arange(count)
    tokens = (ids[:, None] * 7 + np.arange(facts.length) * 3) % facts.codes
    drawn = facts.noise(ids) if facts.noise_is_stored else None
    return Rows(ids, facts.labels(ids), drawn, tokens.astype(np.uint16))


def write_set(recipe: Recipe, uri: str | None = None) -> tuple[str, PairFacts, list[Shard]]:
    """A complete pair set of the recipe's size."""
    uri, facts = uri or recipe.pairs_uri, PairFacts.of(recipe)
    count, size = recipe.pairs.count, recipe.pairs.shard_rows
    manifest.claim(uri, facts, recipe)
    shards = [
        pairs.write_shard(uri, facts, pairs.table(facts, some_rows(facts, first, min(size, count - first))))
        for first in range(0, count, size)
    ]
    manifest.finish(uri, facts, shards, {"rows": count, "seconds": 1.0, "device": "cpu"})
    return uri, facts, shards


# ---- shards


def test_a_shard_keeps_its_rows_and_its_types(recipe: Recipe) -> None:
    uri, facts, (first, *_) = write_set(recipe)
    rows, kept = some_rows(facts, 0, 16), pairs.read_shard(uri, facts, first.name)
    for name, a, b in zip(Rows._fields, rows, kept, strict=True):
        assert a.dtype == b.dtype, name
        assert np.array_equal(a, b), name
    read = pq.read_table(Path(uri, first.name)).schema
    assert read.field("noise").type == pa.list_(pa.float16(), 14 * 4), "datasets knows no tensors"
    assert read.field("noise").metadata == {b"shape": b"[14, 4]"}
    assert read.field("tokens").type == pa.list_(pa.uint16(), 14)
    assert read.field("sample_id").type == pa.uint64()
    assert read.field("label").type == pa.int32()
    columns = pq.read_metadata(Path(uri, first.name)).row_group(0)
    encodings = {columns.column(i).path_in_schema.split(".")[0]: columns.column(i).encodings for i in range(4)}
    assert "RLE_DICTIONARY" not in encodings["noise"]
    assert "RLE_DICTIONARY" in encodings["tokens"]


ODD = [
    *("a, b; \"quoted\" and 'single'", "two\nlines", "a\ttab", "", "   ", "word " * 5_000, "not UTF-8: \ufffd"),
    *(
        "😀 東京 مرحبا",
        "NUL \x00 and bell \x07",
        "the same",
        "the same",
        "<b>bold</b> &amp; https://example.com $5",
        "-",
    ),
]


def test_prompts_are_kept_to_the_letter(tmp_path: Path) -> None:
    recipe = with_pairs(tiny_text(tmp_path), count=len(ODD), shard_rows=5)
    uri, facts = recipe.pairs_uri, PairFacts.of(recipe)
    manifest.claim(uri, facts, recipe)
    shards, odd = [], np.array(ODD, dtype=object)
    for first in range(0, len(ODD), 5):
        ids = np.arange(first, min(first + 5, len(ODD)))
        rows = Rows(ids, odd[ids], facts.noise(ids), np.zeros((len(ids), facts.length), np.uint16))
        shards.append(pairs.write_shard(uri, facts, pairs.table(facts, rows)))
        again = pairs.write_shard(str(tmp_path / "again"), facts, pairs.table(facts, rows))
        assert again == shards[-1], "the same bytes"
    inventory = manifest.finish(uri, facts, shards, {"rows": len(ODD), "seconds": 1.0, "device": "cpu"})
    kept = Rows.join([pairs.read_shard(uri, facts, shard.name) for shard in shards])
    assert kept.conditions.tolist() == ODD
    assert pq.read_table(uri).column_names == ["sample_id", "prompt", "noise", "tokens"]
    assert pq.read_schema(Path(uri, shards[0].name)).field("prompt").type == pa.string()

    assert pairs.verify(uri)["count"] == len(ODD)
    assert pairs.verify(uri, lambda ids: odd[ids])["count"] == len(ODD)
    with pytest.raises(Refused, match=r"shard-00001.* is damaged \(its prompts are not those of its ids"):
        pairs.verify(uri, lambda ids: np.where(ids == 6, "another", odd[ids]))
    card = dataset_card.card(inventory, "_manifest.json")
    assert "| prompt | string | as it was given: row (sample_id modulo 60) of the prompts |" in card
    assert "label" not in card
    assert facts.encoder
    assert facts.encoder["weights"] in card


def test_a_batch_of_prompts_carries_them(tmp_path: Path) -> None:
    recipe = tiny_text(tmp_path)
    uri, facts = recipe.pairs_uri, PairFacts.of(recipe)
    prompts = conditioning(recipe)
    manifest.claim(uri, facts, recipe)
    shards = []
    for first in range(0, 40, 16):
        ids = np.arange(first, min(first + 16, 40))
        rows = Rows(ids, prompts(ids), facts.noise(ids), np.zeros((len(ids), facts.length), np.uint16))
        shards.append(pairs.write_shard(uri, facts, pairs.table(facts, rows)))
    manifest.finish(uri, facts, shards, {"rows": 40, "seconds": 1.0, "device": "cpu"})
    seen = {}
    for batch in PairStream.open(uri).batches(epoch=0, seed=1, batch=8):
        assert isinstance(batch.condition, Prompts)
        seen |= dict(zip(batch.ids.tolist(), batch.condition.texts, strict=True))
    assert seen == dict(enumerate(prompts(range(40)).tolist()))


def test_the_same_rows_give_the_same_bytes(recipe: Recipe, tmp_path: Path) -> None:
    _, facts, (first, *_) = write_set(recipe)
    again = pairs.write_shard(str(tmp_path / "again"), facts, pairs.table(facts, some_rows(facts, 0, 16)))
    assert again == first


def test_pandas_and_pyarrow_read_the_folder_as_its_page_says(recipe: Recipe) -> None:
    """Companions included: what readers of a folder do not take for Parquet, by its name, is left alone."""
    uri, facts, _ = write_set(recipe)
    manifest.record(uri, facts, [])
    storage.write_json(storage.join(uri, tracking.MARKER), {})
    with_pandas, with_pyarrow = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    assert "runs/demo/pairs" in with_pandas
    rows, found, read = some_rows(facts, 0, 40), dict[str, Any](), dict[str, Any]()
    exec(with_pandas.replace("runs/demo/pairs", uri), found)
    assert found["pairs"].shape == (40, 4)
    assert list(found["pairs"].columns) == ["sample_id", "label", "noise", "tokens"]
    assert np.array_equal(found["noise"], rows.noise)
    assert np.array_equal(found["tokens"], rows.tokens)
    exec(with_pyarrow.replace("runs/demo/pairs", uri), read)
    assert np.array_equal(read["noise"], rows.noise)
    assert pq.read_table(uri).num_rows == 40


def test_every_reader_knows_the_types_of_a_shard(recipe: Recipe) -> None:
    """No extension: datasets refuses those, whatever they are; nor anything that only Arrow would know how to read."""
    uri, _, (first, *_) = write_set(recipe)
    kinds = pq.read_schema(Path(uri, first.name)).types
    assert not [kind for kind in kinds if isinstance(kind, pa.BaseExtensionType)]
    stored = pq.read_metadata(Path(uri, first.name)).schema
    assert [stored.column(i).physical_type for i in range(4)] == ["INT64", "INT32", "FIXED_LEN_BYTE_ARRAY", "INT32"]
    assert stored.column(2).logical_type.type == "FLOAT16"


@pytest.mark.faults("pairs: a flipped bit")
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_flipped_bit_is_noticed_wherever_it_is(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, dtype: noise.Dtype
) -> None:
    """Every bit of a shard, pages, footer and seal; without the manifest."""
    uri, facts, (first, *_) = write_set(with_pairs(recipe, dtype=dtype))
    data = bytearray(Path(uri, first.name).read_bytes())
    monkeypatch.setattr(storage, "read_bytes", lambda place: bytes(data))
    assert len(pairs.load_shard(uri, facts, first.name).ids) == 16
    missed = []
    for bit in range(8 * len(data)):
        data[bit // 8] ^= 1 << bit % 8
        try:
            pairs.load_shard(uri, facts, first.name)
            missed.append(bit)
        except Refused:
            pass
        data[bit // 8] ^= 1 << bit % 8
    assert missed == []


@pytest.mark.faults("pairs: a flipped bit")
def test_a_flipped_bit_never_turns_into_other_tokens(recipe: Recipe) -> None:
    """Where the tokens alone are read, their pages' own checksums are what there is."""
    uri, facts, (first, *_) = write_set(recipe)
    place = Path(uri, first.name)
    good, column = place.read_bytes(), pq.read_metadata(place).row_group(0).column(3)
    expected, noticed = pairs._read_tokens(uri, facts, first.name), 0
    begin = column.dictionary_page_offset
    for bit in range(8 * begin, 8 * (begin + column.total_compressed_size), 5):
        data = bytearray(good)
        data[bit // 8] ^= 1 << bit % 8
        place.write_bytes(data)
        try:
            assert np.array_equal(pairs._read_tokens(uri, facts, first.name), expected)
        except ValueError as error:
            noticed += "is damaged" in str(error)
    assert noticed > 8 * column.total_compressed_size / 5 * 0.5
    place.write_bytes(good)


def test_a_set_of_the_version_before_is_read_and_goes_on(tmp_path: Path) -> None:
    """Made by commit 0845e7b: tensors, no seal, names without underscores."""
    recipe, place = tiny(tmp_path), tmp_path / "set"
    shutil.copytree(GOLDEN, place)
    uri, found = str(place), pairs.verify(str(place))
    facts = PairFacts.from_json(found["facts"])
    for shard in found["shards"]:
        rows = some_rows(facts, 16 * shard["number"], shard["rows"])
        assert all(np.array_equal(a, b) for a, b in zip(rows, pairs.read_shard(uri, facts, shard["name"]), strict=True))
    assert manifest.check_claim(uri, facts)
    assert len(manifest.records(uri, facts, manifest.committed(uri))) == 3
    assert [tokens.shape for tokens in pairs.tokens_of(uri, facts, [found["shards"][0]["name"]])] == [(16, 14)]
    stream = PairStream.open(uri, found["fingerprint"])
    assert len(list(stream.batches(0, 1, 8))) == 5

    whole = pairs.write_shard(uri, facts, pairs.table(facts, some_rows(facts, 32, 16)))
    (place / "manifest.json").unlink()
    manifest.claim(uri, facts, recipe)
    earlier = [Shard(**shard) for shard in found["shards"][:2]]
    manifest.finish(uri, facts, [*earlier, whole], {"rows": 16, "seconds": 1.0, "device": "cpu"})
    assert pairs.verify(uri)["count"] == 48
    names = ["_README.md", "_manifest.json", "_recipe.json", *(f"shard-0000{k}.parquet" for k in range(3))]
    assert storage.listing(uri) == names
    assert json.loads((place / "_recipe.json").read_text())["fingerprint"] == found["fingerprint"]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_stored_and_derived_noise_read_alike(recipe: Recipe, tmp_path: Path, dtype: noise.Dtype) -> None:
    recipe = with_pairs(recipe, dtype=dtype)
    stored, facts, shards = write_set(recipe)
    derived, facts_d, shards_d = write_set(with_pairs(recipe, noise="derived"), str(tmp_path / "derived"))
    assert "noise" not in pq.read_schema(Path(derived, shards_d[0].name)).names
    assert sum(shard.bytes for shard in shards_d) < 0.7 * sum(shard.bytes for shard in shards)
    for a, b in zip(shards, shards_d, strict=True):
        one, other = pairs.read_shard(stored, facts, a.name), pairs.read_shard(derived, facts_d, b.name)
        assert all(np.array_equal(x, y) for x, y in zip(one, other, strict=True))
        assert one.noise is not None
        assert one.noise.dtype == dtype
    for x, y in zip(PairStream.open(stored).batches(0, 5, 8), PairStream.open(derived).batches(0, 5, 8), strict=True):
        assert torch.equal(x.noise, y.noise)
        assert torch.equal(x.tokens, y.tokens)


def test_codes_outside_the_vocabulary_are_refused(recipe: Recipe) -> None:
    facts = PairFacts.of(recipe)
    rows = some_rows(facts, 0, 16)
    rows.tokens[3, 2] = 24
    with pytest.raises(ValueError, match=r"tokens run from 0 to 24; they must lie in the vocabulary of 24"):
        pairs.table(facts, rows)


def test_every_kind_of_damage_is_named(recipe: Recipe) -> None:
    uri, _, shards = write_set(recipe)
    place = Path(uri, shards[1].name)
    good = place.read_bytes()

    def complaint(data: bytes) -> str:
        place.write_bytes(data)
        with pytest.raises(ValueError, match=rf"{place.name} is damaged .*delete it and run generate_pairs") as got:
            pairs.verify(uri)
        assert "\n" not in str(got.value)
        return str(got.value)

    def encoded(table: pa.Table) -> bytes:
        return pairs._sealed(pairs._encoded(table))

    table = pq.read_table(place)
    complaint(good[:-100])  # truncated
    complaint(good[: len(good) // 2])
    complaint(b"")
    swapped = bytearray(good)
    swapped[40] ^= 1
    complaint(bytes(swapped))
    other = table.replace_schema_metadata({"made": "elsewhere"})
    assert "not those that the manifest lists" in complaint(encoded(other)), "same rows, other bytes"
    assert "lost its CRC-32" in complaint(pairs._encoded(table).replace(pairs.SEAL, b"?" * len(pairs.SEAL)))
    assert "rows are not the ids from 16 to 31" in complaint(encoded(table.slice(0, 10)))
    assert "rows are not the ids" in complaint(Path(uri, shards[0].name).read_bytes())
    assert "other names or types" in complaint(encoded(table.drop_columns(["label"])))
    labels = pa.array(np.zeros(16, dtype=np.int32))
    assert "labels are not those" in complaint(encoded(table.set_column(1, "label", labels)))
    place.write_bytes(good)
    assert pairs.verify(uri)["count"] == 40


# ---- folders


def test_facts_are_written_as_before_and_read_back(recipe: Recipe) -> None:
    """To the byte, order of keys included: they are in three files of every set, and their SHA-256 is its name."""
    golden = json.loads((GOLDEN / "recipe.json").read_text())
    facts = PairFacts.from_json(golden["facts"])
    assert json.dumps(facts.json()) == json.dumps(golden["facts"])
    assert facts.fingerprint == golden["fingerprint"]
    assert json.dumps(PairFacts.of(recipe).json()) == json.dumps(golden["facts"])
    for changed in (recipe, with_pairs(recipe, dtype="float32"), with_pairs(recipe, noise="derived")):
        facts = PairFacts.of(changed)
        assert PairFacts.from_json(json.loads(json.dumps(facts.json()))) == facts


def test_the_fingerprint_covers_what_shapes_rows_and_nothing_else(recipe: Recipe) -> None:
    def of(changed: Recipe) -> str:
        return PairFacts.of(changed).fingerprint

    same = [with_pairs(recipe, count=7), with_pairs(recipe, batch=3, actors=9), replace(recipe, name="x", run="/y")]
    same.append(with_pairs(recipe, uri="/elsewhere", verify=True))
    same.append(replace(recipe, teacher=replace(recipe.teacher, compile=True)))
    for wanted in (True, "auto"):
        same.append(replace(recipe, teacher=replace(recipe.teacher, graphs=wanted), cluster=ClusterSettings(gpus=1)))
    same.append(replace(recipe, teacher=replace(recipe.teacher, graphs="auto")))
    defaults = recipe.teacher.config | {"mlp_ratio": 4}
    same.append(replace(recipe, teacher=replace(recipe.teacher, config=defaults)))
    assert {of(changed) for changed in same} == {of(recipe)}
    solver = replace(recipe.pairs.solver, tolerance=1e-2)
    other = [with_pairs(recipe, **change) for change in ({"seed": 5}, {"noise": "derived"}, {"shard_rows": 8})]
    other.append(with_pairs(recipe, solver=solver))
    warm = replace(recipe.teacher, filter=replace(recipe.teacher.filter, temperature=2.0))
    other += [replace(recipe, teacher=warm), replace(recipe, teacher=replace(recipe.teacher, precision="bf16"))]
    Path(recipe.teacher.tokenizer).write_bytes(Path(recipe.teacher.tokenizer).read_bytes() + b" ")
    other.append(recipe)
    assert len({of(changed) for changed in other}) == len(other)


def test_a_folder_made_otherwise_is_refused_with_the_differences(recipe: Recipe) -> None:
    uri, _, _ = write_set(recipe)
    warm = replace(recipe.teacher, filter=replace(recipe.teacher.filter, guidance=3.0))
    changed = PairFacts.of(replace(with_pairs(recipe, seed=5), teacher=warm))
    with pytest.raises(ValueError, match=r"seed is 1 there and 5 here, teacher\.filter\.guidance is 1\.0 there"):
        manifest.check_claim(uri, changed)


def test_a_foreign_folder_is_refused(recipe: Recipe) -> None:
    place = Path(recipe.pairs_uri)
    place.mkdir(parents=True)
    (place / ".gitattributes").write_text("a fresh Hub repository")
    facts = PairFacts.of(recipe)
    assert not manifest.check_claim(str(place), facts)
    (place / "thesis.doc").write_text("precious")
    with pytest.raises(ValueError, match=r"is not empty \(thesis\.doc\) and holds no _recipe\.json"):
        manifest.claim(str(place), facts, recipe)
    assert sorted(path.name for path in place.iterdir()) == [".gitattributes", "thesis.doc"]


def test_a_claim_is_repeatable_and_sweeps_what_a_killed_writer_left(recipe: Recipe) -> None:
    facts, place = PairFacts.of(recipe), Path(recipe.pairs_uri)
    manifest.claim(str(place), facts, recipe)
    before = (place / "_recipe.json").read_bytes()
    assert json.loads(before)["fingerprint"] == facts.fingerprint
    (place / f"{storage.TEMPORARY}shard-00000.parquet-0123").write_bytes(b"half")
    manifest.claim(str(place), facts, recipe)
    assert [path.name for path in place.iterdir()] == ["_recipe.json"]
    assert (place / "_recipe.json").read_bytes() == before


def test_what_is_missing_follows_from_the_names(recipe: Recipe) -> None:
    facts = PairFacts.of(recipe)
    assert facts.shard_name(3, 16) == "shard-00003.parquet"
    assert facts.shard_name(123456, 5) == "shard-123456-5.parquet"
    assert facts.number_and_rows("shard-123456-5.parquet") == (123456, 5)
    assert facts.ids_of("shard-00002-5.parquet").tolist() == [32, 33, 34, 35, 36]
    assert [facts.shard_of(sample) for sample in (0, 15, 16)] == [0, 0, 1]
    assert [facts.rows_of(number, 40) for number in range(4)] == [16, 16, 8, 0]
    names = {"shard-00000.parquet", "shard-00002-8.parquet"}
    gap = Gap.among(names, facts, 40)
    assert gap.present == {0: "shard-00000.parquet", 1: None, 2: "shard-00002-8.parquet"}
    assert (gap.missing, gap.names, gap.rows_left) == ([1], sorted(names), 16)
    larger = Gap.among(names, facts, 44)
    assert (larger.missing, larger.rows_left) == ([1, 2], 28), "more rows are wanted than the short shard has"
    assert Gap.among(names, facts, 20, {"count": 40}) == gap, "a set never shrinks"
    whole = Gap.among({"shard-00002.parquet"}, facts, 40)
    assert whole.present[2] == "shard-00002.parquet", "more rows do no harm"


@pytest.mark.faults("pairs: workers write to another place")
def test_what_a_worker_says_it_wrote_is_looked_for(recipe: Recipe, tmp_path: Path) -> None:
    """Shards on another machine's disk, or cut short there: no manifest says that they are here."""
    uri, facts = recipe.pairs_uri, PairFacts.of(recipe)
    manifest.claim(uri, facts, recipe)
    here, there = pairs.table(facts, some_rows(facts, 0, 16)), pairs.table(facts, some_rows(facts, 16, 16))
    shards = [pairs.write_shard(uri, facts, here), pairs.write_shard(str(tmp_path / "elsewhere"), facts, there)]
    run = {"rows": 32, "seconds": 1.0, "device": "cpu"}
    with pytest.raises(Unfinished, match=r"^1 shards were committed but are not in .* \(shard-00001\.parquet\)"):
        manifest.finish(uri, facts, shards, run)
    pairs.write_shard(uri, facts, there)
    with pytest.raises(Unfinished, match=r"\(shard-00000\.parquet\)"):
        manifest.finish(uri, facts, [replace(shards[0], bytes=7), shards[1]], run)
    assert not manifest.complete(uri)
    assert manifest.finish(uri, facts, shards, run)["count"] == 32


@pytest.mark.faults("pairs: two drivers of different counts")
def test_the_driver_with_fewer_rows_takes_nothing_from_the_other(recipe: Recipe) -> None:
    """One of 20 rows ends after one of 32, whose whole shard has replaced the short one."""
    uri, facts = recipe.pairs_uri, PairFacts.of(recipe)
    manifest.claim(uri, facts, recipe)
    first, short, whole = (
        pairs.write_shard(uri, facts, pairs.table(facts, some_rows(facts, begin, count)))
        for begin, count in ((0, 16), (16, 4), (16, 16))
    )
    run = {"rows": 4, "seconds": 1.0, "device": "cpu"}
    manifest.finish(uri, facts, [first, whole], run | {"rows": 32})
    assert short.name not in manifest.committed(uri)
    found = manifest.finish(uri, facts, [first, short], run)
    assert [shard["name"] for shard in found["shards"]] == [first.name, whole.name]
    assert [made["rows"] for made in found["made"]] == [32, 4]
    assert pairs.verify(uri)["count"] == 32


def test_the_driver_with_fewer_rows_leaves_the_longer_shard_alone(recipe: Recipe) -> None:
    """One of 20 rows ends while one of 24 is at work."""
    uri, facts = recipe.pairs_uri, PairFacts.of(recipe)
    manifest.claim(uri, facts, recipe)
    first, short, longer = (
        pairs.write_shard(uri, facts, pairs.table(facts, some_rows(facts, begin, count)))
        for begin, count in ((0, 16), (16, 4), (16, 8))
    )
    run = {"rows": 4, "seconds": 1.0, "device": "cpu"}
    manifest.finish(uri, facts, [first, short], run)
    assert manifest.committed(uri).keys() == {first.name, short.name, longer.name}
    manifest.finish(uri, facts, [first, longer], run)
    assert manifest.committed(uri).keys() == {first.name, longer.name}


@pytest.mark.faults("pairs: two recipes in one folder")
def test_of_two_recipes_in_one_folder_one_has_it(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Claimed in the same moment, or after a start that made nothing; the one that lost it writes nothing more."""
    uri, other = recipe.pairs_uri, with_pairs(recipe, seed=5)
    facts, theirs = PairFacts.of(recipe), PairFacts.of(other)
    manifest.claim(uri, facts, recipe)
    manifest.claim(uri, theirs, other)
    run = {"rows": 16, "seconds": 1.0, "device": "cpu"}
    shard = pairs.write_shard(uri, theirs, pairs.table(theirs, some_rows(theirs, 0, 16)))
    with pytest.raises(ValueError, match=r"is another one's now: seed is 5 there and 1 here"):
        manifest.finish(uri, facts, [shard], run)
    with pytest.raises(ValueError, match="holds a pair set made otherwise"):
        manifest.claim(uri, facts, recipe)
    assert manifest.finish(uri, theirs, [shard], run)["count"] == 16

    write = storage.write_json

    def both(place: str, content: Any) -> None:
        write(place, content)
        write(place, content | {"fingerprint": theirs.fingerprint, "facts": theirs.json()})

    monkeypatch.setattr(storage, "write_json", both)
    with pytest.raises(ValueError, match="somebody else works in it"):
        manifest.claim(f"{uri}-2", facts, recipe)


def test_growth_replaces_the_short_shard_last(recipe: Recipe) -> None:
    uri, facts, shards = write_set(recipe)
    assert [shard.name for shard in shards] == [f"shard-0000{k}.parquet" for k in (0, 1)] + ["shard-00002-8.parquet"]
    whole = pairs.write_shard(uri, facts, pairs.table(facts, some_rows(facts, 32, 16)))
    assert pairs.verify(uri)["count"] == 40, "the old set is whole until the new manifest is there"
    grown = manifest.finish(uri, facts, [*shards[:2], whole], {"rows": 16, "seconds": 1.0, "device": "cpu"})
    assert grown["count"] == 48
    assert [run["rows"] for run in grown["made"]] == [40, 16]
    assert manifest.committed(uri).keys() == {f"shard-0000{k}.parquet" for k in range(3)}
    assert pairs.verify(uri) == grown


def test_manifest_and_card_say_what_is_there(recipe: Recipe) -> None:
    uri, facts, shards = write_set(recipe)
    found = manifest.read(uri, facts.fingerprint)
    assert [Shard(**shard) for shard in found["shards"]] == shards
    assert [storage.sha256(storage.join(uri, shard.name)) for shard in shards] == [shard.sha256 for shard in shards]
    assert found["noise_digest"] == noise.digest(1, 14, 4)
    assert set(found["made"][0]["versions"]) == {"torch", "numpy", "scipy", "pyarrow", "ray"}
    card = Path(uri, "_README.md").read_text()
    assert card.startswith("---\npretty_name:")
    for part in ("40 pairs", "float16 [14, 4], flat", found["fingerprint"], 'size_categories: ["n<1K"]'):
        assert part in card
    sizes = {999: "n<1K", 1000: "1K<n<10K", 1_200_000: "1M<n<10M"}
    assert {count: dataset_card._size(count) for count in sizes} == sizes


def test_noise_in_float32_is_another_set_of_twice_the_noise(recipe: Recipe) -> None:
    fine = with_pairs(recipe, dtype="float32")
    facts, facts_16 = PairFacts.of(fine), PairFacts.of(recipe)
    more = {"dtype": "float32"}  # float16 is not named, as in sets from before there was a choice
    assert facts.json() == facts_16.json() | more
    assert facts.row_bytes - facts_16.row_bytes == 2 * 14 * 4
    uri, _, shards = write_set(fine)
    pairs.verify(uri)
    frame = pq.read_table(Path(uri, shards[0].name)).to_pandas()
    assert np.array_equal(np.stack(frame["noise"]).reshape(16, 14, 4), noise.gaussian(1, range(16), 14, 4, "float32"))
    card = Path(uri, "_README.md").read_text()
    assert "| noise | float32 [14, 4], flat |" in card
    assert '`pipeline.noise.gaussian(1, sample_ids, 14, 4, "float32")`' in card
    with pytest.raises(ValueError, match="dtype is float32 there and unknown here"):
        manifest.check_claim(uri, facts_16)


def test_a_reader_refuses_what_it_must_not_read(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match="holds no pair set; run generate_pairs"):
        PairStream.open(recipe.pairs_uri)
    manifest.claim(recipe.pairs_uri, PairFacts.of(recipe), recipe)
    with pytest.raises(FileNotFoundError, match="holds a pair set that is not complete"):
        PairStream.open(recipe.pairs_uri)
    uri, facts, _ = write_set(recipe)
    with pytest.raises(ValueError, match="but this recipe describes ffffffffffff"):
        PairStream.open(uri, "f" * 64)
    gaussian = noise.gaussian
    monkeypatch.setattr(noise, "gaussian", lambda *args: -gaussian(*args))
    with pytest.raises(ValueError, match="this machine makes other noise from seed 1"):
        PairStream.open(uri, facts.fingerprint)


def test_a_bucket_works_like_a_disk(recipe: Recipe) -> None:
    uri, facts, shards = write_set(recipe, f"memory://bucket-{uuid.uuid4().hex}/pairs")
    assert pairs.verify(uri)["count"] == 40
    assert manifest.check_claim(uri, facts)
    assert storage.listing(uri) == sorted(["_README.md", "_manifest.json", "_recipe.json", *(s.name for s in shards)])
    assert len(list(PairStream.open(uri).batches(0, 1, 8))) == 5


# ---- token frequencies


def test_tokens_are_read_without_the_noise(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the pages that hold them: two thirds of a shard are noise."""
    uri, facts, shards = write_set(recipe)

    class Counted(io.BytesIO):
        read_bytes = 0

        def read(self, size: int | None = -1) -> bytes:
            data = super().read(size)
            Counted.read_bytes += len(data)
            return data

    @contextmanager
    def reading(place: str) -> Iterator[Counted]:
        yield Counted(Path(place).read_bytes())

    monkeypatch.setattr(storage, "reading", reading)
    tokens = np.concatenate(list(pairs.tokens_of(uri, facts, [shard.name for shard in shards[:2]])))
    assert np.array_equal(tokens, some_rows(facts, 0, 32).tokens)
    columns = pq.read_metadata(Path(uri, shards[0].name)).row_group(0)
    tokens = columns.column(3).total_compressed_size
    footers = sum(shard.bytes for shard in shards[:2]) - 2 * sum(
        columns.column(i).total_compressed_size for i in range(4)
    )
    assert Counted.read_bytes < 2 * tokens + 3 * footers


def test_token_frequencies_count_every_token(recipe: Recipe) -> None:
    uri, facts, _ = write_set(recipe)
    rows = some_rows(facts, 0, 40)
    slow = np.zeros((3, 14, 24), dtype=np.int64)
    for label, tokens in zip(rows.conditions, rows.tokens, strict=True):
        for position, token in enumerate(tokens):
            slow[label, position, token] += 1
    assert np.array_equal(pairs.token_frequencies(uri, by_class=True), slow)
    assert np.array_equal(pairs.token_frequencies(uri), slow.sum(0))


def test_token_frequencies_too_large_are_refused(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    uri, _, _ = write_set(recipe)
    monkeypatch.setattr(pairs, "FREQUENCIES", 8 * 14 * 24)
    pairs.token_frequencies(uri)
    with pytest.raises(ValueError, match="token frequencies of 3 classes need"):
        pairs.token_frequencies(uri, by_class=True)


# ---- the stream

WINDOWS = [1, 16 * 152 * 2, 1 << 30]  # bytes: one shard, two shards, the whole set


def ids(batches: Any) -> list[list[int]]:
    return [batch.ids.tolist() for batch in batches]


def joined(batches: Iterable[list[int]]) -> list[int]:
    return list(chain.from_iterable(batches))


@pytest.mark.parametrize("window", WINDOWS)
def test_an_epoch_is_a_permutation_that_depends_on_seed_and_epoch(recipe: Recipe, window: int) -> None:
    uri, _, _ = write_set(with_pairs(recipe, count=70))
    stream = PairStream.open(uri, window=window)
    seen = ids(stream.batches(0, 5, 10))
    order = joined(seen)
    assert sorted(order) == list(range(70))
    assert order == stream.order(0, 5).tolist()
    assert ids(PairStream.open(uri, window=window).batches(0, 5, 10)) == seen
    for epoch, seed in ((1, 5), (0, 6)):
        assert ids(stream.batches(epoch, seed, 10)) != seen
    mixed = sum(a // 16 != b // 16 for a, b in pairwise(order))
    assert mixed == 4 if window == 1 else mixed > 10, "rows are shuffled within a window and not beyond"


@pytest.mark.parametrize("window", WINDOWS)
def test_a_batch_carries_its_rows(recipe: Recipe, window: int) -> None:
    uri, facts, _ = write_set(recipe)
    rows = some_rows(facts, 0, 40)
    assert rows.noise is not None
    for batch in PairStream.open(uri, window=window).batches(2, 5, 6, rank=1, world=2):
        assert [batch.ids.dtype, batch.noise.dtype, batch.tokens.dtype] == [torch.int64, torch.float32, torch.int64]
        assert isinstance(batch.condition, Labels)
        assert batch.noise.shape == (3, 14, 4)
        at = batch.ids.numpy()
        assert np.array_equal(batch.condition.labels.numpy(), rows.conditions[at])
        assert np.array_equal(batch.noise.numpy(), rows.noise[at].astype(np.float32))
        assert np.array_equal(batch.tokens.numpy(), rows.tokens[at])


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("world", [2, 3])
def test_the_order_does_not_depend_on_the_workers(recipe: Recipe, window: int, world: int) -> None:
    uri, _, _ = write_set(with_pairs(recipe, count=70))
    alone = ids(PairStream.open(uri, window=window).batches(1, 9, 12))
    assert len(alone) == 70 // 12, "a short last batch is dropped"
    shares = [ids(PairStream.open(uri, window=window).batches(1, 9, 12, rank=r, world=world)) for r in range(world)]
    assert [joined(parts) for parts in zip(*shares, strict=True)] == alone


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("start", [0, 1, 4, 5])
def test_the_stream_resumes_within_an_epoch(recipe: Recipe, window: int, start: int) -> None:
    uri, _, _ = write_set(with_pairs(recipe, count=70))
    stream = PairStream.open(uri, window=window)
    whole = ids(stream.batches(3, 9, 12, rank=1, world=2))
    assert ids(stream.batches(3, 9, 12, start, rank=1, world=2)) == whole[start:]


@pytest.mark.parametrize("world", [3, 4, 7, 10])
def test_any_number_of_workers_shares_a_batch(recipe: Recipe, world: int) -> None:
    uri, _, _ = write_set(with_pairs(recipe, count=70))
    stream = PairStream.open(uri, window=1)
    shares = [ids(stream.batches(3, 9, 10, rank=rank, world=world)) for rank in range(world)]
    assert [joined(parts) for parts in zip(*shares, strict=True)] == ids(stream.batches(3, 9, 10))
    assert {len(part) for share in shares for part in share} <= {10 // world, -(-10 // world)}


def test_batches_may_be_larger_than_a_shard(recipe: Recipe) -> None:
    uri, _, _ = write_set(with_pairs(recipe, count=70))
    stream = PairStream.open(uri, window=1)
    assert joined(ids(stream.batches(0, 1, 35))) == stream.order(0, 1).tolist()


def test_a_stream_may_be_left_early(recipe: Recipe) -> None:
    uri, _, _ = write_set(recipe)
    for batch in PairStream.open(uri, window=1).batches(0, 1, 4):
        assert isinstance(batch, Pairs)
        break


def test_a_small_set_is_read_once_and_a_large_one_window_by_window(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, _, shards = write_set(recipe)
    read: list[str] = []
    load = pairs.load_shard

    def counted(uri: str, facts: PairFacts, name: str) -> Rows:
        read.append(name)
        return load(uri, facts, name)

    monkeypatch.setattr(pair_stream, "load_shard", counted)
    for window, reads in ((1 << 30, 1), (1, 2)):
        stream = PairStream.open(uri, window=window)
        read.clear()
        for epoch in (0, 1):
            assert len(list(stream.batches(epoch, 1, 8))) == 5
        assert sorted(read) == sorted([shard.name for shard in shards] * reads)
    read.clear()
    assert len(list(stream.batches(0, 1, 8, start=4))) == 1
    assert len(read) <= 2, "windows before the start are not read"


def test_the_shards_of_a_window_are_read_together(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each read waits until all of its window are under way; read one by one, the first would wait for ever."""
    uri, _, shards = write_set(with_pairs(recipe, count=70))
    together, load = threading.Barrier(len(shards)), pairs.load_shard

    def waiting(uri: str, facts: PairFacts, name: str) -> Rows:
        together.wait(10)
        return load(uri, facts, name)

    stream = PairStream.open(uri)
    monkeypatch.setattr(pair_stream, "load_shard", waiting)
    assert joined(ids(stream.batches(0, 1, 10))) == stream.order(0, 1).tolist()


@pytest.mark.parametrize("rank", [0, 1])
def test_the_next_epoch_is_read_before_this_one_ends(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    uri, _, shards = write_set(with_pairs(recipe, count=70))
    begun, load, read = threading.Event(), pairs.load_shard, []

    def counted(uri: str, facts: PairFacts, name: str) -> Rows:
        read.append(name)
        if len(read) > len(shards):
            begun.set()
        return load(uri, facts, name)

    stream = PairStream.open(uri, window=1)
    monkeypatch.setattr(pair_stream, "load_shard", counted)
    shares = stream.epochs(range(3), 5, 10, rank=rank, world=2)
    for epoch in range(3):
        for step in range(stream.steps(10)):
            number, share = next(shares)
            assert number == epoch
            whole = stream.order(epoch, 5)[10 * step : 10 * step + 10]
            assert share.ids.tolist() == whole[5 * rank : 5 * rank + 5].tolist()
            if (epoch, step) == (0, stream.steps(10) - 2):
                assert begun.wait(10), "the last batch is still to come, and nobody asks for the next epoch"
    assert next(shares, None) is None


def test_batches_that_cannot_be_shared_or_filled_are_refused(recipe: Recipe) -> None:
    uri, _, _ = write_set(recipe)
    stream = PairStream.open(uri)
    with pytest.raises(ValueError, match=r"a batch of 10 cannot be shared by 11 workers"):
        stream.batches(0, 1, 10, rank=0, world=11)
    with pytest.raises(ValueError, match=r"a batch of 41 is larger than the pair set, which has 40 rows"):
        stream.batches(0, 1, 41)
