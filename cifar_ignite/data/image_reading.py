"""Reading one image file of any size and format as a square RGB image."""

import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFile, ImageOps
from torch import Tensor

from cifar_ignite.data.image_metadata import apply_orientation, read_without_metadata
from cifar_ignite.data.pixel_values import read_encoding, to_rgb
from cifar_ignite.errors import InputError

# A JPEG is decoded at 1/8, 1/4 or 1/2 of its size if at least this multiple of the final size remains to resample from.
MIN_OVERSAMPLING = 4
# Memory for all images that are decoded at the same time. An image that alone requires more is refused.
MEMORY_BUDGET = 2 * 2**30
# Peak of decoding and conversion to RGB, per pixel, measured with Pillow 13; some decoders keep more copies.
BYTES_PER_PIXEL = 10
BYTES_PER_PIXEL_BY_FORMAT = {"WEBP": 20, "JPEG2000": 20, "PPM": 20}


class MemoryBudget:
    """A number of bytes that threads share: each waits until its part is free.

    Args:
        total: Number of bytes.
    """

    def __init__(self, total: int) -> None:
        self.total = self._free = total
        self._changed = threading.Condition()

    @contextmanager
    def reserve(self, size: int) -> Iterator[None]:
        """Hold `size` bytes inside the block; `size` must not exceed the total."""
        with self._changed:
            self._changed.wait_for(lambda: self._free >= size)
            self._free -= size
        try:
            yield
        finally:
            with self._changed:
                self._free += size
                self._changed.notify_all()


def can_allocate(size: int) -> bool:
    """Return whether the process could have `size` more bytes; none of them are used."""
    try:
        np.empty(size, np.uint8)
    except MemoryError:
        return False
    return True


_budget = MemoryBudget(MEMORY_BUDGET)


def load_image(file: Path, size: int) -> Tensor:
    """Load an image file of any size: its center square, resized to size x size pixels.

    Applies the orientation, puts transparent pixels on white, converts every pixel type to 8-bit RGB (see
    `pixel_values`), and takes the first frame of an animation. An image of that size keeps its values. Malformed
    metadata is ignored.

    Returns:
        uint8 (3, size, size).

    Raises:
        InputError: If the range of the pixel values is not evident, or the image is too large to decode.
        MemoryError: If there is not enough memory.
        Exception: If the file is damaged or not an image; of almost any type.
    """
    try:
        image = _read_center_square(file, size)
    except (InputError, MemoryError, Image.DecompressionBombError):
        raise
    except Exception:  # the metadata or the pixels are damaged; the pixels raise again
        if (stripped := read_without_metadata(file)) is None:
            raise
        image = _read_center_square(io.BytesIO(stripped), size)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def _read_center_square(source: Path | io.BytesIO, size: int) -> Image.Image:
    with Image.open(source) as opened:
        num_pixels = opened.width * opened.height
        opened.draft("RGB", (MIN_OVERSAMPLING * size, MIN_OVERSAMPLING * size))
        if not opened.info.get("progressive"):  # libjpeg decodes the others at full size first
            num_pixels = opened.width * opened.height
        with _budget.reserve(_decoding_memory(opened, num_pixels)):
            try:
                return _decode_center_square(opened, size)
            finally:
                opened.close()  # frees the pixels before the reservation ends


def _decode_center_square(opened: ImageFile.ImageFile, size: int) -> Image.Image:
    encoding = read_encoding(opened)
    opened.load()
    rgb = to_rgb(apply_orientation(opened), encoding)
    return ImageOps.fit(rgb, (size, size), Image.Resampling.LANCZOS)


def _decoding_memory(opened: Image.Image, num_pixels: int) -> int:
    """Return the bytes that decoding may require.

    Raises:
        InputError: If they exceed the budget.
    """
    size = num_pixels * BYTES_PER_PIXEL_BY_FORMAT.get(opened.format or "", BYTES_PER_PIXEL)
    if size > _budget.total:
        raise InputError(
            f"decoding {num_pixels / 1e6:.0f} megapixels ({opened.format}) may require {size / 2**30:.1f} GiB, "
            f"more than {_budget.total / 2**30:.1f} GiB; reduce the image"
        )
    return size
