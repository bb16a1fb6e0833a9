"""CIFAR-10 in its official files, and the competition's unlabeled test set."""

import hashlib
import logging
import os
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from numbers import Integral
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import torch
from torch import Tensor
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import download_and_extract_archive

from cifar_ignite.config import DataConfig
from cifar_ignite.data.dataset import IMAGE_SIZE, ImageDataset
from cifar_ignite.data.registry import register_dataset
from cifar_ignite.data.unpickling import load_pickle
from cifar_ignite.errors import InputError

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR10_DIR = CIFAR10.base_folder
# Official md5 by file name; batches.meta is never read.
TRAIN_MD5S: Mapping[str, str] = dict(CIFAR10.train_list)
TEST_MD5S: Mapping[str, str] = dict(CIFAR10.test_list)
OFFICIAL_MD5S: Mapping[str, str] = {**TRAIN_MD5S, **TEST_MD5S}

logger = logging.getLogger(__name__)


@register_dataset
def cifar10(config: DataConfig, *, train: bool) -> ImageDataset:
    """CIFAR-10 from `config.root`, downloaded on first use."""
    return load_cifar10(config.root, train=train)


def load_cifar10(root: Path, *, train: bool) -> ImageDataset:
    """Load the training (50,000) or test (10,000) images, and download them if the directory is missing.

    Args:
        root: Directory that contains `cifar-10-batches-py`.
        train: Whether to load the training set; otherwise the test set. The other set's files are not read.

    Raises:
        InputError: If a file is missing, malformed or unsafe, or the download failed.
    """
    directory = root / CIFAR10_DIR
    if not directory.is_dir():
        download_cifar10(root)
    md5s = TRAIN_MD5S if train else TEST_MD5S
    if missing := missing_files(directory, md5s):
        raise InputError(f"{directory / missing[0]}: no such file; delete {directory} to download CIFAR-10 again")
    batches = [_load_labeled_batch(directory / name) for name in md5s]
    if mismatched := mismatched_files(directory, md5s):
        logger.warning(
            "%s: not the official files (md5 of %s differs); accuracies are not comparable to published ones",
            directory,
            ", ".join(mismatched),
        )
    images, labels = (torch.cat(column) for column in zip(*batches, strict=True))
    return ImageDataset(images, labels, list(range(len(images))), CIFAR10_CLASSES)


def missing_files(directory: Path, md5s: Mapping[str, str] = OFFICIAL_MD5S) -> list[str]:
    """Return the names of the official files that are missing.

    Args:
        directory: Path of `cifar-10-batches-py`.
        md5s: Official md5 by name of the files to check.
    """
    return [name for name in md5s if not (directory / name).is_file()]


def mismatched_files(directory: Path, md5s: Mapping[str, str] = OFFICIAL_MD5S) -> list[str]:
    """Return the names of the files whose contents are not the official ones; all files must exist.

    Args:
        directory: Path of `cifar-10-batches-py`.
        md5s: Official md5 by name of the files to check.
    """

    def md5(name: str) -> str:
        return hashlib.md5((directory / name).read_bytes(), usedforsecurity=False).hexdigest()

    with ThreadPoolExecutor() as pool:  # hashing releases the GIL
        return [name for name, actual in zip(md5s, pool.map(md5, md5s), strict=True) if actual != md5s[name]]


def download_cifar10(root: Path) -> None:
    """Download, md5-verify and extract the official archive; `root`/cifar-10-batches-py appears when it is complete.

    Raises:
        InputError: If the download failed or cannot be written; directories created for it are removed.
    """
    directory = root / CIFAR10_DIR
    created = [parent for parent in (root, *root.parents) if not parent.exists()]
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root, prefix=".download-") as staging:
            download_and_extract_archive(CIFAR10.url, staging, filename=CIFAR10.filename, md5=CIFAR10.tgz_md5)
            os.replace(Path(staging) / CIFAR10_DIR, directory)
    except (URLError, OSError, RuntimeError) as error:
        if directory.is_dir():  # another process finished its download first
            return
        for parent in created:
            parent.rmdir()
        raise InputError(
            f"{root}: contains no CIFAR-10, and the download failed ({error}): put the official files into {directory} "
            f"(from {CIFAR10.url}), or use the synthetic dataset with DATA=synthetic (--set data.dataset=synthetic)"
        ) from None


def load_unlabeled_test_set(path: Path) -> ImageDataset:
    """Load the competition's test pickle: {b"data": uint8 (N, 32, 32, 3) or (N, 3072), b"ids": N values}.

    The rows of an (N, 3072) array are in the official order: channel, row, column.

    Raises:
        InputError: If the file is missing, malformed or unsafe.
    """
    batch = load_pickle(path)
    data = _get_entry(batch, "data", path)
    if isinstance(data, np.ndarray) and data.ndim == 4 and data.shape[1:] == (IMAGE_SIZE, IMAGE_SIZE, 3):
        data = data.transpose(0, 3, 1, 2).reshape(len(data), -1)
    images = _to_images(data, path)
    ids = _get_entry(batch, "ids", path)
    ids = ids.tolist() if isinstance(ids, np.ndarray) else ids
    if not isinstance(ids, list | tuple) or len(ids) != len(images):
        raise InputError(f"{path}: 'ids' must hold one value per image ({len(images)})")
    if not all(isinstance(value, Integral | str) for value in ids):
        raise InputError(f"{path}: 'ids' must be integers or strings")
    plain_ids = [value if isinstance(value, str) else int(value) for value in ids]
    return ImageDataset(images, None, plain_ids, CIFAR10_CLASSES)


def _load_labeled_batch(path: Path) -> tuple[Tensor, Tensor]:
    batch = load_pickle(path)
    images = _to_images(_get_entry(batch, "data", path), path)
    labels = _get_entry(batch, "labels", path)
    if not isinstance(labels, list) or len(labels) != len(images):
        raise InputError(f"{path}: 'labels' must be a list of {len(images)} integers, one per image")
    if not all(type(label) is int and 0 <= label < len(CIFAR10_CLASSES) for label in labels):
        raise InputError(f"{path}: 'labels' must be integers from 0 to {len(CIFAR10_CLASSES) - 1}")
    return images, torch.tensor(labels)


def _to_images(data: Any, path: Path) -> Tensor:
    """Return uint8 (N, 3, 32, 32) from a valid array (N, 3072)."""
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3072:
        found = f"{data.dtype} {data.shape}" if isinstance(data, np.ndarray) else type(data).__name__
        raise InputError(f"{path}: 'data' must be a uint8 array of shape (N, 3072), got {found}")
    if len(data) == 0:
        raise InputError(f"{path}: 'data' holds no images")
    return torch.from_numpy(np.ascontiguousarray(data)).reshape(-1, 3, IMAGE_SIZE, IMAGE_SIZE)


def _get_entry(batch: Any, key: str, path: Path) -> Any:
    """Return the value of a key, which is bytes in pickles written by Python 2 and may be a string in others."""
    for name in (key.encode(), key):
        if isinstance(batch, dict) and name in batch:
            return batch[name]
    raise InputError(f"{path}: not a CIFAR-10 batch: it has no {key!r}")
