"""Loss, accuracy and time of an epoch."""

import math
import time
from collections.abc import Sequence

import torch
from ignite.engine import Engine, Events
from ignite.metrics import Accuracy, Loss, Metric
from torch import Tensor

from cifar_ignite.training.engines import LossFn


class Float64Loss(Loss):
    """Ignite's `Loss` accumulated in float64, so that the sum does not depend on the order of batches or ranks.

    An empty batch, whose mean would be NaN, is skipped. Ignite has no public option for the dtype of the sum, which is
    its private `_sum` (checked with Ignite 0.5.5).
    """

    def reset(self) -> None:
        super().reset()
        self._sum = self._sum.double()

    def update(self, output: Sequence[Tensor]) -> None:
        if len(output[1]):
            super().update(output)


def to_class_indices(output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return (logits, class indices (B,)); a distribution (B, num_classes) counts as its most likely class."""
    logits, targets = output
    return logits, targets.argmax(1) if targets.ndim == 2 else targets


def attach_metrics(engine: Engine, loss_fn: LossFn, device: torch.device) -> dict[str, Metric]:
    """Attach the mean "loss" and "accuracy" over the images of an epoch, accumulated on the device.

    Args:
        engine: Engine with output (logits, targets); targets are labels (B,) or distributions (B, num_classes).
        loss_fn: Loss of logits and targets.
        device: Device of the output.
    """
    metrics: dict[str, Metric] = {
        "loss": Float64Loss(loss_fn, device=device),
        "accuracy": Accuracy(to_class_indices, device=device),
    }
    for name, metric in metrics.items():
        metric.attach(engine, name)
    return metrics


class EpochTimer:
    """Seconds spent in the iterations of the current epoch, including those before an interruption."""

    def __init__(self, trainer: Engine, images_per_epoch: int) -> None:
        self.images_per_epoch = images_per_epoch
        self._seconds_before, self._started_at = 0.0, math.nan
        trainer.add_event_handler(Events.EPOCH_STARTED, self._start)
        trainer.add_event_handler(Events.EPOCH_COMPLETED, self._stop)

    def _start(self, engine: Engine) -> None:
        if engine.state.iteration % (engine.state.epoch_length or 1) == 0:
            self._seconds_before = 0.0
        self._started_at = time.monotonic()

    def _stop(self, engine: Engine) -> None:
        self._seconds_before, self._started_at = self.seconds, math.nan

    @property
    def seconds(self) -> float:
        is_stopped = math.isnan(self._started_at)
        return self._seconds_before if is_stopped else self._seconds_before + time.monotonic() - self._started_at

    @property
    def images_per_second(self) -> float:
        return self.images_per_epoch / self.seconds

    def state_dict(self) -> dict[str, float]:
        return {"seconds": self.seconds}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self._seconds_before = state["seconds"]
