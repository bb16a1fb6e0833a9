"""The training step and the evaluation step as Ignite Engines.

The training step is the same few lines whatever is attached to it: clipping, schedules, metrics and checkpoints are
handlers. Steps return tensors on the device and never wait for it.
"""

import logging
from collections.abc import Callable

import torch
from ignite.engine import Engine, EventEnum, Events
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from cifar_ignite.data.loaders import TrainLoader
from cifar_ignite.training.forward import Forward

# Ignite logs each exception that passes through an engine, which the caller gets anyway: not to stderr by default.
logging.getLogger("ignite").addHandler(logging.NullHandler())

LossFn = Callable[[Tensor, Tensor], Tensor]


class TrainingEvents(EventEnum):
    """Events of a training step besides Ignite's own."""

    BACKWARD_COMPLETED = "backward_completed"
    """The gradients are computed; the optimizer has not used them yet."""


def create_trainer(
    model: nn.Module, forward: Forward, optimizer: Optimizer, loss_fn: LossFn, scaler: GradScaler
) -> Engine:
    """Return an engine whose step makes one update on (images, targets).

    Args:
        model: Model, put into training mode at the start of each epoch.
        forward: Forward pass through the model, from images to logits.
        optimizer: Optimizer of the model's parameters.
        loss_fn: Loss of logits and targets.
        scaler: Gradient scaler for fp16; does nothing if disabled.

    Returns:
        Engine with output (logits, targets): float (B, num_classes) each, on the device, detached.
    """

    def train_step(engine: Engine, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        images, targets = batch
        optimizer.zero_grad()
        logits = forward(images)
        scaler.scale(loss_fn(logits, targets)).backward()
        scaler.unscale_(optimizer)
        engine.fire_event(TrainingEvents.BACKWARD_COMPLETED)
        scaler.step(optimizer)
        scaler.update()
        return logits.detach(), targets

    trainer = Engine(train_step)
    trainer.register_events(*TrainingEvents)
    # Once per epoch, because validation changes the mode: a walk over all modules costs as much as a kernel launch.
    trainer.add_event_handler(Events.EPOCH_STARTED, lambda: model.train())
    return trainer


def scale_loss(loss_fn: LossFn, loader: TrainLoader) -> LossFn:
    """Return the loss of this rank's shard, multiplied by the loader's `loss_scale`.

    The loss of an empty shard is 0, and still a function of the logits, so that zero gradients reach all parameters.
    """

    def scaled_loss(logits: Tensor, targets: Tensor) -> Tensor:
        loss = loss_fn(logits, targets) if len(logits) else logits.sum()
        return loss if loader.loss_scale == 1 else loss * loader.loss_scale

    return scaled_loss


def create_evaluator(model: nn.Module, forward: Forward) -> Engine:
    """Return an engine with output (logits, labels): float (B, num_classes) and int64 (B,) or None, on the device."""

    @torch.inference_mode()
    def evaluate_step(engine: Engine, batch: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
        images, labels = batch
        return forward(images), labels

    evaluator = Engine(evaluate_step)
    evaluator.add_event_handler(Events.STARTED, lambda: model.eval())
    return evaluator
