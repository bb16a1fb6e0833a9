"""What a dataset contains: images per class and split, duplicates, and the sizes of image files."""

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from cifar_ignite.config import DataConfig
from cifar_ignite.data.dataset import ImageDataset, train_val_split
from cifar_ignite.data.file_dataset import ImageFiles
from cifar_ignite.data.registry import list_fitting, load_listed
from cifar_ignite.errors import InputError

# A limit that no dataset reaches: unreadable files are counted instead.
NO_LIMIT = 10**9
MAX_EXAMPLES = 3
MAX_LISTED_CLASSES = 12


@dataclass(frozen=True)
class DatasetReport:
    """All splits of a dataset.

    Attributes:
        splits: Images by the name of the split: "train", "val" (empty splits are left out) and "test".
        num_unreadable: Number of unreadable files by split.
        sizes: int64 (N, 2), width and height of all files in pixels; empty if the images are not in files of their own.
        missing_test: Why there is no test set; empty if there is one.
    """

    splits: dict[str, ImageDataset]
    num_unreadable: dict[str, int]
    sizes: np.ndarray
    missing_test: str = ""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names in label order."""
        return self.splits["train"].class_names

    @property
    def class_table(self) -> pd.DataFrame:
        """Number of labeled images, one row per class and one column per split."""
        labeled = {name: split.class_counts for name, split in self.splits.items() if split.labels is not None}
        return pd.DataFrame(labeled, index=list(self.class_names))

    def describe(self) -> str:
        """Return the number of classes, and of images per split and class; of many classes, the extremes."""
        parts = [f"{len(self.class_names)} classes"]
        parts += [f"{len(split):,} {name} images ({_describe_counts(split)})" for name, split in self.splits.items()]
        return "; ".join(parts)

    def describe_sizes(self, image_size: int) -> str:
        """Return the range of the sizes of all files, and how many have to be enlarged to `image_size`."""
        quantiles = {"smallest": 0.0, "median": 0.5, "largest": 1.0}
        width, height = (np.quantile(sides, list(quantiles.values())).astype(int) for sides in self.sizes.T)
        text = ", ".join(f"{name} {w}x{h}" for name, w, h in zip(quantiles, width, height, strict=True))
        num_small = int((self.sizes.min(axis=1) < image_size).sum())
        return f"width x height {text}; {num_small} of {len(self.sizes)} are smaller than data.image_size={image_size}"


def _describe_counts(split: ImageDataset) -> str:
    if split.labels is None:
        return "unlabeled"
    counts = list(zip(split.class_counts, split.class_names, strict=True))
    if len(counts) <= MAX_LISTED_CLASSES:
        return ", ".join(f"{count:,} {name}" for count, name in counts)
    (low, rarest), (high, most) = min(counts), max(counts)
    return f"from {low:,} {rarest} to {high:,} {most}"


def inspect_dataset(config: DataConfig) -> DatasetReport:
    """Load all splits of the configured dataset; unreadable files are left out and counted.

    Raises:
        InputError: If the training set is invalid.
    """
    config = config.model_copy(update={"max_unreadable": NO_LIMIT})
    listed = list_fitting(config, train=True)
    dataset = load_listed(listed, config)
    train_set, val_set = train_val_split(dataset, config.val_size, config.split_seed)
    splits, missing_test = {"train": train_set, "val": val_set}, ""
    files = _files_by_split(listed, "train")
    num_read = {"train": len(dataset), "val": len(dataset.val or ())}
    try:
        listed = list_fitting(config, train=False)
        splits["test"] = load_listed(listed, config)
        files |= _files_by_split(listed, "test")
        num_read["test"] = len(splits["test"])
    except InputError as error:
        missing_test = str(error)
    splits = {name: split for name, split in splits.items() if len(split)}
    num_unreadable = {name: len(paths) - num_read[name] for name, paths in files.items()}
    return DatasetReport(splits, num_unreadable, read_sizes([*chain(*files.values())]), missing_test)


def _files_by_split(listed: ImageDataset | ImageFiles, split: str) -> dict[str, list[Path]]:
    """Return the image files by split; empty if the images are not in files of their own."""
    if not isinstance(listed, ImageFiles):
        return {}
    val = {"val": listed.val.files} if listed.val else {}
    return {split: listed.files, **val}


def read_sizes(files: Sequence[Path]) -> np.ndarray:
    """Return int64 (N, 2), width and height of all files whose header can be read."""

    def read(file: Path) -> tuple[int, int] | None:
        with suppress(Exception), Image.open(file) as image:  # damaged files raise almost anything
            return image.size
        return None

    with ThreadPoolExecutor() as pool:
        sizes = [size for size in pool.map(read, files) if size]
    return np.array(sizes, np.int64).reshape(-1, 2)


# --- Duplicates ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Occurrence:
    """One image of a group of identical ones."""

    split: str
    id: Any
    label: int | None

    def __str__(self) -> str:
        return f"{self.split}/{self.id}"


def find_duplicates(splits: Mapping[str, ImageDataset]) -> list[list[Occurrence]]:
    """Return the groups of images that are identical in every pixel, by a hash of their content.

    Args:
        splits: Datasets by the name of the split.
    """
    groups: dict[bytes, list[Occurrence]] = defaultdict(list)
    for name, split in splits.items():
        labels = [None] * len(split) if split.labels is None else split.labels.tolist()
        for image, id_, label in zip(split.images.numpy(), split.ids, labels, strict=True):
            groups[hashlib.blake2b(image.data, digest_size=16).digest()].append(Occurrence(name, id_, label))
    return [group for group in groups.values() if len(group) > 1]


def describe_duplicates(groups: Sequence[Sequence[Occurrence]]) -> Iterator[str]:
    """Yield one line per kind of harmful duplicates: images in two splits, and images with different labels."""
    for first, second in (("train", "val"), ("train", "test"), ("val", "test")):
        if leaked := [group for group in groups if {first, second} <= {item.split for item in group}]:
            yield f"{len(leaked)} images of {second} are in {first} too ({_format_examples(leaked)})"
    if conflicting := [group for group in groups if len({item.label for item in group} - {None}) > 1]:
        yield f"{len(conflicting)} images have different labels in different places ({_format_examples(conflicting)})"


def _format_examples(groups: Sequence[Sequence[Occurrence]]) -> str:
    examples = ", ".join(" = ".join(map(str, group[:2])) for group in groups[:MAX_EXAMPLES])
    return examples + (", ..." if len(groups) > MAX_EXAMPLES else "")
