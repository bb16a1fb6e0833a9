"""Datasets as tensors, and the stratified validation split."""

import hashlib
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cifar_ignite.errors import InputError

DEFAULT_VAL_FRACTION = 0.1


@dataclass(frozen=True)
class ImageDataset:
    """Images with their labels; a test set may have none.

    Attributes:
        images: uint8 (N, 3, size, size).
        labels: int64 (N,), each in [0, num_classes), or None if unlabeled.
        ids: N values for the column `ID` of predictions.csv.
        class_names: Names of the classes in the order of the labels.
        val: Validation images that the dataset itself holds out; None leaves them to a random split.
    """

    images: Tensor
    labels: Tensor | None
    ids: list[Any]
    class_names: tuple[str, ...]
    val: "ImageDataset | None" = None

    def __len__(self) -> int:
        return len(self.images)

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def fingerprint(self) -> str:
        """Hash of the images, labels and class names: equal for the same dataset, whatever it was loaded from."""
        digest = hashlib.blake2b(digest_size=16)
        for tensor in (self.images, self.labels):
            if tensor is not None:
                digest.update(tensor.cpu().contiguous().numpy().data)
        digest.update(repr((tuple(self.images.shape), self.class_names)).encode(errors="surrogatepass"))
        return digest.hexdigest()

    @property
    def class_counts(self) -> list[int]:
        """Number of images of each class; zeros without labels."""
        labels = torch.empty(0, dtype=torch.long) if self.labels is None else self.labels
        return torch.bincount(labels, minlength=self.num_classes).tolist()

    def select(self, rows: Tensor) -> "ImageDataset":
        """Return a copy with some of the images.

        Args:
            rows: int64 (M,), indices of the images.
        """
        labels = None if self.labels is None else self.labels[rows]
        ids = [self.ids[row] for row in rows.tolist()]
        return ImageDataset(self.images.index_select(0, rows), labels, ids, self.class_names)

    def to(self, device: torch.device) -> "ImageDataset":
        """Return the dataset with images and labels on a device."""
        labels = None if self.labels is None else self.labels.to(device)
        return replace(self, images=self.images.to(device), labels=labels)


def train_val_split(dataset: ImageDataset, val_size: int | None, seed: int) -> tuple[ImageDataset, ImageDataset]:
    """Split a labeled dataset into copies for training and validation; see `stratified_split`.

    Args:
        dataset: Labeled dataset of N images.
        val_size: Number of validation images, which may be 0. None is a tenth of the images. If the dataset itself
            holds out validation images, these are returned, whatever the number, unless it is 0.
        seed: Seed of the split.

    Raises:
        InputError: If too few training images would remain.
    """
    assert dataset.labels is not None, "a split requires labels"
    if dataset.val is not None and val_size != 0:
        return replace(dataset, val=None), dataset.val
    val_size = round(DEFAULT_VAL_FRACTION * len(dataset)) if val_size is None else val_size
    train_rows, val_rows = stratified_split(dataset.labels, dataset.num_classes, val_size, seed)
    return dataset.select(train_rows), dataset.select(val_rows)


def stratified_split(labels: Tensor, num_classes: int, val_size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return the indices of a random, stratified split into training and validation images.

    Args:
        labels: int64 (N,), each in [0, num_classes).
        num_classes: Number of classes.
        val_size: Number of validation images. Classes contribute in proportion to their size, rounded such that the sum
            is `val_size`; each keeps at least one training image.
        seed: Seed of the split, separate from the run's seed so that runs are compared on the same images.

    Returns:
        Two sorted, disjoint int64 tensors of lengths N - val_size and val_size.

    Raises:
        InputError: If fewer training images than classes would remain.
    """
    counts = torch.bincount(labels, minlength=num_classes)
    limits = (counts - 1).clamp(min=0)
    if val_size > limits.sum():
        raise InputError(
            f"data.val_size: {val_size} of {len(labels)} images leave too few for training, which requires one of each "
            f"class; use at most {limits.sum()}"
        )
    val_counts = _stratified_counts(counts, limits, val_size)
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    is_val = torch.zeros(len(labels), dtype=torch.bool)
    for label, count in enumerate(val_counts.tolist()):
        is_val[shuffled[labels[shuffled] == label][:count]] = True
    return torch.nonzero(~is_val).flatten(), torch.nonzero(is_val).flatten()


def _stratified_counts(counts: Tensor, limits: Tensor, val_size: int) -> Tensor:
    """Return the number of validation images of each class, int64 (num_classes,); their sum is `val_size`."""
    total = max(1, int(counts.sum()))
    # Cumulative rounding: each class differs from its exact proportion by less than one image.
    edges = torch.round(counts.cumsum(0) * val_size / total).long()
    val_counts = torch.diff(edges, prepend=torch.zeros(1, dtype=torch.long)).minimum(limits)
    for _ in range(val_size - int(val_counts.sum())):  # in place of the images that rare classes keep
        missing = (counts * val_size / total - val_counts).masked_fill(val_counts == limits, -torch.inf)
        val_counts[missing.argmax()] += 1
    return val_counts
