"""The dataset registry: a dataset is a function with the decorator `@register_dataset`."""

from typing import Protocol

from cifar_ignite.config import DataConfig
from cifar_ignite.data.dataset import IMAGE_SIZE, ImageDataset
from cifar_ignite.errors import InputError


class DatasetLoader(Protocol):
    """A function that loads the labeled training or test set."""

    __name__: str
    __qualname__: str

    def __call__(self, config: DataConfig, *, train: bool) -> ImageDataset: ...


DATASETS: dict[str, DatasetLoader] = {}


def register_dataset(loader: DatasetLoader) -> DatasetLoader:
    """Register a dataset under the name of the function.

    The function takes the section `DataConfig` and the keyword `train`, and raises `InputError` if it cannot load the
    images.

    Raises:
        ValueError: If the name is taken. The same function replaces itself: a cell of a notebook is run again.
    """
    registered = DATASETS.get(loader.__name__, loader)
    if (registered.__module__, registered.__qualname__) != (loader.__module__, loader.__qualname__):
        raise ValueError(f"a dataset named {loader.__name__} is already registered")
    DATASETS[loader.__name__] = loader
    return loader


def load_dataset(config: DataConfig, *, train: bool) -> ImageDataset:
    """Load the labeled training or test set of the configured dataset.

    Args:
        config: Section whose `dataset` is a key of `DATASETS`.
        train: Whether to load the training set; otherwise the test set.

    Raises:
        InputError: If the dataset is unknown, a file is missing, malformed or unsafe, a download failed, or the images
            are not of the size that models are trained for.
    """
    if config.dataset not in DATASETS:
        raise InputError(f"data.dataset: unknown dataset {config.dataset!r}; known: {', '.join(sorted(DATASETS))}")
    dataset = DATASETS[config.dataset](config, train=train)
    if dataset.images.shape[1:] != (shape := (3, IMAGE_SIZE, IMAGE_SIZE)):
        found = tuple(dataset.images.shape[1:])
        raise InputError(f"data.dataset: {config.dataset} has images of shape {found}; models take {shape}")
    return dataset
