"""One setting of a recipe varied at a time: the three jobs for every variant and seed, then one table.

In come a recipe and its variants; out go reports of their own and a comparison of them. It knows no sampler and no
network, only recipes and the numbers of reports.
"""
