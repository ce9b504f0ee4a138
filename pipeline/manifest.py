"""The folder of a pair set: who owns it, what is missing from it, and when it is complete.

    <uri>/recipe.json               written first: claims the folder, holds the facts and their fingerprint
    <uri>/shard-00000.parquet ...   shard k holds the ids from k * shard_rows on; any worker can remake it, bit for bit
    <uri>/ledger.json               while shards are made: rows and SHA-256 of those that are there, now and then
    <uri>/manifest.json             written last: the set is complete; rows and SHA-256 of every shard
    <uri>/README.md                 dataset card

A last shard of fewer rows carries their number in its name (shard-00002-500.parquet). When ``pairs.count`` grows, the
whole shard is made under its own name, with the same first rows; the short one is deleted once the manifest no longer
lists it. So a listing alone says what is missing, and a reader never meets a half-grown set. A set never shrinks.

Knows names and JSON; the shards' content is ``pairs``'s.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import re
from collections.abc import Container, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pipeline import noise, storage
from pipeline.errors import Missing, Refused
from pipeline.models import checkpoints
from pipeline.models.base import Layout
from pipeline.recipe import Recipe, fingerprint, leaves

FORMAT = 1
SHARD = re.compile(r"shard-(\d{5,})(?:-(\d+))?\.parquet")
VERSIONS = ("torch", "numpy", "scipy", "pyarrow", "ray")

Facts = dict[str, Any]
"""What determines the rows of a set, as JSON values; made by ``facts``."""


@dataclass(frozen=True)
class Shard:
    """A committed shard, as the manifest lists it."""

    name: str
    number: int
    rows: int
    bytes: int
    sha256: str


# ---- what a set is


def facts(recipe: Recipe, layout: Layout, checksums: dict[str, str]) -> Facts:
    """Everything that the rows and their storage depend on; its ``fingerprint`` is the set's.

    ``checksums`` are ``checkpoints.checksums``. Left out: where the set lies, how many rows it has, and what may change
    float rounding but not the distribution (batch, actors, cores, device).
    """
    if layout.vocabulary > 2**16:
        raise Refused(f"the teacher has {layout.vocabulary} codes; a pair set stores tokens as uint16, up to 65536.")
    if not layout.classes:
        raise Refused(
            "the teacher takes captions, and there is no reader of captions here yet; give a class-conditional one."
        )
    teacher, pairs = asdict(recipe.teacher), asdict(recipe.pairs)
    named = {name: teacher[name] for name in ("family", "filter", "precision")}
    found = {
        "format": FORMAT,
        "teacher": named | {"config": asdict(checkpoints.config(recipe.teacher))} | checksums,
        "layout": asdict(layout),
        **{name: pairs[name] for name in ("seed", "solver", "noise", "shard_rows")},
    }
    if recipe.pairs.dtype != "float16":  # not named where it is: the sets from before there was a choice stay valid
        found["dtype"] = recipe.pairs.dtype
    return json.loads(json.dumps(found))  # tuples become lists, as they are when read back


def facts_of(recipe: Recipe) -> Facts:
    """The facts of the recipe's pair set; ValueError or FileNotFoundError for a teacher that is not there."""
    return facts(recipe, checkpoints.config(recipe.teacher).layout, checkpoints.checksums(recipe.teacher))


def noise_shape(known: Facts) -> tuple[int, int]:
    """(n, C): tokens of an image and dimensions of a code."""
    return sum(known["layout"]["groups"]), known["layout"]["code_dim"]


def noise_dtype(known: Facts) -> noise.Dtype:
    """What the noise of a set is rounded to."""
    return known.get("dtype", "float16")


def gaussian(known: Facts, ids: Sequence[int] | np.ndarray) -> np.ndarray:
    """The noise of a set's samples ``ids``, as its teacher sees it: [len(ids), n, C] of its dtype."""
    return noise.gaussian(known["seed"], ids, *noise_shape(known), noise_dtype(known))


def _noise_digest(known: Facts) -> str:
    return noise.digest(known["seed"], *noise_shape(known), noise_dtype(known))


# ---- which shards there are


def shard_name(number: int, rows: int, shard_rows: int) -> str:
    """A shard with fewer than ``shard_rows`` rows (the last of a count) says how many it has."""
    return f"shard-{number:05d}.parquet" if rows == shard_rows else f"shard-{number:05d}-{rows}.parquet"


def number_and_rows(name: str, shard_rows: int) -> tuple[int, int]:
    """The inverse of ``shard_name``."""
    match = SHARD.fullmatch(name)
    assert match, name
    return int(match[1]), int(match[2] or shard_rows)


def committed(uri: str) -> dict[str, int]:
    """Names of the shards in the folder and their bytes, by one listing."""
    return {name: size for name, size in storage.sizes(uri).items() if SHARD.fullmatch(name)}


def present(names: Container[str], count: int, shard_rows: int) -> dict[int, str | None]:
    """Number of each shard of ``count`` rows -> the committed file that holds its rows, None where it is missing."""
    out: dict[int, str | None] = {}
    for number in range(math.ceil(count / shard_rows)):
        whole = shard_name(number, shard_rows, shard_rows)
        short = shard_name(number, min(shard_rows, count - number * shard_rows), shard_rows)
        out[number] = next((name for name in (whole, short) if name in names), None)
    return out


# ---- what is known of them


def record(uri: str, known: Facts, shards: list[Shard]) -> None:
    """Write down what was committed, so that a run that goes on need not read it again for its SHA-256."""
    content = {"fingerprint": fingerprint(known), "shards": [asdict(shard) for shard in shards]}
    storage.write_json(_ledger(uri), content)


def recorded(uri: str, known: Facts, there: dict[str, int]) -> dict[str, Shard]:
    """The shards of ``there`` (name -> bytes) that a ledger or a manifest knows with as many bytes, by name."""
    found: dict[str, Shard] = {}
    for place in (storage.join(uri, "manifest.json"), _ledger(uri)):
        with suppress(FileNotFoundError):
            content = storage.read_json(place)
            if content["fingerprint"] == fingerprint(known):
                found |= {line["name"]: Shard(**line) for line in content["shards"]}
    return {name: shard for name, shard in found.items() if there.get(name) == shard.bytes}


def _ledger(uri: str) -> str:
    return storage.join(uri, "ledger.json")


# ---- claiming a folder


def check_claim(uri: str, known: Facts) -> bool:
    """Whether the folder already belongs to this set; ValueError if it belongs to something else."""
    with suppress(FileNotFoundError):  # asked for by name: a bucket lists 12,000 shards in seconds
        there = storage.read_json(storage.join(uri, "recipe.json"))
        if there["fingerprint"] != fingerprint(known):
            raise Refused(
                f"{uri} holds a pair set made otherwise: {_differences(there['facts'], known)}; set pairs.uri (or run)"
                " to another folder, or go back to the recipe that it was made with."
            )
        return True
    foreign = [name for name in storage.listing(uri) if not name.startswith(".")]
    if foreign:
        raise Refused(
            f"{uri} is not empty ({', '.join(foreign[:3])}{', ...' if len(foreign) > 3 else ''}) and holds no"
            " recipe.json, so it is no pair set; set pairs.uri to a new or empty folder."
        )
    return False


def claim(uri: str, known: Facts, recipe: Recipe) -> None:
    """Write recipe.json into a free folder, or do nothing in one of ours; sweep what killed writers left behind."""
    if not check_claim(uri, known):
        content = {"fingerprint": fingerprint(known), "facts": known, "recipe": recipe.resolved()}
        storage.write_json(storage.join(uri, "recipe.json"), content)
    storage.sweep(uri)


def _differences(there: Facts, here: Facts) -> str:
    """The first three settings in which two sets differ."""
    old, new = leaves(there), leaves(here)
    names = [name for name in sorted(old | new) if old.get(name) != new.get(name)]
    parts = [f"{name} is {old.get(name, 'unknown')} there and {new.get(name, 'unknown')} here" for name in names[:3]]
    return ", ".join(parts) + (f", and {len(names) - 3} more" if len(names) > 3 else "")


# ---- completing a set


def finish(uri: str, known: Facts, shards: list[Shard], made: dict[str, Any]) -> dict[str, Any]:
    """Write the card and manifest.json, then delete short shards that whole ones replaced; returns the manifest.

    ``made`` describes this run (rows, seconds, batch, device, MLflow run, ...) and joins those of earlier manifests.
    """
    place = storage.join(uri, "manifest.json")
    before = storage.read_json(place)["made"] if storage.exists(place) else []
    versions = {name: importlib.metadata.version(name) for name in VERSIONS}
    manifest = {
        "fingerprint": fingerprint(known),
        "count": sum(shard.rows for shard in shards),
        "bytes": sum(shard.bytes for shard in shards),
        "noise_digest": _noise_digest(known),
        "facts": known,
        "made": [*before, made | {"versions": versions}],
        "shards": [asdict(shard) for shard in sorted(shards, key=lambda shard: shard.number)],
    }
    storage.write_bytes(storage.join(uri, "README.md"), card(manifest).encode())
    storage.write_json(place, manifest)
    storage.remove(_ledger(uri))
    storage.sweep(uri)
    listed, whole = {shard.name for shard in shards}, {shard.number for shard in shards}
    for name in committed(uri).keys() - listed:
        number, rows = number_and_rows(name, known["shard_rows"])
        if number in whole and rows < known["shard_rows"]:
            storage.remove(storage.join(uri, name))
    return manifest


def read(uri: str, expected: str | None = None) -> dict[str, Any]:
    """The manifest of a complete set whose noise this machine can make again.

    ``expected`` is the fingerprint that the caller's recipe asks for. Raises FileNotFoundError for a set that is not
    there or not complete, and ValueError for another set or another noise, with one sentence.
    """
    if not storage.exists(storage.join(uri, "manifest.json")):
        begun = storage.exists(storage.join(uri, "recipe.json"))
        what = "holds a pair set that is not complete" if begun else "holds no pair set"
        raise Missing(f"{uri} {what}; run generate_pairs with this recipe first.")
    manifest = storage.read_json(storage.join(uri, "manifest.json"))
    known = manifest["facts"]
    if expected is not None and manifest["fingerprint"] != expected:
        raise Refused(
            f"{uri} holds the pair set {manifest['fingerprint'][:12]} but this recipe describes {expected[:12]}; run"
            " generate_pairs with this recipe, or set pairs.uri."
        )
    if _noise_digest(known) != manifest["noise_digest"]:
        made_with = {name: manifest["made"][-1]["versions"][name] for name in ("numpy", "scipy")}
        raise Refused(
            f"this machine makes other noise from seed {known['seed']} than the one that made {uri}; install the"
            f" versions that made it ({made_with})."
        )
    return manifest


def card(manifest: dict[str, Any]) -> str:
    """The dataset card, with the front matter that the Hugging Face Hub reads."""
    known, made = manifest["facts"], manifest["made"][-1]
    teacher, layout, filters = known["teacher"], known["layout"], known["teacher"]["filter"]
    (length, dim), dtype = noise_shape(known), noise_dtype(known)
    other = "" if dtype == "float16" else f', "{dtype}"'
    call = f"pipeline.noise.gaussian({known['seed']}, sample_ids, {length}, {dim}{other})"
    if known["noise"] == "stored":
        noise_row = f"| noise | {dtype} [{length}, {dim}] | standard normal, exactly what the teacher was given |\n"
        origin = f"The noise comes from `{call}`."
    else:
        noise_row = ""
        origin = f"The noise, {dtype} [{length}, {dim}], is not stored: `{call}` makes it."
    return f"""---
pretty_name: Noise-token pairs ({teacher["family"].rpartition(".")[2]})
tags: [distilled-decoding, image-generation, autoregressive]
size_categories: ["{_size(manifest["count"])}"]
configs:
- config_name: default
  data_files: "shard-*.parquet"
---

# Noise-token pairs

{manifest["count"]:,} pairs of Gaussian noise and the tokens that flow matching turns it into under the auto-regressive
teacher `{teacher["family"]}`, for Distilled Decoding (arXiv 2412.17153).

| column | type | |
|---|---|---|
| sample_id | uint64 | with seed {known["seed"]}, determines noise and label |
| label | int32 | class, sample_id modulo {layout["classes"]} |
{noise_row}| tokens | uint16 [{length}] | codes of a vocabulary of {layout["vocabulary"]} |

{origin}

* Teacher, {teacher["precision"]}: SHA-256 of the checkpoint `{teacher["checkpoint"]}`, of the tokenizer \
`{teacher["tokenizer"]}`.
* Filter: guidance {filters["guidance"]}, temperature {filters["temperature"]}, top-k {filters["top_k"]}, top-p \
{filters["top_p"]}.
* Solver: {", ".join(f"{name} {value}" for name, value in known["solver"].items())}.
* {len(manifest["shards"])} shards, {manifest["bytes"] / 1e6:,.1f} MB; the last run made {made["rows"]:,} rows in \
{made["seconds"]:,.0f} s on {made["device"]}.
* Fingerprint `{manifest["fingerprint"]}`; `manifest.json` holds the rest.
"""


def _size(count: int) -> str:
    """The Hub's size category."""
    names = ["1K", "10K", "100K", "1M", "10M", "100M", "1B"]
    power = len(str(count)) - 1  # 10^power <= count < 10^(power + 1)
    return "n<1K" if power < 3 else f"{names[power - 3]}<n<{names[power - 2]}"
