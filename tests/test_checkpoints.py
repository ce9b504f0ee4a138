"""pytest tests/test_checkpoints.py"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.models import checkpoints
from pipeline.models.checkpoints import CheckpointError
from pipeline.recipe import TeacherSettings


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
    "stored rotary table": lambda w: {**w, "freqs_cis": torch.zeros(3)},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_official_layouts_load_and_the_average_is_preferred(tmp_path: Path, layout: str) -> None:
    path = str(tmp_path / "net.pt")
    torch.save(LAYOUTS[layout](weights()), path)
    net = Net()
    assert len(checkpoints.load(net, path)) == 64
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
        "needs unpickling": ({"model": good, "args": Path("x")}, "holds more than tensors"),
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
