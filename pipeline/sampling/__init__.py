"""Alg. 3, Alg. 4, the teacher and the baselines: every way to draw images from noise.

In come noise, conditions and networks; out come images, and files of them. It knows nothing of scores.
"""
