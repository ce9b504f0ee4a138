"""Score and time the samplers of a recipe and write the report; resumes when run again."""

from pipeline.host import startup

if __name__ == "__main__":
    startup.begin()  # the imports take seconds, in which a job may be stopped, too

    from pipeline.command_line import main
    from pipeline.workflow.evaluate import evaluate

    main(__doc__, evaluate)
