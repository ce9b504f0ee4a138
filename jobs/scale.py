"""Make a recipe's pairs at full size with a stand-in for the teacher, and say what all but the teacher takes."""

from pipeline.host import startup

if __name__ == "__main__":
    startup.begin()  # the imports take seconds, in which a job may be stopped, too

    from pipeline.benchmark.scale import scale
    from pipeline.command_line import main

    main(__doc__, scale)
