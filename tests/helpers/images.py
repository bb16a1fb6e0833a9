"""Images for the tests."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

from cifar_ignite.data import image_reading

load_image = partial(image_reading.load_image, size=32)


def smooth_image(height: int, width: int, channels: int = 3) -> np.ndarray:
    """Return an image without high frequencies, which resampling preserves: uint8 (height, width, channels)."""
    row, column = np.mgrid[0:height, 0:width] / max(height, width)
    planes = [128 + 100 * np.sin(5 * row + channel) * np.cos(4 * column) for channel in range(channels)]
    return np.stack(planes, -1).astype(np.uint8)


def write_photos(root: Path, splits: Mapping[str, int], class_names: Sequence[str] = ("cat", "dog", "fish")) -> Path:
    """Write photos of many sizes, formats, pixel types and orientations into class directories; return `root`.

    The classes differ in their color, so that there is something to learn.

    Args:
        root: Directory of the dataset.
        splits: Number of images per class by the name of the split.
        class_names: Names of the directories.
    """
    rng = np.random.default_rng(0)
    for split, count in splits.items():
        for label, name in enumerate(class_names):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                height, width = (int(side) for side in rng.integers(40, 200, 2))
                pixels = smooth_image(height, width) // 2 + rng.integers(0, 30, (height, width, 1), dtype=np.uint8)
                pixels[..., label % 3] += 80
                save_photo(Image.fromarray(pixels), root / split / name / f"{index:03d}", index)
    return root


def save_photo(image: Image.Image, path: Path, kind: int) -> Path:
    """Save a photo as one of ten kinds of files; return its path with the extension."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    kinds = [
        (image, "jpg", {}),
        (image, "jpg", {"exif": exif}),
        (image.convert("CMYK"), "jpeg", {}),
        (image, "png", {}),
        (image.convert("P"), "png", {}),
        (Image.merge("RGBA", (*image.split(), Image.new("L", image.size, 200))), "png", {}),
        (Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257), "png", {}),
        (image, "bmp", {}),
        (image, "tiff", {}),
        (image.convert("P"), "gif", {}),
    ]
    converted, extension, options = kinds[kind % len(kinds)]
    file = path.with_suffix(f".{extension}")
    converted.save(file, **options)
    return file
