"""Turn a teacher into noise-token pairs (Alg. 1): sharded Parquet that resumes when run again."""

from pipeline.host import startup

if __name__ == "__main__":
    startup.begin()  # the imports take seconds, in which a job may be stopped, too

    from pipeline.command_line import main
    from pipeline.workflow.generate import generate

    main(__doc__, generate)
