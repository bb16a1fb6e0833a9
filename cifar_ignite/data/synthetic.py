"""The synthetic dataset: ten classes of shapes and textures, drawn from a seed."""

import numpy as np
import torch

from cifar_ignite.config import DataConfig, SyntheticConfig
from cifar_ignite.data.dataset import ImageDataset
from cifar_ignite.data.memory import check_memory
from cifar_ignite.data.registry import register_dataset

SYNTHETIC_CLASSES = ("disk", "ring", "square", "frame", "triangle", "plus", "cross", "bars", "stripes", "checkers")
REFERENCE_SIZE = 32  # positions and sizes of the shapes are in pixels of images of this side
# Images drawn at a time, and fewer large ones, which bounds the memory; changing it changes the images.
CHUNK_SIZE = 4096
CHUNK_PIXELS = CHUNK_SIZE * 128**2


@register_dataset
def synthetic(config: DataConfig, *, train: bool) -> ImageDataset:
    """Shapes and textures drawn from `config.synthetic.seed`."""
    count = config.synthetic.train_size if train else config.synthetic.test_size
    check_memory((count, 3, config.image_size, config.image_size), torch.device("cpu"))
    return make_synthetic(config.synthetic, train=train, size=config.image_size)


def make_synthetic(config: SyntheticConfig, *, train: bool, size: int = REFERENCE_SIZE) -> ImageDataset:
    """Draw shapes and textures at random positions, sizes, tilts and colors, as a function of (seed, train).

    The colors of shape and background are independent of the class, so the accuracy of a linear classifier stays low
    (below 60% in the tests), while a convolutional network separates the classes.

    Args:
        config: Sizes and seed.
        train: Whether to draw the training set; otherwise the test set.
        size: Side of the images in pixels.

    Returns:
        `train_size` or `test_size` images with classes as balanced as the size allows.
    """
    count = config.train_size if train else config.test_size
    rng = np.random.default_rng([config.seed, int(train)])
    labels = rng.permutation(np.arange(count) % len(SYNTHETIC_CLASSES))
    images = np.empty((count, 3, size, size), np.uint8)
    chunk_size = min(CHUNK_SIZE, CHUNK_PIXELS // size**2)
    for start in range(0, count, chunk_size):
        chunk = slice(start, start + chunk_size)
        images[chunk] = _random_images(labels[chunk], size, rng)
    return ImageDataset(torch.from_numpy(images), torch.from_numpy(labels), list(range(count)), SYNTHETIC_CLASSES)


def _random_images(labels: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Return uint8 (N, 3, H, W) for labels of (N,)."""
    mask = _random_masks(labels, size, rng)
    background, foreground = _random_colors(len(labels), rng)
    noise = rng.normal(0, 16, (len(labels), 3, size, size))
    image = np.where(mask[:, None], foreground, background) + noise
    return image.clip(0, 255).astype(np.uint8)


def _random_masks(labels: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Return bool (N, H, W), true inside the shapes of the labels."""
    shape = (len(labels), 1, 1)
    # Each image has its own coordinates: x and y are in [-1, 1] over the shape, tilted by up to 10 degrees.
    radius, tilt = _uniform(rng, 8, 13, shape), np.deg2rad(_uniform(rng, -10, 10, shape))
    axis = (np.arange(size, dtype=np.float32) - (size - 1) / 2) * (REFERENCE_SIZE / size)
    column = axis[None, None, :] - _uniform(rng, -4, 4, shape)
    row = axis[None, :, None] - _uniform(rng, -4, 4, shape)
    x = (np.cos(tilt) * column + np.sin(tilt) * row) / radius
    y = (np.cos(tilt) * row - np.sin(tilt) * column) / radius
    return _shape_masks(x, y, _uniform(rng, 0, 2, shape))[labels, np.arange(len(labels))]


def _random_colors(count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return float32 background and foreground colors (N, 3, 1, 1) that differ clearly in at least one channel."""
    background, foreground = (_uniform(rng, 0, 255, (count, 3, 1, 1)) for _ in range(2))
    rows, channel = np.arange(count), rng.integers(3, size=count)
    value = background[rows, channel]
    foreground[rows, channel] = np.where(value > 127, value - 110, value + 110)
    return background, foreground


def _uniform(rng: np.random.Generator, low: float, high: float, size: tuple[int, ...]) -> np.ndarray:
    return rng.uniform(low, high, size).astype(np.float32)


def _shape_masks(x: np.ndarray, y: np.ndarray, phase: np.ndarray) -> np.ndarray:
    """Return bool (10, N, H, W), true inside each of the ten shapes, for coordinates x, y of (N, H, W)."""
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
