"""The process and the machine it runs on: signals, progress, clocks, other load, and which code runs.

It knows nothing of recipes, and imports nothing of the other rooms.
"""
