"""Runs on fake tensors: tiny configurations, and what cannot work without data replaced."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cifar_ignite.checkpointing import best_model, savers
from cifar_ignite.checkpointing.run_record import RunRecord
from cifar_ignite.config_io import load_config
from cifar_ignite.data.dataset import ImageDataset
from cifar_ignite.data.synthetic import synthetic
from cifar_ignite.evaluation.trained_model import TrainedModel
from cifar_ignite.training import state
from cifar_ignite.training.state import create_initial_model
from tests.helpers import REPOSITORY
from tests.training.helpers import CPU

train_command = importlib.import_module("cifar_ignite.train")  # cifar_ignite.train is the function
CONFIGS = sorted(path.stem for path in (REPOSITORY / "configs").glob("*.json") if path.stem != "schema")
PRECISIONS = ("fp32", "bf16", "fp16")
LOG_EVERY = 5
# Three iterations per epoch, in training and validation, of which the last has a smaller batch.
OVERRIDES = (
    "data.dataset=synthetic",
    "data.synthetic.train_size=20",
    "data.synthetic.test_size=10",
    "data.val_size=10",
    "data.batch_size=4",
    "train.epochs=2",
    "train.ema_decay=0.9",
    f"train.log_every={LOG_EVERY}",
)


def load_tiny_config(recipe: str, *overrides: str) -> Any:
    return load_config(REPOSITORY / "configs" / f"{recipe}.json", [*OVERRIDES, *overrides])


def wrap(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, change: Callable[..., Any]) -> None:
    """Replace a function by `change(function, *arguments)`."""
    function = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args, **kwargs: change(function, *args, **kwargs))


def prepare_training(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """Let the train command select a fake device, whose tensors have no data to save."""
    monkeypatch.setattr(train_command, "select_device", lambda name: device)
    monkeypatch.setattr(savers, "save_checkpoint", lambda path, checkpoint: path.touch())
    monkeypatch.setattr(best_model, "promote_best_model", lambda source, target: "")


def create_trained_model(device: torch.device, precision: str) -> tuple[TrainedModel, ImageDataset]:
    """Return a model with initial weights, to be evaluated on a fake device, and a test set."""
    config = load_tiny_config("hybrid_best", f"precision={precision}")
    dataset = synthetic(config.data, train=False)
    record = RunRecord("run", config.model_dump(mode="json"), list(dataset.class_names))
    return TrainedModel(Path("model.pth"), record, config, device, create_initial_model(config, 10, CPU)), dataset


def with_loss_fault(fault: Callable[[Tensor, Tensor], Any]) -> Callable[[pytest.MonkeyPatch], None]:
    """Return a function that adds a fault, called with logits and targets, to the loss."""

    def scale_loss(function: Any, *args: Any) -> Any:
        loss_fn = function(*args)

        def loss_with_fault(logits: Tensor, targets: Tensor) -> Tensor:
            fault(logits.detach(), targets)
            return loss_fn(logits, targets)

        return loss_with_fault

    return lambda monkeypatch: wrap(monkeypatch, state, "scale_loss", scale_loss)
