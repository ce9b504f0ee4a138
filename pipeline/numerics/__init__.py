"""How numbers are computed: precision of products, compilation, recomputed activations, memory by tracing.

In come modules and functions; out come the same, computed otherwise. It knows no family of models.
"""
