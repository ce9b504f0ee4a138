"""Images -> numbers: scoring networks, statistics of what they see, distances, and the real images beside them.

Knows no sampler, no plan of a report and no Ray.
"""
