"""The folder of a pair set: who owns it, what is missing from it, and when it is complete.

    <uri>/_recipe.json              written first: claims the folder, holds the facts and their fingerprint
    <uri>/shard-00000.parquet ...   shard k holds the ids from k * shard_rows on; any worker can remake it
    <uri>/_ledger.json              while shards are made: rows and SHA-256 of those that are there, now and then
    <uri>/_manifest.json            written last: the set is complete; rows and SHA-256 of every shard
    <uri>/_README.md                dataset card

Readers of a folder of Parquet take no notice of names that begin with an underscore. Earlier versions wrote the four
without it; such a set is read, and gets the new names when it is completed or grows.

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
from collections.abc import Container, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pipeline import noise, storage
from pipeline.host.errors import Missing, Refused, Unfinished
from pipeline.models import checkpoints
from pipeline.models.base import Layout
from pipeline.recipe import Recipe, fingerprint, leaves

RECIPE, LEDGER, MANIFEST, CARD = "_recipe.json", "_ledger.json", "_manifest.json", "_README.md"
FORMAT = 1
NAMED = 3  # files that a sentence names
SHARD = re.compile(r"shard-(\d{5,})(?:-(\d+))?\.parquet")
VERSIONS = ("torch", "numpy", "scipy", "pyarrow", "ray")

Facts = dict[str, Any]
"""What determines the rows of a set, as JSON values; made by ``facts``."""


@dataclass(frozen=True)
class Shard:
    """A committed shard, as the manifest lists it; ``host`` is the machine that made it, or empty."""

    name: str
    number: int
    rows: int
    bytes: int
    sha256: str
    host: str = ""


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


def ids_of(name: str, known: Facts) -> np.ndarray:
    """The sample ids of a shard's rows, int64 [rows], by its name."""
    number, rows = number_and_rows(name, known["shard_rows"])
    return number * known["shard_rows"] + np.arange(rows)


def committed(uri: str) -> dict[str, int]:
    """Names of the shards in the folder and their bytes, by one listing."""
    return shards_among(storage.sizes(uri))


def shards_among(files: dict[str, int]) -> dict[str, int]:
    """Those of a folder's files (name -> bytes) that are shards."""
    return {name: size for name, size in files.items() if SHARD.fullmatch(name)}


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
    storage.write_json(storage.join(uri, LEDGER), content)


def recorded(uri: str, known: Facts, there: dict[str, int]) -> dict[str, Shard]:
    """The shards of ``there`` (name -> bytes) that a ledger or a manifest knows with as many bytes, by name."""
    found: dict[str, Shard] = {}
    for content in (complete(uri), _stored(uri, LEDGER)):
        if content and content["fingerprint"] == fingerprint(known):
            found |= {line["name"]: Shard(**line) for line in content["shards"]}
    return {name: shard for name, shard in found.items() if there.get(name) == shard.bytes}


def complete(uri: str) -> dict[str, Any] | None:
    """The manifest of a complete set, as it stands there; None without one."""
    return _stored(uri, MANIFEST)


def begun(uri: str) -> bool:
    """Whether somebody has claimed the folder for a set."""
    return _stored(uri, RECIPE) is not None


def _stored(uri: str, name: str) -> Any:
    """The content of one of the set's JSON files, under its name or that of earlier versions; None if there is none."""
    for place in (name, _earlier(name)):
        with suppress(FileNotFoundError):  # asked for by name: to list a bucket of many shards takes longer
            return storage.read_json(storage.join(uri, place))
    return None


def _earlier(name: str) -> str:
    """What earlier versions called the file."""
    return name.removeprefix("_")


# ---- claiming a folder


def check_claim(uri: str, known: Facts) -> bool:
    """Whether the folder already belongs to this set; ValueError if it belongs to something else.

    A claim without a single shard, left by a start that failed, holds nothing and may be replaced.
    """
    there = _stored(uri, RECIPE)
    if there is not None and "facts" in there:
        if there["fingerprint"] == fingerprint(known):
            return True
        if committed(uri) or complete(uri):
            raise Refused(
                f"{uri} holds a pair set made otherwise: {_differences(there['facts'], known)}; set pairs.uri (or run)"
                " to another folder, or go back to the recipe that it was made with."
            )
        return False
    foreign = [name for name in storage.listing(uri) if not name.startswith(".")]
    if foreign:
        raise Refused(
            f"{uri} is not empty ({', '.join(foreign[:NAMED])}{', ...' if len(foreign) > NAMED else ''}) and holds no"
            f" {RECIPE} of a pair set; set pairs.uri to a new or empty folder."
        )
    return False


def claim(uri: str, known: Facts, recipe: Recipe) -> None:
    """Write _recipe.json into a free folder, or do nothing in one of ours; sweep what killed writers left behind.

    Raises ValueError if another recipe claims it in the same moment: of two, the last one to write has it.
    """
    if not check_claim(uri, known):
        content = {"fingerprint": fingerprint(known), "facts": known, "recipe": recipe.resolved()}
        storage.write_json(storage.join(uri, RECIPE), content)
        storage.remove(storage.join(uri, _earlier(RECIPE)))
        check_owner(uri, known)
    storage.sweep(uri)


def check_owner(uri: str, known: Facts) -> None:
    """ValueError unless the folder still belongs to this set; asked before anything is written into it."""
    there = _stored(uri, RECIPE)
    if there is None or there["fingerprint"] != fingerprint(known):
        found = "is gone" if there is None else f"is another one's now: {_differences(there['facts'], known)}"
        raise Refused(
            f"{storage.join(uri, RECIPE)}, which says whose the folder is, {found}; somebody else works in it. Set"
            " pairs.uri (or run) to a folder of its own, and run the same command again."
        )


def _differences(there: Facts, here: Facts) -> str:
    """The first three settings in which two sets differ."""
    old, new = leaves(there), leaves(here)
    names = [name for name in sorted(old | new) if old.get(name) != new.get(name)]
    parts = [f"{name} is {old.get(name, 'unknown')} there and {new.get(name, 'unknown')} here" for name in names[:3]]
    return ", ".join(parts) + (f", and {len(names) - 3} more" if len(names) > 3 else "")


# ---- completing a set


def finish(uri: str, known: Facts, shards: list[Shard], made: dict[str, Any]) -> dict[str, Any]:
    """Write the card and the manifest, then delete what they make superfluous; returns the manifest.

    ``made`` describes this run (rows, seconds, batch, device, MLflow run, ...) and joins those of earlier manifests. A
    driver that has completed more rows of the same set in the meantime keeps them. Raises ValueError if the folder has
    another owner by now and RuntimeError if a shard is not there, as its listing has it.
    """
    check_owner(uri, known)
    before = complete(uri) or {"made": [], "shards": []}
    best = {shard.number: shard for shard in sorted(shards, key=lambda shard: shard.rows)}
    for shard in (Shard(**line) for line in before["shards"]):
        if shard.number not in best or shard.rows > best[shard.number].rows:
            best[shard.number] = shard
    files = storage.sizes(uri)
    _check_there(uri, best.values(), files)
    versions = {name: importlib.metadata.version(name) for name in VERSIONS}
    run = made | {"versions": versions}
    manifest = {
        "fingerprint": fingerprint(known),
        "count": sum(shard.rows for shard in best.values()),
        "bytes": sum(shard.bytes for shard in best.values()),
        "noise_digest": _noise_digest(known),
        "facts": known,
        "made": [*(other for other in before["made"] if other != run), run],  # once, though it may be said again
        "shards": [asdict(best[number]) for number in sorted(best)],
    }
    if not storage.exists(storage.join(uri, RECIPE)):  # a set of an earlier version
        storage.write_json(storage.join(uri, RECIPE), _stored(uri, RECIPE))
    storage.write_bytes(storage.join(uri, CARD), card(manifest).encode())
    storage.write_json(storage.join(uri, MANIFEST), manifest)
    tidy(uri, manifest, [*files, MANIFEST])
    return manifest


def _check_there(uri: str, shards: Iterable[Shard], sizes: dict[str, int]) -> None:
    """RuntimeError naming shards that were committed and that this machine does not see as they were written."""
    missing = [shard.name for shard in shards if sizes.get(shard.name) != shard.bytes]
    if missing:
        raise Unfinished(
            f"{len(missing)} shards were committed but are not in {uri} as they were written"
            f" ({', '.join(missing[:NAMED])}{', ...' if len(missing) > NAMED else ''}): the workers write to another"
            " place than this machine reads. Give --run an s3:// or gs:// URI or a folder that all nodes share."
        )


def tidy(uri: str, manifest: dict[str, Any], files: Iterable[str]) -> None:
    """Delete those of the folder's files that the complete set no longer needs; a killed driver may have left them.

    They are the ledger, what killed writers left, files of earlier names, and short shards that longer ones replaced:
    nothing that another driver needs which is about to complete more rows.
    """
    rows = {shard["number"]: shard["rows"] for shard in manifest["shards"]}
    useless = {LEDGER, _earlier(LEDGER)}
    if MANIFEST in files:
        useless |= {_earlier(name) for name in (RECIPE, MANIFEST, CARD)}
    for name in files:
        number, held = number_and_rows(name, manifest["facts"]["shard_rows"]) if SHARD.fullmatch(name) else (-1, 0)
        if name in useless or held < rows.get(number, 0):
            storage.remove(storage.join(uri, name))
    if any(name.startswith(storage.TEMPORARY) for name in files):
        storage.sweep(uri)


def read(uri: str, expected: str | None = None) -> dict[str, Any]:
    """The manifest of a complete set whose noise this machine can make again.

    ``expected`` is the fingerprint that the caller's recipe asks for. Raises FileNotFoundError for a set that is not
    there or not complete, and ValueError for another set or another noise, with one sentence.
    """
    manifest = complete(uri)
    if manifest is None:
        begun = _stored(uri, RECIPE) is not None
        what = "holds a pair set that is not complete" if begun else "holds no pair set"
        raise Missing(f"{uri} {what}; run generate_pairs with this recipe first.")
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
        shape = f"{length}, {dim}"
        noise_row = f"| noise | {dtype} [{shape}], flat | standard normal, exactly what the teacher was given |\n"
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
* Fingerprint `{manifest["fingerprint"]}`; `{MANIFEST}` holds the rest.
"""


def _size(count: int) -> str:
    """The Hub's size category."""
    names = ["1K", "10K", "100K", "1M", "10M", "100M", "1B"]
    power = len(str(count)) - 1  # 10^power <= count < 10^(power + 1)
    return "n<1K" if power < 3 else f"{names[power - 3]}<n<{names[power - 2]}"
