"""What happens in a job, for programs: one JSON object a line, in a file or on standard output (``events``).

A process has one log of events at most, as it has one standard error: whoever does something worth a line calls
``tell`` or ``warn``, and where no log is open, as in Ray's workers, ``tell`` does nothing.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pipeline.host.errors import Refused, Unfinished
from pipeline.host.signals import Stopped, held

STDOUT = "-"  # in the place of a file's path
_log: Log | None = None


class Log:
    """Lines at the end of an open file, each by one write; ``always`` is in all of them.

    A line that cannot be written is lost, and the first one is said: the job is worth more than what is told of it.
    """

    def __init__(self, file: int, place: str, always: dict[str, Any]) -> None:
        self.file, self.place, self.always = file, place, always
        self._lock, self._failed, self._closed = threading.Lock(), False, False

    def write(self, event: str, values: dict[str, Any]) -> None:
        """Add a line of an event: time in UTC, ``always``, the event's name, its ``values``."""
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        content = _plain({"time": stamp, **self.always, "event": event, **values})
        line = (json.dumps(content, ensure_ascii=False, default=str) + "\n").encode(errors="replace")
        try:
            with held(), self._lock:
                if not self._closed:
                    _append(self.file, line)
        except OSError as error:
            if not self._failed:
                self._failed = True
                text = f"Events are missing in {self.place} ({error.strerror or error}); the job goes on."
                tqdm.write(text, file=sys.stderr)

    def close(self) -> None:
        """Let go of the file; a thread that still tells something is not heard."""
        with self._lock:
            self._closed = True
            os.close(self.file)


@contextmanager
def written(place: str, **always: Any) -> Iterator[None]:
    """Have ``tell`` add lines to the file at ``place`` while the body runs, or to standard output; the last one says
    how it was left where an exception did that.

    ``always`` are values of every line. Raises Refused, one sentence, for a file that cannot be opened.
    """
    global _log
    log = _log = Log(_opened(place), "standard output" if place == STDOUT else place, always)
    try:
        yield
    except BaseException as error:
        tell(**_ending(error))
        raise
    finally:
        _log = None
        log.close()


def tell(event: str, **values: Any) -> None:
    """Write a line of an event with its ``values``, plain JSON, into the log of this process, if there is one."""
    if log := _log:
        log.write(event, values)


def warn(sentence: str) -> None:
    """Say a sentence on standard error, above a progress bar if there is one, and among the events."""
    tqdm.write(sentence, file=sys.stderr)
    tell("warning", text=sentence.removeprefix("warning: "))


def _opened(place: str) -> int:
    """A descriptor to append to, which no child inherits; folders on the way are made.

    Not waiting: a named pipe that nobody reads would hold the job up before it has said anything.
    """
    try:
        if place == STDOUT:
            sys.stdout.flush()
            return os.dup(sys.stdout.fileno())
        Path(place).parent.mkdir(parents=True, exist_ok=True)
        file = os.open(place, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK, 0o666)
        os.set_blocking(file, True)
        return file
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        what = "- and standard output is closed" if place == STDOUT else f"{place}, which cannot be opened ({reason})"
        raise Refused(f"events is {what}; give the path of a file that can be written.") from error


def _append(file: int, line: bytes) -> None:
    """Write a whole line or none of it: what a full disk took of one is cut off again."""
    done = 0
    try:
        while done < len(line):
            done += os.write(file, line[done:])
    except OSError:
        with suppress(OSError):  # a pipe has no end to cut
            if done:
                os.ftruncate(file, os.lseek(file, 0, os.SEEK_END) - done)
        raise


def _ending(error: BaseException) -> dict[str, Any]:
    """The last event of a job that an exception ends, by the status that its process ends with."""
    text = " ".join(str(error).split())
    if isinstance(error, Stopped | KeyboardInterrupt):
        status = error.code if isinstance(error, Stopped) else 128 + signal.SIGINT
        return {
            "event": "stopped",
            "status": status,
            "text": f"Stopped by {signal.Signals(int(status or 0) - 128).name}.",
        }
    if isinstance(error, Refused | Unfinished):
        return {"event": "failed", "status": error.status, "text": text}
    return {"event": "failed", "status": 1, "text": f"{type(error).__name__}: {text}"}


def _plain(value: Any) -> Any:
    """The same for JSON, which knows neither NaN nor infinity: null stands for them."""
    if isinstance(value, dict):
        return {key: _plain(inside) for key, inside in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inside) for inside in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
