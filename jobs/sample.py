"""Draw images with a student: a grid, one file an image, or one .npz for other evaluators."""

from pipeline.host import startup

if __name__ == "__main__":
    startup.begin()  # the imports take seconds, in which a job may be stopped, too

    from pipeline.generator.sample import main

    main(__doc__)
