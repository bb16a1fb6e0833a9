"""Loading a trained model from a checkpoint."""

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cifar_ignite.checkpointing.best_model import best_model_path, list_best_models
from cifar_ignite.checkpointing.io import load_checkpoint
from cifar_ignite.checkpointing.run_record import RunRecord
from cifar_ignite.config import Config
from cifar_ignite.config_io import parse_config
from cifar_ignite.data.dataset import ImageDataset
from cifar_ignite.errors import InputError
from cifar_ignite.files import latest_first
from cifar_ignite.models import create_model
from cifar_ignite.training.device import select_device

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainedModel:
    """A model with the weights of a checkpoint.

    Attributes:
        path: Checkpoint file.
        record: Run that wrote the checkpoint: its name, configuration, class names and history.
        config: Configuration of the run, with overrides and the current `output_dir`.
        device: Device selected by the configuration.
        model: Model in channels_last, with EMA weights if the run kept them; on the CPU, because a rank knows its GPU
            only after the process group is initialized.
    """

    path: Path
    record: RunRecord
    config: Config
    device: torch.device
    model: nn.Module


def load_trained_model(
    checkpoint: Path | None,
    model_name: str | None,
    overrides: Sequence[str] = (),
    class_names: Sequence[str] | None = None,
) -> TrainedModel:
    """Load a trained model.

    Args:
        checkpoint: Any checkpoint of this project; None loads the latest best model that fits the data.
        model_name: Experiment whose latest best model is loaded; None allows all experiments.
        overrides: Strings `section.key=value`, applied to the checkpoint's configuration.
        class_names: Classes of the data, in label order; None if the data are those of the configured dataset.

    Raises:
        InputError: If the checkpoint is missing or invalid, or its weights do not match the configuration.
    """
    values = {override.partition("=")[0].strip(): override for override in overrides}
    selecting = {key: values[key] for key in ("output_dir", "data.dataset") if key in values}
    wanted = parse_config({}, "--set", selecting.values())
    output_dir, dataset = wanted.output_dir, wanted.data.dataset if "data.dataset" in selecting else None
    if checkpoint:
        path, saved = checkpoint, load_checkpoint(checkpoint)
    else:
        path, saved = find_best_model(output_dir, model_name, lambda record: _fits(record, class_names, dataset))
    record: RunRecord = saved["record"]
    config = parse_config(record.config, str(path), [*overrides, f"output_dir={output_dir}"])
    model = create_model(num_classes=len(record.class_names), **config.model.model_dump())
    try:
        model.load_state_dict(saved.get("ema", saved["model"]))
    except (RuntimeError, AttributeError, TypeError):
        raise InputError(f"{path}: the weights do not match the configured {config.model.name}") from None
    model = model.to(memory_format=torch.channels_last)
    logger.info("checkpoint  %s (%s, epoch %d)", path, config.model.name, record.epoch)
    return TrainedModel(path, record, config, select_device(config.device), model)


def check_fits(trained: TrainedModel, dataset: ImageDataset, dataset_name: str) -> None:
    """Check that the classes of a dataset are those that a model was trained on, in the same order.

    Args:
        trained: Trained model.
        dataset: Images to predict.
        dataset_name: Name of the dataset in the message.

    Raises:
        InputError: If the classes differ.
    """
    if trained.record.class_names != list(dataset.class_names):
        raise InputError(
            f"{trained.path}: trained on the classes {', '.join(trained.record.class_names)}, but those of "
            f"{dataset_name} are {', '.join(dataset.class_names)}; name a model of these classes with --model or "
            "--checkpoint, or train one"
        )


# --- The best models ----------------------------------------------------------------------------------------------


def find_best_model(
    output_dir: Path, model_name: str | None, fits: Callable[[RunRecord], bool]
) -> tuple[Path, dict[str, Any]]:
    """Return the latest best model that fits the data, with its content (see `load_checkpoint`); otherwise the latest.

    Args:
        output_dir: Directory that contains best_models.
        model_name: Experiment of the model. None allows all; files that cannot be loaded are then skipped.
        fits: Function that returns whether a model fits the data.

    Raises:
        InputError: If there is no best model, or none that can be loaded.
    """
    skipped: list[Path] = []
    errors: list[InputError] = []
    for path in _best_models(output_dir, model_name):
        try:
            saved = load_checkpoint(path)
            if fits(saved["record"]):
                for other in skipped:
                    logger.info("skipped     %s: trained on other data", other)
                return path, saved
            skipped.append(path)
        except InputError as error:
            if model_name:
                raise
            logger.warning("skipped     %s", error)
            errors.append(error)
    if not skipped:
        raise errors[0]
    return skipped[0], load_checkpoint(skipped[0])


def _best_models(output_dir: Path, model_name: str | None) -> list[Path]:
    """Return the best models of an experiment, or of all if `model_name` is None, the latest first.

    Raises:
        InputError: If there are none.
    """
    found = available = list_best_models(output_dir)
    if model_name:
        named = [best_model_path(output_dir, model_name, selected=selected) for selected in (True, False)]
        # One that is named but not readable is loaded too, which reports why.
        found = latest_first(named) or [path for path in named if os.path.lexists(path)]
    if found:
        return found
    names = ", ".join(sorted(path.name.removesuffix("_best.pth") for path in available))
    hint = f"available: {names}" if names else "train one first: make train MODEL=se"
    wanted = f" of experiment {model_name!r}" if model_name else ""
    raise InputError(f"{output_dir / 'best_models'}: no best model{wanted}; {hint}")


def _fits(record: RunRecord, class_names: Sequence[str] | None, dataset: str | None) -> bool:
    """Return whether a model was trained on these classes; if they are not known, on the dataset of this name."""
    if class_names is not None:
        return record.class_names == list(class_names)
    return dataset is None or parse_config(record.config, record.run).data.dataset == dataset
