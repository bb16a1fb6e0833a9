"""The entries of a pickled batch: pixels and columns in the forms that people store them in."""

import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cifar_ignite.errors import InputError

CIFAR_SIZE = 32

# Shapes of an image, with the axes of an array of images in the order (image, channel, row, column).
IMAGE_SHAPES: Mapping[tuple[int, ...], tuple[int, ...]] = {
    (3 * CIFAR_SIZE**2,): (0, 1),
    (3, CIFAR_SIZE, CIFAR_SIZE): (0, 1, 2, 3),
    (CIFAR_SIZE, CIFAR_SIZE, 3): (0, 3, 1, 2),
}


def get_entry(batch: Any, key: str, path: Path) -> Any:
    """Return the value of a key, which is bytes in pickles written by Python 2 and may be a string in others.

    Raises:
        InputError: If the batch is not a dict with this key.
    """
    for name in (key.encode(), key):
        if isinstance(batch, dict) and name in batch:
            return batch[name]
    raise InputError(f"{path}: not a CIFAR batch: it has no {key!r}; found {describe(batch)}")


def to_images(data: Any, path: Path) -> Tensor:
    """Return uint8 (N, 3, 32, 32) from an array, or a list of arrays, whose images have one of `IMAGE_SHAPES`.

    Raises:
        InputError: If `data` is anything else, or has no images.
    """
    is_list = isinstance(data, list | tuple) and all(isinstance(image, np.ndarray) for image in data)
    is_uniform = is_list and len({(image.dtype, image.shape) for image in data}) == 1
    images = np.stack(data) if is_uniform else data
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.shape[1:] not in IMAGE_SHAPES:
        shapes = " or ".join(f"(N, {', '.join(map(str, shape))})" for shape in IMAGE_SHAPES)
        raise InputError(f"{path}: 'data' must be a uint8 array of shape {shapes}, got {describe(data)}")
    if len(images) == 0:
        raise InputError(f"{path}: 'data' holds no images")
    planes = np.ascontiguousarray(images.transpose(IMAGE_SHAPES[images.shape[1:]]))
    return torch.from_numpy(planes).reshape(-1, 3, CIFAR_SIZE, CIFAR_SIZE)


def to_list(column: Any, name: str, length: int, path: Path) -> list[Any]:
    """Return the values of a list, a tuple or an array as values of Python.

    Args:
        column: Values, of shape (N,) or (N, 1); they may be numpy scalars.
        name: Key of the column.
        length: Required number of values.
        path: File of the column.

    Raises:
        InputError: If `column` is anything else.
    """
    values = column.tolist() if isinstance(column, np.ndarray) else column
    if not isinstance(values, list | tuple) or len(values) != length:
        raise InputError(
            f"{path}: {name!r} must hold one value per entry: a list of {length}, or an array of shape ({length},) or "
            f"({length}, 1); got {describe(column)}"
        )
    return [_to_scalar(value) for value in values]


def _to_scalar(value: Any) -> Any:
    """Return the only element of a row of an (N, 1) column, and a numpy scalar as a value of Python."""
    if isinstance(value, list | tuple) and len(value) == 1:
        value = value[0]
    return value.item() if isinstance(value, np.generic | np.ndarray) and value.size == 1 else value


def describe(value: Any) -> str:
    """Return a value's type with its dtype and shape, length or keys, for example "float64 array of shape (40,)"."""
    if isinstance(value, np.ndarray):
        return f"{value.dtype} array of shape {value.shape}"
    if isinstance(value, list | tuple):
        types = ", ".join(sorted({type(item).__name__ for item in value}))
        return f"{type(value).__name__} of {len(value)} values ({types})"
    if isinstance(value, dict):
        return f"dict with the keys {reprlib.repr(list(value))}"
    return type(value).__name__
