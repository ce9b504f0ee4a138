"""A CLIP model of a few thousand random weights, in a folder as Hugging Face lays it out: what the tests score with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.numerics import torchvision_ops  # noqa: F401  before transformers imports torchvision

transformers = pytest.importorskip("transformers")

SIDE, LENGTH = 12, 8  # pixels that it sees; tokens that it reads
WORDS = ["a", "the", "bold", "thin", "red", "big", "zero", "one", "two", "three", "four", "five", "at", "top", "left"]
START, END = "<|startoftext|>", "<|endoftext|>"
MEAN, DEVIATION = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]


def tiny_clip(folder: Path, shard: str | int = "50GB") -> Path:
    """Write the model, its tokenizer and its preparation; ``shard`` is the size of a file of weights. Returns it."""
    vocabulary = {word: i for i, word in enumerate(["<unk>", *WORDS, START, END])}
    both: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    both |= {"num_attention_heads": 2}
    tokens = {"bos_token_id": vocabulary[START], "eos_token_id": vocabulary[END], "pad_token_id": 0}
    text = both | tokens | {"vocab_size": len(vocabulary), "max_position_embeddings": LENGTH}
    vision = both | {"image_size": SIDE, "patch_size": 4}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.CLIPModel(config)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.ndim > 1:  # the norms stay as they are, so that images and prompts are told apart
                    torch.nn.init.normal_(weight, std=0.5)
    model.save_pretrained(folder, max_shard_size=shard)
    write(folder / "tokenizer.json", _tokenizer(vocabulary))
    special = {"bos_token": START, "eos_token": END, "unk_token": "<unk>", "pad_token": END}
    write(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"} | special)
    size = {"height": SIDE, "width": SIDE}
    preparation = {"size": {"shortest_edge": SIDE}, "crop_size": size, "resample": 3, "do_rescale": True}
    preparation |= {"image_mean": MEAN, "image_std": DEVIATION, "image_processor_type": "CLIPImageProcessor"}
    write(folder / "preprocessor_config.json", preparation)
    return folder


def write(place: Path, content: dict[str, Any]) -> None:
    """A JSON file."""
    place.write_text(json.dumps(content))


def _tokenizer(vocabulary: dict[str, int]) -> dict[str, Any]:
    """Words between blanks, START before them and END behind."""

    def special(word: str) -> dict[str, Any]:
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        return {"id": vocabulary[word], "content": word} | flags

    around = {word: {"id": word, "ids": [vocabulary[word]], "tokens": [word]} for word in (START, END)}
    order = [{"SpecialToken": {"id": START, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    order.append({"SpecialToken": {"id": END, "type_id": 0}})
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [special("<unk>"), special(START), special(END)],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": {"type": "TemplateProcessing", "single": order, "pair": order, "special_tokens": around},
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"},
    }
