"""Measure the flow-matching solvers on the recipe's codebook, and what the cache and a student save, as ratios."""

from pipeline.benchmark import benchmark
from pipeline.command_line import main

if __name__ == "__main__":
    main(__doc__, benchmark)
