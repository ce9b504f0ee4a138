"""How fast a CPU multiplies a few rows by the weights of a large network, beside reading the weights alone.

    python tests/support/skinny.py

An AR step of LlamaGen-L at batch 4 with guidance multiplies eight rows by every weight. docs/speed.md has what it
printed.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

ROWS = (1, 2, 4, 8, 16, 32)
SHAPE, MATRICES = (4096, 1024), 24  # float32, 403 MB: no cache holds them
CALLS = 5


def seconds(work: Callable[[], object]) -> float:
    """Of the fastest of some calls, after one that warms up."""
    work()
    found = []
    for _ in range(CALLS):
        begun = time.perf_counter()
        work()
        found.append(time.perf_counter() - begun)
    return min(found)


@torch.inference_mode()
def main() -> None:
    """One line of a table for each number of rows."""
    torch.set_num_threads(1)
    weights = [torch.randn(SHAPE) for _ in range(MATRICES)]
    size = sum(weight.nbytes for weight in weights) / 1e9
    reading = seconds(lambda: [weight.sum() for weight in weights])
    print(f"One thread, torch {torch.__version__}; reading alone: {size / reading:.1f} GB/s of weights.\n")
    print("| rows | GB/s of weights | GFLOP/s | of reading alone |\n|--:|--:|--:|--:|")
    for rows in ROWS:
        x = torch.randn(rows, SHAPE[1])
        took = seconds(lambda x=x: [F.linear(x, weight) for weight in weights])  # type: ignore[misc]
        print(f"| {rows} | {size / took:.1f} | {size * rows / 2 / took:.1f} | {reading / took:.2f} |")


if __name__ == "__main__":
    main()
