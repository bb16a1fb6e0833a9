"""The training and evaluation steps as Ignite Engines.

The training step is the same few lines whatever hangs on it: clipping, schedules, metrics and saving are handlers
(handlers.py). Steps return tensors on the device and never wait for it.
"""

from collections.abc import Callable

import torch
from ignite.engine import Engine, EventEnum
from torch import Tensor, nn
from torch.optim import Optimizer

from cifar_ignite.config import InputError

LossFn = Callable[[Tensor, Tensor], Tensor]


class TrainingEvents(EventEnum):
    """What a training step fires beside Ignite's own events."""

    BACKWARD_COMPLETED = "backward_completed"
    """Gradients are there, the optimizer has not used them yet."""


def select_device(name: str) -> torch.device:
    """auto is the GPU if there is one. On a GPU, repeatable algorithms are asked for."""
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("device: no CUDA GPU is available to torch here; take device=auto or device=cpu")
    torch.backends.cudnn.deterministic = True
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def create_trainer(model: nn.Module, optimizer: Optimizer, loss_fn: LossFn) -> Engine:
    """An engine whose step does one update on (images, targets).

    Its output is (logits, targets): float (B, num_classes) each, on the device, detached.
    """

    def train_step(engine: Engine, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        images, targets = batch
        model.train()
        optimizer.zero_grad()
        logits = model(images)
        loss_fn(logits, targets).backward()
        engine.fire_event(TrainingEvents.BACKWARD_COMPLETED)
        optimizer.step()
        return logits.detach(), targets

    trainer = Engine(train_step)
    trainer.register_events(*TrainingEvents)
    return trainer


def create_evaluator(model: nn.Module) -> Engine:
    """An engine whose step returns (logits, labels): float (B, num_classes) and int64 (B,) or None, on the device."""

    @torch.inference_mode()
    def evaluate_step(engine: Engine, batch: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
        images, labels = batch
        model.eval()
        return model(images), labels

    return Engine(evaluate_step)
