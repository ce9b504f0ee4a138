"""Turn a teacher into noise-token pairs (Alg. 1): sharded Parquet that resumes when run again."""

from pipeline.generate import generate
from pipeline.recipe import main

if __name__ == "__main__":
    main(__doc__, generate)
