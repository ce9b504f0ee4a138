"""The dataset card of a pair set, with the front matter that the Hugging Face Hub reads."""

from __future__ import annotations

from typing import Any

from pipeline.pairs.facts import PairFacts


def card(manifest: dict[str, Any], name: str) -> str:
    """The text of the card of a complete set, whose manifest lies beside it as the file ``name``."""
    facts, run = PairFacts.from_json(manifest["facts"]), manifest["made"][-1]
    teacher, filters = facts.teacher, facts.teacher["filter"]
    length, dtype, shape = facts.length, facts.dtype, f"{facts.length}, {facts.dim}"
    other = "" if dtype == "float16" else f', "{dtype}"'
    call = f"pipeline.noise.gaussian({facts.seed}, sample_ids, {shape}{other})"
    if facts.noise_is_stored:
        noise_row = f"| noise | {dtype} [{shape}], flat | standard normal, exactly what the teacher was given |\n"
        origin = f"The noise comes from `{call}`."
    else:
        noise_row = ""
        origin = f"The noise, {dtype} [{shape}], is not stored: `{call}` makes it."
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
| sample_id | uint64 | with seed {facts.seed}, determines noise and {"prompt" if facts.captions else "label"} |
{_condition_row(facts)}
{noise_row}| tokens | uint16 [{length}] | codes of a vocabulary of {facts.codes} |

{origin}

* Teacher, {teacher["precision"]}: SHA-256 of the checkpoint `{teacher["checkpoint"]}`, of the tokenizer \
`{teacher["tokenizer"]}`.{_of_text(facts)}
* Filter: guidance {filters["guidance"]}, temperature {filters["temperature"]}, top-k {filters["top_k"]}, top-p \
{filters["top_p"]}.
* Solver: {", ".join(f"{name} {value}" for name, value in facts.solver.items())}.
* {len(manifest["shards"])} shards, {manifest["bytes"] / 1e6:,.1f} MB; the last run made {run["rows"]:,} rows in \
{run["seconds"]:,.0f} s on {run["device"]}.
* Fingerprint `{manifest["fingerprint"]}`; `{name}` holds the rest.
"""


def _condition_row(facts: PairFacts) -> str:
    """The table's row of the column that says what a pair was drawn for."""
    if facts.captions:
        return (
            f"| prompt | string | as it was given: row (sample_id modulo {facts.captions['rows']:,}) of the prompts |"
        )
    return f"| label | int32 | class, sample_id modulo {facts.layout.classes} |"


def _of_text(facts: PairFacts) -> str:
    """Where prompts and features come from; nothing of a teacher that takes classes."""
    lines = ""
    if facts.captions:
        column = f", column {facts.captions['column']}" if facts.captions["column"] else ""
        lines += f"\n* Prompts: {facts.captions['rows']:,} rows{column}, SHA-256 `{facts.captions['sha256']}`."
    if facts.encoder:
        clean = facts.encoder["clean"] or "none"
        lines += (
            f"\n* Text encoder, {facts.encoder['precision']}, at most {facts.encoder['length']} tokens,"
            f" cleaning {clean}: SHA-256 of its weights `{facts.encoder['weights']}`, of its"
            f" tokenizer `{facts.encoder['tokenizer']}`."
        )
    return lines


def _size(count: int) -> str:
    """The Hub's size category."""
    names = ["1K", "10K", "100K", "1M", "10M", "100M", "1B"]
    power = len(str(count)) - 1  # 10^power <= count < 10^(power + 1)
    return "n<1K" if power < 3 else f"{names[power - 3]}<n<{names[power - 2]}"
