"""The best model: saved by validation accuracy in the run directory, promoted to best_models/."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ignite.distributed as idist
from ignite.engine import Engine, Events
from ignite.handlers import ModelCheckpoint

from cifar_ignite.checkpointing.io import copy_checkpoint, load_checkpoint
from cifar_ignite.checkpointing.run_record import RunRecord
from cifar_ignite.checkpointing.savers import FaultTolerantSaver, create_model_checkpoint
from cifar_ignite.config_io import flatten_dict
from cifar_ignite.errors import InputError, TrainingError
from cifar_ignite.files import check_listable, list_files

logger = logging.getLogger(__name__)


class BestModelSaver:
    """Saves the model with the highest validation accuracy, or the last one of a run without validation.

    Attributes:
        is_selected: Whether validation accuracies select the model; the state then belongs in a full checkpoint.
    """

    def __init__(
        self,
        to_save: Mapping[str, Any],
        record: RunRecord,
        saver: FaultTolerantSaver,
        target: Path,
        *,
        is_selected: bool,
    ) -> None:
        """
        Args:
            to_save: Objects with a `state_dict`: the model, and what is saved with it.
            record: Record with the validation accuracies; saved with the model.
            saver: Writes the file and counts failures.
            target: File of the experiment's best model, see `best_model_path`.
            is_selected: Whether there are validation accuracies.
        """
        self.to_save, self.record, self.saver, self.target = {**to_save, "record": record}, record, saver, target
        self.is_selected = is_selected
        self._checkpoint: ModelCheckpoint = create_model_checkpoint(
            saver.directory,
            filename_pattern="best_epoch_{global_step:04d}.pth" if is_selected else "last_val_acc_none.pth",
            score_function=(lambda _: record.val_acc or 0.0) if is_selected else None,
            global_step_transform=lambda engine, _: engine.state.epoch,
            n_saved=1,
        )

    def attach(self, trainer: Engine) -> None:
        """Save after each epoch; attach after the history, so that the file records its own accuracy."""
        trainer.add_event_handler(Events.EPOCH_COMPLETED, self._save)

    def _save(self, engine: Engine) -> None:
        is_last = engine.state.epoch == engine.state.max_epochs
        if is_last:
            self.saver.disallow_failures()
        if self.is_selected or is_last:
            self.saver(self._checkpoint, engine, self.to_save, on_saved=self.try_promote)

    @property
    def path(self) -> Path:
        """File of the best model in the run directory; its name is "None" before the first save."""
        return self.saver.directory / Path(str(self._checkpoint.last_checkpoint)).name

    def state_dict(self) -> dict[str, Any]:
        return self._checkpoint.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the best score; if its file is missing (the checkpoint was copied elsewhere), start over."""
        self._checkpoint.load_state_dict(state)
        if not self.path.exists():
            self._checkpoint.reset()

    def promote(self) -> str:
        """Copy the run's best model to `target` on rank 0; return a line about what `target` now contains.

        Raises:
            TrainingError: If `target` cannot be written.
        """
        if idist.get_rank() != 0:
            return ""
        try:
            return promote_best_model(self.path, self.target)
        except InputError as error:  # the run's own file was deleted
            return f"not updated: {error}"
        except OSError as error:
            raise TrainingError(
                f"cannot write {self.target} ({' '.join(str(error).split())}); this run's best model is {self.path}"
            ) from None

    def try_promote(self) -> None:
        """Promote the model of a run that continues: a failure is a warning, since the run's own file is complete."""
        try:
            self.promote()
        except TrainingError as error:
            logger.warning("%s; training continues", error)


def best_model_path(output_dir: Path, experiment: str, *, selected: bool) -> Path:
    """Return the file of an experiment's best model; `selected` is false for a run without validation."""
    return output_dir / "best_models" / f"{experiment}{'' if selected else '_val_acc_none'}_best.pth"


def run_best_model(run_dir: Path) -> Path | None:
    """Return the file of a run's best model, or of its last one without validation; None if there is none."""
    return next(iter(list_files(run_dir / "checkpoints", "*.pth")), None)


def list_best_models(output_dir: Path) -> list[Path]:
    """Return the best models of all experiments, the latest first.

    Raises:
        InputError: If their directory cannot be listed.
    """
    check_listable(output_dir / "best_models")
    return list_files(output_dir / "best_models", "*_best.pth")


def promote_best_model(source: Path, target: Path) -> str:
    """Copy a run's best model to `target`, unless `target` is better or not comparable.

    Models are comparable if they are of the same run, or were validated on the same images. Without validation, the
    latest model is copied.

    Returns:
        One line about which run's model `target` now contains.

    Raises:
        InputError: If `source` cannot be loaded.
    """
    record: RunRecord = load_checkpoint(source)["record"]
    if record.val_acc is not None and target.exists() and (other := _load_record(target)):
        is_own = other.run == record.run
        if not is_own and not _same_validation_images(record, other):
            return (
                f"{target} unchanged: validated on other images (use --set experiment=NAME to save this one elsewhere)"
            )
        # A run that was killed while promoting a model promotes the same model again.
        is_same = is_own and other.val_acc == record.val_acc
        if other.val_acc is not None and other.val_acc >= record.val_acc and not is_same:
            return f"{target} unchanged: run {other.run} reached {other.val_acc:.2%}"
    copy_checkpoint(source, target)
    return f"{target} updated by this run"


def _same_validation_images(record: RunRecord, other: RunRecord) -> bool:
    """Compare fingerprints; if one was not recorded, compare the configuration of the data."""
    if record.val_fingerprint and other.val_fingerprint:
        return record.val_fingerprint == other.val_fingerprint
    ours, theirs = flatten_dict(record.config), flatten_dict(other.config)
    keys = ["data.dataset", "data.val_size", "data.split_seed"]
    if ours.get("data.dataset") == "synthetic":
        keys += [key for key in ours if key.startswith("data.synthetic.")]
    return all(ours.get(key) == theirs.get(key) for key in keys)


def _load_record(path: Path) -> RunRecord | None:
    try:
        return load_checkpoint(path)["record"]
    except InputError as error:
        logger.warning("%s; replacing it", error)
        return None
