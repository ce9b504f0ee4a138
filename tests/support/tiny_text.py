"""A tiny text encoder in Hugging Face's layout, written to a folder by hand: what tests with prompts run on.

A T5 of two layers with a gated GELU, as FLAN-T5 has it, and a tokenizer of whole words. transformers is not needed to
write it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from pipeline.text import encoder_files

SPECIAL = ("<pad>", "</s>", "<unk>")  # ids 0, 1, 2
WORDS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
    *("a", "thin", "bold", "at", "the", "top", "left", "right"),
)


def config(dim: int = 16, words: int = len(WORDS), **changes: Any) -> dict[str, Any]:
    """The content of config.json."""
    sizes = {"d_model": dim, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    rest = {"feed_forward_proj": "gated-gelu", "relative_attention_num_buckets": 32, "tie_word_embeddings": False}
    return {"model_type": "t5", "vocab_size": len(SPECIAL) + words} | sizes | rest | changes


def weights(config: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """Weights float32 by name, under a fixed seed, of such a size that every part matters."""
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for name, shape in encoder_files.shapes(config).items():
        drawn = torch.randn(shape, generator=generator)
        if name.endswith("norm.weight"):
            out[name] = 1 + 0.2 * drawn
        elif "relative" in name or name == encoder_files.EMBEDDING:
            out[name] = drawn
        else:
            out[name] = drawn / shape[-1] ** 0.5
    return out


def tokenizer(words: Sequence[str] = WORDS) -> dict[str, Any]:
    """The content of tokenizer.json: words between blanks, each one token or <unk>, and the end token behind them."""
    special = [
        {"id": i, "content": token, "single_word": False, "lstrip": False, "rstrip": False}
        | {"normalized": False, "special": True}
        for i, token in enumerate(SPECIAL)
    ]
    end = {"SpecialToken": {"id": "</s>", "type_id": 0}}
    template = {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}, end]}
    template |= {"pair": [{"Sequence": {"id": "A", "type_id": 0}}, end, {"Sequence": {"id": "B", "type_id": 0}}, end]}
    template["special_tokens"] = {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}}  # type: ignore[assignment]
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *words])}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": template,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"},
    }


def tiny_encoder(folder: Path, dim: int = 16, vocabulary: Sequence[str] = WORDS, **changes: Any) -> Path:
    """Write an encoder whose features have ``dim`` numbers, and return its folder; ``changes`` are of config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    content = config(dim, len(vocabulary), **changes)
    (folder / "config.json").write_text(json.dumps(content))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer(vocabulary)))
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 10**9} | special
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    save_file(weights(content), folder / "model.safetensors")
    return folder
