"""Configuration values that null leaves to the data: the normalization and the number of validation images."""

import torch
from torch import Tensor

from cifar_ignite.config import Config
from cifar_ignite.data.dataset import ImageDataset
from cifar_ignite.errors import InputError

DECIMALS = 4


def resolve_config(config: Config, train_set: ImageDataset, val_set: ImageDataset) -> Config:
    """Return the configuration without the nulls that the data decide, as a run records it.

    Args:
        config: Configuration of the run.
        train_set: Images to train on.
        val_set: Images for validation, which may be empty.

    Raises:
        InputError: If a standard deviation is to be computed and the images are constant.
    """
    augment = config.augment
    if augment.mean is None or augment.std is None:
        mean, std = channel_statistics(train_set.images)
        if augment.std is None and not all(std):
            raise InputError("augment.std: null, but a channel of the training images is constant; give three numbers")
        augment = augment.model_copy(update={"mean": augment.mean or mean, "std": augment.std or std})
    data = config.data.model_copy(update={"val_size": len(val_set)})
    return config.model_copy(update={"augment": augment, "data": data})


def channel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation per channel, in [0, 1], rounded to four decimals.

    Computed from the histograms of uint8 images (N, 3, H, W), so the order of the images has no effect.
    """
    counts = torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in images.unbind(1)]).double()
    values = torch.arange(256, dtype=torch.float64) / 255
    frequencies = counts / counts.sum(1, keepdim=True)
    mean = frequencies @ values
    std = (frequencies * (values - mean[:, None]) ** 2).sum(1).sqrt()
    rounded_mean, rounded_std = (tuple(round(value, DECIMALS) for value in row.tolist()) for row in (mean, std))
    return rounded_mean, rounded_std
