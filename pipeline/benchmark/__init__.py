"""How fast everything is, as ratios measured in one run, and how time and memory grow with size.

In comes a recipe; out go a table, numbers as JSON and a plot. It keeps nothing of what it makes and scores no image.
"""
