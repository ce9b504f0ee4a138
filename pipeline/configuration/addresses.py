"""Which texts of a recipe are paths and URIs, and which would become a folder that nobody meant.

``s3:/bucket``, as pathlib leaves it, is a local folder called ``s3:``, and an empty one is the root of the disk. They
are refused before anything is written there. Knows texts alone: whether something is there, ``storage`` knows.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from pipeline.host.errors import Refused

PLACEHOLDER = "CHANGE"  # how a value begins that a recipe leaves to its user
SCHEMES = ("s3", "s3a", "gs", "gcs", "hf", "package", "file", "memory")  # the last is fsspec's, for tests
ADVICE = "give a path, or a URI of s3://, gs://, hf:// or package://"
UNSET = "(is a variable of the shell not set?)"


@dataclass(frozen=True)
class Address:
    """What a path or a URI has to be. ``empty``: it may be missing; ``model``: it may be one of MLflow's registry."""

    empty: bool = False
    model: bool = False
    text: str = "a path or a URI"

    def check(self, value: str, name: str) -> None:
        """Raises Refused, which names the field ``name``, for a text that is no path and no supported URI."""
        check_printable(value, name)
        if value.startswith(PLACEHOLDER) or (self.empty and not value) or (self.model and value.startswith("models:/")):
            return
        if not value.strip():
            raise Refused(f"{name} is empty {UNSET}; {ADVICE}.")
        if value != value.strip():
            raise Refused(f"{name} is {value!r}, with a blank at an end; take it out.")
        if value in ("None", "null"):
            raise Refused(f"{name} is the text {value}; {ADVICE}.")
        if not value.strip("/"):
            raise Refused(f"{name} is {value}, the root of the disk {UNSET}; {ADVICE}.")
        if not _is_uri(value, name):
            _check_path(value, name)


@dataclass(frozen=True)
class Appended:
    """What a file has to be that lines are added to: a path, or ``-`` for standard output."""

    text: str = "a path, or - for standard output"

    def check(self, value: str, name: str) -> None:
        """Raises Refused, which names the field ``name``, for what is neither, and for a bucket."""
        if value == "-":
            return
        Address().check(value, name)
        if "://" in value and not value.startswith("file://"):
            raise Refused(f"{name} is {value}, to which no line can be added; give {self.text}.")


def check_printable(value: str, name: str) -> None:
    """Raises Refused for line breaks, control characters, and bytes of the command line that are no text."""
    if not value.isprintable():
        raise Refused(f"{name} is {value!a}, which holds characters that do not print; take them out.")


def _is_uri(value: str, name: str) -> bool:
    """Whether a text is a URI and no path; Refused for one that is not written as URIs are, or not supported."""
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)(:?)(/*)(.*)", value)
    scheme, colon, slashes, rest = match.groups() if match else ("", "", "", "")
    known = scheme.lower() in SCHEMES
    if not (colon and (slashes or known)) and not (known and slashes == "//"):
        return False
    if not known:
        raise Refused(f"{name} is {value}, and {scheme}: is not supported; {ADVICE}.")
    local = scheme.lower() == "file"
    meant = f"{scheme.lower()}:{'///' if local else '//'}"
    if not rest or rest[0].isspace():
        raise Refused(f"{name} is {value}, and nothing is named behind {meant}; {ADVICE}.")
    if scheme + colon + slashes != meant:
        raise Refused(f"{name} is {value}; write {meant}{rest}, with {'three' if local else 'two'} slashes.")
    return True


def _check_path(value: str, name: str) -> None:
    if value.startswith("~") and os.path.expanduser(value) == value:
        raise Refused(f"{name} is {value}, and no home of that user is known; give the whole path.")
    try:
        os.fsencode(value)
    except UnicodeEncodeError:
        raise Refused(f"{name} is {value!a}, which this locale cannot call a file; set LC_ALL=C.UTF-8.") from None
