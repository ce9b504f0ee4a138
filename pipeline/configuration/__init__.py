"""What a recipe's fields may hold, and how YAML and flags become values: types, ranges, addresses, ``--help``.

In come texts; out come checked values, or one sentence with the field's name. It does not know what a field is for.
"""
