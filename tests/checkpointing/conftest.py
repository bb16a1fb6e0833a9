"""Runs that are interrupted, and an uninterrupted one to compare them with."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.runs import STATEFUL, call_at_iteration, send_signal, set_options


@pytest.fixture
def train(command: Callable[..., Any], tiny_file: Path) -> Callable[..., tuple[int, str, str]]:
    """A function that trains with further command-line words and returns (exit status, stdout, stderr)."""
    return lambda *words, **extra: command("train", "--config", tiny_file, *words, **extra)


@pytest.fixture
def interrupt(train: Callable[..., Any]) -> Callable[..., tuple[int, str, str]]:
    """A function that trains with `STATEFUL` until a real signal stops the run in an iteration."""

    def run(
        iteration: int, *words: object, signum: signal.Signals = signal.SIGTERM, in_validation: bool = False
    ) -> tuple[int, str, str]:
        attach = call_at_iteration(iteration, lambda: send_signal(signum), in_validation=in_validation)
        return train(*STATEFUL, *words, attach=attach)

    return run


@pytest.fixture(scope="session")
def _uninterrupted_output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("uninterrupted")


@pytest.fixture
def uninterrupted(train: Callable[..., Any], _uninterrupted_output: Path) -> Path:
    """Directory of an uninterrupted run with `STATEFUL`, which is made once."""
    runs = _uninterrupted_output / "training_runs"
    if not runs.exists():
        assert train(*STATEFUL, *set_options({"output_dir": _uninterrupted_output}))[0] == 0
    return next(runs.iterdir())
