"""The command lines of the jobs that take no recipe."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from typing import NoReturn

from pipeline.command_line import Output, stop
from pipeline.host import signals
from pipeline.host.errors import Refused, Unfinished


class Parser(argparse.ArgumentParser):
    """Says what is wrong as all jobs do: in one sentence, with exit status 2."""

    def __init__(self, doc: str | None) -> None:
        super().__init__(description=doc, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        stop(Refused(f"{message}; --help lists what there is."))

    def carry_out(self, work: Callable[[argparse.Namespace], str | None], args: Sequence[str] | None = None) -> None:
        """The body of a job: ``work`` on its arguments, by default this process's, and the sentence that it returns.

        Refused and Unfinished end the program with their sentence and their exit status.
        """
        signals.install()
        with redirect_stdout(Output(sys.stdout)):
            asked = self.parse_args(args)
            try:
                if said := work(asked):
                    print(said, flush=True)
            except (Refused, Unfinished) as error:
                stop(error, error.status)


def truth(text: str) -> bool:
    """The type of an argument that is true or false."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"
