"""Run the GPU tests, measure speed, pairs a second, memory and training on one GPU in ten minutes; write one sheet."""

from pipeline.host import startup

if __name__ == "__main__":
    startup.begin()  # the imports take seconds, in which a job may be stopped, too

    from pipeline.device.check import main

    main(__doc__)
