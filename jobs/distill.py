"""Distil a few-step student from noise-token pairs (Alg. 2): run again, it finishes what is missing."""

from pipeline.command_line import main
from pipeline.distill import distill

if __name__ == "__main__":
    main(__doc__, distill)
