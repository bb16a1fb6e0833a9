"""Inference over a dataset."""

from collections.abc import Sequence
from typing import Any

import ignite.distributed as idist
import torch
import torch.nn.functional as F
from ignite.engine import Events
from ignite.handlers import EpochOutputStore
from ignite.metrics import ConfusionMatrix, TopKCategoricalAccuracy
from torch import Tensor

from cifar_ignite.data.dataset import ImageDataset
from cifar_ignite.data.loaders import EvalLoader, Shard
from cifar_ignite.distributed.collectives import gather_outputs
from cifar_ignite.evaluation.trained_model import TrainedModel
from cifar_ignite.training.device import enable_deterministic_algorithms, resolve_amp_dtype, set_float32_precision
from cifar_ignite.training.engines import create_evaluator
from cifar_ignite.training.forward import Forward, create_forward
from cifar_ignite.training.loggers import create_progress_bar
from cifar_ignite.training.metrics import attach_metrics


def create_inference_forward(trained: TrainedModel) -> Forward:
    """Move a trained model to its device; return its forward pass, which is deterministic on a GPU too."""
    enable_deterministic_algorithms()
    set_float32_precision(trained.config.precision)
    model = trained.model.to(trained.device)
    return create_forward(model, trained.device, resolve_amp_dtype(trained.config.precision, trained.device))


def run_inference(trained: TrainedModel, forward: Forward, dataset: ImageDataset) -> tuple[Tensor, dict[str, Any]]:
    """Predict all images of a dataset, sharded over the ranks.

    Args:
        trained: Trained model, already on its device.
        forward: Forward pass through the model.
        dataset: N images on any device, labeled or unlabeled.

    Returns:
        Logits, float (N, num_classes) on the CPU, of all images on every rank; and the metrics that `compute_metrics`
        requires, empty without labels.
    """
    evaluator = create_evaluator(trained.model, forward)
    outputs = EpochOutputStore(output_transform=lambda output: output[0])
    outputs.attach(evaluator, "logits")
    is_disabled = None if idist.get_rank() == 0 else True  # None: shown on a terminal or in a notebook only
    create_progress_bar(disable=is_disabled).attach(evaluator, event_name=Events.ITERATION_COMPLETED)
    if dataset.labels is not None:
        attach_metrics(evaluator, F.cross_entropy, trained.device)
        TopKCategoricalAccuracy(2, device=trained.device).attach(evaluator, "top2_accuracy")
        DeviceConfusionMatrix(len(trained.record.class_names), device=trained.device).attach(evaluator, "confusion")
    loader = EvalLoader(
        dataset.to(trained.device),
        batch_size=trained.config.data.batch_size,
        augment=trained.config.augment,
        shard=Shard.current(),
    )
    state = evaluator.run(loader)
    logits = gather_outputs(state.logits, loader.rows(), len(dataset))  # type: ignore[attr-defined]
    return logits.float().cpu(), state.metrics


class DeviceConfusionMatrix(ConfusionMatrix):
    """Ignite's `ConfusionMatrix` for labels in [0, num_classes), accumulated without reading from the device.

    Ignite's own selects valid labels by a mask and counts them with `bincount`; both make the host wait for the device
    (checked with Ignite 0.5.5). Sums of integers do not depend on their order.
    """

    def update(self, output: Sequence[Tensor]) -> None:
        logits, labels = output
        self._num_examples += len(labels)
        cells = labels * self.num_classes + logits.argmax(1)
        self.confusion_matrix.view(-1).scatter_add_(0, cells, torch.ones_like(cells))
