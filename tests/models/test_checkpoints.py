"""pytest tests/models/test_checkpoints.py"""

import contextlib
import gzip
import io
import json
import pickle
import tarfile
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from pipeline.models import checkpoints, llamagen, var, weight_files
from pipeline.models.checkpoints import CheckpointError
from pipeline.settings.teacher import Filter, TeacherSettings


class Elsewhere:
    """What an unpickler must import to read a file."""


class Net(nn.Module):
    steps: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 2)
        self.register_buffer("steps", torch.arange(4))


def weights() -> dict[str, Tensor]:
    return {"inner.weight": torch.arange(6.0).reshape(2, 3), "inner.bias": torch.tensor([1.0, -1.0])}


LAYOUTS: dict[str, Any] = {
    "flat": lambda w: w,
    "llamagen": lambda w: {"model": w, "optimizer": {"lr": 1.0}},
    "llamagen-dd": lambda w: {"model": {k: v * 0 for k, v in w.items()}, "ema": w},
    "var-dd": lambda w: {"trainer": {"var_wo_ddp": {k: v * 0 for k, v in w.items()}, "ema_parameters": w}, "epoch": 3},
    "fsdp": lambda w: {"module": w},
    "compiled ddp": lambda w: {f"module._orig_mod.{k}": v for k, v in w.items()},
    "training arguments": lambda w: {"model": w, "args": Namespace(lr=1e-4, layers=[1, 2])},
    "stored rotary table": lambda w: {**w, "freqs_cis": torch.zeros(3)},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_official_layouts_load_and_the_average_is_preferred(tmp_path: Path, layout: str) -> None:
    path = str(tmp_path / "net.pt")
    torch.save(LAYOUTS[layout](weights()), path)
    net = Net()
    checkpoints.load(net, path)
    assert torch.equal(net.inner.weight, weights()["inner.weight"])
    assert torch.equal(net.steps, torch.arange(4)), "a missing constant buffer stays as it was built"


def damaged() -> dict[str, tuple[Any, str]]:
    good = weights()
    return {
        "missing parameter": ({"inner.weight": good["inner.weight"]}, "lacks inner.bias"),
        "unknown parameter": ({**good, "outer.weight": torch.ones(1)}, "holds unknown outer.weight"),
        "other shape": ({**good, "inner.bias": torch.ones(3)}, "does not fit: inner.bias is (3,) in the file and (2,)"),
        "no weights": ({"epoch": 3}, "holds no weights"),
        "not a dictionary": (torch.ones(3), "holds a Tensor"),
        "needs unpickling": ({"model": good, "run": Elsewhere()}, "if you trust it, set teacher.unpickle"),
        "a diverged run": ({**good, "inner.bias": torch.tensor([1.0, torch.nan])}, "NaN or infinity in inner.bias"),
        "quantized": (
            {**good, "inner.weight": torch.ones(2, 3, dtype=torch.int8)},
            "torch.int8 values in inner.weight",
        ),
    }


@pytest.mark.parametrize("case", damaged())
def test_files_that_do_not_fit_are_refused_with_one_sentence(tmp_path: Path, case: str) -> None:
    content, sentence = damaged()[case]
    path = str(tmp_path / "net.pt")
    torch.save(content, path)
    net = Net()
    before = net.inner.weight.clone()
    with pytest.raises(CheckpointError, match=sentence.replace("(", r"\(").replace(")", r"\)")) as caught:
        checkpoints.load(net, path)
    assert "\n" not in str(caught.value)
    assert path in str(caught.value)
    assert torch.equal(net.inner.weight, before), "nothing is loaded by halves"


def written(save: Callable[..., None]) -> bytes:
    buffer = io.BytesIO()
    save(buffer, np.zeros(100))
    return buffer.getvalue()


def tarred() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("net.pth"))
    return buffer.getvalue()


@pytest.mark.parametrize("name", ["net.pt", "net.safetensors"])
def test_truncated_files_are_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name.endswith(".pt"):
        torch.save(weights(), path)
    else:
        checkpoints.save(weights(), str(path), {})
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(CheckpointError, match=r"net\.(pt|safetensors)"):
        checkpoints.load(Net(), str(path))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "is empty; fetch it again"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "is a Git LFS pointer"),
        (b"\n<!DOCTYPE html><html><title>404</title>", "is a web page, not weights"),
        (b'<?xml version="1.0"?>\n<Error><Code>AccessDenied</Code></Error>', "is an XML document, as a bucket answers"),
        (b'{"weight_map": {}}', "is a JSON document, not weights"),
        (b"layers: 12\n" * 100, "is a text, not weights"),
        (gzip.compress(b"x" * 1000), "is compressed by gzip, not weights"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 600, "is a picture, not weights"),
        (written(np.save), "is a numpy array, not weights"),
        (written(np.savez), "is numpy's .npz, not weights"),
        (tarred(), "is a tar archive, not weights"),
        (pickle.dumps({"weight": [1.0]}), "is a pickle that torch.save did not write, not weights"),
        (b"\x01\x02\xff" * 300, "is a file of unknown kind, not weights"),
        (b"PK\x03\x04 not really", r"could not be read as a PyTorch weight file \(.*\); it is damaged, fetch it again"),
    ],
    ids=lambda value: value.split(",")[0] if isinstance(value, str) else "",
)
@pytest.mark.parametrize("name", ["net.pth", "net.safetensors", "net"])
def test_files_that_are_something_else(tmp_path: Path, content: bytes, sentence: str, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=sentence) as caught:
        checkpoints.load(Net(), str(path))
    assert "\n" not in str(caught.value)
    assert "unpickle" not in str(caught.value), "it would not help"


@pytest.mark.faults("weights: legacy format")
def test_files_from_before_torch_1_6_load(tmp_path: Path) -> None:
    path = str(tmp_path / "net.pth")
    content = {"model": weights(), "args": Namespace(lr=1e-4)}
    torch.save(content, path, _use_new_zipfile_serialization=False)
    net = Net()
    checkpoints.load(net, path)
    assert torch.equal(net.inner.weight, weights()["inner.weight"])
    torch.save({"model": weights(), "run": Elsewhere()}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"Elsewhere.*it holds more than tensors: if you trust it, set"):
        checkpoints.load(net, path)


@pytest.mark.faults("weights: cut short or with a flipped byte")
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_damage_anywhere_is_one_sentence(tmp_path: Path, legacy: bool) -> None:
    """Or harms nothing: some bytes are padding, and the format of before 1.6 has no checksums."""
    path = tmp_path / "net.pth"
    torch.save(weights(), path, _use_new_zipfile_serialization=not legacy)
    data = path.read_bytes()
    for place in range(0, len(data), 7):
        for damaged in (data[:place], data[:place] + bytes([data[place] ^ 0x41]) + data[place + 1 :]):
            path.write_bytes(damaged)
            with contextlib.suppress(CheckpointError):
                checkpoints.load(Net(), str(path))


def test_safetensors_may_begin_with_any_number(tmp_path: Path) -> None:
    """The length of the header comes first; of 640 bytes it begins as a pickle does, of 123 as JSON does."""
    path = tmp_path / "net.safetensors"
    for length in range(256):
        header = b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'.ljust(512 + length)
        path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
        assert set(weight_files.read(path, str(path))) == {"w"}, length


@pytest.mark.parametrize("name", ["net.bin", "0a1b2c"])
def test_safetensors_are_known_by_their_content(tmp_path: Path, name: str) -> None:
    """As in the Hub's cache, whose files are called by their hash. The first byte is that of a length: any."""
    first = set()
    for length in range(0, 256, 8):
        checkpoints.save(weights(), str(tmp_path / name), {"note": "x" * length})
        first.add((tmp_path / name).read_bytes()[:1])
        net = Net()
        checkpoints.load(net, str(tmp_path / name))
        assert torch.equal(net.inner.weight, weights()["inner.weight"])
    assert b"\x80" in first, "with which a pickle begins"


def test_a_trusted_file_may_hold_more(tmp_path: Path) -> None:
    path = str(tmp_path / "net.pt")
    torch.save({"model": weights(), "run": Elsewhere()}, path)
    net = Net()
    checkpoints.load(net, path, unpickle=True)
    assert torch.equal(net.inner.weight, weights()["inner.weight"])


VAR = var.Config(depth=2, width=64, heads=2, classes=3, patch_nums=(1, 2), vocabulary=8, code_dim=4, channels=32)
LLAMAGEN = llamagen.Config(layers=2, heads=2, dim=32, classes=3, side=2, vocabulary=8, code_dim=4, channels=32)
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "VAR": lambda: var.Teacher(VAR, Filter()).network,
    "VAR-DD": lambda: var.Student(VAR, torch.zeros(8, 4)),
    "VQVAE": lambda: var.Tokenizer(VAR),
    "LlamaGen": lambda: llamagen.Teacher(LLAMAGEN, Filter()).network,
    "LlamaGen-DD": lambda: llamagen.Student(LLAMAGEN, torch.zeros(8, 4)),
    "VQ": lambda: llamagen.Tokenizer(LLAMAGEN),
    "deeper VAR": lambda: var.Teacher(replace(VAR, depth=3, width=128), Filter()).network,
    "VAR of more classes": lambda: var.Teacher(replace(VAR, classes=5), Filter()).network,
    "larger VQVAE": lambda: var.Tokenizer(replace(VAR, vocabulary=16)),
    "deeper LlamaGen": lambda: llamagen.Teacher(replace(LLAMAGEN, layers=4), Filter()).network,
    "wider VQ": lambda: llamagen.Tokenizer(replace(LLAMAGEN, channels=64, z_channels=64)),
    "VAR of more scales": lambda: var.Teacher(replace(VAR, patch_nums=(1, 2, 3)), Filter()).network,
}


@pytest.mark.parametrize(
    ("file", "network", "sentence"),
    [
        ("VQVAE", "VAR", "the file holds a VAR tokenizer where the recipe wants a VAR transformer: check which URI"),
        ("VAR", "VQVAE", "the file holds a VAR transformer where the recipe wants a VAR tokenizer"),
        ("VAR-DD", "VAR", "the file holds a VAR student where the recipe wants a VAR transformer"),
        ("LlamaGen", "VAR", "the file holds a LlamaGen transformer where the recipe wants a VAR transformer"),
        ("LlamaGen", "LlamaGen-DD", "the file holds a LlamaGen transformer where the recipe wants a LlamaGen student"),
        ("VQ", "VQVAE", "the file holds a LlamaGen tokenizer where the recipe wants a VAR tokenizer"),
        ("deeper VAR", "VAR", "set teacher.config.depth to 3 (it is 2) and teacher.config.width to 128 (it is 64)"),
        ("VAR of more classes", "VAR", "set teacher.config.classes to 5 (it is 3)."),
        ("larger VQVAE", "VQVAE", "set teacher.config.vocabulary to 16 (it is 8)."),
        ("deeper LlamaGen", "LlamaGen", "set teacher.config.layers to 4 (it is 2)."),
        (
            "wider VQ",
            "VQ",
            "set teacher.config.channels to 64 (it is 32) and teacher.config.z_channels to 64 (it is 256)",
        ),
        ("VAR of more scales", "VAR", "check that teacher.family and teacher.config describe the file."),
    ],
)
def test_the_wrong_file_or_field_is_named(tmp_path: Path, file: str, network: str, sentence: str) -> None:
    path = str(tmp_path / "net.pth")
    torch.save(NETWORKS[file]().state_dict(), path)
    with pytest.raises(CheckpointError) as caught:
        checkpoints.load(NETWORKS[network](), path)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["VAR", "VAR-DD", "VQVAE", "LlamaGen", "LlamaGen-DD", "VQ"])
def test_nothing_stays_on_the_meta_device(tmp_path: Path, name: str) -> None:
    built = NETWORKS[name]()
    path = str(tmp_path / "net.pth")
    torch.save(dict(built.named_parameters()), path)  # a file without the constants
    with torch.device("meta"):
        net = NETWORKS[name]()
    if hasattr(net, "codebook") and "codebook" in dict(net.named_buffers()):
        net.codebook = built.codebook  # given from outside
    checkpoints.load(net, path)
    made = dict([*net.named_parameters(), *net.named_buffers()])
    known = dict([*built.named_parameters(), *built.named_buffers()])
    assert made.keys() == known.keys()
    assert all(torch.equal(made[key], known[key]) for key in known)


def test_the_weights_are_not_those_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "net.pth"
    torch.save(weights(), path)
    net = Net()
    checkpoints.load(net, str(path))
    data = path.read_bytes()
    with path.open("r+b") as file:  # in place, where a memory map would see it
        file.write(b"\x7f" * len(data))
    assert torch.equal(net.inner.weight, weights()["inner.weight"])


def test_own_files_keep_weights_and_settings(tmp_path: Path) -> None:
    net, copy, uri = Net(), Net(), str(tmp_path / "student.safetensors")
    checkpoints.save(net, uri, {"step": 7, "split": 5})
    checkpoints.load(copy, uri)
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), copy.state_dict().values(), strict=True))
    assert checkpoints.metadata(uri) == {"step": 7, "split": 5}
    checkpoints.save(net, uri, {}, torch.float16)
    checkpoints.load(copy, uri)
    assert copy.inner.weight.dtype == torch.float32, "values are cast to the module's dtype"
    assert copy.steps.dtype == torch.int64


def test_recipes_that_name_no_model_are_refused() -> None:
    with pytest.raises(ValueError, match="there is no such package"):
        checkpoints.family(TeacherSettings(family="pipeline.models.gpt9"))
    with pytest.raises(ValueError, match="has no field 'dept'"):
        checkpoints.config(TeacherSettings(config={"dept": 3}))
    with pytest.raises(ValueError, match=r"teacher\.tokenizer is not set"):
        checkpoints.checksums(TeacherSettings())


def test_what_is_written_is_what_safetensors_writes() -> None:
    """Every dtype, scalars, empty tensors, views, names and settings beyond ASCII."""
    tensors = {
        "b.weight": torch.randn(3, 4).T,
        "a.weight": torch.randn(2, 3, dtype=torch.float64),
        "half": torch.randn(5).half(),
        "brain": torch.randn(5).bfloat16()[1:],
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "count": torch.arange(3),
        "small": torch.arange(3, dtype=torch.uint8),
        "truth": torch.tensor([True, False]),
        "naïve": torch.arange(2, dtype=torch.int32),
    }
    settings = {"settings": json.dumps({"prompt": 'a "seven"\n of ünïcode'}, ensure_ascii=False)}
    file = io.BytesIO()
    weight_files.write_safetensors(file, tensors, settings)
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    assert file.getvalue() == safetensors.torch.save(whole, settings)
