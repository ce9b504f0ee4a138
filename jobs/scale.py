"""Make a recipe's pairs at full size with a stand-in for the teacher, and say what all but the teacher takes."""

from pipeline.command_line import main
from pipeline.scale import scale

if __name__ == "__main__":
    main(__doc__, scale)
