"""Loading image files of all kinds that users have."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional

from cifar_ignite.config import SyntheticConfig
from cifar_ignite.data.synthetic import make_synthetic
from cifar_ignite.errors import InputError
from cifar_ignite.evaluation.image_files import find_images, load_image, load_images
from tests.evaluation.helpers import smooth_image


def as_array(path):
    image = load_image(path)
    assert (image.dtype, tuple(image.shape)) == (torch.uint8, (3, 32, 32))
    return image.permute(1, 2, 0).numpy()


def test_load_image_keeps_values_of_32x32_images(tmp_path):
    image = make_synthetic(SyntheticConfig(test_size=1), train=False).images[0].permute(1, 2, 0).numpy()
    for extension, options in (("png", {}), ("webp", {"lossless": True}), ("bmp", {}), ("tiff", {})):
        Image.fromarray(image).save(tmp_path / f"a.{extension}", **options)
        assert np.array_equal(as_array(tmp_path / f"a.{extension}"), image), extension


@pytest.mark.parametrize(("height", "width"), [(64, 64), (90, 200), (1, 1), (5, 300), (700, 320)])
def test_load_image_crops_center_square(tmp_path, height, width):
    image = smooth_image(height, width)
    Image.fromarray(image).save(tmp_path / "a.png")
    side = min(height, width)
    center = functional.center_crop(torch.from_numpy(image).permute(2, 0, 1), [side, side])
    expected = functional.resize(center, [32, 32], antialias=True).permute(1, 2, 0).numpy()
    difference = np.abs(as_array(tmp_path / "a.png").astype(int) - expected)
    assert difference.mean() < 2.5  # another filter, and half a pixel where a margin is odd


def test_load_image_decodes_large_jpeg_like_png(tmp_path):
    """A JPEG is decoded at a fraction of its size, which is fast."""
    image = Image.fromarray(smooth_image(1500, 2000))
    image.save(tmp_path / "a.png")
    image.save(tmp_path / "a.jpg", quality=95)
    assert np.abs(as_array(tmp_path / "a.jpg").astype(int) - as_array(tmp_path / "a.png")).max() <= 6


@pytest.mark.parametrize("orientation", range(1, 9))
def test_load_image_applies_exif_orientation(tmp_path, orientation):
    upright = smooth_image(60, 60)
    exif = Image.Exif()
    exif[0x0112] = orientation
    undo = {
        1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1), 7: lambda a: np.rot90(a, 2).transpose(1, 0, 2), 8: lambda a: np.rot90(a, -1),
    }  # fmt: skip
    Image.fromarray(np.ascontiguousarray(undo[orientation](upright))).save(tmp_path / "rotated.png", exif=exif)
    Image.fromarray(upright).save(tmp_path / "upright.png")
    difference = as_array(tmp_path / "rotated.png").astype(int) - as_array(tmp_path / "upright.png")
    assert np.abs(difference).max() <= 1


def test_load_image_converts_grayscale_16_bit_and_1_bit(tmp_path):
    gray = smooth_image(32, 32, 1)[..., 0]
    Image.fromarray(gray).save(tmp_path / "gray.png")
    assert np.array_equal(as_array(tmp_path / "gray.png"), np.stack([gray] * 3, -1))
    Image.fromarray(gray.astype(np.uint16) * 257).save(tmp_path / "16_bit.png")
    assert np.array_equal(as_array(tmp_path / "16_bit.png"), np.stack([gray] * 3, -1))
    Image.fromarray(gray > 128).save(tmp_path / "1_bit.png")
    assert set(np.unique(as_array(tmp_path / "1_bit.png"))) == {0, 255}


def test_load_image_puts_transparency_on_white(tmp_path):
    """Transparent on the left, half transparent in the middle row."""
    rgba = np.zeros((32, 32, 4), np.uint8)
    rgba[:, 16:, 3], rgba[:, :16, 0], rgba[16, 16:, 3] = 255, 200, 128
    Image.fromarray(rgba).save(tmp_path / "rgba.png")
    loaded = as_array(tmp_path / "rgba.png")
    assert (loaded[:, :16] == 255).all()
    assert (loaded[:16, 16:] == 0).all()
    assert np.abs(loaded[16, 16:].astype(int) - 127).max() <= 1
    Image.fromarray(rgba).save(tmp_path / "palette.gif")
    assert (as_array(tmp_path / "palette.gif")[:, :16] == 255).all()


def test_load_image_converts_cmyk(tmp_path):
    Image.fromarray(smooth_image(32, 32, 4), mode="CMYK").save(tmp_path / "cmyk.jpg")
    as_array(tmp_path / "cmyk.jpg")


def test_load_image_takes_first_frame_of_animation(tmp_path):
    frames = [Image.fromarray(np.full((32, 32), value, np.uint8)) for value in (10, 200)]
    frames[0].save(tmp_path / "animation.gif", save_all=True, append_images=frames[1:])
    assert (as_array(tmp_path / "animation.gif") == 10).all()


def test_load_images_without_files_returns_empty_tensor():
    readable, images = load_images([])
    assert readable == []
    assert images.shape == (0, 3, 32, 32)


def test_find_images_searches_directories_and_keeps_named_files(tmp_path):
    for name in ("b.PNG", "a/c.jpeg", "a/z.webp", "notes.txt", "a/.hidden"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = find_images([tmp_path, tmp_path / "notes.txt"])
    assert [path.relative_to(tmp_path).as_posix() for path in found] == ["a/c.jpeg", "a/z.webp", "b.PNG", "notes.txt"]


def test_find_images_rejects_missing_path_and_directory_without_images(tmp_path):
    with pytest.raises(InputError, match=r"missing\.png: no such file"):
        find_images([tmp_path / "missing.png"])
    with pytest.raises(InputError, match="no images"):
        find_images([tmp_path])
