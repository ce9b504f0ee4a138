"""How a job ends that cannot do what was asked: three kinds of error, each of which carries one sentence for its user.

``command_line.main`` prints the sentence and exits with the kind's ``status``. Whatever else is raised is a fault of
the program or of a library and keeps its traceback. Each kind is also the built-in error that Python would raise, so a
caller of a single function need not know this module.
"""

from __future__ import annotations

from typing import ClassVar


class Refused(ValueError):
    """The input cannot be used as it is: what was found, what was expected and what to do. Nothing was begun."""

    status: ClassVar[int] = 2


class Missing(Refused, FileNotFoundError):
    """A file or a folder that the input names is not there."""


class Unfinished(RuntimeError):
    """Work is left, and what was made is kept; the sentence says what stopped it and whether the same command goes on.

    An outage of the storage or of the cluster is of this kind: nothing is wrong with the input.
    """

    status: ClassVar[int] = 1


class Outage(Unfinished):
    """A storage that does not answer or is overloaded: nothing is wrong with the input, and it may pass by itself."""
