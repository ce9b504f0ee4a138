"""Every knob of the jobs, a module for each section of a recipe's YAML; ``recipe`` puts the sections together.

The type of a field says which values it may have (``configuration.fields``); what needs several fields of a section is
checked there, too. Both need no file and no network.
"""
