"""Vary one setting of a recipe at a time and compare the students in one table; resumes when run again."""

from pipeline.ablate import ablate
from pipeline.command_line import main

if __name__ == "__main__":
    main(__doc__, ablate)
