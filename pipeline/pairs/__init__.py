"""Alg. 1: a teacher and flow matching turn numbered noise into a folder of noise-token pairs.

In come sample ids and a teacher; out go Parquet shards with a manifest, and a stream of rows for training. It does not
know what the pairs are for.
"""
