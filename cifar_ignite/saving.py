"""When training states and models are saved, and what happens if that fails. How is in checkpoints.py."""

import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ignite.distributed as idist
from ignite.engine import Engine, Events
from ignite.handlers import Checkpoint
from torch import nn

from cifar_ignite.checkpoints import DurableSaver, RunRecord
from cifar_ignite.config import RunFailedError

logger = logging.getLogger(__name__)


class PatientSaver:
    """Calls Ignite's `Checkpoint`; a failure leaves what was there and is told; too many in a row end the run.

    Of several processes, only the first one saves.

    Attributes:
        folder: of the checkpoints.
        allowed: failures in a row that are borne.
        failures: in a row, so far.
    """

    def __init__(self, folder: Path, allowed: int) -> None:
        self.folder, self.allowed, self.failures = folder, allowed, 0

    def be_strict(self) -> None:
        """Bear no failure from here on: what is saved now is the last chance."""
        self.allowed = 0

    def __call__(self, checkpoint: Checkpoint, engine: Engine, then: Callable[[], Any] | None = None) -> None:
        """Save, and call `then` if there is a new file.

        Raises:
            RunFailedError: more than the allowed number of saves in a row have failed.
        """
        if idist.get_rank():
            return
        before, last = checkpoint.state_dict(), checkpoint.last_checkpoint
        try:
            checkpoint(engine)
            if checkpoint.last_checkpoint != last:  # a model that is not better is not saved: that is no success
                if then:
                    then()
                self.failures = 0
        except (OSError, RuntimeError) as error:  # torch's zip writer turns a full disk into a RuntimeError
            # Checkpoint has already noted the file that is not there as saved, and the old one as removed.
            checkpoint.load_state_dict(before)
            self.failures += 1
            reason = " ".join(str(error).split())
            free = shutil.disk_usage(self.folder).free / 1e9 if self.folder.exists() else 0
            message = f"cannot write a checkpoint into {self.folder} ({reason}; {free:.1f} GB free)"
            if self.failures > self.allowed:
                raise RunFailedError(f"{message}, {self.failures} in a row") from None
            logger.warning("%s; the older ones are kept and training goes on", message)


def attach_best_model(
    trainer: Engine,
    model: nn.Module,
    record: RunRecord,
    saver: PatientSaver,
    publish: Callable[[], Any],
    *,
    selected: bool,
) -> Checkpoint:
    """Keep the model of the best validation accuracy, or, with nothing to select by, the last one.

    Attached to the trainer, after the history has the epoch's row, so that the file tells its own accuracy.

    Args:
        trainer: its epochs are judged.
        model: what is saved, beside the record.
        record: has the accuracies.
        saver: where to, and bears with failures.
        publish: called when there is a new file.
        selected: whether there are validation accuracies.

    Returns:
        The handler; its state belongs in the checkpoint if the model is selected.
    """
    best = Checkpoint(
        {"model": model, "record": record},
        DurableSaver(saver.folder),
        filename_pattern="best_epoch_{global_step:04d}.pth" if selected else "last_val_acc_none.pth",
        score_function=(lambda _: record.val_acc or 0.0) if selected else None,
        global_step_transform=lambda engine, _: engine.state.epoch,
    )

    def save(engine: Engine) -> None:
        is_last = engine.state.epoch == engine.state.max_epochs
        if is_last:
            saver.be_strict()
        if selected or is_last:
            saver(best, engine, publish)

    trainer.add_event_handler(Events.EPOCH_COMPLETED, save)
    return best


def attach_checkpoints(
    trainer: Engine,
    state: dict[str, Any],
    saver: PatientSaver,
    every: int,
    every_seconds: float,
    check: Callable[[], None],
    agree: Callable[[int], int] = int,
    look_every: int = 1,
) -> Callable[[], None]:
    """Save the whole training state: the newest two, and every so many epochs one that stays.

    Attached last, so that the state is that of a finished iteration or epoch, and after a resumed state is loaded.

    Args:
        trainer: its iterations name the files.
        state: objects with a `state_dict`.
        saver: where to, and bears with failures.
        every: epochs between checkpoints that stay.
        every_seconds: between saves within an epoch; each epoch ends with one in any case.
        check: raises if the state is not fit to be saved.
        agree: makes one number of those of several processes, whose clocks differ.
        look_every: iterations between looks at the clock.

    Returns:
        Saves the newest state at once.
    """
    folder = saver.folder
    kept = Checkpoint(
        state,
        DurableSaver(folder),
        filename_pattern="epoch_{global_step:04d}.pt",
        global_step_transform=lambda engine, _: engine.state.epoch,
        n_saved=None,
    )
    latest = Checkpoint(
        state,
        DurableSaver(folder),
        filename_pattern="latest_{global_step:09d}.pt",
        global_step_transform=lambda engine, _: engine.state.iteration,
        # The state between the last iteration of an epoch and its end has the name of the one after it.
        n_saved=2,
    )
    # What an interrupted run left counts among the newest two.
    before = [(int(path.stem.split("_")[1]), path.name) for path in folder.glob("latest_*.pt")]
    latest.load_state_dict({"_saved": sorted(item for item in before if item[0] <= trainer.state.iteration)})
    saved_at = [time.monotonic()]

    def save() -> None:
        check()
        saver(latest, trainer)
        saved_at[0] = time.monotonic()

    def save_if_due() -> None:
        if agree(time.monotonic() - saved_at[0] >= every_seconds):
            save()

    trainer.add_event_handler(Events.EPOCH_COMPLETED(every=every), lambda engine: saver(kept, engine))
    trainer.add_event_handler(Events.EPOCH_COMPLETED, save)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(every=look_every), save_if_due)
    return save
