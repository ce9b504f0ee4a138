"""The encoder against T5's formulas, alone and in batches, in both precisions; what is refused of its folder."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import s3server
import t5_oracle
import tiny_text
import torch
from safetensors.torch import load_file, save_file
from tiny_text import WORDS, tiny_encoder

from pipeline import storage
from pipeline.host.errors import Missing, Refused
from pipeline.models.conditions import Captions, Labels, Prompts
from pipeline.numerics.precision import products
from pipeline.settings.text import TextSettings
from pipeline.text import encoder, encoder_files

if find_spec("transformers") is None:
    pytest.skip("pip install 'distilled-decoding[text]'", allow_module_level=True)

TEXTS = ("a thin three at the top left", "", "nine", "one unheard word", "bold " * 30)


def settings(folder: Path | str, **changes: Any) -> TextSettings:
    """fp32, 40 tokens, without cleaning, unless said otherwise."""
    return replace(TextSettings(encoder=str(folder), precision="fp32", length=40, clean=False), **changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_encoder(tmp_path_factory.mktemp("text") / "encoder")


def words(count: int, seed: int = 0) -> str:
    """A prompt of so many words."""
    picks = torch.randint(len(WORDS), (count,), generator=torch.Generator().manual_seed(seed))
    return " ".join(WORDS[i] for i in picks)


def filled(captions: Captions, row: int) -> torch.Tensor:
    """The features of a prompt's own positions."""
    return captions.features[row][captions.valid[row]]


# ---- features


@pytest.mark.parametrize("changes", [{}, {"num_layers": 3, "num_heads": 3, "d_kv": 5}], ids=["tiny", "odd"])
@pytest.mark.parametrize("lengths", [(3,), (40,), (200,), (3, 40, 200, 1)])
def test_it_is_a_t5(tmp_path: Path, lengths: tuple[int, ...], changes: dict[str, int]) -> None:
    """The formulas, slowly, prompt by prompt; the batch of four lengths has padding."""
    place = tiny_encoder(tmp_path, dim=20, **changes)
    weights, config = load_file(place / "model.safetensors"), json.loads((place / "config.json").read_text())
    model = encoder.load(settings(place, length=200), "cpu")
    prompts = Prompts(tuple(words(length - 1, seed=length) for length in lengths))
    found, ids = model(prompts), model.tokens(prompts)
    for row, length in enumerate(lengths):
        assert len(ids[row]) == length
        expected = t5_oracle.features(weights, config, ids[row])
        assert (filled(found, row) - expected).abs().max() < 1e-5


def test_captions_end_at_the_last_position_and_are_no_longer_than_needed(folder: Path) -> None:
    model = encoder.load(settings(folder, length=12), "cpu")
    for texts, positions in ((("",), 8), ((words(7),), 8), ((words(8), ""), 12), ((words(50),), 12)):
        found = model(Prompts(texts))
        assert found.features.shape == (len(texts), positions, 16)
        assert found.features.dtype == torch.float32
        assert found.valid[:, -1].all(), "left-padded"
        assert not found.features[~found.valid].any()
        assert not found.features.requires_grad
    assert model(Prompts(("",))).valid.sum() == 1, "an empty prompt is the end token"
    assert model(Prompts(("",))).valid.dtype == torch.bool


def test_long_prompts_keep_the_end_token(folder: Path) -> None:
    model = encoder.load(settings(folder, length=5), "cpu")
    whole = encoder.load(settings(folder, length=40), "cpu")
    (cut,), (ids,) = model.tokens(Prompts((words(20),))), whole.tokens(Prompts((words(20),)))
    assert cut == [*ids[:4], 1]
    assert model.tokens(Prompts((words(4),))) == whole.tokens(Prompts((words(4),)))
    one = encoder.load(settings(folder, length=1), "cpu")
    assert one.tokens(Prompts((words(20), ""))) == [[1], [1]]
    assert one(Prompts((words(20),))).features.shape == (1, 1, 16)


def test_neither_neighbours_nor_order_nor_padding_matter(folder: Path) -> None:
    model = encoder.load(settings(folder, length=120), "cpu")
    together, backwards = model(Prompts(TEXTS)), model(Prompts(TEXTS[::-1]))
    padded = model(Prompts((*TEXTS, words(200))))
    assert (together.features.shape[1], padded.features.shape[1]) == (32, 120)
    for row, text in enumerate(TEXTS):
        alone = filled(model(Prompts((text,))), 0)
        for other in (filled(together, row), filled(backwards, len(TEXTS) - 1 - row), filled(padded, row)):
            assert other.shape == alone.shape
            assert (other - alone).abs().max() < 2e-6


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_callers_autocast_changes_nothing(folder: Path, precision: Any) -> None:
    model = encoder.load(settings(folder, precision=precision), "cpu")
    plain = model(Prompts(TEXTS))
    with torch.autocast("cpu", torch.bfloat16):
        inside = model(Prompts(TEXTS))
        assert torch.is_autocast_enabled("cpu")
    assert torch.equal(plain.features, inside.features)
    assert inside.features.dtype == torch.float32


def test_features_are_full_float32s_under_tf32(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So a replica that draws in TF32 and a worker that trains in fp32 see the same captions."""
    model, seen = encoder.load(settings(folder), "cpu"), []
    forward = model.network.forward
    monkeypatch.setattr(
        model.network, "forward", lambda **given: seen.append(torch.get_float32_matmul_precision()) or forward(**given)
    )
    with products("tf32"):
        model(Prompts(TEXTS))
        assert torch.get_float32_matmul_precision() == "high", "and the caller's are as they were"
    assert seen == ["highest"]


def test_another_config_is_another_encoder(folder: Path) -> None:
    """The kind of GELU, for one, shows in no shape."""
    before = encoder.check(settings(folder), 16, 120)
    place = folder / "config.json"
    content = json.loads(place.read_text())
    place.write_text(json.dumps(content | {"layer_norm_epsilon": 1e-3}))
    try:
        assert encoder.check(settings(folder), 16, 120) != before
    finally:
        place.write_text(json.dumps(content))


def test_bf16_is_near(folder: Path) -> None:
    exact, near = (encoder.load(settings(folder, precision=p), "cpu")(Prompts(TEXTS)) for p in ("fp32", "bf16"))
    difference = (exact.features - near.features).abs().max()
    assert 1e-3 < difference < 0.2
    assert near.features.dtype == torch.float32


def test_it_stays_frozen(folder: Path) -> None:
    """In eval mode, without gradients, and its features can still be trained on: a student's projection keeps them."""
    model = encoder.load(settings(folder), "cpu")
    assert not any(module.training for module in model.modules())
    assert not any(weight.requires_grad for weight in model.parameters())
    assert torch.equal(model(Prompts(TEXTS)).features, model(Prompts(TEXTS)).features), "no dropout"
    projection = torch.nn.Linear(16, 2)
    projection(model(Prompts(TEXTS)).features).sum().backward()


def test_prompts_are_cleaned_before_they_are_encoded(folder: Path) -> None:
    pytest.importorskip("ftfy")
    pytest.importorskip("bs4")
    model = encoder.load(settings(folder, clean=True), "cpu")
    raw = encoder.load(settings(folder), "cpu")
    prompts = Prompts(("A+Bold <b>THREE</b>", "photo.jpg"))
    assert model.tokens(prompts) == raw.tokens(Prompts(("a bold three", "")))
    assert raw.tokens(prompts) != model.tokens(prompts)


def test_odd_prompts_are_encoded(folder: Path) -> None:
    odd = ("\x00 \x1b[31m", "😀 東京", "\ufffd", " \t\n", "</s> <pad> <unk> a", "long " * 20_000)
    found = encoder.load(settings(folder), "cpu")(Prompts(odd))
    assert found.features.isfinite().all()
    assert found.valid.sum(1).tolist() == [3, 3, 2, 1, 5, 40]


# ---- the condition of a network


def test_a_conditioner_encodes_prompts_and_passes_on_the_rest(folder: Path) -> None:
    labels = Labels(torch.arange(3))
    encoded = encoder.conditioner(settings(folder), "cpu")
    captions = encoded(Prompts(TEXTS))
    assert isinstance(captions, Captions)
    assert torch.equal(captions.features, encoder.load(settings(folder), "cpu")(Prompts(TEXTS)).features)
    assert encoded(labels).labels.tolist() == [0, 1, 2]  # type: ignore[attr-defined]
    plain = encoder.conditioner(TextSettings(), "meta")
    assert plain(labels).labels.is_meta  # type: ignore[attr-defined]


def test_a_recipe_of_classes_never_imports_transformers() -> None:
    code = (
        "import sys; from pipeline.text import encoder, encoder_files, prompts, cleaning;"
        "from pipeline.settings.text import TextSettings; encoder.conditioner(TextSettings(), 'cpu');"
        "print(sorted({'transformers', 'tokenizers', 'ftfy', 'bs4'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_it_says_nothing_and_asks_no_network(folder: Path) -> None:
    """In a process whose sockets go nowhere; transformers' own level of talking is as it was."""
    code = f"""
import socket, sys
def nowhere(*arguments, **named): raise OSError("the network was asked")
socket.socket.connect = socket.getaddrinfo = nowhere
from pipeline.models.conditions import Prompts
from pipeline.settings.text import TextSettings
from pipeline.text import encoder
import transformers
before = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
settings = TextSettings(encoder={str(folder)!r}, length=16, clean=False)
encoder.check(settings, 16, 16), encoder.load(settings, "cpu")(Prompts(("a " * 99, "x")))
assert before == (transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled())
print("done")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("done\n", "")


# ---- files


def rewritten(place: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """The folder with other weights."""
    weights = load_file(place / "model.safetensors")
    change(weights)
    save_file(weights, place / "model.safetensors")
    return place


def edited(place: Path, name: str = "config.json", **changes: Any) -> Path:
    """The folder with other values in a JSON file; None takes a key away."""
    content = json.loads((place / name).read_text()) | changes
    (place / name).write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    return place


def second_name(weights: dict[str, torch.Tensor]) -> None:
    weights["encoder.embed_tokens.weight"] = weights.pop("shared.weight")


def both_names(weights: dict[str, torch.Tensor]) -> None:
    weights["encoder.embed_tokens.weight"] = weights["shared.weight"].clone()


def whole_t5(weights: dict[str, torch.Tensor]) -> None:
    """With the decoder's keys and an output layer that is no embedding, as FLAN-T5 has it."""
    weights |= {"decoder.embed_tokens.weight": torch.full_like(weights["shared.weight"], 7)}
    weights |= {"lm_head.weight": torch.full_like(weights["shared.weight"], 9)}
    weights |= {"decoder.block.0.layer.0.SelfAttention.q.weight": torch.zeros(3, 3)}
    weights |= {"decoder.final_layer_norm.weight": torch.tensor([1])}


@pytest.mark.parametrize("tied", [True, False, None])
@pytest.mark.parametrize("change", [second_name, both_names, whole_t5])
def test_the_word_embedding_is_the_files(folder: Path, tmp_path: Path, change: Any, tied: bool | None) -> None:
    place = edited(rewritten(tiny_encoder(tmp_path), change), tie_word_embeddings=tied)
    other = encoder.load(settings(place), "cpu")
    assert torch.equal(other(Prompts(TEXTS)).features, encoder.load(settings(folder), "cpu")(Prompts(TEXTS)).features)
    network: Any = other.network
    assert network.shared.weight is network.encoder.embed_tokens.weight, "one tensor, once in memory"
    encoder.check(settings(place), 16, 40)


def test_another_embedding_is_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What early versions 5 of transformers did: the embedding was left as drawn, or taken from the output layer."""

    def differ(weights: dict[str, torch.Tensor]) -> None:
        both_names(weights)
        weights["encoder.embed_tokens.weight"][0, 0] += 1

    with pytest.raises(Refused, match="holds two word embeddings that differ; fetch the folder again"):
        encoder.load(settings(rewritten(tiny_encoder(tmp_path), differ)), "cpu")
    made = encoder._network

    def untied(config: dict[str, Any]) -> Any:
        network = made(config)
        network.set_input_embeddings = lambda table: network.encoder.set_input_embeddings(
            torch.nn.Embedding(*table.weight.shape)
        )
        return network

    monkeypatch.setattr(encoder, "_network", untied)
    with pytest.raises(Refused, match="was not loaded as its file says: transformers put another word embedding in"):
        encoder.load(settings(folder), "cpu")


def test_weights_in_several_files_are_the_same_encoder(folder: Path, tmp_path: Path) -> None:
    """Of which one holds the decoder alone: it need not even be there."""
    place = tiny_encoder(tmp_path)
    weights = load_file(place / "model.safetensors")
    (place / "model.safetensors").unlink()
    parts = {
        "model-00001-of-00003.safetensors": sorted(weights)[:5],
        "model-00002-of-00003.safetensors": sorted(weights)[5:],
    }
    for name, keys in parts.items():
        save_file({key: weights[key] for key in keys}, place / name)
    places = {key: name for name, keys in parts.items() for key in keys}
    places["decoder.final_layer_norm.weight"] = "model-00003-of-00003.safetensors"
    (place / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    found = encoder.load(settings(place), "cpu")(Prompts(TEXTS))
    assert torch.equal(found.features, encoder.load(settings(folder), "cpu")(Prompts(TEXTS)).features)
    sums = [[name, hashlib.sha256((place / name).read_bytes()).hexdigest()] for name in sorted(parts)]
    expected = hashlib.sha256(json.dumps(sums).encode()).hexdigest()
    assert encoder.check(settings(place), 16, 40)["weights"] == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_in_a_file_become_the_precision_that_is_asked_for(tmp_path: Path, dtype: torch.dtype) -> None:
    def halve(weights: dict[str, torch.Tensor]) -> None:
        weights |= {name: value.to(dtype) for name, value in weights.items()}

    place = rewritten(tiny_encoder(tmp_path), halve)
    for precision, wanted in encoder.DTYPES.items():
        model = encoder.load(settings(place, precision=precision), "cpu")
        assert {weight.dtype for weight in model.parameters()} == {wanted}


def test_an_encoder_in_a_bucket(
    folder: Path, tmp_path: Path, s3_server: s3server.Relay, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    uri = f"s3://{s3server.BUCKET}/encoder"
    for file in folder.iterdir():
        storage.write_bytes(f"{uri}/{file.name}", file.read_bytes())
    here, there = settings(folder), settings(uri)
    assert encoder.check(there, 16, 40) == encoder.check(here, 16, 40)
    found = encoder.load(there, "cpu")(Prompts(TEXTS))
    assert torch.equal(found.features, encoder.load(here, "cpu")(Prompts(TEXTS)).features)
    with pytest.raises(Missing, match=r"s3://.*/nowhere has no config\.json"):
        encoder.check(settings(f"s3://{s3server.BUCKET}/nowhere"), 16, 40)


def test_bytes_are_tokens_too(tmp_path: Path) -> None:
    """ByT5's tokenizer has no tokenizer.json: its tokens are the bytes and need no list."""
    place = tiny_encoder(tmp_path, vocab_size=384)
    (place / "tokenizer.json").unlink()
    (place / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "ByT5Tokenizer", "extra_ids": 125}))
    rewritten(place, lambda weights: weights.update({"shared.weight": torch.randn(384, 16)}))
    encoder.check(settings(place), 16, 40)
    model = encoder.load(settings(place, length=4), "cpu")
    assert model.tokens(Prompts(("abcdef", "", "é"))) == [[100, 101, 102, 1], [1], [198, 172, 1]]


UNIGRAM = [["<pad>", 0.0], ["</s>", 0.0], ["<unk>", -2.0], ["\u2581", -3.0], ["\u2581a", -2.0], ["\u2581thin", -2.5]]
UNIGRAM += [["th", -4.0], ["in", -4.0], ["three", -3.0], *([letter, -6.0] for letter in "abehinrt")]


def test_the_tokens_are_those_of_a_t5s_own_file(tmp_path: Path) -> None:
    """FLAN-T5's layout: pieces with scores, and T5Tokenizer, which transformers builds anew from them."""
    from tokenizers import Tokenizer

    place = tiny_encoder(tmp_path)
    content = tiny_text.tokenizer()
    content["model"] = {"type": "Unigram", "unk_id": 2, "vocab": UNIGRAM, "byte_fallback": False}
    metaspace = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True}
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, metaspace]}
    (place / "tokenizer.json").write_text(json.dumps(content))
    edited(place, "tokenizer_config.json", tokenizer_class="T5Tokenizer", extra_ids=0)
    model, plain = encoder.load(settings(place), "cpu"), Tokenizer.from_file(str(place / "tokenizer.json"))
    texts = ("a thin three", "", "  three  in\tthe rain", "東 a", "thinthree")
    assert model.tokens(Prompts(texts)) == [plain.encode(text).ids for text in texts]
    assert model.tokens(Prompts(("a thin three",))) == [[4, 5, 3, 8, 1]]


# ---- facts, memory


def test_facts_are_of_the_files_and_the_settings(folder: Path) -> None:
    pytest.importorskip("ftfy")
    pytest.importorskip("bs4")
    facts = encoder.check(settings(folder), 16, 40)
    weights = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    names = ("tokenizer.json", "tokenizer_config.json")
    sums = [[name, hashlib.sha256((folder / name).read_bytes()).hexdigest()] for name in names]
    assert facts == {
        "config": hashlib.sha256((folder / "config.json").read_bytes()).hexdigest(),
        "weights": weights,
        "tokenizer": hashlib.sha256(json.dumps(sums).encode()).hexdigest(),
        "length": 40,
        "clean": "",
        "precision": "fp32",
    }
    other = encoder.check(settings(folder, clean=True, precision="bf16", length=7), 16, 40)
    assert {key: other[key] for key in other if other[key] != facts[key]} == {
        "length": 7,
        "clean": "deepfloyd-2",
        "precision": "bf16",
    }


@pytest.mark.parametrize(("precision", "size"), [("fp32", 4), ("bf16", 2)])
def test_memory_is_that_of_the_weights(tmp_path: Path, precision: Any, size: int) -> None:
    chosen = settings(tiny_encoder(tmp_path, dim=128, d_ff=256), precision=precision, length=8)
    own = sum(weight.numel() for weight in encoder.load(chosen, "cpu").parameters())
    assert encoder.memory(chosen) == own * size


def test_flan_t5_xl_has_its_known_size(tmp_path: Path) -> None:
    sizes = {"d_model": 2048, "d_kv": 64, "d_ff": 5120, "num_layers": 24, "num_heads": 32, "vocab_size": 32128}
    edited(tiny_encoder(tmp_path), **sizes)
    assert encoder.memory(settings(tmp_path, precision="bf16")) == 2 * 1_223_527_424


# ---- what is refused


def refused(sentence: str, chosen: TextSettings, dim: int = 16, length: int = 40) -> None:
    with pytest.raises(Refused, match=sentence) as caught:
        encoder.check(chosen, dim, length)
    assert "\n" not in str(caught.value)


def test_settings_that_do_not_fit_the_teacher_are_refused(folder: Path) -> None:
    refused(r"^text\.encoder is not set, and the teacher takes captions; set it to a folder", TextSettings())
    refused(r"makes features of 16 numbers, and the teacher takes 2048", settings(folder), dim=2048)
    refused(
        r"^text\.length is 40, and the teacher has 39 places for a caption; set it to 39 or", settings(folder), 16, 39
    )
    with pytest.raises(Refused, match=r"text\.encoder is not set"):
        encoder.load(TextSettings(), "cpu")


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("config.json", r"has no config\.json; name a folder in Hugging Face's layout"),
        (
            "model.safetensors",
            r"has no model\.safetensors and no model\.safetensors\.index\.json; a pytorch_model\.bin",
        ),
        ("tokenizer", r"has no tokenizer\.json; an older spiece\.model is not read"),
    ],
)
def test_files_that_are_not_there_are_named(tmp_path: Path, name: str, sentence: str) -> None:
    for file in tiny_encoder(tmp_path).glob(f"{name}*"):
        file.unlink()
    with pytest.raises(Missing, match=sentence):
        encoder.check(settings(tmp_path), 16, 40)
    with pytest.raises(Missing, match=sentence):
        encoder.load(settings(tmp_path), "cpu")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model_type": "bert"}, "is a bert model, not a T5; give a T5 or FLAN-T5"),
        ({"model_type": None}, "is no model, not a T5"),
        ({"d_ff": None}, r"has a config\.json without the number d_ff"),
        ({"num_heads": "two"}, r"has a config\.json without the number num_heads"),
        ({"num_layers": 3}, r"lacks encoder\.block\.2\.layer\.0\.SelfAttention\.q\.weight, .* and more \(9 in all\)"),
        (
            {"d_ff": 25},
            r"holds encoder\.block\.0\.layer\.1\.DenseReluDense\.wi_0\.weight as \(24, 16\), and .* \(25, 16\)",
        ),
        ({"feed_forward_proj": "relu"}, r"lacks encoder\.block\.0\.layer\.1\.DenseReluDense\.wi\.weight"),
        ({"vocab_size": 999}, r"holds shared\.weight as"),
        ({"relative_attention_num_buckets": 16}, r"holds .*relative_attention_bias\.weight as \(32, 2\)"),
    ],
)
def test_a_config_that_is_not_the_weights_is_refused(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    refused(sentence, settings(edited(tiny_encoder(tmp_path), **changes)))
    with pytest.raises(Refused, match=sentence):
        encoder.load(settings(tmp_path), "cpu")


def test_weights_that_are_none_are_refused(tmp_path: Path) -> None:
    file = tiny_encoder(tmp_path) / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    refused(r"model\.safetensors is a Git LFS pointer, not weights", settings(tmp_path))
    file.write_bytes(whole[: len(whole) // 2])
    refused(r"is not a readable safetensors file", settings(tmp_path))
    file.write_bytes(whole)
    rewritten(tmp_path, lambda weights: weights.pop("shared.weight"))
    refused(r"lacks shared\.weight \(1 in all\)", settings(tmp_path))
    file.write_bytes(whole)
    rewritten(tmp_path, lambda weights: weights.update({"shared.weight": weights["shared.weight"].to(torch.int8)}))
    refused(r"holds shared\.weight as I8; give weights that are not quantised", settings(tmp_path))
    file.write_bytes(whole)
    rewritten(tmp_path, lambda weights: weights["encoder.final_layer_norm.weight"].fill_(torch.nan))
    encoder.check(settings(tmp_path), 16, 40)  # the headers are right
    with pytest.raises(Refused, match=r"holds NaN or infinity in encoder\.final_layer_norm\.weight"):
        encoder.load(settings(tmp_path), "cpu")
    file.unlink()
    (tmp_path / encoder_files.INDEX).write_text("[]")
    refused(r"has a model\.safetensors\.index\.json without a weight_map", settings(tmp_path))
    (tmp_path / encoder_files.INDEX).write_text(json.dumps({"weight_map": {"shared.weight": "gone.safetensors"}}))
    refused(r"has no gone\.safetensors", settings(tmp_path))


def test_a_tokenizer_that_does_not_belong_to_it_is_refused(tmp_path: Path) -> None:
    def loading(sentence: str) -> None:
        with pytest.raises(Refused, match=sentence) as caught:
            encoder.load(settings(tmp_path), "cpu")
        assert "\n" not in str(caught.value)

    edited(tiny_encoder(tmp_path), "tokenizer.json", post_processor={"type": "Sequence", "processors": []})
    loading(r"has a tokenizer that makes \[\] of an empty prompt, not the end token alone")
    (tmp_path / "tokenizer.json").write_text(json.dumps(tiny_text.tokenizer((*WORDS, "ten"))))
    loading(rf"has a tokenizer of {len(WORDS) + 4} tokens and a network that knows {len(WORDS) + 3};")
    (tmp_path / "tokenizer.json").write_text("{}")
    loading(r"has a tokenizer that cannot be read \(.+\); fetch it again")


def test_missing_transformers_are_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder, "find_spec", lambda name: None)
    for do in (lambda: encoder.check(settings(folder), 16, 40), lambda: encoder.load(settings(folder), "cpu")):
        with pytest.raises(Missing, match=r"needs transformers, .*; pip install 'distilled-decoding\[text\]'"):
            do()
