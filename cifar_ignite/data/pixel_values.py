"""Pixels of any type as 8-bit RGB: the range of their values, and transparency.

Types of up to 8 bits declare their range. So do 16-bit samples, but many files hold samples of 10, 12 or 14 bits in
them without declaring it: if no value exceeds a quarter of the range, the image may be one of those, or dark, and is
refused. 32-bit integers and floating-point numbers declare nothing. They are accepted if their range is evident: 0 to
255 or 0 to 65535, and for floating-point numbers also 0 to 1, with a maximum in the upper half.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
from PIL import Image, ImageFile
from PIL.TiffImagePlugin import (
    BITSPERSAMPLE,
    PHOTOMETRIC_INTERPRETATION,
    PLANAR_CONFIGURATION,
    SAMPLEFORMAT,
    TiffImageFile,
)

from cifar_ignite.errors import InputError

BACKGROUND = "white"
STRIP_PIXELS = 2**20
# Modes of Pillow with more than 8 bits.
WIDE_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N", "F")
# Full scale of a range, and the value that the largest one of an image must exceed.
EVIDENT_RANGES = ((1, 0.5), (255, 127), (65535, 32767))
QUARTER_OF_16_BITS = 16383
# Half a step of 8 bits, as a fraction of the range: floating-point numbers may exceed the range by this.
TOLERANCE = 0.5 / 255


@dataclass(frozen=True)
class Encoding:
    """How a file stores pixels, as far as it is not known any more after Pillow has decoded them.

    Attributes:
        file_format: Name of the format in Pillow.
        bits: Bits per sample, if the samples are not converted to 8 bits by their declared range.
        is_inverted: Whether zero is white in values that Pillow has not inverted.
    """

    file_format: str | None
    bits: int
    is_inverted: bool


def read_encoding(opened: ImageFile.ImageFile) -> Encoding:
    """Return the encoding of an image that is open but not decoded.

    Raises:
        InputError: If Pillow would decode the image to wrong values.
    """
    bits, is_inverted = 8, False
    if isinstance(opened, TiffImageFile):
        bits = max(opened.tag_v2.get(BITSPERSAMPLE, (1,)))
        _check_tiff(opened, bits)
        is_inverted = opened.mode in WIDE_MODES and opened.tag_v2.get(PHOTOMETRIC_INTERPRETATION) == 0
    elif opened.format in ("PNG", "SGI") and (match := re.search(r";(2|4|16)", str(opened.tile))):  # such as RGB;16B
        bits = int(match[1])
    return Encoding(opened.format, bits, is_inverted)


def _check_tiff(opened: TiffImageFile, bits: int) -> None:
    is_signed = opened.tag_v2.get(SAMPLEFORMAT, (1,))[0] == 2
    is_planar = opened.tag_v2.get(PLANAR_CONFIGURATION) == 2
    is_raw = opened.info.get("compression") == "raw"
    if (is_signed and bits == 8) or (is_planar and (opened.mode == "LA" or (bits == 16 and is_raw))):
        raise InputError(
            "a TIFF with signed samples or separate planes of a kind that is not supported; save it as PNG"
        )


def to_rgb(image: Image.Image, encoding: Encoding) -> Image.Image:
    """Return an image as 8-bit RGB, on a white background if it is transparent.

    Args:
        image: Decoded image.
        encoding: How its file stores pixels.

    Raises:
        InputError: If the range of the values is not evident.
    """
    key = image.info.get("transparency")  # a value that is transparent, or the opacities of a palette
    convert = _convert
    if image.mode in WIDE_MODES:
        full_scale = _find_full_scale(image, encoding)
        convert = partial(_convert_wide, full_scale=full_scale, is_inverted=encoding.is_inverted, key=key)
    elif encoding.bits == 16:  # Pillow has kept the upper 8 bits
        _check_upper_bits(image)
        if isinstance(key, tuple):
            image.info["transparency"] = tuple(value >> 8 for value in key)
    elif encoding.bits < 8 and image.mode == "L" and key is not None:  # Pillow has scaled the pixels, but not the key
        image.info["transparency"] = key * 255 // (2**encoding.bits - 1)
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    rgb = Image.new("RGB", image.size)
    for top, strip in _split_rows(image):
        rgb.paste(convert(strip), (0, top))
    return rgb


def _split_rows(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """Yield strips of about a million pixels, each with its first row: conversions require several copies of them."""
    count = max(1, STRIP_PIXELS // image.width)
    for top in range(0, image.height, count):
        yield top, image.crop((0, top, image.width, min(top + count, image.height)))


def _convert(image: Image.Image) -> Image.Image:
    if image.has_transparency_data:
        image = image.convert("LA").convert("RGBA") if image.mode == "La" else image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, BACKGROUND), image)
    return image.convert("RGB")


def _convert_wide(image: Image.Image, full_scale: int, is_inverted: bool, key: int | None) -> Image.Image:
    values = np.asarray(image)
    if image.mode == "F":
        gray = np.rint(values.astype(np.float64) * (255 / full_scale)).clip(0, 255)
    else:
        gray = values.astype(np.int64) * 255 // full_scale
    gray = 255 - gray if is_inverted else gray
    if key is not None:
        gray = np.where(values == key, 255, gray)
    return Image.fromarray(gray.astype(np.uint8)).convert("RGB")


# --- Ranges -------------------------------------------------------------------------------------------------------


def _find_full_scale(image: Image.Image, encoding: Encoding) -> int:
    """Return the value that means white; the result for an image of zeros is of no importance."""
    extremes = [(values.min(), values.max()) for values in (np.asarray(strip) for _, strip in _split_rows(image))]
    lows, highs = np.array(extremes, np.float64).T
    low, high = lows.min(), highs.max()
    for full_scale, lower_limit in _accepted_ranges(image.mode, encoding):
        tolerance = TOLERANCE * full_scale if image.mode == "F" else 0
        is_evident = lower_limit < high <= full_scale + tolerance and low >= -tolerance
        if is_evident or low == high == 0:
            return full_scale
    raise _unclear_range(low, high)


def _accepted_ranges(mode: str, encoding: Encoding) -> tuple[tuple[int, float], ...]:
    """Return pairs of a full scale and the value that the largest one of the image must exceed."""
    if mode == "F":
        return EVIDENT_RANGES
    if encoding.file_format == "PPM":  # Pillow has scaled the values from the range that the header declares
        return ((65535, -1),)
    if encoding.file_format == "TIFF" and encoding.bits == 12:
        return ((4095, -1),)
    if encoding.file_format == "FITS" and mode != "I":  # signed, with an offset that Pillow does not apply
        return ()
    # Pillow before 10.3 has the mode I for PNG with 16 bits.
    return EVIDENT_RANGES[1:] if mode == "I" and encoding.file_format != "PNG" else ((65535, QUARTER_OF_16_BITS),)


def _check_upper_bits(image: Image.Image) -> None:
    """Check that the upper bits of 16-bit samples are in use.

    Raises:
        InputError: If no value, of opacity apart, exceeds a quarter of the range.
    """
    extremes = np.array(image.getextrema()).reshape(-1, 2)[[name not in "Aa" for name in image.getbands()]]
    low, high = extremes[:, 0].min(), extremes[:, 1].max()
    if high * 256 <= QUARTER_OF_16_BITS:
        raise _unclear_range(low * 256, high * 256 + 255)


def _unclear_range(low: float, high: float) -> InputError:
    return InputError(
        f"pixel values from {low:.9g} to {high:.9g}, whose range is not evident; save the image with 8 bits per channel"
    )
