"""Write a student and its decoder as one graph of tensors: a torch.export archive (.pt2) or an ONNX file (.onnx)."""

from pipeline.host import startup

if __name__ == "__main__":
    startup.begin()  # the imports take seconds, in which a job may be stopped, too

    from pipeline.generator.export import main

    main(__doc__)
