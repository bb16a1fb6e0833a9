"""The figure of the first training batch: what the network sees."""

from pathlib import Path

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from torch import Tensor

from cifar_ignite.config import AugmentConfig
from cifar_ignite.data.loaders import TrainLoader
from cifar_ignite.training.loggers import WarnOnce

NUM_IMAGES = 32


def attach_batch_figure(
    trainer: Engine, loader: TrainLoader, augment: AugmentConfig, class_names: list[str], path: Path
) -> None:
    """Before the first iteration, draw the first images of its batch with their labels, unless the figure exists.

    The batch is drawn twice, and both draws are a function of (seed, iteration), so training is the same without this.

    Args:
        trainer: Engine of the training.
        loader: Training batches.
        augment: Section with the mean and standard deviation, to undo the normalization.
        class_names: Names in label order.
        path: PNG file.
    """

    def draw() -> None:
        from cifar_ignite.image_plots import plot_train_batch  # imports matplotlib, which takes seconds

        images, targets = (tensor[:NUM_IMAGES] for tensor in loader.peek())
        path.parent.mkdir(parents=True, exist_ok=True)
        plot_train_batch(to_uint8(images, augment).numpy(), targets.cpu().numpy(), class_names, path)

    if idist.get_rank() == 0 and not path.exists():
        trainer.add_event_handler(Events.STARTED, lambda: WarnOnce()("train_batch.png", draw))


def to_uint8(images: Tensor, augment: AugmentConfig) -> Tensor:
    """Return normalized images (N, 3, H, W) as uint8 (N, H, W, 3) on the CPU."""
    mean, std = (torch.tensor(values)[:, None, None] for values in augment.normalization)
    pixels = (images.float().cpu() * std + mean) * 255
    return pixels.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
