"""Loading a trained model from a checkpoint."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from cifar_ignite.checkpointing.best_model import best_model_path
from cifar_ignite.checkpointing.io import load_checkpoint
from cifar_ignite.checkpointing.run_record import RunRecord
from cifar_ignite.config import Config
from cifar_ignite.config_io import parse_config
from cifar_ignite.errors import InputError
from cifar_ignite.files import latest_file
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


def load_trained_model(checkpoint: Path | None, model_name: str | None, overrides: Sequence[str] = ()) -> TrainedModel:
    """Load a trained model.

    Args:
        checkpoint: Any checkpoint of this project; None loads the latest best model.
        model_name: Experiment whose latest best model is loaded; None allows all experiments.
        overrides: Strings `section.key=value`, applied to the checkpoint's configuration.

    Raises:
        InputError: If the checkpoint is missing or invalid, or its weights do not match the configuration.
    """
    output_dir_overrides = [override for override in overrides if override.partition("=")[0].strip() == "output_dir"]
    output_dir = parse_config({}, "--set", output_dir_overrides).output_dir
    path = checkpoint or find_best_model(output_dir, model_name)
    saved = load_checkpoint(path)
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


def find_best_model(output_dir: Path, model_name: str | None) -> Path:
    """Return the latest best model below `output_dir`, of one experiment or of all if `model_name` is None.

    Raises:
        InputError: If there is none.
    """
    directory = output_dir / "best_models"
    paths = list(directory.glob("*_best.pth"))
    if model_name:
        paths = [best_model_path(output_dir, model_name, selected=selected) for selected in (True, False)]
    if found := latest_file(path for path in paths if path.exists()):
        return found
    available = ", ".join(sorted(path.name.removesuffix("_best.pth") for path in directory.glob("*_best.pth")))
    hint = f"available: {available}" if available else "train one first: make train MODEL=se"
    wanted = f" of experiment {model_name!r}" if model_name else ""
    raise InputError(f"{directory}: no best model{wanted}; {hint}")
