"""What one session on a GPU is to find out, in order of worth and within its minutes, and the sheet of what it found.

In come recipes and minutes, out goes a sheet; weights are by formula. It knows nothing of images that mean anything.
"""
