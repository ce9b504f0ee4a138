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

Knows files and JSON; what is in a shard is the business of ``shards``.
"""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Container, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from pipeline import storage
from pipeline.host.errors import Missing, Refused, Unfinished
from pipeline.pairs import dataset_card
from pipeline.pairs.facts import SHARD, PairFacts
from pipeline.recipe import Recipe, leaves

RECIPE, LEDGER, MANIFEST, CARD = "_recipe.json", "_ledger.json", "_manifest.json", "_README.md"
NAMED = 3  # files that a sentence names
VERSIONS = ("torch", "numpy", "scipy", "pyarrow", "ray")
TEXT_VERSIONS = ("transformers", "tokenizers", "ftfy", "beautifulsoup4")  # on which a prompt's features depend


@dataclass(frozen=True)
class Shard:
    """A committed shard, as the manifest lists it; ``host`` is the machine that made it, or empty."""

    name: str
    number: int
    rows: int
    bytes: int
    sha256: str
    host: str = ""


# ---- which shards there are


def committed(uri: str) -> dict[str, int]:
    """Names of the shards in the folder and their bytes, by one listing."""
    return shards_among(storage.sizes(uri))


def shards_among(files: dict[str, int]) -> dict[str, int]:
    """Those of a folder's files (name -> bytes) that are shards."""
    return {name: size for name, size in files.items() if SHARD.fullmatch(name)}


@dataclass(frozen=True)
class Gap:
    """What a folder lacks of a set of ``count`` rows.

    ``present`` has every shard of such a set: its number -> the committed file that holds its rows, None where there is
    none.
    """

    facts: PairFacts
    count: int
    present: dict[int, str | None]

    @classmethod
    def among(cls, names: Container[str], facts: PairFacts, count: int, complete: dict[str, Any] | None = None) -> Gap:
        """The gap that the shards called ``names`` leave, to ``count`` rows or to those of the ``complete`` set."""
        count = max(count, complete["count"] if complete else 0)  # a set never shrinks
        present: dict[int, str | None] = {}
        for number in range(math.ceil(count / facts.shard_rows)):
            sizes = (facts.shard_rows, facts.rows_of(number, count))  # one of more rows does as well
            candidates = (facts.shard_name(number, rows) for rows in sizes)
            present[number] = next((name for name in candidates if name in names), None)
        return cls(facts, count, present)

    @property
    def missing(self) -> list[int]:
        """Numbers of the shards that are to be made."""
        return [number for number, name in self.present.items() if name is None]

    @property
    def names(self) -> list[str]:
        """The files that hold the others."""
        return [name for name in self.present.values() if name is not None]

    def rows_of(self, number: int) -> int:
        """Rows that the set has in a shard."""
        return self.facts.rows_of(number, self.count)

    @property
    def rows_left(self) -> int:
        """Rows of the shards that are to be made."""
        return sum(map(self.rows_of, self.missing))


# ---- what is written of them


def record(uri: str, facts: PairFacts, shards: list[Shard]) -> None:
    """Write down what was committed, so that a run that goes on need not read it again for its SHA-256."""
    content = {"fingerprint": facts.fingerprint, "shards": [asdict(shard) for shard in shards]}
    storage.write_json(storage.join(uri, LEDGER), content)


def records(uri: str, facts: PairFacts, sizes: dict[str, int]) -> dict[str, Shard]:
    """The shards of ``sizes`` (name -> bytes) that a ledger or a manifest knows with as many bytes, by name."""
    lines: dict[str, Shard] = {}
    for content in (complete(uri), _content(uri, LEDGER)):
        if content and content["fingerprint"] == facts.fingerprint:
            lines |= {line["name"]: Shard(**line) for line in content["shards"]}
    return {name: shard for name, shard in lines.items() if sizes.get(name) == shard.bytes}


def complete(uri: str) -> dict[str, Any] | None:
    """The manifest of a complete set, as it stands there; None without one."""
    return _content(uri, MANIFEST)


def facts_of(recipe: Recipe, checksums: dict[str, str] | None = None) -> PairFacts:
    """The facts of the recipe's pair set: of a complete one also where its list of prompts is gone.

    Its shards hold the prompts, and the manifest says whose they are. Raises as ``PairFacts.of``.
    """
    uri, captions = recipe.captions.uri, None
    if uri and not storage.exists(uri) and (content := complete(recipe.pairs_uri)):
        captions = content["facts"].get("captions")
    return PairFacts.of(recipe, checksums, captions)


def begun(uri: str) -> bool:
    """Whether somebody has claimed the folder for a set."""
    return _content(uri, RECIPE) is not None


def _content(uri: str, name: str) -> Any:
    """What is in one of the set's JSON files, under its name or that of earlier versions; None if there is none."""
    for place in (name, _earlier(name)):
        with suppress(FileNotFoundError):  # asked for by name: to list a bucket of many shards takes longer
            return storage.read_json(storage.join(uri, place))
    return None


def _earlier(name: str) -> str:
    """What earlier versions called the file."""
    return name.removeprefix("_")


# ---- claiming a folder


def check_claim(uri: str, facts: PairFacts) -> bool:
    """Whether the folder already belongs to this set; ValueError if it belongs to something else.

    A claim without a single shard, left by a start that failed, holds nothing and may be replaced.
    """
    owner = _content(uri, RECIPE)
    if owner is not None and "facts" in owner:
        if owner["fingerprint"] == facts.fingerprint:
            return True
        if committed(uri) or complete(uri):
            raise Refused(
                f"{uri} holds a pair set made otherwise: {_differences(owner['facts'], facts)}; set pairs.uri (or run)"
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


def claim(uri: str, facts: PairFacts, recipe: Recipe) -> None:
    """Write _recipe.json into a free folder, or do nothing in one of ours; sweep what killed writers left behind.

    Raises ValueError if another recipe claims it in the same moment: of two, the last one to write has it.
    """
    if not check_claim(uri, facts):
        content = {"fingerprint": facts.fingerprint, "facts": facts.json(), "recipe": recipe.resolved()}
        storage.write_json(storage.join(uri, RECIPE), content)
        storage.remove(storage.join(uri, _earlier(RECIPE)))
        check_owner(uri, facts)
    storage.sweep(uri)


def check_owner(uri: str, facts: PairFacts) -> None:
    """ValueError unless the folder still belongs to this set; asked before anything is written into it."""
    owner = _content(uri, RECIPE)
    if owner is None or owner["fingerprint"] != facts.fingerprint:
        state = "is gone" if owner is None else f"is another one's now: {_differences(owner['facts'], facts)}"
        raise Refused(
            f"{storage.join(uri, RECIPE)}, which says whose the folder is, {state}; somebody else works in it. Set"
            " pairs.uri (or run) to a folder of its own, and run the same command again."
        )


def _differences(theirs: dict[str, Any], ours: PairFacts) -> str:
    """The first three settings in which two sets differ; ``theirs`` are the facts in a file, which may be anybody's."""
    old, new = leaves(theirs), leaves(ours.json())
    names = [name for name in sorted(old | new) if old.get(name) != new.get(name)]
    parts = [f"{name} is {old.get(name, 'unknown')} there and {new.get(name, 'unknown')} here" for name in names[:3]]
    return ", ".join(parts) + (f", and {len(names) - 3} more" if len(names) > 3 else "")


# ---- completing a set


def finish(uri: str, facts: PairFacts, shards: list[Shard], run: dict[str, Any]) -> dict[str, Any]:
    """Write the card and the manifest, then delete what they make superfluous; returns the manifest.

    ``run`` describes this one (rows, seconds, batch, device, MLflow run, ...) and joins those of earlier manifests. A
    driver that has completed more rows of the same set in the meantime keeps them. Raises ValueError if the folder has
    another owner by now and RuntimeError if a shard is not there, as its listing has it.
    """
    check_owner(uri, facts)
    before = complete(uri) or {"made": [], "shards": []}
    best = {shard.number: shard for shard in sorted(shards, key=lambda shard: shard.rows)}
    for shard in (Shard(**line) for line in before["shards"]):
        if shard.number not in best or shard.rows > best[shard.number].rows:
            best[shard.number] = shard
    files = storage.sizes(uri)
    _check_presence(uri, best.values(), files)
    packages = (*VERSIONS, *(TEXT_VERSIONS if facts.encoder else ()))
    run = run | {"versions": {name: importlib.metadata.version(name) for name in packages}}
    manifest = {
        "fingerprint": facts.fingerprint,
        "count": sum(shard.rows for shard in best.values()),
        "bytes": sum(shard.bytes for shard in best.values()),
        "noise_digest": facts.noise_digest(),
        "facts": facts.json(),
        "made": [*(other for other in before["made"] if other != run), run],  # once, though it may be said again
        "shards": [asdict(best[number]) for number in sorted(best)],
    }
    if not storage.exists(storage.join(uri, RECIPE)):  # a set of an earlier version
        storage.write_json(storage.join(uri, RECIPE), _content(uri, RECIPE))
    storage.write_bytes(storage.join(uri, CARD), dataset_card.card(manifest, MANIFEST).encode())
    storage.write_json(storage.join(uri, MANIFEST), manifest)
    tidy(uri, manifest, [*files, MANIFEST])
    return manifest


def _check_presence(uri: str, shards: Iterable[Shard], sizes: dict[str, int]) -> None:
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
    facts = PairFacts.from_json(manifest["facts"])
    rows = {shard["number"]: shard["rows"] for shard in manifest["shards"]}
    useless = {LEDGER, _earlier(LEDGER)}
    if MANIFEST in files:
        useless |= {_earlier(name) for name in (RECIPE, MANIFEST, CARD)}
    for name in files:
        number, size = facts.number_and_rows(name) if SHARD.fullmatch(name) else (-1, 0)
        if name in useless or size < rows.get(number, 0):
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
        what = "holds a pair set that is not complete" if begun(uri) else "holds no pair set"
        raise Missing(f"{uri} {what}; run generate_pairs with this recipe first.")
    if expected is not None and manifest["fingerprint"] != expected:
        raise Refused(
            f"{uri} holds the pair set {manifest['fingerprint'][:12]} but this recipe describes {expected[:12]}; run"
            " generate_pairs with this recipe, or set pairs.uri."
        )
    facts = PairFacts.from_json(manifest["facts"])
    if facts.noise_digest() != manifest["noise_digest"]:
        versions = {name: manifest["made"][-1]["versions"][name] for name in ("numpy", "scipy")}
        raise Refused(
            f"this machine makes other noise from seed {facts.seed} than the one that made {uri}; install the"
            f" versions that made it ({versions})."
        )
    return manifest


def describe(uri: str, manifest: dict[str, Any]) -> str:
    """Half a sentence on a complete set: where it is, rows, shards, bytes and fingerprint."""
    size = f"{len(manifest['shards'])} shards, {manifest['bytes'] / 1e6:,.1f} MB"
    return f"{uri} holds {manifest['count']:,} pairs ({size}), fingerprint {manifest['fingerprint'][:12]}"
