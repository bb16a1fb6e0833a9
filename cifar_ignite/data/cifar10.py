"""CIFAR-10 from its official files."""

import logging
from pathlib import Path

import torch
from torch import Tensor

from cifar_ignite.config import DataConfig
from cifar_ignite.data.batch_entries import describe, get_entry, to_images, to_list
from cifar_ignite.data.cifar10_files import (
    CIFAR10_DIR,
    TEST_MD5S,
    TRAIN_MD5S,
    check_complete,
    find_cifar10,
    install_cifar10,
    mismatched_files,
)
from cifar_ignite.data.dataset import ImageDataset
from cifar_ignite.data.registry import register_dataset
from cifar_ignite.data.unpickling import load_pickle
from cifar_ignite.errors import InputError

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

logger = logging.getLogger(__name__)


@register_dataset
def cifar10(config: DataConfig, *, train: bool) -> ImageDataset:
    """CIFAR-10 from `config.root`, unpacked or downloaded on first use."""
    return load_cifar10(config.root, train=train)


def load_cifar10(root: Path, *, train: bool) -> ImageDataset:
    """Load the training (50,000) or test (10,000) images; unpack or download the archive if there are no files.

    Args:
        root: Directory that contains `cifar-10-batches-py`, or see `find_cifar10`.
        train: Whether to load the training set; otherwise the test set. The other set's files are not read.

    Raises:
        InputError: If a file is missing, malformed or unsafe, or the download failed.
    """
    md5s = TRAIN_MD5S if train else TEST_MD5S
    directory = find_cifar10(root, md5s) or install_cifar10(root)
    check_complete(directory, md5s)
    if directory != root / CIFAR10_DIR:
        logger.info("data.root   CIFAR-10 is in %s", directory)
    batches = [load_labeled_batch(directory / name) for name in md5s]
    if mismatched := mismatched_files(directory, md5s):
        logger.warning(
            "%s: not the official files (md5 of %s differs); accuracies are not comparable to published ones",
            directory,
            ", ".join(mismatched),
        )
    images, labels = (torch.cat(column) for column in zip(*batches, strict=True))
    return ImageDataset(images, labels, list(range(len(images))), CIFAR10_CLASSES)


def load_labeled_batch(path: Path) -> tuple[Tensor, Tensor]:
    """Load images, uint8 (N, 3, 32, 32), and labels, int64 (N,), of one official file.

    Raises:
        InputError: If the file is missing, malformed or unsafe.
    """
    batch = load_pickle(path)
    images = to_images(get_entry(batch, "data", path), path)
    column = get_entry(batch, "labels", path)
    labels = to_list(column, "labels", len(images), path)
    if not all(type(label) is int for label in labels):
        raise InputError(f"{path}: 'labels' must be integers, one per image; got {describe(column)}")
    if invalid := [label for label in labels if not 0 <= label < len(CIFAR10_CLASSES)]:
        raise InputError(f"{path}: 'labels' must be from 0 to {len(CIFAR10_CLASSES) - 1}, got {invalid[0]}")
    return images, torch.tensor(labels)
