"""Distil a few-step student from noise-token pairs (Alg. 2): run again, it finishes what is missing."""

from pipeline.distill import distill
from pipeline.recipe import main

if __name__ == "__main__":
    main(__doc__, distill)
