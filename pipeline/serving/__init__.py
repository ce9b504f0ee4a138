"""A student behind HTTP: Ray Serve, requests in batches, one page to try it.

In comes a student's folder; out go images as PNG or JSON. It knows the ``Generator`` and Ray Serve, and nothing of
recipes, pairs or MLflow.
"""
