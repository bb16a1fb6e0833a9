"""Runs that are interrupted, and an uninterrupted one to compare them with."""

import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import only_run
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
def _made_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("made_once")


@pytest.fixture
def uninterrupted(train: Callable[..., Any], _made_once: Path) -> Path:
    """Directory of an uninterrupted run with `STATEFUL`, which is made once."""
    runs = _made_once / "uninterrupted" / "training_runs"
    if not runs.exists():
        assert train(*STATEFUL, *set_options({"output_dir": runs.parent}))[0] == 0
    return next(runs.iterdir())


@pytest.fixture
def make_once(tmp_path: Path, cifar_root: Path, _made_once: Path) -> Callable[..., Path]:
    """A function that copies the outputs of a run, which is made by the first test that asks for it.

    The images stay where the run finds them again when it is resumed.
    """

    def run(name: str, make: Callable[..., object]) -> Path:
        outputs, original, data = tmp_path / "outputs", _made_once / name, _made_once / "data"
        if original.exists():
            shutil.copytree(original, outputs)
        else:
            shutil.copytree(cifar_root, data, dirs_exist_ok=True)
            make(*set_options({"data.root": data}))
            shutil.copytree(outputs, original)
        return only_run(tmp_path)

    return run


@pytest.fixture
def interrupted(interrupt: Callable[..., Any], make_once: Callable[..., Path]) -> Path:
    """Directory of a run with `STATEFUL` that was stopped after iteration 6."""
    return make_once("interrupted", lambda *words: interrupt(6, *words))


@pytest.fixture
def complete(train: Callable[..., Any], make_once: Callable[..., Path]) -> Path:
    """Directory of a complete run of two epochs."""
    return make_once("complete", train)
