"""Ignite's checkpoint handlers with atomic writes and a limit on failures."""

import logging
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ignite.distributed as idist
from ignite.engine import Engine, Events
from ignite.handlers import DiskSaver, ModelCheckpoint

from cifar_ignite.checkpointing.full_checkpoints import list_checkpoints
from cifar_ignite.checkpointing.io import save_checkpoint
from cifar_ignite.config import TrainConfig
from cifar_ignite.distributed.collectives import all_reduce_max, check_interval
from cifar_ignite.errors import TrainingError
from cifar_ignite.files import delete

logger = logging.getLogger(__name__)


class AtomicDiskSaver(DiskSaver):
    """Ignite's save handler with atomic writes, which never has fewer valid files than before.

    `Checkpoint` requests the removal of the old file before it saves the new one; here the old file is deleted once the
    new one is on the disk, and a missing file is tolerated.
    """

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, create_dir=False, require_empty=False)
        self._superseded: set[str] = set()

    def __call__(self, checkpoint: Mapping, filename: str, metadata: Mapping | None = None) -> None:
        superseded, self._superseded = self._superseded - {filename}, set()
        save_checkpoint(Path(self.dirname) / filename, checkpoint)
        for name in superseded:
            delete(Path(self.dirname) / name)

    def remove(self, filename: str) -> None:
        self._superseded.add(filename)


def create_model_checkpoint(directory: Path, **options: Any) -> ModelCheckpoint:
    """Return Ignite's `ModelCheckpoint` with atomic writes; `options` are its own."""
    checkpoint = ModelCheckpoint(directory, create_dir=False, require_empty=False, **options)
    checkpoint.save_handler = AtomicDiskSaver(directory)
    return checkpoint


class FaultTolerantSaver:
    """Calls a `ModelCheckpoint` on rank 0; a failed write keeps the previous files and is logged.

    Attributes:
        directory: Directory of the checkpoints.
        max_failures: Consecutive failed writes that are tolerated.
        failures: Consecutive failed writes so far.
    """

    def __init__(self, directory: Path, max_failures: int) -> None:
        self.directory, self.max_failures, self.failures = directory, max_failures, 0

    def disallow_failures(self) -> None:
        """Raise on the next failed write: there will be no later one."""
        self.max_failures = 0

    def __call__(
        self,
        checkpoint: ModelCheckpoint,
        engine: Engine,
        to_save: Mapping[str, Any],
        on_saved: Callable[[], Any] | None = None,
    ) -> None:
        """Save `to_save`, and call `on_saved` if a new file was written.

        Raises:
            TrainingError: If more than `max_failures` consecutive writes have failed.
        """
        if idist.get_rank() != 0:
            return
        state_before, last = checkpoint.state_dict(), checkpoint.last_checkpoint
        try:
            checkpoint(engine, to_save)
            if checkpoint.last_checkpoint != last:  # a model that is not better is not saved, which is not a success
                if on_saved:
                    on_saved()
                self.failures = 0
        except (OSError, RuntimeError) as error:  # torch's zip writer raises RuntimeError on a full disk
            # ModelCheckpoint has already listed the missing file as saved and the previous one as removed.
            checkpoint.load_state_dict(state_before)
            self._count_failure(error)

    def _count_failure(self, error: Exception) -> None:
        self.failures += 1
        free = shutil.disk_usage(self.directory).free / 1e9 if self.directory.exists() else 0
        reason = " ".join(str(error).split())
        message = f"cannot write a checkpoint to {self.directory} ({reason}; {free:.1f} GB free)"
        if self.failures > self.max_failures:
            raise TrainingError(f"{message}; consecutive failures: {self.failures}") from None
        logger.warning("%s; previous checkpoints are kept, training continues", message)


class CheckpointSaver:
    """Saves full checkpoints: one every few epochs that is kept, and the latest two for resuming.

    Attributes:
        saver: Writes the files and counts failures.
        to_save: Objects with a `state_dict`.
        check: Raises if the state must not be saved; called on all ranks before a save.
    """

    def __init__(self, saver: FaultTolerantSaver, to_save: Mapping[str, Any], check: Callable[[], None]) -> None:
        self.saver, self.to_save, self.check = saver, to_save, check
        self._saved_at = time.monotonic()
        self._kept = create_model_checkpoint(
            saver.directory,
            filename_pattern="epoch_{global_step:04d}.pt",
            global_step_transform=lambda engine, _: engine.state.epoch,
            n_saved=None,
        )
        # A checkpoint between the last iteration of an epoch and its end has the same name as the one at its end.
        self._latest = create_model_checkpoint(
            saver.directory,
            filename_pattern="latest_{global_step:09d}.pt",
            global_step_transform=lambda engine, _: engine.state.iteration,
            n_saved=None,
        )

    def attach(self, trainer: Engine, options: TrainConfig, check_every: int, group: Any = None) -> None:
        """Save at the end of each epoch, and every `save_every_seconds` within one.

        Args:
            trainer: Engine whose epochs and iterations name the files.
            options: Intervals between checkpoints.
            check_every: Iterations between checks of the clock.
            group: Process group on which the ranks agree that a save is due.
        """

        def save_if_due(engine: Engine) -> None:
            if all_reduce_max(int(time.monotonic() - self._saved_at >= options.save_every_seconds), group):
                self.save(engine)

        trainer.add_event_handler(Events.EPOCH_COMPLETED(every=options.checkpoint_every), self._save_kept)
        trainer.add_event_handler(Events.EPOCH_COMPLETED, self.save)
        trainer.add_event_handler(Events.ITERATION_COMPLETED(every=check_interval(check_every)), save_if_due)

    def save(self, engine: Engine) -> None:
        """Save the latest checkpoint now, and delete all but the latest two."""
        self.check()
        self.saver(self._latest, engine, self.to_save, on_saved=self._delete_older)
        self._saved_at = time.monotonic()

    def _save_kept(self, engine: Engine) -> None:
        self.saver(self._kept, engine, self.to_save)

    def _delete_older(self) -> None:
        """Delete all but the latest two checkpoints on the disk, those of an interrupted run included."""
        last = Path(str(self._latest.last_checkpoint))
        for path in [path for path in list_checkpoints(self.saver.directory, "latest") if path != last][1:]:
            delete(path)
