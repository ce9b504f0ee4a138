"""Prompts to features: the encoder of a T5, as transformers has it, frozen, in a precision of its own.

The weights are read by name here and not by ``from_pretrained``: so nothing asks a network, a folder may lie in a
bucket, only the encoder's half of a T5 is read, and the word embedding is what the file says. Versions 5 of
transformers have tied it to other weights, or to none, for models whose config.json says ``tie_word_embeddings:
false``, as that of FLAN-T5 does. transformers is imported inside functions, for it takes seconds: a process that draws
classes never pays them.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from pipeline import storage
from pipeline.host.errors import Missing, Refused
from pipeline.models.conditions import Captions, Condition, Encode, Prompts
from pipeline.numerics.precision import products
from pipeline.settings.text import TextSettings
from pipeline.text import cleaning, encoder_files

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MULTIPLE = 8  # of positions: strides of masks that fused attention takes, and few shapes


class Encoder(nn.Module):
    """``Prompts`` to ``Captions``, on the device of its weights: float32 features of the network's last layer.

    A prompt is cleaned if the settings say so, cut to ``length`` tokens, of which the last is always the end token, and
    padded to the longest of its batch, rounded up to a multiple of 8, which changes no feature. An empty prompt has one
    position, that of the end token.
    """

    def __init__(self, network: nn.Module, tokenizer: Any, settings: TextSettings) -> None:
        super().__init__()
        self.network, self.tokenizer, self.settings = network, tokenizer, settings

    @torch.no_grad()
    def forward(self, prompts: Prompts) -> Captions:
        """Prompts of B texts -> features float32 [B, T, D] and validity [B, T]; B is 1 or more.

        TF32 and autocast of the caller are switched off inside, so the features are the same wherever a prompt is
        encoded.
        """
        ids = self.tokens(prompts)
        lengths = torch.tensor([len(row) for row in ids])
        width = min(-(-max(map(len, ids)) // MULTIPLE) * MULTIPLE, self.settings.length)
        padded = torch.tensor([row + [0] * (width - len(row)) for row in ids])  # what stands there is seen by nobody
        mask = torch.arange(width) < lengths[:, None]
        device = next(self.network.parameters()).device
        with products("fp32"), torch.autocast(device.type, enabled=False):
            out = self.network(input_ids=padded.to(device), attention_mask=mask.to(device, torch.long))
        return Captions.from_encoder(out.last_hidden_state.float(), lengths.to(device))

    def tokens(self, prompts: Prompts) -> list[list[int]]:
        """The tokens of each prompt, with the end token, without padding: 1 to ``length`` of them."""
        texts = [cleaning.cleaned(text) for text in prompts.texts] if self.settings.clean else list(prompts.texts)
        found = self.tokenizer(texts, truncation=True, max_length=self.settings.length, add_special_tokens=True)
        return [list(row) for row in found["input_ids"]]


def conditioner(settings: TextSettings, device: torch.device | str) -> Encode:
    """What a network's condition passes through first: prompts become captions, all else goes to the device.

    A recipe without ``text.encoder`` needs nothing else, and loads nothing.
    """
    encoder = load(settings, device) if settings.encoder else None

    def encoded(condition: Condition) -> Condition:
        return encoder(condition) if encoder and isinstance(condition, Prompts) else condition.to(device)

    return encoded


def load(settings: TextSettings, device: torch.device | str) -> Encoder:
    """The encoder of the settings on ``device``, frozen, in its precision; Refused or Missing as ``check`` says."""
    uri = _uri(settings)
    _check_packages(settings)
    config = encoder_files.config(uri)
    wanted = encoder_files.shapes(config)
    encoder_files.check_weights(uri, wanted)
    state, embedding = {}, None
    for name, weight in encoder_files.tensors(uri, wanted):
        if name in encoder_files.EMBEDDINGS:
            if embedding is not None and not torch.equal(weight, embedding):
                raise Refused(f"text.encoder {uri} holds two word embeddings that differ; fetch the folder again.")
            embedding = weight
        else:
            state[name] = weight.to(device, DTYPES[settings.precision])
    assert embedding is not None  # check_weights has seen it
    state |= dict.fromkeys(encoder_files.EMBEDDINGS, embedding.to(device, DTYPES[settings.precision]))
    network = _network(config)
    network.load_state_dict(state, assign=True)
    network.set_input_embeddings(network.shared)  # one tensor again, in memory too
    _check_embedding(network, embedding, uri)
    tokenizer = _tokenizer(uri, config)
    return Encoder(network.eval().requires_grad_(False), tokenizer, settings).eval()


def memory(settings: TextSettings) -> int:
    """Bytes of the encoder's weights in their precision, from config.json alone; 0 where the recipe has none."""
    if not settings.encoder:
        return 0
    wanted = encoder_files.shapes(encoder_files.config(_uri(settings)))
    return sum(map(prod, wanted.values())) * DTYPES[settings.precision].itemsize


def check(settings: TextSettings, caption_dim: int, caption_length: int) -> dict[str, Any]:
    """What determines the features: SHA-256 of config.json, weights and tokenizer, length, cleaning, precision.

    ``caption_dim`` and ``caption_length`` are what the teacher takes. No weights are loaded, but the files are fetched,
    for their checksums. Raises Missing for packages and files that are not there; Refused for an encoder that is not
    set, is no T5, is of another width, or whose files do not fit one another, and for more tokens than the teacher has
    places for.
    """
    uri = _uri(settings)
    if settings.length > caption_length:
        raise Refused(
            f"text.length is {settings.length}, and the teacher has {caption_length} places for a caption; set it to"
            f" {caption_length} or less."
        )
    _check_packages(settings)
    config = encoder_files.config(uri)
    if config["d_model"] != caption_dim:
        raise Refused(
            f"text.encoder {uri} makes features of {config['d_model']} numbers, and the teacher takes {caption_dim}"
            " (teacher.config.caption_dim); give the encoder that the teacher was trained with."
        )
    wanted = encoder_files.shapes(config)
    encoder_files.check_weights(uri, wanted)
    return {
        "config": storage.sha256(storage.join(uri, "config.json")),
        "weights": encoder_files.digest(uri, encoder_files.weights(uri, wanted)),
        "tokenizer": encoder_files.digest(uri, encoder_files.tokenizer(uri)),
        "length": settings.length,
        "clean": cleaning.RULES if settings.clean else "",
        "precision": settings.precision,
    }


def _uri(settings: TextSettings) -> str:
    if settings.encoder is None:
        raise Refused(
            "text.encoder is not set, and the teacher takes captions; set it to a folder in Hugging Face's layout with"
            " the T5 that the teacher was trained with."
        )
    return settings.encoder


def _check_packages(settings: TextSettings) -> None:
    if find_spec("transformers") is None:
        raise Missing(f"text.encoder needs transformers, which is not installed here; {cleaning.INSTALL}.")
    if settings.clean:
        cleaning.check()


def _check_embedding(network: Any, embedding: Tensor, uri: str) -> None:
    """Refused where the network would look words up in another table than the file's."""
    used = network.encoder.get_input_embeddings().weight
    if not torch.equal(used.cpu(), embedding.to("cpu", used.dtype)):
        raise Refused(
            f"text.encoder {uri} was not loaded as its file says: transformers put another word embedding in its"
            " place; install the version of transformers that pyproject.toml names."
        )


def _network(config: dict[str, Any]) -> Any:
    """transformers' encoder on the meta device, in float32."""
    with _quiet():
        from transformers import T5Config, T5EncoderModel
    with _quiet(), torch.device("meta"):
        return T5EncoderModel(T5Config.from_dict(config))


def _tokenizer(uri: str, config: dict[str, Any]) -> Any:
    """The tokenizer as transformers reads it, from its own files and config.json alone, put side by side on a disk."""
    names = encoder_files.tokenizer(uri)
    with TemporaryDirectory(dir=storage.scratch()) as folder, _quiet():
        from transformers import AutoTokenizer

        for name in [*names, "config.json"]:
            shutil.copyfile(storage.local(storage.join(uri, name)), Path(folder, name))
        try:
            found = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            end = found("")["input_ids"]
        except Exception as error:  # tokenizers raise what they like
            reason = " ".join(str(error).replace(folder, uri).split())[:200].rstrip(".") or type(error).__name__
            raise Refused(
                f"text.encoder {uri} has a tokenizer that cannot be read ({reason}); fetch it again."
            ) from None
    found.truncation_side = "right"
    if len(end) != 1 or end[0] != found.eos_token_id:
        raise Refused(
            f"text.encoder {uri} has a tokenizer that makes {end} of an empty prompt, not the end token alone, as T5"
            " was trained; fetch the tokenizer that belongs to it."
        )
    if len(found) > config["vocab_size"]:
        raise Refused(
            f"text.encoder {uri} has a tokenizer of {len(found)} tokens and a network that knows"
            f" {config['vocab_size']}; fetch the tokenizer that belongs to it."
        )
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """For what is done with transformers, its import too: it says errors alone and draws no bars."""
    from pipeline.numerics import torchvision_ops  # noqa: F401  isort: skip  before transformers imports torchvision
    from transformers.utils import logging

    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    try:
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()
