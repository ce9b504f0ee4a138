"""The model card of a student, with the front matter that the Hugging Face Hub reads."""

from __future__ import annotations

import json
from typing import Any

from pipeline.report import markdown
from pipeline.report.names import metric_name
from pipeline.report.results import Results, Row

PICTURE = "samples.png"


def card(name: str, config: dict[str, Any], results: Results | None = None) -> str:
    """The text of the card of the student ``config``, what config.json holds; ``results`` are those of its report."""
    parts = [
        _front_matter(name, config, results),
        f"# {name}",
        _introduction(config),
        _drawing(config, "path or hf:// address of this folder"),
        _scores(results) if results else "No report of it has been made yet: `jobs/evaluate.py` completes this card.",
        _training(config),
        _LIMITS,
        _CITATION,
    ]
    return "\n\n".join(parts) + "\n"


def description(config: dict[str, Any] | None, results: Results, address: str, room: int) -> str:
    """The card for a page that knows neither front matter nor pictures and has ``room`` for so many characters.

    ``config`` is None for a student whose folder has no config.json, ``address`` what ``Generator.from_pretrained``
    takes. Its parts come whole or, from the first one that has no room left, not at all.
    """
    said = f"{markdown.headline(results)}."  # plain: tables of versions show the first words as they are
    parts = [f"{said} {_introduction(config)}" if config else said]
    parts += [_drawing(config, address)] if config else []
    parts += [f"## Scores\n\n{_table(results)}"]
    parts += [_training(config), _LIMITS] if config else []
    kept = next(n for n in range(len(parts), -1, -1) if len("\n\n".join(parts[:n])) <= room)
    return "\n\n".join(parts[:kept])


def _front_matter(name: str, config: dict[str, Any], results: Results | None) -> str:
    """YAML, every value as JSON, which YAML reads."""
    content: dict[str, Any] = {
        "license": "other",
        "license_name": "as-the-teacher",
        "library_name": "distilled-decoding",
        "pipeline_tag": "text-to-image" if config["text"] else "unconditional-image-generation",
        "tags": ["distilled-decoding", "image-generation", "autoregressive", "one-step"],
    }
    if results:
        content["model-index"] = [{"name": name, "results": [_result(results, row) for row in _of_student(results)]}]
    return "\n".join(["---", *(f"{key}: {json.dumps(value)}" for key, value in content.items()), "---"])


def _result(results: Results, row: Row) -> dict[str, Any]:
    """A row of the report as an entry of the model index."""
    reference = str(results["made"]["reference"]["uri"])
    return {
        "task": {"type": "image-generation", "name": row["name"]},
        "dataset": {"type": "reference", "name": reference},
        "metrics": [{"type": metric_name(results["title"]), "name": results["title"], "value": row["score"]}],
    }


def _of_student(results: Results) -> list[Row]:
    """The rows that this student drew; others may stand beside it."""
    return [row for row in results["rows"] if row["type"].startswith("DD") and not row.get("student")]


def _introduction(config: dict[str, Any]) -> str:
    family, side = config["family"].rpartition(".")[2], config["image_size"]
    what = "prompts" if config["text"] else f"{config['conditions'].get('classes')} classes"
    steps = ", ".join(map(str, config["start_steps"]))
    return (
        f"A one-step generator of {side}x{side} images from {what}, made from an auto-regressive teacher"
        f" (`{family}`) by [Distilled Decoding](https://arxiv.org/abs/2412.17153). It jumps from Gaussian noise to the"
        f" whole token sequence; it was trained to jump from the AR steps {steps}, and asking for several of them gives"
        " better images in as many steps."
    )


def _drawing(config: dict[str, Any], address: str) -> str:
    classes = config["conditions"].get("classes", 0)
    wanted = '["a bold seven"]' if config["text"] else str([label for label in (3, 7) if label < classes] or [0])
    steps = f"({', '.join(map(str, config['start_steps']))}{',' * (len(config['start_steps']) == 1)})"
    return f"""## How to draw

```python
from pipeline import Generator

generator = Generator.from_pretrained("{address}")
images = generator({wanted}, seeds=0)                  # one step
better = generator({wanted}, seeds=0, steps={steps})
images[0].save("image.png")
```

The same seed and sample id give the same image; labels and prompts are free."""


def _scores(results: Results) -> str:
    return f"## Scores\n\n![one column per noise, one row per sampler]({PICTURE})\n\n{_table(results)}"


def _table(results: Results) -> str:
    """The report's table, and what it was measured with."""
    count, reference = results["rows"][-1]["count"], results["made"]["reference"]["uri"]
    said = f"{results['title']}, {count:,} images a row, reference `{reference}`"
    report = f"report `{results['fingerprint'][:12]}`"
    return f"{markdown.table(results)}\n\n{said}; {report}.{_about_others(results)}"


def _about_others(results: Results) -> str:
    """Which rows of the table are not this student's; nothing where all are."""
    others = list(dict.fromkeys(row["student"] for row in results["rows"] if row.get("student")))
    if not others:
        return ""
    return f" Rows of {', '.join(others)} were drawn by other students, for the same conditions and noise."


def _training(config: dict[str, Any]) -> str:
    filters, teacher = config["filter"], config["teacher"]
    return f"""## How it was made

* {config["step"]:,} optimiser steps on {config["pairs_count"]:,} noise-token pairs, seed {config["pairs_seed"]},
  fingerprint `{config["pairs_fingerprint"]}`.
* Teacher: SHA-256 of its checkpoint `{teacher["checkpoint"]}`, of its tokenizer `{teacher["tokenizer"]}`.
* Distilled in: guidance {filters["guidance"]}, temperature {filters["temperature"]}, top-k {filters["top_k"]}, top-p \
{filters["top_p"]}. They cannot be changed when drawing.
* The first {config["split"]} AR steps take their tokens from the logits head, later ones from the embedding head."""


_LIMITS = """## Limits

One step has fewer details and less variety than the teacher; the table says how much. Its licence follows the teacher's
weights, from which it was trained, and the data behind them. Nothing here judges what is safe to draw."""

_CITATION = """## Citation

```bibtex
@inproceedings{liu2025distilled,
  title     = {Distilled Decoding 1: One-step Sampling of Image Auto-regressive Models with Flow Matching},
  author    = {Enshu Liu and Xuefei Ning and Yu Wang and Zinan Lin},
  booktitle = {International Conference on Learning Representations},
  year      = {2025}
}
```"""
