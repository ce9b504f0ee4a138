"""Ctrl-C, SIGTERM and SIGHUP: a job that is told to stop says so in one line and ends with the status that shells know.

The exception that a signal becomes is a SystemExit: wherever it is raised and whoever lets it pass, the program ends
without a traceback and with 128 plus the signal's number.
"""

from __future__ import annotations

import atexit
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
GRACE = 3.0  # seconds that a process may take to end
_held: list[int] = []  # depth of ``held``, and the signal that came meanwhile
_depth = 0
_stopping = False


class Stopped(SystemExit):
    """A signal ended the job. ``code``: 128 plus its number."""


def leave_to_parent() -> None:
    """In a child process: Ctrl-C, which a terminal sends to all, is the parent's, who ends its children."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def stopping() -> bool:
    """Whether the job is on its way out: what merely tidies up may be left out, for a supervisor waits seconds."""
    return _stopping


def install() -> None:
    """Have the three signals raise Stopped in the main thread; elsewhere, nothing: Python allows it there alone.

    One that is ignored stays so: SIGHUP by nohup, SIGINT by a shell's script for what it runs in the background.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _stop)


@contextmanager
def held() -> Iterator[None]:
    """A signal that comes while the body runs is raised after it: for what must not be left half done.

    Nothing in other threads than the main one, in which no signal is raised.
    """
    global _depth
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1
        if _held and not _depth:
            _raise(_held.pop())


@contextmanager
def kept() -> Iterator[None]:
    """The handlers from before the body, put back after it: Ray sets its own when it starts, which exits with 15."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    except SystemExit as stop:
        if stop.code == signal.SIGTERM and before[signal.SIGTERM] is _stop and not _stopping:
            _raise(signal.SIGTERM)
        raise
    finally:
        for number, handler in before.items():
            if handler is _stop:
                signal.signal(number, handler)


def interruptible(call: Callable[[], Any]) -> Any:
    """The result of a call that runs in a thread of its own, while this one may be told to stop."""
    outcome: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue()

    def work() -> None:
        """Hand on what came of it."""
        try:
            outcome.put((call(), None))
        except BaseException as error:
            outcome.put((None, error))

    threading.Thread(target=work, daemon=True).start()
    result, error = outcome.get()
    if error:
        raise error
    return result


def _stop(number: int, frame: FrameType | None) -> None:
    """Raise Stopped once; whatever follows it finds the job on its way out."""
    if _stopping or _held:
        return
    if _depth:
        _held.append(number)
    else:
        _raise(number)


def _raise(number: int) -> None:
    global _stopping
    _stopping = True
    threading.excepthook = lambda failure: None  # threads of Ray's still ask it for something while it goes
    name = signal.Signals(number).name
    begin = "\n" if os.isatty(2) else ""  # there, the line may be begun: ^C
    atexit.register(_leave, 128 + number)  # the last to be registered is the first to be called
    os.write(2, f"{begin}Stopped by {name}; what is finished is kept, and the same command goes on.\n".encode())
    raise Stopped(128 + number)


def _leave(code: int) -> None:
    """End the process here, once all that the job itself tidies up is done.

    Ray's own way out comes later, and a thread that still asks Ray for something during it ends the process with status
    1. A cluster notices that this process is gone, as when it is killed; a local Ray is of its children.
    """
    _end_children()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # a pipe that nobody reads, a stream that is closed
            stream.flush()
    os._exit(code)


def _end_children() -> None:
    """Tell all processes that this one has started to end, and end those that do not, with all that they started."""
    import psutil  # not when a job begins, before it can be stopped

    own = psutil.Process()
    children, everyone = own.children(), own.children(recursive=True)
    for child in children:
        with suppress(psutil.NoSuchProcess):
            child.terminate()
    psutil.wait_procs(children, timeout=GRACE)  # theirs may stay zombies where the first process asks for no status
    for process in everyone:
        with suppress(psutil.NoSuchProcess):
            process.kill()
