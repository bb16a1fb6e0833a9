"""The dataset registry: a dataset is a function with the decorator `@register_dataset`."""

from typing import Protocol

import ignite.distributed as idist
import torch
from torch import Tensor

from cifar_ignite.config import DataConfig
from cifar_ignite.data.dataset import ImageDataset
from cifar_ignite.data.file_dataset import ImageFiles, check_files_fit, load_image_files
from cifar_ignite.errors import InputError

CPU = torch.device("cpu")
# Columns of details.csv and predictions.csv next to those of the classes.
RESERVED_NAMES = frozenset({"ID", "file", "true", "predicted", "confidence", "unsure"})


class DatasetLoader(Protocol):
    """A function that loads the training or test set, or lists its files to be loaded."""

    __name__: str
    __qualname__: str

    def __call__(self, config: DataConfig, *, train: bool) -> ImageDataset | ImageFiles: ...


DATASETS: dict[str, DatasetLoader] = {}


def register_dataset(loader: DatasetLoader) -> DatasetLoader:
    """Register a dataset under the name of the function.

    The function takes the section `DataConfig` and the keyword `train`, and returns the images, or their files. It
    raises `InputError` if it cannot find or load them.

    Raises:
        ValueError: If the name is taken. The same function replaces itself: a cell of a notebook is run again.
    """
    registered = DATASETS.get(loader.__name__, loader)
    if (registered.__module__, registered.__qualname__) != (loader.__module__, loader.__qualname__):
        raise ValueError(f"a dataset named {loader.__name__} is already registered")
    DATASETS[loader.__name__] = loader
    return loader


def load_dataset(config: DataConfig, *, train: bool, device: torch.device = CPU) -> ImageDataset:
    """Load the training set, or the test set, which may be unlabeled, of the configured dataset.

    Args:
        config: Section whose `dataset` is a key of `DATASETS`.
        train: Whether to load the training set; otherwise the test set.
        device: Device that the images will be moved to: files that do not fit into its memory are not loaded.

    Raises:
        InputError: If the dataset is unknown, a file is missing, malformed or unsafe, a download failed, the images do
            not have the configured size or do not fit into memory, or the classes are invalid.
    """
    return load_listed(list_fitting(config, train=train, device=device), config)


def load_dataset_on_ranks(config: DataConfig, *, train: bool, device: torch.device) -> ImageDataset:
    """Load the dataset on all ranks, which call this together; arguments and errors are those of `load_dataset`."""
    with idist.one_rank_first(local=True):  # the others find what the first one downloaded
        listed = list_fitting(config, train=train, device=device)
    return load_listed(listed, config)  # on all ranks at once: it may take longer than a rank waits for another


def list_fitting(config: DataConfig, *, train: bool, device: torch.device = CPU) -> ImageDataset | ImageFiles:
    """Return what `list_dataset` returns, if it fits into memory; arguments and errors are those of `load_dataset`."""
    listed = list_dataset(config, train=train)
    if isinstance(listed, ImageFiles):
        check_files_fit(listed, config, device)
    return listed


def load_listed(listed: ImageDataset | ImageFiles, config: DataConfig) -> ImageDataset:
    """Load the files of a listed dataset, if they are not loaded; errors are those of `load_dataset`."""
    dataset = load_image_files(listed, config) if isinstance(listed, ImageFiles) else listed
    check_shape(config, dataset.images)
    return dataset


def list_dataset(config: DataConfig, *, train: bool) -> ImageDataset | ImageFiles:
    """Return what the function of the configured dataset returns; arguments and errors are those of `load_dataset`."""
    check_registered(config)
    dataset = DATASETS[config.dataset](config, train=train)
    if len(dataset.class_names) < 2:
        name = ", ".join(dataset.class_names)
        raise InputError(f"data.dataset: {config.dataset} has one class only ({name}); training requires at least two")
    if reserved := RESERVED_NAMES.intersection(dataset.class_names):
        raise InputError(
            f"data.dataset: a class is named {min(reserved)}, as a column of the predictions is; rename it"
        )
    return dataset


def check_registered(config: DataConfig) -> None:
    """Raise an `InputError` if there is no such dataset."""
    if config.dataset not in DATASETS:
        raise InputError(f"data.dataset: unknown dataset {config.dataset!r}; known: {', '.join(sorted(DATASETS))}")


def check_shape(config: DataConfig, images: Tensor) -> None:
    """Check that images are square color images of the configured size.

    Raises:
        InputError: If they are not.
    """
    size, found = config.image_size, tuple(images.shape[1:])
    if found == (3, size, size):
        return
    if found == (3, images.shape[-1], images.shape[-1]):
        raise InputError(f"data.image_size: {config.dataset} has images of {found[-1]} pixels; use {found[-1]}")
    raise InputError(f"data.dataset: {config.dataset} has images of shape {found}; models take (3, size, size)")
