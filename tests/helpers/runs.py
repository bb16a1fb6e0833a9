"""Command-line options of runs, and functions called in the middle of a run."""

import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ignite.engine import Events

from cifar_ignite.training.state import TrainingState


def set_options(values: Mapping[str, object]) -> list[str]:
    """Return the command-line words that override configuration keys."""
    return [word for key, value in values.items() for word in ("--set", f"{key}={value}")]


# Overrides of a run of 4 epochs, of 4 iterations each, that use every object with a state.
STATEFUL = set_options({"train.epochs": 4, "train.patience": 4, "train.ema_decay": 0.8, "train.checkpoint_every": 3})


def latest_checkpoint(run_dir: Path) -> Path:
    """Return the full checkpoint of the highest iteration."""
    return max((run_dir / "checkpoints").glob("latest_*.pt"))


def call_at_iteration(
    iteration: int, call: Callable[[], Any], *, in_validation: bool = False
) -> Callable[[TrainingState], None]:
    """Return an `attach` of `train` that calls a function in an iteration, or in the validation after it."""

    def attach(state: TrainingState) -> None:
        engine, once = (state.evaluator, 1) if in_validation else (state.trainer, iteration)
        event = Events.ITERATION_STARTED(once=once)
        assert engine is not None
        engine.add_event_handler(event, lambda: call() if state.trainer.state.iteration == iteration else None)

    return attach


def send_signal(signum: signal.Signals = signal.SIGTERM) -> None:
    """Send a real signal to this process."""
    signal.raise_signal(signum)


def raise_disk_full(*_: object, **__: object) -> None:
    """Fail as any write to a full disk does."""
    raise OSError(28, "No space left on device")


class Stop(Exception):
    """Ends a run."""


def stop(*_: object) -> None:
    """End a run; as `attach` of `train`, before its first iteration."""
    raise Stop
