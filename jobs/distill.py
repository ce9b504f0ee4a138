"""Distil a few-step student from noise-token pairs (Alg. 2): run again, it finishes what is missing."""

from pipeline.host import startup

if __name__ == "__main__":
    startup.begin()  # the imports take seconds, in which a job may be stopped, too

    from pipeline.command_line import main
    from pipeline.workflow.distill import distill

    main(__doc__, distill)
