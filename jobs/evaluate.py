"""Score and time the samplers of a recipe and write the report; resumes when run again."""

from pipeline.evaluate import evaluate
from pipeline.recipe import main

if __name__ == "__main__":
    main(__doc__, evaluate)
