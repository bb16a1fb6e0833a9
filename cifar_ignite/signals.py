"""SIGTERM, SIGINT and SIGUSR1 ask a run to stop: they set a flag, and the run looks at it after each iteration."""

import contextlib
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

from cifar_ignite.config import RunFailedError

# Exit statuses by convention: 128 + number, but a batch system's advance notice (SIGUSR1) is no failure.
STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGUSR1: 0}


class StopRequested(Exception):
    """Raised between two iterations, inside an engine, once a signal has come."""


class StopFlag:
    """Set by the first signal; the second ends the process at once (files are always whole).

    Attributes:
        signum: the signal; None while there was none.
        agree: the greatest of the numbers that several processes have; None for a process on its own.
    """

    def __init__(self, agree: Callable[[int], int] | None = None) -> None:
        self.signum: int | None = None
        self.agree = agree
        self._came = math.inf
        # A signal to a whole group of processes comes from the sender and again from torchrun.
        self._grace = 1.0 if agree else 0.0

    def on_signal(self, signum: int, frame: FrameType | None) -> None:
        if time.monotonic() - self._came >= self._grace:
            os._exit(128 + signum)
        self._came = min(self._came, time.monotonic())
        self.signum = self.signum or signum

    def look(self) -> None:
        """Raise `StopRequested` if a signal has come, to this process or to another of the run."""
        if self.agree:
            self.signum = self.agree(self.signum or 0) or None
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
def stop_flag(agree: Callable[[int], int] | None = None) -> Iterator[StopFlag]:
    """Catch the signals while inside; only the main thread may, elsewhere the flag stays unset."""
    flag = StopFlag(agree)
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return
    previous = {signum: signal.signal(signum, flag.on_signal) for signum in STATUS}
    try:
        yield flag
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
