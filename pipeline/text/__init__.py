"""From prompts to what a network is given: the list of prompts, LlamaGen's cleaning of them, the T5 encoder.

Only recipes whose teacher takes captions come here; the packages of the extra ``text`` are imported inside functions.
"""
