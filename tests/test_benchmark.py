"""pytest tests/test_benchmark.py"""

from dataclasses import replace

import pytest
import torch

from pipeline import benchmark, flow
from pipeline.command_line import parse


def test_what_is_measured_is_what_the_teacher_meets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "TOKENS", 120)
    monkeypatch.setattr(benchmark, "SOLVERS", (flow.Solver("adaptive"), flow.Solver("paper")))
    monkeypatch.setattr(benchmark, "_median", lambda call, device: float(call().numel() > 0))
    monkeypatch.setattr(benchmark, "synthetic", lambda v, c, k, unit_norm: synthetic(64, c, 9, unit_norm))
    text = benchmark.benchmark(parse(None, []))
    rows = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("|") and "%" in line]
    assert len(rows) == 6
    wrong = [float(row[2].strip().rstrip("%")) for row in rows]
    assert max(wrong[0::2]) <= 2.5, "120 tokens: at most three codes off with the adaptive solver"
    assert "| 64 |" in text


synthetic = benchmark.synthetic


def test_synthetic_p_is_truncated_and_normalised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "TOKENS", 40)
    points, log_p, codebook = synthetic(64, 4, 9, unit_norm=True)
    assert points.shape == (40, 4)
    assert (log_p.isfinite().sum(-1) == 9).all()
    assert torch.allclose(log_p.exp().sum(-1), torch.ones(40))
    assert torch.allclose(codebook.norm(dim=-1), torch.ones(64))


def test_a_missing_gpu_is_one_sentence() -> None:
    recipe = parse(None, [])
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no CUDA device"):
            benchmark.benchmark(replace(recipe, cluster=replace(recipe.cluster, gpus=1)))
