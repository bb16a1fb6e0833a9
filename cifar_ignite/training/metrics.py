"""Loss, accuracy and time of an epoch."""

import math
import time
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from ignite.engine import Engine, Events
from ignite.metrics import Accuracy, Metric
from ignite.metrics.metric import reinit__is_reduced, sync_all_reduce
from torch import Tensor

from cifar_ignite.training.engines import LossFn


class Float64Loss(Metric):
    """Mean loss over images, summed in float64, so that it does not depend on the order of batches or ranks.

    The sums of the batches stay on their device, in float32, until the mean or the state is needed; then they are read
    together and added on the host. Nothing waits for the device in between, and MPS, which has no float64, gives the
    same precision. An empty batch, whose mean would be NaN, is skipped. Replaces Ignite's `Loss`, which adds in float32
    on the device.
    """

    _state_dict_all_req_keys = ("_sum", "_num_examples")

    def __init__(self, loss_fn: LossFn) -> None:
        """
        Args:
            loss_fn: Mean loss of logits and targets.
        """
        self._loss_fn = loss_fn
        super().__init__()

    @reinit__is_reduced
    def reset(self) -> None:
        self._sum, self._num_examples = torch.zeros((), dtype=torch.float64), 0
        self._batch_sums: list[Tensor] = []

    @reinit__is_reduced
    def update(self, output: Sequence[Tensor]) -> None:
        logits, targets = output
        if len(targets):
            self._batch_sums.append(self._loss_fn(logits, targets).detach() * len(targets))
            self._num_examples += len(targets)

    def _add_batches(self) -> None:
        """Add the sums of the batches since the last call, in their order."""
        if self._batch_sums:
            for batch_sum in torch.stack(self._batch_sums).tolist():
                self._sum += batch_sum
            self._batch_sums = []

    def compute(self) -> float:
        self._add_batches()
        return self._mean()

    @sync_all_reduce("_sum", "_num_examples")
    def _mean(self) -> float:
        return float(self._sum) / self._num_examples

    def state_dict(self) -> OrderedDict[str, Any]:
        self._add_batches()
        return super().state_dict()


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
        "loss": Float64Loss(loss_fn),
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
