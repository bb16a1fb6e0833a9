"""Reading images: the official CIFAR-10 files, the competition's test file, the embedded dataset, the split.

Images are uint8 tensors (N, 3, 32, 32), labels are int64 tensors (N,) in [0, 10). Nothing here is random except through
an explicit seed, and the test set is only read when it is asked for.
"""

import codecs
import hashlib
import logging
import os
import pickle
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any, BinaryIO
from urllib.error import URLError

import numpy as np
import torch
from torch import Tensor
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import download_and_extract_archive

from cifar_ignite.config import DataConfig, InputError, SyntheticConfig

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SYNTHETIC_CLASSES = ("disk", "ring", "square", "frame", "triangle", "plus", "cross", "bars", "stripes", "checkers")
NUM_CLASSES = 10
IMAGE_SIZE = 32

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Images:
    """A set of images, with labels or (the competition's test file) without.

    Attributes:
        images: uint8, (N, 3, 32, 32).
        labels: int64, (N,), each in [0, 10); None where nobody knows them.
        ids: (N,), what the `ID` column of predictions.csv holds.
        class_names: the ten names, in label order.
    """

    images: Tensor
    labels: Tensor | None
    ids: list[Any]
    class_names: tuple[str, ...]


def load_images(config: DataConfig, *, train: bool) -> Images:
    """The labelled training or test set that the configuration names.

    Raises:
        InputError: a file is missing, truncated, malformed or hostile, or the download failed.
    """
    if config.source == "synthetic":
        return draw_synthetic(config.synthetic, train=train)
    return read_cifar10(config.root, train=train)


# --- The official files -------------------------------------------------------------------------------------------


def read_cifar10(root: Path, *, train: bool) -> Images:
    """The training (50,000) or test (10,000) images of `root`/cifar-10-batches-py, downloaded if nothing is there."""
    folder = root / CIFAR10.base_folder
    if not folder.is_dir():
        download_cifar10(root)
    checksums = dict(CIFAR10.train_list if train else CIFAR10.test_list)
    if missing := [name for name in checksums if not (folder / name).exists()]:
        raise InputError(f"{folder / missing[0]}: no such file; remove {folder} to have CIFAR-10 downloaded anew")
    with ThreadPoolExecutor() as pool:  # hashing takes most of the time, and lets other threads run
        md5s = pool.map(_md5, [folder / name for name in checksums])
        parts = [_read_labelled_batch(folder / name) for name in checksums]
        strangers = [name for (name, official), md5 in zip(checksums.items(), md5s, strict=True) if md5 != official]
    if strangers:
        logger.warning(
            "%s: well-formed, but not the official files (md5 of %s differs); accuracies are not comparable to "
            "published ones",
            folder,
            ", ".join(strangers),
        )
    images, labels = (torch.cat(column) for column in zip(*parts, strict=True))
    return Images(images, labels, list(range(len(images))), CIFAR10_CLASSES)


def download_cifar10(root: Path) -> None:
    """Fetch, md5-verify and unpack the official archive; `root`/cifar-10-batches-py appears only when complete."""
    advice = (
        f"put the official files into {root / CIFAR10.base_folder} (from {CIFAR10.url}), "
        "or train on the embedded dataset with DATA=synthetic (--set data.source=synthetic)"
    )
    created = [folder for folder in (root, *root.parents) if not folder.exists()]
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root, prefix=".download-") as staging:
            download_and_extract_archive(CIFAR10.url, staging, filename=CIFAR10.filename, md5=CIFAR10.tgz_md5)
            os.replace(Path(staging) / CIFAR10.base_folder, root / CIFAR10.base_folder)
    except (URLError, OSError, RuntimeError) as error:
        if (root / CIFAR10.base_folder).is_dir():  # another process was faster
            return
        for folder in created:
            folder.rmdir()
        raise InputError(f"{root}: no CIFAR-10 there, and it cannot be downloaded ({error}): {advice}") from None


def read_test_file(path: Path) -> Images:
    """The competition's unlabelled test pickle: {b"data": uint8 (N, 32, 32, 3) or (N, 3072), b"ids": N values}.

    The rows of an (N, 3072) array are in the official channel-height-width order.
    """
    batch = _unpickle(path)
    data = _entry(batch, "data", path)
    if isinstance(data, np.ndarray) and data.ndim == 4 and data.shape[1:] == (IMAGE_SIZE, IMAGE_SIZE, 3):
        data = data.transpose(0, 3, 1, 2).reshape(len(data), -1)
    images = _check_images(data, path)
    ids = _entry(batch, "ids", path)
    ids = ids.tolist() if isinstance(ids, np.ndarray) else ids
    if not isinstance(ids, list | tuple) or len(ids) != len(images):
        raise InputError(f"{path}: 'ids' must hold one value an image ({len(images)})")
    if not all(isinstance(value, Integral | str) for value in ids):
        raise InputError(f"{path}: 'ids' must be whole numbers or strings")
    plain = [value if isinstance(value, str) else int(value) for value in ids]
    return Images(images, None, plain, CIFAR10_CLASSES)


def _read_labelled_batch(path: Path) -> tuple[Tensor, Tensor]:
    batch = _unpickle(path)
    images = _check_images(_entry(batch, "data", path), path)
    labels = _entry(batch, "labels", path)
    if not isinstance(labels, list) or len(labels) != len(images):
        raise InputError(f"{path}: 'labels' must be a list of {len(images)} numbers, one an image")
    if not all(type(label) is int and 0 <= label < NUM_CLASSES for label in labels):
        raise InputError(f"{path}: 'labels' must be whole numbers from 0 to {NUM_CLASSES - 1}")
    return images, torch.tensor(labels)


def _check_images(data: Any, path: Path) -> Tensor:
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3072:
        shape = f"{data.dtype} {data.shape}" if isinstance(data, np.ndarray) else type(data).__name__
        raise InputError(f"{path}: 'data' must be a uint8 array of shape (N, 3072), got {shape}")
    if len(data) == 0:
        raise InputError(f"{path}: 'data' holds no images")
    return torch.from_numpy(np.ascontiguousarray(data)).reshape(-1, 3, IMAGE_SIZE, IMAGE_SIZE)


def _entry(batch: Any, key: str, path: Path) -> Any:
    """Pickles written by Python 2 have bytes as keys, those by Python 3 may have strings."""
    for name in (key.encode(), key):
        if isinstance(batch, dict) and name in batch:
            return batch[name]
    raise InputError(f"{path}: not a CIFAR-10 batch: no {key!r} in it")


def _md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


# --- Unpickling without running code ------------------------------------------------------------------------------


def _encode_latin1(text: str, encoding: str) -> bytes:
    """How Python 2 bytes travel inside a protocol-2 pickle written by Python 3; no other codec is admitted."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"codec {encoding!r}")
    return codecs.encode(text, "latin1")


# All that a pickle of numpy arrays in plain containers refers to, under the module names of numpy 1 and 2.
_ADMITTED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): _encode_latin1,
}
for _module in ("numpy.core", "numpy._core"):
    _ADMITTED[f"{_module}.multiarray", "_reconstruct"] = np._core.multiarray._reconstruct  # type: ignore[attr-defined]
    _ADMITTED[f"{_module}.multiarray", "scalar"] = np._core.multiarray.scalar  # type: ignore[attr-defined]
    _ADMITTED[f"{_module}.numeric", "_frombuffer"] = np._core.numeric._frombuffer  # type: ignore[attr-defined]


class _ArrayUnpickler(pickle.Unpickler):
    """Admits numpy arrays and plain containers, and refuses every other global: no code of the file's choice runs."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ADMITTED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}") from None


def _unpickle(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            return _load_arrays(file)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot read it: {error.strerror}") from None
    except Exception as error:  # a damaged pickle raises nearly anything: EOFError, IndexError, TypeError, MemoryError
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path}: refused: not a whole pickle of plain arrays ({reason})") from None


def _load_arrays(file: BinaryIO) -> Any:
    return _ArrayUnpickler(file, encoding="bytes").load()


# --- The embedded dataset -----------------------------------------------------------------------------------------


def draw_synthetic(config: SyntheticConfig, *, train: bool) -> Images:
    """Ten classes of shapes and textures at random place, size, tilt and colours, drawn from (seed, split).

    The colours of figure and ground are independent of the class, so a linear classifier has little to hold on to
    (tests: below 60%); a convolutional net separates the classes.

    Returns:
        `train_size` or `test_size` images, the classes as balanced as the size allows.
    """
    count = config.train_size if train else config.test_size
    rng = np.random.default_rng([config.seed, int(train)])
    labels = rng.permutation(np.arange(count) % NUM_CLASSES)
    images = np.empty((count, 3, IMAGE_SIZE, IMAGE_SIZE), np.uint8)
    for start in range(0, count, 4096):
        images[start : start + 4096] = _draw_chunk(labels[start : start + 4096], rng)
    return Images(torch.from_numpy(images), torch.from_numpy(labels), list(range(count)), SYNTHETIC_CLASSES)


def _draw_chunk(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    count = len(labels)

    def draw(low: float, high: float, *shape: int) -> np.ndarray:
        return rng.uniform(low, high, (count, *shape)).astype(np.float32)

    # Each image has its own frame: x, y run from -1 to 1 over the figure, tilted by up to 10 degrees.
    radius, tilt = draw(8, 13, 1, 1), np.deg2rad(draw(-10, 10, 1, 1))
    axis = np.arange(IMAGE_SIZE, dtype=np.float32) - (IMAGE_SIZE - 1) / 2
    column = axis[None, None, :] - draw(-4, 4, 1, 1)
    row = axis[None, :, None] - draw(-4, 4, 1, 1)
    x = (np.cos(tilt) * column + np.sin(tilt) * row) / radius
    y = (np.cos(tilt) * row - np.sin(tilt) * column) / radius
    mask = _shape_masks(x, y, draw(0, 2, 1, 1))[labels, np.arange(count)]

    ground, figure = draw(0, 255, 3, 1, 1), draw(0, 255, 3, 1, 1)
    # Keep figure and ground apart in at least one channel, whichever of the two is the brighter.
    channel = rng.integers(3, size=count)
    ground_value = ground[np.arange(count), channel]
    figure[np.arange(count), channel] = np.where(ground_value > 127, ground_value - 110, ground_value + 110)
    image = np.where(mask[:, None], figure, ground) + rng.normal(0, 16, (count, 3, IMAGE_SIZE, IMAGE_SIZE))
    return image.clip(0, 255).astype(np.uint8)


def _shape_masks(x: np.ndarray, y: np.ndarray, phase: np.ndarray) -> np.ndarray:
    """Inside or outside of each of the ten figures: bool (10, N, H, W) for x, y of (N, H, W)."""
    round_, square = np.hypot(x, y), np.maximum(np.abs(x), np.abs(y))
    bars, stripes = ((4 * (axis + 1) + phase) % 2 < 1 for axis in (x, y))
    diagonal = np.minimum(np.abs(x - y), np.abs(x + y)) < 0.35
    return np.stack(
        [
            round_ < 1,
            (round_ < 1) & (round_ > 0.55),
            square < 0.9,
            (square < 0.9) & (square > 0.5),
            (y < 0.8) & (y > 2 * np.abs(x) - 0.9),
            (square < 1) & (np.minimum(np.abs(x), np.abs(y)) < 0.28),
            (square < 0.9) & diagonal,
            (square < 1) & bars,
            (square < 1) & stripes,
            (square < 1) & (bars ^ stripes),
        ]
    )


# --- The split ----------------------------------------------------------------------------------------------------


def split_images(config: DataConfig, images: Images) -> tuple[Images, Images]:
    """Copies of the images to train on, and of those held out for validation, which may be none.

    Raises:
        InputError: as `split_validation`.
    """
    labels = images.labels
    assert labels is not None, "training images have labels"

    def select(rows: Tensor) -> Images:
        return Images(images.images.index_select(0, rows), labels[rows], rows.tolist(), images.class_names)

    train_rows, val_rows = split_validation(labels, config.validation, config.split_seed)
    return select(train_rows), select(val_rows)


def split_validation(labels: Tensor, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of the training and validation images: a seeded, stratified hold-out.

    Args:
        labels: int64, (N,).
        size: images held out; each class gives its share, rounded so that the shares sum to `size`.
        seed: which images; independent of the run's seed, so that runs are compared on the same images.

    Returns:
        Two sorted, disjoint int64 tensors of lengths N - size and size.

    Raises:
        InputError: fewer training images than there are classes would remain.
    """
    counts = torch.bincount(labels, minlength=NUM_CLASSES)
    if size and size > len(labels) - NUM_CLASSES:
        raise InputError(f"data.validation: {size} of {len(labels)} training images leaves too few to train on")
    # Cumulative rounding: class shares differ from exact proportion by less than one image and sum to `size`.
    edges = torch.round(counts.cumsum(0) * size / len(labels)).long()
    shares = torch.diff(edges, prepend=torch.zeros(1, dtype=torch.long))
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    for label, share in enumerate(shares.tolist()):
        held_out[shuffled[labels[shuffled] == label][:share]] = True
    return torch.nonzero(~held_out).flatten(), torch.nonzero(held_out).flatten()
