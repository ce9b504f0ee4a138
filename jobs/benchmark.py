"""Measure the speed of everything a recipe runs, as ratios in one run; write a table, JSON and a plot of growth."""

from pipeline.host import startup

if __name__ == "__main__":
    startup.begin()  # the imports take seconds, in which a job may be stopped, too

    from pipeline.benchmark.benchmark import benchmark
    from pipeline.command_line import main

    main(__doc__, benchmark)
