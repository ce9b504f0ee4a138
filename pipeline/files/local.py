"""Files of a local disk that several processes are at: names of unfinished ones, whose writer may be gone; locks."""

from __future__ import annotations

import errno
import fcntl
import io
import os
import socket
import stat
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline.host.errors import Refused

TEMPORARY = ".tmp-"  # files being written; a killed process leaves one behind


def user() -> Path:
    """The user's home; Refused where nobody says which it is, as in a container for a user without a name."""
    place = os.path.expanduser("~")
    if place.startswith("~"):
        raise Refused("HOME is not set, and this user has no home; set HOME to a folder that can be written.")
    return Path(place)


def cache() -> Path:
    """Where downloads are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or user() / ".cache") / "distilled-decoding"


def no_file(path: str) -> str:
    """What stands in a file's place: a folder has no bytes, a pipe would be waited for without end; "" for a file."""
    mode = os.stat(path).st_mode
    kinds = {"": stat.S_ISREG, "a folder": stat.S_ISDIR, "a pipe": stat.S_ISFIFO, "a socket": stat.S_ISSOCK}
    return next((name for name, is_kind in kinds.items() if is_kind(mode)), "a device")


def temporary(name: str) -> str:
    """A name for a file being written, which says who writes it."""
    return f"{TEMPORARY}{name}@{socket.gethostname()}@{os.getpid()}@{uuid.uuid4().hex}"


def writer_is_gone(name: str) -> bool | None:
    """Whether nobody writes the temporary file of that name any more; None where its writer is of another machine."""
    writer = name.rsplit("@", 3)[1:]
    if len(writer) < 3:
        return True  # not even named as one of ours
    host, process, _ = writer
    if host != socket.gethostname():
        return None
    try:
        os.kill(int(process), 0)  # asks, and kills nobody
    except OSError as error:
        return error.errno == errno.ESRCH
    return False


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold a folder's lock, which ends with the process. On a disk without locks nobody waits for anybody."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def leads_to(link: Path, name: str) -> bool:
    """Whether ``point`` made the link so, be its neighbour there or not."""
    return link.is_symlink() and os.readlink(link) == name


def write(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write files of a folder, {name: content}, each whole or not at all, and on the disk when this returns."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        unfinished = folder / temporary(name)
        try:
            with io.FileIO(unfinished, "wb") as file:
                view = memoryview(data)
                while view:  # the system may take a part of them
                    view = view[file.write(view) :]
                os.fsync(file.fileno())
            os.replace(unfinished, folder / name)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise


def point(link: Path, name: str) -> None:
    """Make ``link`` lead to its neighbour ``name``; there is always the old link or the new one."""
    unfinished = link.with_name(temporary(link.name))
    os.symlink(name, unfinished)
    os.replace(unfinished, link)
