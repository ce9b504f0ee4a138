"""The kernel in Triton's interpreter, through Triton's compiler, and on a GPU."""

import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import passes
import pytest
import torch

from pipeline.flow import matching
from pipeline.flow.matching import Matcher, Solver

TESTS = Path(__file__).parents[1]
TRITON = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is for Linux")


def python(*arguments: str, **environment: str) -> str:
    """What a fresh Python of this checkout prints; fails with it."""
    path = os.pathsep.join([str(TESTS.parent), str(TESTS / "support")])
    variables = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": path} | environment
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=TESTS.parent, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@TRITON
def test_the_kernel_in_the_interpreter() -> None:
    said = python(
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--noconftest",
        "tests/support/interpreted.py",
        TRITON_INTERPRET="1",
    )
    assert " passed" in said
    assert "skipped" not in said


COMPILE = """
import os, subprocess, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from pipeline.flow import kernel

names = kernel._follow.arg_names
numbers = dict.fromkeys(["tokens", "stride", "vocabulary", "listed", "capacity", "dimension", "steps"], "i32")
numbers |= dict.fromkeys(["tolerance", "exit_weight", "exit_gain", "lost", "max_step"], "fp32")
pointers = dict.fromkeys(["noise", "log_p", "codes", "levels", "copies", "count"], "*fp32")
pointers |= dict.fromkeys(["places", "passes", "flags"], "*i32") | dict(marks="*i8", answer="*i64")
aligned = [*pointers, "stride", "vocabulary", "listed", "capacity"]
options = dict(num_warps=kernel.WARPS, enable_fp_fusion=True)
for architecture, width, codes in ((80, 32, 4096), (90, 8, 16384)):
    rows = kernel.PART // width
    sizes = dict(LIST=min(kernel.LIST, codes), PARTS=kernel.PARTS, ROWS=rows, WIDTH=width)
    types = pointers | numbers | dict.fromkeys(sizes, "constexpr")
    divisible = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(kernel._follow, {name: types[name] for name in names}, sizes, divisible)
    made = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    ptx, cubin = made.asm["ptx"], made.asm["cubin"]
    assert "bar.sync" in ptx  # lists are read after they are written,
    assert "ld.global.nc" not in ptx  # and not from a cache of constants
    assert "mma" not in ptx  # full float32
    assert "ld.global.v4" in ptx and "st.global.v4" in ptx  # codes, 16 bytes at a time
    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    with open(sys.argv[1], "wb") as file:
        file.write(cubin)
    used = subprocess.run([tool, "-res-usage", sys.argv[1]], capture_output=True, text=True, check=True).stdout
    assert "STACK:0" in used and "LOCAL:0" in used, used  # no register is spilled
"""


@TRITON
def test_the_kernel_compiles_for_gpus(tmp_path: Path) -> None:
    """To machine code for an A100 and an H100, which needs no GPU."""
    python("-c", COMPILE, str(tmp_path / "kernel.cubin"), TRITON_CACHE_DIR=str(tmp_path))


@pytest.mark.parametrize(
    ("name", "most", "before"),
    [("LlamaGen-like, top-k 8000", 60, (330, 375)), ("VAR-like, top-k 900", 40, (140, 155))],
)
def test_a_token_takes_few_passes(name: str, most: int, before: tuple[int, int]) -> None:
    """On the shipped teachers' p at full size, and so many as it took before; the model is compared with the kernel."""
    recipe = passes.LIKE[name]
    points, log_p, codebook = passes.like(recipe, 32)
    seen = [passes.watch(x, p, codebook) for x, p in zip(points, log_p, strict=True)]
    assert fmean(passes.passes(token, recipe.dimension)[0] for token in seen) <= most
    assert before[0] <= fmean(passes.passes_before(token, recipe.dimension) for token in seen) <= before[1]


def test_only_the_adaptive_solver_on_a_gpu_has_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def on(device: str, dimension: int = 4, solver: Solver = matching.ADAPTIVE) -> bool:
        codebook: Any = SimpleNamespace(device=torch.device(device), shape=(8, dimension))
        return matching.has_kernel(codebook, solver)

    monkeypatch.setattr(matching, "find_spec", lambda name: name)
    monkeypatch.setenv("CC", "cc")
    assert on("cuda")
    assert not on("cpu")
    assert not on("cuda", dimension=65)
    assert not on("cuda", solver=Solver("fixed"))
    assert not on("cuda", solver=Solver("paper"))
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", "")
    assert not on("cuda"), "no compiler for Triton's launchers"
    monkeypatch.setenv("CC", "cc")
    monkeypatch.setattr(matching, "find_spec", lambda name: None)
    assert not on("cuda"), "no Triton"


def test_flow_matching_on_a_cpu_needs_no_triton() -> None:
    python("-c", "import sys; sys.modules['triton'] = None; import torch; from pipeline.flow import matching; "
           "matching.match(torch.randn(3, 4), torch.zeros(3, 6), torch.randn(6, 4)); "
           "assert 'pipeline.flow.kernel' not in sys.modules")  # fmt: skip


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize(
    ("codes", "dimension", "kept"), [(4096, 32, 900), (16384, 8, None), (1000, 5, None)], ids=["var", "llamagen", "odd"]
)
def test_the_kernel_on_a_gpu(codes: int, dimension: int, kept: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The codes of the torch path on the same GPU, no host synchronisation before `check`, and its refusals."""
    random = torch.Generator().manual_seed(3)
    codebook = torch.randn(codes, dimension, generator=random).cuda()
    logits = torch.tensor([3.0, 1.0]).repeat(1024)[:, None] * torch.randn(2048, codes, generator=random)
    if kept:
        logits = logits.masked_fill(logits < logits.topk(kept).values[:, -1:], -math.inf)
    noise, log_p = torch.randn(2048, dimension, generator=random).cuda(), logits.log_softmax(-1).cuda()
    matcher = Matcher(codebook)
    assert matcher.kernel
    matcher(noise[:8], log_p[:8])  # compiled
    before = torch.cuda.get_sync_debug_mode()
    try:
        torch.cuda.set_sync_debug_mode("error")
        found, counts = matcher.counted(noise, log_p)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    matcher.check()
    log_p_bad = log_p.clone()
    log_p_bad[7] = -math.inf
    assert matcher(noise, log_p_bad)[7] == 0
    with pytest.raises(ValueError, match="-inf for all codes of a token"):
        matcher.check()
    assert torch.equal(
        torch.cat([matcher(x, p) for x, p in zip(noise.split(300), log_p.split(300), strict=True)]), found
    )
    monkeypatch.setattr(matching, "has_kernel", lambda codebook, solver: False)
    expected, slower = matching.match_counted(noise, log_p, codebook)
    assert (found != expected).float().mean() <= 1e-3
    assert 0 <= (slower - counts).mean() <= 1
