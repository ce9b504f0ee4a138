"""The process and the machine it runs on: how it ends, signals, progress, clocks, other load, which code runs.

It knows nothing of recipes, and imports nothing of the other rooms.
"""
