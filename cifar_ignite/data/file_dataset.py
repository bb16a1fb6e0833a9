"""Datasets of image files: listed first, then decoded into memory."""

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cifar_ignite.config import DataConfig
from cifar_ignite.data.dataset import ImageDataset
from cifar_ignite.data.image_files import load_images, printable
from cifar_ignite.data.memory import check_memory
from cifar_ignite.errors import InputError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageFiles:
    """Image files with their labels: a dataset that is not loaded yet.

    Attributes:
        directory: Directory of the files, for messages.
        files: N image files.
        labels: N labels, each in [0, num_classes), or None if unlabeled.
        ids: N values for the column `ID` of predictions.csv.
        class_names: Names of the classes in the order of the labels.
        val: Files of the validation images; None leaves them to a random split.
    """

    directory: Path
    files: list[Path]
    labels: list[int] | None
    ids: list[Any]
    class_names: tuple[str, ...]
    val: "ImageFiles | None" = None


def check_files_fit(listed: ImageFiles, config: DataConfig, device: torch.device) -> None:
    """Check that the decoded images fit into memory, and into that of the device that they will be moved to.

    Raises:
        InputError: If they do not fit.
    """
    count, size = len(listed.files) + (len(listed.val.files) if listed.val else 0), config.image_size
    check_memory((count, 3, size, size), device)


def load_image_files(listed: ImageFiles, config: DataConfig) -> ImageDataset:
    """Decode all files; those that are unreadable are logged and left out.

    Args:
        listed: Files to load.
        config: Section with the size of the images and the number of files that may be unreadable.

    Raises:
        InputError: If too many files, or all of a split or class, are unreadable.
    """
    train, *val = [load_split(split, config) for split in (listed, *([listed.val] if listed.val else []))]
    return ImageDataset(train.images, train.labels, train.ids, train.class_names, *val)


def load_split(listed: ImageFiles, config: DataConfig) -> ImageDataset:
    """Decode the files of one split; see `load_image_files`."""
    started = time.monotonic()
    images, unreadable = load_images(listed.files, config.image_size)
    check_unreadable(listed, unreadable, config.max_unreadable)
    seconds = time.monotonic() - started
    name = printable(listed.directory)
    logger.info("loaded      %s: %s images in %.1f s", name, f"{len(images):,}", seconds)
    rows = [row for row, file in enumerate(listed.files) if file not in unreadable]
    labels = None if listed.labels is None else torch.tensor(listed.labels, dtype=torch.long)[rows]
    return ImageDataset(images, labels, [listed.ids[row] for row in rows], listed.class_names)


def check_unreadable(listed: ImageFiles, unreadable: dict[Path, str], max_unreadable: int) -> None:
    """Log each unreadable file, and check that there are not too many.

    Raises:
        InputError: If there are too many, or all files, of the split or of a class, are unreadable.
    """
    for file, reason in unreadable.items():
        logger.warning("%s: %s", printable(file), printable(reason))
    if len(unreadable) > max_unreadable:
        file, reason = next(iter(unreadable.items()))
        raise InputError(
            f"{printable(listed.directory)}: {len(unreadable)} of {len(listed.files)} files are unreadable, such as "
            f"{printable(file.name)} ({printable(reason)}); remove them, or leave them out with "
            f"data.max_unreadable={len(unreadable)}"
        )
    if len(unreadable) == len(listed.files):
        raise InputError(f"{printable(listed.directory)}: none of the {len(listed.files)} files is readable")
    labeled = list(zip(listed.files, listed.labels or (), strict=False))
    readable = {label for file, label in labeled if file not in unreadable}
    if lost := sorted({label for _, label in labeled} - readable):
        raise InputError(
            f"{printable(listed.directory)}: no file of the class {listed.class_names[lost[0]]} is readable"
        )
