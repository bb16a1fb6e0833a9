"""The competition's unlabeled test set."""

import logging
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

from cifar_ignite.data.batch_entries import describe, get_entry, to_images, to_list
from cifar_ignite.data.cifar10 import CIFAR10_CLASSES
from cifar_ignite.data.dataset import ImageDataset
from cifar_ignite.data.unpickling import load_pickle
from cifar_ignite.errors import InputError

logger = logging.getLogger(__name__)


def load_unlabeled_test_set(path: Path) -> ImageDataset:
    """Load the competition's test pickle: a dict of "data" (images as in `to_images`) and "ids".

    The N ids are integers or strings, those of Python 2 included, in a list or an array of shape (N,) or (N, 1). Ids
    that repeat are logged as a warning.

    Raises:
        InputError: If the file is missing, malformed or unsafe.
    """
    batch = load_pickle(path)
    images = to_images(get_entry(batch, "data", path), path)
    ids = [_to_id(value, path) for value in to_list(get_entry(batch, "ids", path), "ids", len(images), path)]
    # By their text: 1 and "1" are the same in predictions.csv.
    if repeated := [text for text, count in Counter(map(str, ids)).items() if count > 1]:
        logger.warning("%s: 'ids' repeats %d values, the first is %r", path, len(repeated), repeated[0])
    return ImageDataset(images, None, ids, CIFAR10_CLASSES)


def _to_id(value: Any, path: Path) -> int | str:
    """Return an integer, or a string that predictions.csv can contain, decoded if it is one of Python 2."""
    with suppress(ValueError):  # not UTF-8
        decoded = value.decode() if isinstance(value, bytes) else value
        if type(decoded) in (int, str):
            str(decoded).encode()
            return decoded
    raise InputError(f"{path}: 'ids' must be integers or strings in UTF-8, got {describe(value)}")
