"""Images for the tests."""

from functools import partial

import numpy as np

from cifar_ignite.data import image_reading

load_image = partial(image_reading.load_image, size=32)


def smooth_image(height: int, width: int, channels: int = 3) -> np.ndarray:
    """Return an image without high frequencies, which resampling preserves: uint8 (height, width, channels)."""
    row, column = np.mgrid[0:height, 0:width] / max(height, width)
    planes = [128 + 100 * np.sin(5 * row + channel) * np.cos(4 * column) for channel in range(channels)]
    return np.stack(planes, -1).astype(np.uint8)
