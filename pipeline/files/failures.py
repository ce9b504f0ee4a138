"""What a filesystem raises, as one sentence about the file: ``Missing``, ``Refused``, or ``Outage`` if it may pass.

Backends have families of errors of their own (botocore's, aiohttp's, the Hub's, Google's). They are told apart by their
number, by the HTTP status that they carry and by the names of their classes, so that no backend has to be installed.
"""

from __future__ import annotations

import errno
import io
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any

from pipeline.host.errors import Missing, Outage, Refused, Unfinished

FULL = (errno.ENOSPC, errno.EDQUOT)
BUSY = (errno.EBUSY, errno.EAGAIN)
BROKEN = (  # a disk, a mount or a connection that fails
    *(errno.EIO, errno.EREMOTEIO, errno.ESTALE, errno.ENOLINK, errno.EPIPE, errno.ETIMEDOUT, errno.ESHUTDOWN),
    *(errno.ENETDOWN, errno.ENETUNREACH, errno.ENETRESET, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENOTCONN),
    *(errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED),
)
PASSING_STATUS = (408, 425, 429)  # and those from 500 on
UNREACHABLE = {  # names of classes that stand for a connection: none, broken off, or too slow
    *("ConnectionError", "HTTPClientError", "ClientConnectionError", "ClientPayloadError", "TransportError"),
    *("TimeoutError", "TimeoutException", "IncompleteReadError", "IncompleteRead", "ResponseStreamingError"),
}
CERTIFICATE = "certificate verify failed"  # the server answers, and waiting does not help
BLOCK = 1 << 20  # bytes that an open file is read or written in
AGAIN = "run the same command again later"
ADVICE = {  # by the number of an OSError that does not pass
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.EREMCHG: "the bucket is in another region, so set AWS_DEFAULT_REGION to that",
}


@contextmanager
def sentences(uri: str, doing: str, remote: bool) -> Iterator[None]:
    """Turn what a filesystem raises into one sentence about ``uri``. The body is storage's own, never a caller's."""
    try:
        yield
    except (Refused, Unfinished):
        raise
    except Exception as error:
        if not remote and not isinstance(error, OSError | ValueError):
            raise  # a fault of ours
        raise sentence(error, uri, doing, remote) from None


def sentence(error: Exception, uri: str, doing: str, remote: bool) -> Refused | Unfinished:
    """What to raise instead of a filesystem's ``error``."""
    status, failed = _status(error), f"{uri} could not be {doing}"
    reason = " ".join(str(getattr(error, "strerror", None) or error).split()).rstrip(".") or type(error).__name__
    number = error.errno if isinstance(error, OSError) else None
    if isinstance(error, FileNotFoundError) or status == 404 or (number == errno.ENOTDIR and doing == "looked up"):
        what = "bucket" if doing == "written" and remote else "file"
        return Missing(f"{failed}: there is no such {what}; check the path.")
    if isinstance(error, PermissionError) or status in (401, 403):
        return Refused(f"{failed}: permission denied ({reason}).")
    if number in FULL:
        return Unfinished(f"{failed} ({reason}); free some space or choose another folder.")  # waiting does not help
    if number in BUSY or status == 429:
        return Outage(f"{failed} ({reason}); the server is overloaded, so {AGAIN}.")  # after many attempts
    if CERTIFICATE not in reason.lower() and _passes(error, number, status):
        where = "the server does not answer: check the address, or" if remote else "the disk or its server fails:"
        return Outage(f"{failed} ({reason}); {where} {AGAIN}.")
    advice = ADVICE.get(number or 0, "check the address and the credentials" if remote else "check the path")
    return Refused(f"{failed} ({reason}); {advice}.")


def _passes(error: Exception, number: int | None, status: int | None) -> bool:
    """Whether nothing may be wrong but the moment."""
    if any(kind.__name__ in UNREACHABLE for one in _causes(error) for kind in type(one).__mro__):
        return True
    if status is not None and status >= 400:  # the server has spoken, and s3fs calls all that it does not know EIO
        return status >= 500 or status in PASSING_STATUS
    return number in BROKEN or isinstance(error, socket.gaierror)


def _status(error: Exception) -> int | None:
    """The HTTP status that an error, or the response that it came from, carries."""
    found = [getattr(error, "status", None), getattr(error, "code", None)]
    for one in _causes(error):
        response = getattr(one, "response", None)
        if isinstance(response, dict):  # botocore's
            found.append(response.get("ResponseMetadata", {}).get("HTTPStatusCode"))
        else:
            found.append(getattr(response, "status_code", None))
    return next((value for value in found if isinstance(value, int) and 100 <= value < 600), None)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error and those that it was raised from."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__


class Watched(io.RawIOBase):
    """An open file whose own errors are sentences; so the errors of whoever reads or writes it can pass untouched.

    ``failed`` is the first of them, for libraries that turn an error of the file into one of their own.
    """

    def __init__(self, file: IO[bytes], uri: str, remote: bool, writing: bool) -> None:
        self.file: Any = file
        self.uri, self.remote, self.writing = uri, remote, writing
        self.failed: Refused | Unfinished | None = None

    @contextmanager
    def _watching(self, doing: str) -> Iterator[None]:
        try:
            with sentences(self.uri, doing, self.remote):
                yield
        except (Refused, Unfinished) as error:
            self.failed = self.failed or error
            raise

    def readable(self) -> bool:
        return not self.writing

    def writable(self) -> bool:
        return self.writing

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        with self._watching("read"):
            return int(self.file.readinto(buffer))

    def readall(self) -> bytes:
        with self._watching("read"):
            return bytes(self.file.read())

    def write(self, data: Any) -> int:
        with self._watching("written"):
            return int(self.file.write(data))

    def tell(self) -> int:
        return int(self.file.tell())

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        try:
            return int(self.file.seek(offset, whence))
        except ValueError as error:  # fsspec's for a place before the beginning, where Python's files say OSError
            raise OSError(errno.EINVAL, str(error)) from None

    def fileno(self) -> int:
        return int(self.file.fileno())

    def close(self) -> None:
        """Close the file, which may be when its last bytes are sent; again is no error."""
        if not self.closed:
            try:
                with self._watching("written" if self.writing else "read"):
                    self.file.close()
            finally:
                super().close()


@contextmanager
def watched(file: IO[bytes], uri: str, remote: bool, writing: bool = False) -> Iterator[IO[bytes]]:
    """``file``, buffered, as a ``Watched`` one; closed at the end. Errors of the body pass untouched.

    If the file itself failed, its sentence is what is raised, whatever a library in the body made of it.
    """
    raw = Watched(file, uri, remote, writing)
    buffered = io.BufferedWriter(raw, BLOCK) if writing else io.BufferedReader(raw, BLOCK)
    try:
        yield buffered
        buffered.close()
    except BaseException as error:
        with suppress(Exception):
            buffered.close()
        if isinstance(error, Exception) and raw.failed not in (None, error):
            raise raw.failed from None
        raise
