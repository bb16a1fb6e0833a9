"""Resuming: finding the full checkpoint to continue from, and checking that it belongs to the requested run."""

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from ignite.handlers import Checkpoint
from torch import nn

from cifar_ignite.checkpointing.full_checkpoints import (
    full_checkpoints,
    latest_run,
    list_checkpoints,
    load_full_checkpoint,
    load_latest_valid,
    read_run_config,
)
from cifar_ignite.config import OPTIMIZER_LAYOUT_KEYS, RESOLVED_KEYS, RESUME_SAFE_KEYS, Config
from cifar_ignite.config_io import flatten_dict, parse_config
from cifar_ignite.distributed.collectives import SyncedMetrics, broadcast_from_rank0
from cifar_ignite.errors import InputError, check_named, first_line
from cifar_ignite.files import check_listable

Changes = dict[str, tuple[Any, Any]]

logger = logging.getLogger(__name__)


@dataclass
class ResumeState:
    """A run to resume, and the configuration that it continues with.

    Attributes:
        run_dir: Run directory; None for a checkpoint outside any, which continues in a new one.
        path: Full checkpoint; None if the run stopped before it saved one and starts again.
        saved: Content of the checkpoint; empty if there is none.
        config: Configuration of the continued run.
        changed: Keys of `config` that differ from the saved run, with the saved and the new value.
        kept: Keys in which the requested configuration differs but the saved value is kept.
        allow_changes: Whether another number of iterations per epoch is accepted.
    """

    run_dir: Path | None
    path: Path | None
    saved: dict[str, Any]
    config: Config
    changed: Changes
    kept: list[str]
    allow_changes: bool = False

    @property
    def epoch(self) -> int:
        """Completed epochs."""
        return self.saved["record"].epoch if self.saved else 0

    @property
    def is_complete(self) -> bool:
        """Whether all epochs are done, or early stopping ended the run and no more epochs are requested."""
        return self.epoch >= self.config.train.epochs or (self._stopped_early and "train.epochs" not in self.changed)

    @property
    def _stopped_early(self) -> bool:
        patience, counter = self.config.train.patience, self.saved.get("early_stopping", {"counter": 0})["counter"]
        return patience is not None and counter >= patience

    def check_same_data(self, class_names: list[str], train_fingerprint: str, val_fingerprint: str) -> None:
        """Check that the classes and the images are those of the saved run, unless changes are allowed.

        Args:
            class_names: Names in label order.
            train_fingerprint: Fingerprint of the training images.
            val_fingerprint: Fingerprint of the validation images.

        Raises:
            InputError: If they differ.
        """
        if not self.saved:
            return
        record = self.saved["record"]
        if self.allow_changes:
            if record.val_fingerprint not in (None, val_fingerprint):
                logger.warning("the validation images changed: accuracies before and after are compared nevertheless")
            return
        if record.class_names != class_names:
            saved, now = (", ".join(names) for names in (record.class_names, class_names))
            raise InputError(f"{self.path}: trained on the classes {saved}; those of the dataset are {now}")
        found = {
            "validation": (record.val_fingerprint, val_fingerprint),
            "training": (record.train_fingerprint, train_fingerprint),
        }
        for split, (saved_fingerprint, fingerprint) in found.items():
            if saved_fingerprint not in (None, fingerprint):
                raise InputError(
                    f"{self.path}: the {split} images differ from those of the run; the dataset has changed since, use "
                    "--allow-changes to resume nevertheless"
                )

    def check_compatible(self, model: nn.Module, epoch_length: int) -> None:
        """Check that the checkpoint fits the model and the data, and that all ranks found the same one.

        Args:
            model: Model of the continued run.
            epoch_length: Iterations per epoch of the continued run. If another one is accepted, training continues from
                the last complete epoch.

        Raises:
            InputError: If the checkpoint does not fit, or the ranks see different files.
        """
        if self.saved:
            self._check_shapes(model)
            self._check_epoch_length(epoch_length)
        if str(self.path) != (primary_path := broadcast_from_rank0(lambda: str(self.path))):
            raise InputError(f"{self.path}: rank 0 resumes {primary_path}; all machines must see the same output_dir")

    def _check_shapes(self, model: nn.Module) -> None:
        expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        found = {name: tuple(value.shape) for name, value in self.saved["model"].items()}
        for name in sorted(expected.keys() | found.keys()):
            if expected.get(name) != found.get(name):
                raise InputError(
                    f"{self.path}: not a checkpoint of the configured model: {name} has shape "
                    f"{found.get(name, 'missing')}, the model's is {expected.get(name, 'missing')}"
                )

    def _check_epoch_length(self, epoch_length: int) -> None:
        saved_length = self.saved["trainer"]["epoch_length"]
        if saved_length == epoch_length:
            return
        if not self.allow_changes:
            raise InputError(
                f"{self.path}: an epoch had {saved_length} iterations and now has {epoch_length}: "
                "the dataset differs from the one that the run was trained on"
            )
        self.saved["trainer"] |= {"epoch_length": epoch_length, "iteration": self.epoch * epoch_length}

    def restore(self, objects: dict[str, Any]) -> None:
        """Load the saved state into the objects of a run.

        Hyperparameters are those of the configuration: of the optimizer, only momentum buffers are loaded, and only if
        the parameters have the same order as when they were saved.

        Args:
            objects: Objects with `load_state_dict`, by their names in the checkpoint.

        Raises:
            InputError: If the state does not fit the objects.
        """
        if not self.saved:
            return
        saved = {"ema": self.saved["model"], **self.saved, "record": self.saved["record"].state_dict()}
        saved["trainer"] = saved["trainer"] | {"max_epochs": self.config.train.epochs}
        saved["optimizer"] = self._optimizer_state(objects["optimizer"].state_dict())
        if self._stopped_early:  # and continues with more epochs: it has its patience again
            saved["early_stopping"] = saved["early_stopping"] | {"counter": 0}
        try:
            Checkpoint.load_objects({name: object_ for name, object_ in objects.items() if name in saved}, saved)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{self.path}: does not fit the configured run: {first_line(error)}") from None

    def _optimizer_state(self, initial: dict[str, Any]) -> dict[str, Any]:
        """Return the saved momentum buffers with the hyperparameters of `initial`."""
        if reordered := sorted(OPTIMIZER_LAYOUT_KEYS & self.changed.keys()):
            logger.info("momentum buffers were reset (%s changed)", ", ".join(reordered))
            return initial
        # A run without momentum has saved no buffers.
        return {"state": initial["state"] | self.saved["optimizer"]["state"], "param_groups": initial["param_groups"]}

    def resume_mid_epoch(self, trainer: Engine, metrics: SyncedMetrics, device: torch.device) -> None:
        """Prepare to continue within the epoch in which the run stopped.

        The metrics of the epoch are restored after Ignite has reset them. If the run stopped between the last iteration
        of an epoch and its end, the handlers of its end are run first.
        """
        epoch_length = trainer.state.epoch_length or 1
        if not self.saved or trainer.state.iteration == self.epoch * epoch_length:
            return

        def restore_metrics() -> None:
            metrics.restore(self.saved["metrics"], device)

        if trainer.state.iteration % epoch_length:
            trainer.add_event_handler(Events.EPOCH_STARTED(once=self.epoch + 1), restore_metrics)
        else:
            restore_metrics()
            trainer.fire_event(Events.EPOCH_COMPLETED)

    def describe(self) -> str:
        """Return lines about what is resumed, and how it differs."""
        if not self.saved:
            return f"{self.run_dir} has no checkpoint yet: starting from the beginning"
        lines = [f"resuming after epoch {self.epoch}, iteration {self.saved['trainer']['iteration']}, from {self.path}"]
        lines += [f"  {_format_change(key, *values)}" for key, values in self.changed.items()]
        if "train.epochs" in self.changed:
            lines.append(f"  the learning rate now follows a schedule of {self.config.train.epochs} epochs")
        if self.kept:
            lines.append(f"  kept from the run, although the configuration differs: {', '.join(self.kept)}")
        return "\n".join(lines)


def resolve_resume(config: Config, resume: str, overrides: Sequence[str], allow_changes: bool) -> ResumeState:
    """Return the run that `--resume` names, and the configuration it continues with: its own plus the overrides.

    Args:
        config: Requested configuration; names the output directory and the experiment.
        resume: "latest" for the latest run of the experiment and its latest valid checkpoint; a run directory, or a
            directory of checkpoints, for its latest checkpoint; or a full checkpoint. Only "latest" falls back from a
            damaged checkpoint to an older one.
        overrides: Strings `section.key=value` in which the continued run is to differ from the saved one.
        allow_changes: Whether to continue with `config` itself. Otherwise only more epochs, and keys that do not change
            what is trained, may differ.

    Raises:
        InputError: If there is no such run, the file is not a full checkpoint, or the configuration differs.
    """
    run_dir, path, saved = _find_checkpoint(config, resume)
    source = str(path or run_dir)
    # Through Config: a key that did not exist when the run was started has its default.
    saved_tree = parse_config(saved["record"].config if saved else read_run_config(run_dir), source).model_dump(
        mode="json"
    )
    run_config = parse_config(saved_tree, source, overrides)
    # The directory may have been moved since.
    is_inside = run_dir is not None and run_dir.parent.name == "training_runs"
    output_dir = run_dir.parent.parent if run_dir is not None and is_inside else config.output_dir
    resumed_tree = (config if allow_changes else run_config).model_dump(mode="json") | {"output_dir": str(output_dir)}
    resumed_config = parse_config(resumed_tree, source)
    changed = diff_configs(saved_tree, resumed_config)
    if not allow_changes:
        _check_changes(changed, source)
    kept = sorted(diff_configs(saved_tree, config).keys() - changed.keys() - _left_to_data(config))
    return ResumeState(run_dir, path, saved, resumed_config, changed, kept, allow_changes)


def _left_to_data(config: Config) -> set[str]:
    """Return the keys whose value the configuration leaves to the data; the saved run has resolved them."""
    return {key for key, value in flatten_dict(config.model_dump()).items() if key in RESOLVED_KEYS and value is None}


def _check_changes(changed: Changes, source: str) -> None:
    """Raise an InputError if more has changed than the number of epochs, upwards."""
    saved_epochs, epochs = changed.get("train.epochs", (0, 0))
    refused = changed.keys() - ({"train.epochs"} if epochs > saved_epochs else set())
    if refused:
        changes = ", ".join(_format_change(key, *changed[key]) for key in sorted(refused))
        raise InputError(f"{source}: cannot resume with another configuration: {changes}; use --allow-changes to do so")


def _format_change(key: str, saved: Any, new: Any) -> str:
    return f"{key} was {json.dumps(saved)}, now {json.dumps(new)}"


def diff_configs(saved_tree: dict[str, Any], config: Config) -> Changes:
    """Return the keys that change what is trained, with the saved and the new value."""
    saved, new = flatten_dict(saved_tree), flatten_dict(config.model_dump(mode="json"))
    return {
        key: (saved.get(key), new[key]) for key in new if key not in RESUME_SAFE_KEYS and saved.get(key) != new[key]
    }


def _find_checkpoint(config: Config, resume: str) -> tuple[Path | None, Path | None, dict[str, Any]]:
    """Return run directory, full checkpoint and its content; see `ResumeState` for what may be missing."""
    check_named(resume=resume)
    if resume == "latest":
        run_dir = latest_run(config.output_dir / "training_runs", config.experiment)
        return run_dir, *load_latest_valid(full_checkpoints(run_dir))
    path = Path(os.path.abspath(resume))
    if not os.path.isdir(path):
        return _run_dir_of(path.parent), path, load_full_checkpoint(path)
    run_dir = _run_dir_of(path) or path
    check_listable(run_dir / "checkpoints")
    if found := full_checkpoints(run_dir):
        return run_dir, found[0], load_full_checkpoint(found[0])
    if copied := list_checkpoints(path):
        return None, copied[0], load_full_checkpoint(copied[0])
    return run_dir, None, {}


def _run_dir_of(directory: Path) -> Path | None:
    """Return the run directory that a directory of checkpoints belongs to; None if it is outside of any."""
    is_inside = directory.name == "checkpoints" and os.path.isfile(directory.parent / "config.json")
    return directory.parent if is_inside else None
