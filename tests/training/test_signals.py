"""Signals that stop a run."""

import os
import signal
import threading

import pytest

from cifar_ignite.distributed.env import DistEnv
from cifar_ignite.distributed.process_group import DistributedContext
from cifar_ignite.training import signals
from cifar_ignite.training.signals import EXIT_CODES, StopFlag, StopRequested, catch_signals, exit_codes_by_signal

SINGLE = DistributedContext(DistEnv())


@pytest.fixture
def exits(monkeypatch):
    """Statuses with which the process would have exited."""
    statuses = []
    monkeypatch.setattr(os, "_exit", statuses.append)
    return statuses


def test_first_signal_sets_flag_and_second_ends_the_run(exits):
    """The kernel of a notebook survives a second SIGINT."""
    before = signal.getsignal(signal.SIGTERM)
    with catch_signals(SINGLE) as flag:
        flag.raise_if_set()
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(StopRequested):
            flag.raise_if_set()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert exits == []
        signal.raise_signal(signal.SIGTERM)
        assert exits == [143]
    assert signal.getsignal(signal.SIGTERM) == before


def test_duplicate_signal_within_window_counts_once(monkeypatch, exits):
    """A signal sent to all processes also arrives from torchrun; an intended second one arrives later."""
    now = [0.0]
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    flag = StopFlag(DistributedContext(DistEnv(0, 0, 2)))
    flag.raise_if_set()
    flag.signum = int(signal.SIGINT)  # another rank received it, and all ranks have agreed on it
    for moment, num_exits in [(5, 0), (5.2, 0), (6.5, 1)]:
        now[0] = moment
        flag.on_signal(signal.SIGTERM, None)
        assert len(exits) == num_exits
    with pytest.raises(StopRequested):
        flag.raise_if_set()
    assert flag.signum == signal.SIGINT


def test_catch_signals_outside_main_thread_leaves_handlers_unchanged():
    before, flags = signal.getsignal(signal.SIGTERM), []

    def run():
        with catch_signals(SINGLE) as flag:
            flag.raise_if_set()
            flags.append((flag.signum, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert flags == [(None, before)]


def test_exit_codes_are_of_signals_that_windows_has(monkeypatch):
    monkeypatch.delattr(signal, "SIGUSR1", raising=False)
    monkeypatch.setattr(signal, "SIGBREAK", 21, raising=False)
    assert exit_codes_by_signal() == {signal.SIGINT: 130, signal.SIGTERM: 143, 21: 143}


@pytest.mark.parametrize(("signum", "status"), EXIT_CODES.items())
def test_interruption_names_signal_and_progress(signum, status):
    flag = StopFlag(SINGLE)
    flag.on_signal(signum, None)
    error = flag.interruption(epoch=3, iteration=14)
    assert error.status == status
    assert f"{signum.name} after epoch 3, iteration 14; " in str(error)
    assert "RESUME=latest" in str(error)
