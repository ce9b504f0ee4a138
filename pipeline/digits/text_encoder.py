"""The digits' text encoder, a tiny T5, as a folder in Hugging Face's layout: its shape, its vocabulary, its files.

What loads FLAN-T5 loads it. Its tokenizer takes the longest piece of the vocabulary that fits, again and again: the
words of the captions' grammar whole, any other word letter by letter.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import Any

import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from pipeline import storage
from pipeline.digits import captions
from pipeline.models.conditions import Captions

LENGTH = 16  # positions of a caption; the longest of the grammar fills 10, its end among them
WIDTH = 64  # of a feature
PAD, END, UNKNOWN = 0, 1, 2
SPECIAL = ("<pad>", "</s>", "<unk>")
SHAPE: dict[str, Any] = {
    "vocab_size": 64,
    "d_model": WIDTH,
    "d_kv": 16,
    "d_ff": 128,
    "num_layers": 2,
    "num_heads": 4,
    "feed_forward_proj": "gated-gelu",
    "dropout_rate": 0.0,  # so small a network needs none
    "pad_token_id": PAD,
    "eos_token_id": END,
}


def vocabulary() -> list[str]:
    """The 64 pieces in the order of their ids: three special ones, words, numerals, letters, and marks."""
    words = dict.fromkeys(word for text, _ in captions.every_caption() for word in text.split() if word.isalpha())
    letters = [letter for letter in string.ascii_lowercase if letter not in words]
    return [*SPECIAL, *sorted(words), *string.digits, *letters, *",.'-"]


def tokenizer_json() -> dict[str, Any]:
    """The content of tokenizer.json. Every text ends in the end token, a truncated one too."""
    special = [
        {"id": i, "content": piece, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        | {"special": True}
        for i, piece in enumerate(SPECIAL)
    ]
    end = SPECIAL[END]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": {"type": "Lowercase"},
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": end, "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}]
            + [{"SpecialToken": {"id": end, "type_id": 0}}],
            "special_tokens": {end: {"id": end, "ids": [END], "tokens": [end]}},
        },
        "decoder": None,
        "model": {
            "type": "WordPiece",
            "unk_token": SPECIAL[UNKNOWN],
            "continuing_subword_prefix": "",
            "max_input_chars_per_word": 100,
            "vocab": {piece: i for i, piece in enumerate(vocabulary())},
        },
    }


def new() -> nn.Module:
    """A T5EncoderModel of ``SHAPE``, 86,464 parameters drawn from torch's generator."""
    from pipeline.numerics import torchvision_ops  # noqa: F401  isort: skip  transformers imports torchvision
    from transformers import T5Config, T5EncoderModel  # slow to import, and only who trains a teacher needs it

    return T5EncoderModel(T5Config(**SHAPE))


class Reader:
    """Texts -> token ids, by the tokenizer of a folder that ``save`` wrote or ``write_tokenizer`` began."""

    def __init__(self, folder: str) -> None:
        from tokenizers import Tokenizer

        self.tokenizer = Tokenizer.from_str(storage.read_bytes(f"{folder}/tokenizer.json").decode())
        self.tokenizer.enable_truncation(LENGTH)
        self.tokenizer.enable_padding(pad_id=PAD, pad_token=SPECIAL[PAD], length=LENGTH)

    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids int64 [B, LENGTH], padded on the right, and which of them count, int64 [B, LENGTH] of zeros and ones."""
        found = self.tokenizer.encode_batch(list(texts))
        return torch.tensor([one.ids for one in found]), torch.tensor([one.attention_mask for one in found])


def features(encoder: nn.Module, ids: Tensor, mask: Tensor) -> Captions:
    """What ``Reader`` read -> captions with features [B, LENGTH, WIDTH], through which gradients flow."""
    return Captions.from_encoder(encoder(input_ids=ids, attention_mask=mask).last_hidden_state, mask.sum(1))


def write_tokenizer(folder: str) -> None:
    """Write what is not learnt: tokenizer.json, tokenizer_config.json, config.json."""
    storage.write_json(f"{folder}/tokenizer.json", tokenizer_json())
    names = dict(zip(("pad_token", "eos_token", "unk_token"), SPECIAL, strict=True))
    more = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": LENGTH, "padding_side": "right"}
    storage.write_json(f"{folder}/tokenizer_config.json", names | more)
    kind = {"architectures": ["T5EncoderModel"], "model_type": "t5", "dtype": "float16"}
    # The name that transformers 5 gave up for ``dtype``; T5 without a decoder says so itself when it is built.
    storage.write_json(f"{folder}/config.json", SHAPE | kind)


def save(encoder: nn.Module, folder: str) -> None:
    """Write the whole folder, weights rounded to float16; whoever loads it in float32 gets the rounded ones exactly."""
    write_tokenizer(folder)
    weights = {name: weight.detach().half().contiguous() for name, weight in encoder.named_parameters()}
    storage.write_bytes(f"{folder}/model.safetensors", to_safetensors(weights, {"format": "pt"}))
