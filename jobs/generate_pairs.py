"""Turn a teacher into noise-token pairs (Alg. 1): sharded Parquet that resumes when run again."""

from pipeline.command_line import main
from pipeline.generate import generate

if __name__ == "__main__":
    main(__doc__, generate)
