"""Inputs of the training tests."""

from typing import Any

import torch
from ignite.engine import Engine
from torch import Tensor, nn
from torch.amp import GradScaler

CPU = torch.device("cpu")
# Of a shipped configuration: a tiny training on the CPU.
CPU_OVERRIDES = (
    "device=cpu",
    "compile=off",
    "data.dataset=synthetic",
    "data.synthetic.train_size=24",
    "data.val_size=8",
    "data.batch_size=8",
    "model.width=2",
    "train.epochs=2",
    "train.ema_decay=0.9",
)
NO_SCALER = GradScaler("cpu", enabled=False)


def create_sgd(parameters: Any = None, **options: Any) -> torch.optim.SGD:
    """Return fused SGD of the parameters, by default of a single one."""
    parameters = [nn.Parameter(torch.zeros(1))] if parameters is None else parameters
    return torch.optim.SGD(parameters, **({"lr": 0.1, "momentum": 0.9, "fused": True} | options))


def idle_engine() -> Engine:
    """Return an engine whose step does nothing."""
    return Engine(lambda engine, batch: None)


def relative_error(value: Tensor, expected: Tensor) -> float:
    """Return the 2-norm of the difference, as a fraction of the expected value's."""
    return ((value - expected).norm() / expected.norm()).item()
