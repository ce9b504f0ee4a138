"""Vary one setting of a recipe at a time and compare the students in one table; resumes when run again."""

from pipeline.host import startup

if __name__ == "__main__":
    startup.begin()  # the imports take seconds, in which a job may be stopped, too

    from pipeline.ablation.ablate import ablate
    from pipeline.command_line import main

    main(__doc__, ablate)
