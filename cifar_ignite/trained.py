"""Trained networks: which checkpoint is meant, and the network that it holds."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from cifar_ignite.checkpoints import RunRecord, load_checkpoint, newest
from cifar_ignite.config import Config, InputError, parse_config
from cifar_ignite.data import NUM_CLASSES
from cifar_ignite.engines import select_device
from cifar_ignite.models import create_model


@dataclass(frozen=True)
class Trained:
    """A network with the weights of a checkpoint, on the device that the configuration names.

    Attributes:
        path: the checkpoint.
        record: what the checkpoint tells about its run.
        config: the run's, with overrides and the present `output_dir`.
        device: that the configuration asks for.
        model: the network, channels_last, with averaged weights where the run averaged; still on the CPU, as which of
            several GPUs is a process's own shows only when it has joined the others.
    """

    path: Path
    record: RunRecord
    config: Config
    device: torch.device
    model: nn.Module


def load_trained(checkpoint: Path | None, model_name: str | None, overrides: Sequence[str] = ()) -> Trained:
    """Rebuild a trained network.

    Args:
        checkpoint: any checkpoint of this project; None takes the newest best model.
        model_name: experiment whose newest best model is taken; None takes that of any.
        overrides: `section.key=value`, applied to the checkpoint's configuration.

    Raises:
        InputError: the checkpoint is missing, is no checkpoint, or does not fit its configuration.
    """
    where = [override for override in overrides if override.partition("=")[0].strip() == "output_dir"]
    output_dir = parse_config({}, "--set", where).output_dir
    path = checkpoint or find_best_model(output_dir, model_name)
    saved = load_checkpoint(path)
    record: RunRecord = saved["record"]
    config = parse_config(record.config, str(path), [*overrides, f"output_dir={output_dir}"])
    model = load_model(config, saved.get("ema", saved["model"]), path).to(memory_format=torch.channels_last)
    return Trained(path, record, config, select_device(config.device), model)


def find_best_model(output_dir: Path, model_name: str | None) -> Path:
    """The newest of the best models, of one experiment or of all."""
    folder = output_dir / "best_models"
    found = newest(folder.glob("*_best.pth"))
    if model_name:
        found = newest(
            path
            for path in (folder / f"{model_name}_best.pth", folder / f"{model_name}_val_acc_none_best.pth")
            if path.exists()
        )
    if found is None:
        known = ", ".join(sorted(path.name.removesuffix("_best.pth") for path in folder.glob("*_best.pth")))
        wanted = f"of {model_name!r} " if model_name else ""
        hint = f"there are {known}" if known else "train one first: make train MODEL=se"
        raise InputError(f"{folder}: no best model {wanted}there; {hint}")
    return found


def load_model(config: Config, weights: dict[str, Tensor], path: Path) -> nn.Module:
    """Rebuild the network that the configuration names, with the weights of a checkpoint."""
    model = create_model(num_classes=NUM_CLASSES, **config.model.model_dump())
    try:
        model.load_state_dict(weights)
    except (RuntimeError, AttributeError, TypeError):
        raise InputError(f"{path}: its weights are not those of a {config.model.name} as configured") from None
    return model
