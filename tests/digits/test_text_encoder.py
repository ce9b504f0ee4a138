"""The digits' text encoder as a folder: its vocabulary, its files, and that transformers reads them back."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipeline.digits import captions, text_encoder
from pipeline.digits.text_encoder import END, LENGTH, UNKNOWN, WIDTH
from pipeline.host.errors import Missing

pytest.importorskip("transformers", reason="the extra 'text'")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(1)
    text_encoder.save(text_encoder.new(), str(made))
    return made


@pytest.fixture(scope="module")
def read(folder: Path) -> text_encoder.Reader:
    return text_encoder.Reader(str(folder))


def test_the_vocabulary_fills_the_table() -> None:
    pieces = text_encoder.vocabulary()
    assert len(pieces) == len(set(pieces)) == text_encoder.SHAPE["vocab_size"]
    assert [pieces.index(piece) for piece in ("<pad>", "</s>", "<unk>")] == [0, 1, 2]
    assert set("abcdefghijklmnopqrstuvwxyz") < set(pieces)


def test_every_caption_is_read_word_by_word(read: text_encoder.Reader) -> None:
    texts = [text for text, _ in captions.every_caption()]
    ids, mask = read(texts)
    assert ids.shape == mask.shape == (len(texts), LENGTH)
    assert not (ids == UNKNOWN).any()
    assert mask.sum(1).tolist() == [len(text.split()) + 1 for text in texts]
    pieces = text_encoder.vocabulary()
    for text, row, length in zip(texts, ids.tolist(), mask.sum(1).tolist(), strict=True):
        assert " ".join(pieces[i] for i in row[: length - 1]) == text
        assert row[length - 1] == END


def test_other_words_are_spelt(read: text_encoder.Reader) -> None:
    pieces = text_encoder.vocabulary()
    ids, mask = read(["A Cat, 77", "", "東京", "a " * 40])
    spelt = [[pieces[i] for i in row[:length]] for row, length in zip(ids.tolist(), mask.sum(1).tolist(), strict=True)]
    assert spelt[0] == ["a", "c", "at", ",", "7", "7", "</s>"]
    assert spelt[1] == ["</s>"]
    assert spelt[2] == ["<unk>", "</s>"]
    assert spelt[3] == ["a"] * (LENGTH - 1) + ["</s>"], "the end token survives where text is cut"


def test_transformers_reads_the_folder_back(folder: Path, read: text_encoder.Reader) -> None:
    from transformers import AutoTokenizer, T5EncoderModel

    texts = ["a bold 7 leaning right at the top left", "", "a cat"]
    ids, mask = read(texts)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    same = tokenizer(texts, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt")
    assert torch.equal(same["input_ids"], ids)
    assert torch.equal(same["attention_mask"], mask)
    encoder = T5EncoderModel.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    stored = load_file(folder / "model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float16}
    loaded = dict(encoder.named_parameters())
    assert loaded.keys() == stored.keys()
    assert all(torch.equal(loaded[name], value.float()) for name, value in stored.items()), "the rounded ones, exactly"
    assert sum(value.numel() for value in stored.values()) == 86_464
    torch.manual_seed(1)
    made = text_encoder.new()
    assert all(torch.equal(stored[name], value.half()) for name, value in made.named_parameters())


def test_the_configuration_is_a_t5_encoder(folder: Path) -> None:
    found = json.loads((folder / "config.json").read_text())
    assert (found["model_type"], found["d_model"], found["num_layers"]) == ("t5", WIDTH, 2)
    assert (found["pad_token_id"], found["eos_token_id"]) == (0, 1)


def test_without_transformers_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_encoder, "find_spec", lambda name: None)
    with pytest.raises(Missing, match=r"pip install 'distilled-decoding\[text\]'"):
        text_encoder.new()


def test_features_stand_at_the_end_and_carry_gradients(read: text_encoder.Reader) -> None:
    torch.manual_seed(1)
    encoder = text_encoder.new()
    ids, mask = read(["a thin zero", "a 7 upright at the middle"])
    found = text_encoder.features(encoder, ids, mask)
    assert found.features.shape == (2, LENGTH, WIDTH)
    assert found.valid.sum(1).tolist() == [4, 7]
    assert found.valid[:, -1].all()
    assert (found.features[~found.valid] == 0).all()
    found.features.sum().backward()
    assert all(weight.grad is not None for weight in encoder.parameters())
