"""Auto-regressive teachers, their tokenizers and their Distilled Decoding students.

A family is one package with ``Config``, ``Tokenizer``, ``Teacher`` and ``Student`` (see ``base``); a recipe names it by
its dotted path, e.g. ``pipeline.models.var``.
"""
