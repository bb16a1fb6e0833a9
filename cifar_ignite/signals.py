"""SIGTERM, SIGINT and SIGUSR1 ask a run to stop: they set a flag, and the run looks at it after each iteration."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from cifar_ignite.config import RunFailedError

# Exit statuses by convention: 128 + number, but a batch system's advance notice (SIGUSR1) is no failure.
STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGUSR1: 0}


class StopRequested(Exception):
    """Raised between two iterations, inside an engine, once a signal has come."""


class StopFlag:
    """Set by the first signal; the second ends the process at once (files are always whole)."""

    def __init__(self) -> None:
        self.signum: int | None = None

    def on_signal(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is not None:
            os._exit(128 + signum)
        self.signum = signum

    def look(self) -> None:
        """Raise `StopRequested` if a signal has come."""
        if self.signum is not None:
            raise StopRequested


class Stopped(RunFailedError):
    """The run was asked to stop and has saved its state; the message says how to go on."""

    def __init__(self, flag: StopFlag, epoch: int, iteration: int) -> None:
        signum = signal.Signals(flag.signum or signal.SIGINT)
        super().__init__(
            f"stopped by {signum.name} after epoch {epoch}, iteration {iteration}; the state is saved, "
            "RESUME=latest (--resume latest) continues"
        )
        self.status = STATUS[signum]


@contextlib.contextmanager
def stop_flag() -> Iterator[StopFlag]:
    """Catch the signals while inside; only the main thread may, elsewhere the flag stays unset."""
    flag = StopFlag()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return
    previous = {signum: signal.signal(signum, flag.on_signal) for signum in STATUS}
    try:
        yield flag
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
