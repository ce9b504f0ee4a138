"""Serve a student on Ray Serve: images over HTTP, drawn in batches, and a page to try it in a browser."""

from pipeline.host import startup

if __name__ == "__main__":
    startup.begin()  # the imports take seconds, in which a job may be stopped, too

    from pipeline.serving.serve import main

    main(__doc__)
