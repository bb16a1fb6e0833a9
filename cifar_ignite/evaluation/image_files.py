"""Image files of any size and format, as 32x32 RGB images."""

import logging
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from cifar_ignite.data.dataset import IMAGE_SIZE
from cifar_ignite.errors import InputError

# A JPEG is decoded at 1/8, 1/4 or 1/2 of its size if at least this size remains to resample from.
MIN_DECODED_SIZE = 4 * IMAGE_SIZE
BACKGROUND = "white"

logger = logging.getLogger(__name__)


def find_images(paths: Sequence[Path]) -> list[Path]:
    """Return the given files, and the files below the given directories whose extension Pillow knows, sorted.

    Raises:
        InputError: If a path does not exist, or a directory contains no such file.
    """
    extensions = Image.registered_extensions()
    files: list[Path] = []
    for path in paths:
        if not path.exists():
            raise InputError(f"{path}: no such file or directory")
        if not path.is_dir():
            files.append(path)
            continue
        found = sorted(file for file in path.rglob("*") if file.suffix.lower() in extensions and file.is_file())
        if not found:
            raise InputError(f"{path}: no images in this directory (PNG, JPEG, WebP, GIF, BMP, TIFF, ...)")
        files += found
    return files


def load_images(files: Sequence[Path]) -> tuple[list[Path], Tensor]:
    """Load all readable files in a thread pool (Pillow decodes without the GIL); log a warning for each other file.

    Returns:
        The readable files, and their images, uint8 (N, 3, 32, 32).
    """
    readable: list[Path] = []
    images: list[Tensor] = []
    with warnings.catch_warnings(), ThreadPoolExecutor() as pool:
        warnings.simplefilter("ignore")  # Pillow's, of odd metadata and large images; it refuses too large ones
        results = tqdm(_map_in_chunks(pool, files), total=len(files), desc="load", disable=None, dynamic_ncols=True)
        for file, result in results:
            if isinstance(result, str):
                logger.warning("%s: %s", file, result)
            else:
                readable.append(file)
                images.append(result)
    return readable, torch.stack(images) if images else torch.empty(0, 3, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.uint8)


def _map_in_chunks(
    pool: ThreadPoolExecutor, files: Sequence[Path], chunk_size: int = 256
) -> Iterator[tuple[Path, Tensor | str]]:
    """Yield each file with its result; pool.map alone would submit a call for every file at once."""
    remaining = iter(files)
    while chunk := list(islice(remaining, chunk_size)):
        yield from zip(chunk, pool.map(try_load_image, chunk), strict=True)


def try_load_image(file: Path) -> Tensor | str:
    """Return the image as `load_image` does, or the reason, in one line, why it cannot be loaded."""
    try:
        return load_image(file)
    except UnidentifiedImageError:
        return "not an image of a known format"
    except Exception as error:  # damaged files raise almost anything: OSError, SyntaxError, ValueError, struct.error
        return f"not a readable image ({' '.join(str(error).split()) or type(error).__name__})"


def load_image(file: Path) -> Tensor:
    """Load an image file of any size: its center square, resized to 32x32 pixels.

    Applies the EXIF orientation, puts transparent pixels on white, converts grayscale and palettes to RGB and 16 bits
    to 8, and takes the first frame of an animation. A 32x32 image keeps its values.

    Returns:
        uint8 (3, 32, 32).

    Raises:
        Exception: If the file is damaged or not an image; of almost any type.
    """
    with Image.open(file) as opened:
        opened.draft("RGB", (MIN_DECODED_SIZE, MIN_DECODED_SIZE))
        image = ImageOps.exif_transpose(opened)
        if image.mode.startswith("I"):
            image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, BACKGROUND), image)
        resized = ImageOps.fit(image.convert("RGB"), (IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.LANCZOS)
        return torch.from_numpy(np.array(resized)).permute(2, 0, 1).contiguous()
