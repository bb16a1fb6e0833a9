"""Images of all pixel types: read with the right brightness and transparency, or refused."""

import struct

import numpy as np
import pytest
from PIL import Image

from cifar_ignite.data import pixel_values
from cifar_ignite.errors import InputError
from tests.data.image_bytes import GRAY, GRAY_ALPHA, RGB, pack_12_bits, write_png, write_tiff
from tests.helpers.images import load_image, smooth_image

GRAY_IMAGE = smooth_image(32, 32, 1)[..., 0]  # values from 28 to 227
FIGURE = np.zeros((32, 32), bool)
FIGURE[8:24, 8:24] = True


def as_array(path):
    return load_image(path).permute(1, 2, 0).numpy().astype(int)


def assert_shows(path, gray, tolerance=0):
    """Assert that an image has these gray values in all channels."""
    assert np.abs(as_array(path) - np.asarray(gray, int)[..., None]).max() <= tolerance


def scaled(full_scale, dtype):
    return np.rint(GRAY_IMAGE / 255 * full_scale).astype(dtype)


# --- Ranges -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strip_pixels", [2**20, 100])
@pytest.mark.parametrize(
    "values",
    [
        scaled(65535, np.uint16),
        scaled(255, np.int32),
        scaled(65535, np.int32),
        (GRAY_IMAGE / 255).astype(np.float32),
        scaled(255, np.float32),
        scaled(65535, np.float32),
        (GRAY_IMAGE / 227 * 1.001).astype(np.float32),  # rounding beyond 1
    ],
    ids=["uint16", "int32 255", "int32 65535", "float 1", "float 255", "float 65535", "float 1.001"],
)
def test_load_image_scales_evident_range(tmp_path, monkeypatch, values, strip_pixels):
    monkeypatch.setattr(pixel_values, "STRIP_PIXELS", strip_pixels)
    Image.fromarray(values).save(tmp_path / "a.tiff")
    expected = GRAY_IMAGE if values.max() != np.float32(1.001) else np.rint((values * 255).clip(0, 255))
    assert_shows(tmp_path / "a.tiff", expected)


@pytest.mark.parametrize(
    "values",
    [
        scaled(255, np.uint16),
        scaled(4095, np.uint16),
        scaled(16383, np.uint16),
        scaled(1, np.int32),
        scaled(4095, np.int32),
        scaled(2**31 - 1, np.int32),
        scaled(255, np.int32) - 100,
        scaled(100, np.float32),
        scaled(4095, np.float32),
        (GRAY_IMAGE / 127.5 - 1).astype(np.float32),
        np.where(FIGURE, np.nan, GRAY_IMAGE / 255).astype(np.float32),
        np.where(FIGURE, np.inf, GRAY_IMAGE / 255).astype(np.float32),
    ],
)
def test_load_image_refuses_unclear_range(tmp_path, values):
    """A range that no type declares, and that the values do not show."""
    Image.fromarray(values).save(tmp_path / "a.tiff")
    with pytest.raises(InputError, match="range is not evident"):
        load_image(tmp_path / "a.tiff")


@pytest.mark.parametrize("extension", ["png", "jp2"])
def test_load_image_refuses_12_bits_in_16_without_declaration(tmp_path, extension):
    Image.fromarray(scaled(4095, np.uint16)).save(tmp_path / f"a.{extension}")
    with pytest.raises(InputError, match="range is not evident"):
        load_image(tmp_path / f"a.{extension}")


@pytest.mark.parametrize("full_scale", [255, 4095, 65535])
def test_load_image_checks_range_of_16_bit_colors(tmp_path, full_scale):
    rgb = np.stack([scaled(full_scale, ">u2")] * 3, -1).astype(">u2")
    path = write_png(tmp_path / "a.png", [row.tobytes() for row in rgb], (32, 16, RGB))
    if full_scale == 65535:
        assert_shows(path, GRAY_IMAGE)
    else:
        with pytest.raises(InputError, match="range is not evident"):
            load_image(path)


@pytest.mark.parametrize("maxval", [300, 4095, 65535])
def test_load_image_scales_declared_range_of_pgm(tmp_path, maxval):
    """The header declares the largest value; dark images are accepted."""
    for name, values in (("a", scaled(maxval, int)), ("dark", scaled(maxval, int) // 100)):
        (tmp_path / f"{name}.pgm").write_bytes(b"P5 32 32 %d\n" % maxval + values.astype(">u2").tobytes())
        assert_shows(tmp_path / f"{name}.pgm", values * 255 // maxval, tolerance=1)


def test_load_image_scales_12_bit_tiff(tmp_path):
    values = scaled(4095, int)
    write_tiff(tmp_path / "a.tiff", pack_12_bits(values), {258: (12,), 262: (1,)})
    assert_shows(tmp_path / "a.tiff", values * 255 // 4095)


def test_load_image_inverts_16_bit_tiff_with_zero_as_white(tmp_path):
    inverted = 65535 - scaled(65535, "<u2")
    write_tiff(tmp_path / "a.tiff", inverted.astype("<u2").tobytes(), {258: (16,), 262: (0,)})
    assert_shows(tmp_path / "a.tiff", GRAY_IMAGE)


@pytest.mark.parametrize(
    ("samples", "tags"),
    [
        ((GRAY_IMAGE // 2).astype(np.int8), {258: (8,), 262: (1,), 339: (2,)}),
        (np.stack([scaled(65535, "<u2")] * 3), {258: (16,) * 3, 262: (2,), 277: (3,), 284: (2,), 273: (8, 2056, 4104)}),
    ],
    ids=["signed", "separate planes"],
)
def test_load_image_refuses_tiff_that_pillow_misreads(tmp_path, samples, tags):
    tags = {**tags, 279: (2048,) * len(tags[258])}
    with pytest.raises(InputError, match="TIFF"):
        load_image(write_tiff(tmp_path / "a.tiff", samples.tobytes(), tags))


def test_load_image_refuses_16_bit_fits(tmp_path):
    """Signed values with an offset, which Pillow does not apply."""
    cards = ["SIMPLE  = T", "BITPIX  = 16", "NAXIS   = 2", "NAXIS1  = 32", "NAXIS2  = 32", "BZERO   = 32768", "END"]
    header = "".join(card.ljust(80) for card in cards).ljust(2880).encode()
    (tmp_path / "a.fits").write_bytes(header + (scaled(65535, int) - 32768).astype(">i2").tobytes())
    with pytest.raises(InputError, match="range is not evident"):
        load_image(tmp_path / "a.fits")


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_load_image_accepts_black(tmp_path, dtype):
    Image.fromarray(np.zeros((32, 32), dtype)).save(tmp_path / "a.tiff")
    assert_shows(tmp_path / "a.tiff", np.zeros((32, 32)))


def test_load_image_converts_lab(tmp_path):
    lab = np.full((32, 32, 3), (136, 80, 67), np.int16).astype(np.uint8)  # red: L 53, a 80, b 67
    write_tiff(tmp_path / "a.tiff", lab.tobytes(), {258: (8,) * 3, 262: (8,), 277: (3,)})
    assert np.abs(as_array(tmp_path / "a.tiff") - (255, 0, 0)).max() <= 12


# --- Transparency -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("background", [0, 12345])
def test_load_image_puts_transparent_16_bit_value_on_white(tmp_path, background):
    values = np.where(FIGURE, 30000, background).astype(">u2")
    expected = np.where(FIGURE, 30000 // 257, 255)
    key = struct.pack(">H", background)
    write_png(tmp_path / "gray.png", [row.tobytes() for row in values], (32, 16, GRAY), key)
    assert_shows(tmp_path / "gray.png", expected)
    rgb = np.repeat(values[..., None], 3, -1).astype(">u2")
    write_png(tmp_path / "rgb.png", [row.tobytes() for row in rgb], (32, 16, RGB), 3 * key)
    assert_shows(tmp_path / "rgb.png", expected, tolerance=1)


def test_load_image_puts_16_bit_alpha_on_white(tmp_path):
    samples = np.stack([np.full((32, 32), 30000), np.where(FIGURE, 65535, 0)], -1).astype(">u2")
    write_png(tmp_path / "a.png", [row.tobytes() for row in samples], (32, 16, GRAY_ALPHA))
    assert_shows(tmp_path / "a.png", np.where(FIGURE, 117, 255))


@pytest.mark.parametrize(("bits", "background", "figure"), [(1, 1, 0), (2, 2, 1), (4, 5, 10), (8, 0, 100)])
def test_load_image_puts_transparent_gray_on_white(tmp_path, bits, background, figure):
    """A transparent value is one of the stored values: 5 of 15, not of 255."""
    values = np.where(FIGURE, figure, background).astype(np.uint8)
    packed = np.packbits(np.unpackbits(values[..., None], axis=-1)[..., -bits:].reshape(32, -1), axis=-1)
    key = struct.pack(">H", background)
    write_png(tmp_path / "a.png", [row.tobytes() for row in packed], (32, bits, GRAY), key)
    assert_shows(tmp_path / "a.png", np.where(FIGURE, figure * 255 // (2**bits - 1), 255))


def test_load_image_puts_palette_with_alpha_on_white(tmp_path):
    for mode, value in (("P", 1), ("PA", (1, 255))):
        image = Image.new(mode, (32, 32))
        image.putpalette([200, 0, 0, 90, 90, 90])
        image.paste(value, (8, 8, 24, 24))
        path = tmp_path / ("a.tiff" if mode == "PA" else "a.png")
        image.save(path, **({} if mode == "PA" else {"transparency": bytes([0, 255])}))
        assert_shows(path, np.where(FIGURE, 90, 255))


def test_load_image_reads_premultiplied_gray(tmp_path):
    samples = np.stack([GRAY_IMAGE // 2, np.full((32, 32), 128, np.uint8)], -1)
    write_tiff(tmp_path / "a.tiff", samples.tobytes(), {258: (8, 8), 262: (1,), 277: (2,), 338: (1,)})
    assert_shows(tmp_path / "a.tiff", 127 + GRAY_IMAGE // 2, tolerance=2)
