"""Measure the speed of everything a recipe runs, as ratios in one run; write a table, JSON and a plot of growth."""

from pipeline.benchmark import benchmark
from pipeline.command_line import main

if __name__ == "__main__":
    main(__doc__, benchmark)
