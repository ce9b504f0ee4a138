"""The folder of a T5 in Hugging Face's layout: what its files say of the encoder, without transformers.

``config.json`` gives the shape of every weight, the headers of ``model*.safetensors`` what there is. A file may hold
the decoder, too; it is passed over. The word embedding is ``shared.weight`` or ``encoder.embed_tokens.weight`` or both;
``tie_word_embeddings`` in config.json, which says something else in every generation of T5, does not matter.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from pipeline import storage
from pipeline.host.errors import Missing, Refused
from pipeline.models import weight_files

EMBEDDING = "shared.weight"
EMBEDDINGS = (EMBEDDING, "encoder.embed_tokens.weight")  # two names of one tensor
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZER = ("added_tokens.json", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json")
SIZES = ("d_model", "d_kv", "d_ff", "num_layers", "num_heads", "vocab_size")
FLOATS = ("F16", "BF16", "F32", "F64")
LAYOUT = "config.json, tokenizer.json and model.safetensors"
Shape = tuple[int, ...]


def config(uri: str) -> dict[str, Any]:
    """The content of config.json; Refused, or Missing, where the folder or the file is none of a T5."""
    content = storage.read_json(_file(uri, "config.json"))
    kind = content.get("model_type") if isinstance(content, dict) else None
    if kind != "t5":
        raise Refused(f"text.encoder {uri} is {f'a {kind}' if kind else 'no'} model, not a T5; give a T5 or FLAN-T5.")
    for name in SIZES:
        if not isinstance(content.get(name), int) or content[name] < 1:
            raise Refused(f"text.encoder {uri} has a config.json without the number {name}; fetch the folder again.")
    return dict(content)


def shapes(config: Mapping[str, Any]) -> dict[str, Shape]:
    """Name -> shape of every weight of the encoder that ``config`` describes, the embedding under its first name."""
    dim, hidden, heads = config["d_model"], config["d_ff"], config["num_heads"]
    inner = heads * config["d_kv"]
    gated = str(config.get("feed_forward_proj", "relu")).startswith("gated-")
    out: dict[str, Shape] = {EMBEDDING: (config["vocab_size"], dim)}
    for i in range(config["num_layers"]):
        attention, wide = f"encoder.block.{i}.layer.0", f"encoder.block.{i}.layer.1"
        out |= {f"{attention}.SelfAttention.{name}.weight": (inner, dim) for name in "qkv"}
        out[f"{attention}.SelfAttention.o.weight"] = (dim, inner)
        if i == 0:  # it serves all blocks
            buckets = config.get("relative_attention_num_buckets", 32)
            out[f"{attention}.SelfAttention.relative_attention_bias.weight"] = (buckets, heads)
        out |= {f"{wide}.DenseReluDense.{name}.weight": (hidden, dim) for name in (("wi_0", "wi_1") if gated else ("wi",))}
        out[f"{wide}.DenseReluDense.wo.weight"] = (dim, hidden)
        out |= {f"{layer}.layer_norm.weight": (dim,) for layer in (attention, wide)}
    return out | {"encoder.final_layer_norm.weight": (dim,)}


def check_weights(uri: str, wanted: Mapping[str, Shape]) -> None:
    """Refused where the files lack one of the ``wanted`` weights or hold it in another shape or not as floats.

    The files are fetched, and of them only the headers are read.
    """
    found: dict[str, tuple[Shape, str]] = {}
    for name in weights(uri, wanted):
        with _opened(uri, name) as file:
            for key in file.keys():  # noqa: SIM118  not a dictionary
                part = file.get_slice(key)
                found[key] = tuple(part.get_shape()), part.get_dtype()
    if EMBEDDING not in found and EMBEDDINGS[1] in found:
        found[EMBEDDING] = found[EMBEDDINGS[1]]
    missing = [key for key in wanted if key not in found]
    if missing:
        raise Refused(
            f"text.encoder {uri} lacks {', '.join(missing[:3])}{' and more' if len(missing) > 3 else ''}"
            f" ({len(missing)} in all), which its config.json asks for; fetch the folder again."
        )
    for key, shape in wanted.items():
        if found[key][0] != shape:
            raise Refused(
                f"text.encoder {uri} holds {key} as {found[key][0]}, and its config.json asks for {shape}; its files"
                " are of different models, fetch the folder again."
            )
        if found[key][1] not in FLOATS:
            raise Refused(
                f"text.encoder {uri} holds {key} as {found[key][1]}; give weights that are not quantised."
            )


def weights(uri: str, wanted: Mapping[str, Shape]) -> list[str]:
    """The names of the files that hold a ``wanted`` weight, sorted: those of an index, or the single one."""
    if storage.exists(storage.join(uri, WEIGHTS)):
        return [WEIGHTS]
    if not storage.exists(storage.join(uri, INDEX)):
        raise Missing(
            f"text.encoder {uri} has no {WEIGHTS} and no {INDEX}; a pytorch_model.bin is not read: load it with"
            " transformers and save it again with save_pretrained."
        )
    index = storage.read_json(storage.join(uri, INDEX))
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict):
        raise Refused(f"text.encoder {uri} has a {INDEX} without a weight_map; fetch the folder again.")
    return sorted({str(file) for key, file in places.items() if key in wanted or key in EMBEDDINGS})


def tensors(uri: str, wanted: Mapping[str, Shape]) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every ``wanted`` weight, memory-mapped, and of the embedding under each name that it has.

    Refused for NaN and infinity.
    """
    for name in weights(uri, wanted):
        with _opened(uri, name) as file:
            for key in file.keys():  # noqa: SIM118  not a dictionary
                if key not in wanted and key not in EMBEDDINGS:
                    continue
                tensor = file.get_tensor(key)
                if not tensor.isfinite().all():
                    raise Refused(f"text.encoder {uri} holds NaN or infinity in {key}; fetch the folder again.")
                yield key, tensor


def tokenizer(uri: str) -> list[str]:
    """The names of the tokenizer's files, sorted; Missing where there are none that can be read."""
    found = [name for name in TOKENIZER if storage.exists(storage.join(uri, name))]
    if not {"tokenizer.json", "tokenizer_config.json"} & {*found}:
        raise Missing(
            f"text.encoder {uri} has no tokenizer.json; an older spiece.model is not read: load it with transformers'"
            " AutoTokenizer and save it there with save_pretrained."
        )
    return found


def digest(uri: str, names: list[str]) -> str:
    """SHA-256 of a file of the folder; of several, of the list of their sorted names and digests."""
    sums = [[name, storage.sha256(storage.join(uri, name))] for name in sorted(names)]
    return str(sums[0][1]) if len(sums) == 1 else hashlib.sha256(json.dumps(sums).encode()).hexdigest()


def _file(uri: str, name: str) -> str:
    place = storage.join(uri, name)
    if not storage.exists(place):
        raise Missing(f"text.encoder {uri} has no {name}; name a folder in Hugging Face's layout, with {LAYOUT}.")
    return place


def _opened(uri: str, name: str) -> Any:
    """A file of weights as safetensors opens it; Refused for one that is none or is damaged."""
    place = _file(uri, name)
    path = storage.local(place)
    weight_files.check_kind(path, place)
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise weight_files.unreadable(place, error) from None
