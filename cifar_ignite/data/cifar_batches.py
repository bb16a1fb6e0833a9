"""Loading the official files of CIFAR as a dataset."""

import logging
from pathlib import Path

import torch
from torch import Tensor

from cifar_ignite.data.batch_entries import describe, get_entry, to_images, to_list
from cifar_ignite.data.cifar_files import OfficialFiles, mismatched_files, provide_files
from cifar_ignite.data.dataset import ImageDataset
from cifar_ignite.data.unpickling import load_pickle
from cifar_ignite.errors import InputError

logger = logging.getLogger(__name__)


def load_cifar(files: OfficialFiles, root: Path, *, train: bool) -> ImageDataset:
    """Load the training or test images; log a warning if the files are not the official ones.

    Args:
        files: Version of CIFAR.
        root: Directory that contains the directory of the files, or see `find_files`.
        train: Whether to load the training set; otherwise the test set. The other set's files are not read.

    Raises:
        InputError: If a file is missing, malformed or unsafe, or the download failed.
    """
    directory = provide_files(files, root, train=train)
    class_names = files.load_class_names(directory)
    names = files.labeled(train=train)
    batches = [load_labeled_batch(directory / name, files.label_key, len(class_names)) for name in names]
    if mismatched := mismatched_files(directory, files.required(train=train)):
        logger.warning(
            "%s: not the official files (md5 of %s differs); accuracies are not comparable to published ones",
            directory,
            ", ".join(mismatched),
        )
    images, labels = (torch.cat(column) for column in zip(*batches, strict=True))
    return ImageDataset(images, labels, list(range(len(images))), class_names)


def load_labeled_batch(path: Path, label_key: str, num_classes: int) -> tuple[Tensor, Tensor]:
    """Load images, uint8 (N, 3, 32, 32), and labels, int64 (N,), of one official file.

    Args:
        path: Official file.
        label_key: Key of the labels.
        num_classes: Number of classes.

    Raises:
        InputError: If the file is missing, malformed or unsafe.
    """
    batch = load_pickle(path)
    images = to_images(get_entry(batch, "data", path), path)
    column = get_entry(batch, label_key, path)
    labels = to_list(column, label_key, len(images), path)
    if not all(type(label) is int for label in labels):
        raise InputError(f"{path}: {label_key!r} must be integers, one per image; got {describe(column)}")
    if invalid := [label for label in labels if not 0 <= label < num_classes]:
        raise InputError(f"{path}: {label_key!r} must be from 0 to {num_classes - 1}, got {invalid[0]}")
    return images, torch.tensor(labels)
