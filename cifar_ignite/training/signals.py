"""Stopping by SIGTERM, SIGINT, SIGUSR1 or SIGBREAK: a signal sets a flag that the run checks after each iteration."""

import contextlib
import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

from cifar_ignite.distributed.collectives import all_reduce_max
from cifar_ignite.distributed.process_group import DistributedContext
from cifar_ignite.errors import TrainingInterrupted


def exit_codes_by_signal() -> dict[signal.Signals, int]:
    """Return the exit status after each signal that stops a run, of those that the platform has.

    By convention it is 128 + signal number; SIGUSR1 is a batch system's advance notice, which is not a failure. Windows
    has no SIGUSR1; there, SIGBREAK (Ctrl-Break, or a console that is closed) stands for SIGTERM, which no process can
    send.
    """
    codes = {"SIGINT": 130, "SIGTERM": 143, "SIGBREAK": 143, "SIGUSR1": 0}
    return {getattr(signal, name): code for name, code in codes.items() if hasattr(signal, name)}


EXIT_CODES = exit_codes_by_signal()


class StopRequested(Exception):
    """Raised inside an engine, between two iterations, after a signal."""


class StopFlag:
    """Set by the first signal; the second ends the run at once (files are always valid).

    A second SIGINT of a single process raises KeyboardInterrupt, so that the kernel of a notebook survives; otherwise
    the process exits: ranks must not wait for one that unwinds.

    Attributes:
        signum: Number of the signal; None before the first one.
    """

    def __init__(self, context: DistributedContext) -> None:
        self.signum: int | None = None
        self._group = context.cpu_group
        self._duplicate_window = context.duplicate_signal_window
        self._received_at = math.inf

    def on_signal(self, signum: int, frame: FrameType | None) -> None:
        if time.monotonic() - self._received_at >= self._duplicate_window:
            if signum == signal.SIGINT and self._group is None:
                raise KeyboardInterrupt
            os._exit(128 + signum)
        self._received_at = min(self._received_at, time.monotonic())
        self.signum = self.signum or signum

    def raise_if_set(self) -> None:
        """Raise `StopRequested` if this or another rank of the run has received a signal."""
        self.signum = all_reduce_max(self.signum or 0, self._group) or None
        if self.signum is not None:
            raise StopRequested

    def interruption(self, epoch: int, iteration: int) -> TrainingInterrupted:
        """Return the error that ends an interrupted run, after `epoch` completed epochs and `iteration` iterations."""
        signum = signal.Signals(self.signum or signal.SIGINT)
        return TrainingInterrupted(
            f"stopped by {signum.name} after epoch {epoch}, iteration {iteration}; the checkpoint is saved, "
            "RESUME=latest (--resume latest) continues",
            EXIT_CODES[signum],
        )


@contextlib.contextmanager
def catch_signals(context: DistributedContext) -> Iterator[StopFlag]:
    """Catch signals inside the block; outside the main thread, where Python cannot, the flag stays unset."""
    flag = StopFlag(context)
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return
    previous = {signum: signal.signal(signum, flag.on_signal) for signum in EXIT_CODES}
    try:
        yield flag
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
