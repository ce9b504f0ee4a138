"""What a job does before it imports anything heavy: it can be stopped, and it has a home and a name.

A container's user often has neither an entry in passwd nor a HOME that exists. Ray, MLflow and matplotlib ask for both.
"""

from __future__ import annotations

import getpass
import os
import sys
import tempfile
from pathlib import Path

from pipeline.host import signals


def begin() -> None:
    """To be called first: the imports of a job take seconds, in which it may be stopped, and some look for a home."""
    signals.install()
    lend_name()
    lend_home()
    keep_to_one_thread()


def lend_name() -> None:
    """USER for a user that has no name: libraries that write down who ran a job ask for it."""
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["USER"] = f"uid-{os.getuid()}"


def lend_home() -> None:
    """A folder in the temporary one as HOME, said aloud, where there is none; one that is read-only stays."""
    try:
        home = Path.home()
    except RuntimeError:  # neither HOME nor an entry in passwd
        home = None
    if home and home.is_dir():
        return
    lent = Path(tempfile.gettempdir(), f"distilled-decoding-{os.getuid()}")
    lent.mkdir(mode=0o700, exist_ok=True)
    if lent.is_symlink() or lent.stat().st_uid != os.getuid():
        lent = Path(tempfile.mkdtemp(prefix="distilled-decoding-"))  # somebody else's
    os.environ["HOME"] = str(lent)
    found = f"HOME is {home}, which does not exist" if home else "this user has no HOME"
    print(f"{found}; what wants one, like caches and Ray's token, goes to {lent}.", file=sys.stderr, flush=True)


def keep_to_one_thread() -> None:
    """Have Ray Data fetch its metadata where it schedules, which for a unit of work of seconds costs nothing.

    The thread that it has for it asks Ray until the process is gone. When a stopped job has left Ray, that ends the
    process at once, with status 1 in the place of the signal's.
    """
    os.environ.setdefault("RAY_DATA_METADATA_PREFETCH_ON_THREAD", "0")
