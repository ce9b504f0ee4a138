"""Score and time the samplers of a recipe and write the report; resumes when run again."""

from pipeline.command_line import main
from pipeline.evaluate import evaluate

if __name__ == "__main__":
    main(__doc__, evaluate)
