"""The training and evaluation steps as Ignite Engines.

The training step is the same few lines whatever hangs on it: clipping, schedules, metrics and saving are handlers
(handlers.py). Steps return tensors on the device and never wait for it.
"""

from collections.abc import Callable

import torch
from ignite.engine import Engine, EventEnum, Events
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from cifar_ignite.config import InputError

LossFn = Callable[[Tensor, Tensor], Tensor]
Forward = Callable[[Tensor], Tensor]


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


def select_precision(name: str, device: torch.device) -> torch.dtype:
    """The type that convolutions and matrix products compute in; auto is bf16 where the device has instructions for it.

    Everything that is summed over many values (BatchNorm's statistics, the loss, the update) stays float32.
    """
    if name != "auto":
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
    if device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        # torch.cpu.get_capabilities is the public way, but torch 2.11 has only these.
        has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if has_bf16 else torch.float32


def create_forward(model: nn.Module, device: torch.device, precision: torch.dtype) -> Forward:
    """The model as a function from images to float32 logits, computed by torch.autocast in `precision`."""

    def forward(images: Tensor) -> Tensor:
        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            return model(images).float()

    return forward


def create_trainer(
    model: nn.Module, forward: Forward, optimizer: Optimizer, loss_fn: LossFn, scaler: GradScaler
) -> Engine:
    """An engine whose step does one update on (images, targets).

    Args:
        model: is put into training mode.
        forward: images to logits, through the model.
        optimizer: of the model's parameters.
        loss_fn: of logits and targets.
        scaler: lifts fp16 gradients above underflow; a disabled one does nothing.

    Its output is (logits, targets): float (B, num_classes) each, on the device, detached.
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
    # Once an epoch, since validation comes between two: a walk over all modules costs as much as a launch of kernels.
    trainer.add_event_handler(Events.EPOCH_STARTED, lambda: model.train())
    return trainer


def create_evaluator(model: nn.Module, forward: Forward) -> Engine:
    """An engine whose step returns (logits, labels): float (B, num_classes) and int64 (B,) or None, on the device."""

    @torch.inference_mode()
    def evaluate_step(engine: Engine, batch: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
        images, labels = batch
        return forward(images), labels

    evaluator = Engine(evaluate_step)
    evaluator.add_event_handler(Events.STARTED, lambda: model.eval())
    return evaluator
