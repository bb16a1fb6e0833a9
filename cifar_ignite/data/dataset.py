"""Datasets as tensors, and the stratified validation split."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cifar_ignite.errors import InputError

IMAGE_SIZE = 32


@dataclass(frozen=True)
class ImageDataset:
    """Images with their labels; the competition's test set has none.

    Attributes:
        images: uint8 (N, 3, 32, 32).
        labels: int64 (N,), each in [0, num_classes), or None if unlabeled.
        ids: N values for the column `ID` of predictions.csv.
        class_names: Names of the classes in the order of the labels.
    """

    images: Tensor
    labels: Tensor | None
    ids: list[Any]
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.images)

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    def to(self, device: torch.device) -> "ImageDataset":
        """Return the dataset with images and labels on a device."""
        labels = None if self.labels is None else self.labels.to(device)
        return replace(self, images=self.images.to(device), labels=labels)


def train_val_split(dataset: ImageDataset, val_size: int, seed: int) -> tuple[ImageDataset, ImageDataset]:
    """Split a labeled dataset into copies for training and validation; see `stratified_split`.

    Args:
        dataset: Labeled dataset of N images.
        val_size: Number of validation images, which may be 0.
        seed: Seed of the split.

    Raises:
        InputError: If too few training images would remain.
    """
    labels = dataset.labels
    assert labels is not None, "a split requires labels"

    def select(rows: Tensor) -> ImageDataset:
        return ImageDataset(dataset.images.index_select(0, rows), labels[rows], rows.tolist(), dataset.class_names)

    train_rows, val_rows = stratified_split(labels, dataset.num_classes, val_size, seed)
    return select(train_rows), select(val_rows)


def stratified_split(labels: Tensor, num_classes: int, val_size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return the indices of a random, stratified split into training and validation images.

    Args:
        labels: int64 (N,), each in [0, num_classes).
        num_classes: Number of classes.
        val_size: Number of validation images. Classes contribute in proportion to their size, rounded such that the sum
            is `val_size`.
        seed: Seed of the split, separate from the run's seed so that runs are compared on the same images.

    Returns:
        Two sorted, disjoint int64 tensors of lengths N - val_size and val_size.

    Raises:
        InputError: If fewer training images than classes would remain.
    """
    if val_size and val_size > len(labels) - num_classes:
        raise InputError(
            f"data.val_size: {val_size} of {len(labels)} images leave too few for training; "
            f"use at most {max(0, len(labels) - num_classes)}"
        )
    counts = torch.bincount(labels, minlength=num_classes)
    # Cumulative rounding: each class differs from its exact proportion by less than one image.
    edges = torch.round(counts.cumsum(0) * val_size / len(labels)).long()
    val_counts = torch.diff(edges, prepend=torch.zeros(1, dtype=torch.long))
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    is_val = torch.zeros(len(labels), dtype=torch.bool)
    for label, count in enumerate(val_counts.tolist()):
        is_val[shuffled[labels[shuffled] == label][:count]] = True
    return torch.nonzero(~is_val).flatten(), torch.nonzero(is_val).flatten()
