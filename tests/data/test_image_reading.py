"""Reading one image file of any size and format, and the memory that decoding requires."""

import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional

from cifar_ignite.config import SyntheticConfig
from cifar_ignite.data import image_reading
from cifar_ignite.data.image_files import load_images
from cifar_ignite.data.image_reading import MemoryBudget
from cifar_ignite.data.synthetic import make_synthetic
from cifar_ignite.errors import InputError
from tests.helpers import REPOSITORY
from tests.helpers.images import load_image, smooth_image

# Loads a file twice, at first with 60 MB of memory; prints both results, and the additional peak in bytes per pixel.
LOAD_WITH_LIMIT = """
import resource, sys
from pathlib import Path
from cifar_ignite.data.image_files import try_load_image

def status(key):
    return int(Path("/proc/self/status").read_text().split(key + ":")[1].split()[0]) * 1024

unlimited = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (status("VmSize") + 60_000_000, unlimited[1]))
print(try_load_image(Path(sys.argv[1]), 32))
resource.setrlimit(resource.RLIMIT_AS, unlimited)
peak = status("VmHWM")
print(getattr(try_load_image(Path(sys.argv[1]), 32), "shape", "not loaded"))
print((status("VmHWM") - peak) / int(sys.argv[2]))
"""


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
    Image.new("CMYK", (32, 32), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg")
    red, green, blue = as_array(tmp_path / "cmyk.jpg").reshape(-1, 3).mean(0)
    assert red > 200 > 100 > max(green, blue)


def test_load_image_takes_first_frame_of_animation(tmp_path):
    frames = [Image.fromarray(np.full((32, 32), value, np.uint8)) for value in (10, 200)]
    frames[0].save(tmp_path / "animation.gif", save_all=True, append_images=frames[1:])
    assert (as_array(tmp_path / "animation.gif") == 10).all()


# --- Memory -------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_load_image_reports_lack_of_memory_and_keeps_to_budget(tmp_path):
    """A palette with transparency, which would require several RGBA copies if it was converted at once."""
    image = Image.new("P", (8000, 6000))
    image.putpalette([200, 0, 0, 0, 0, 200])
    image.save(tmp_path / "a.png", transparency=bytes([0, 255]), compress_level=1)
    words = [sys.executable, "-c", LOAD_WITH_LIMIT, str(tmp_path / "a.png"), str(8000 * 6000)]
    result = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    limited, loaded, bytes_per_pixel = result.stdout.splitlines()
    assert "not enough memory" in limited
    assert loaded == "torch.Size([3, 32, 32])"
    assert float(bytes_per_pixel) < image_reading.BYTES_PER_PIXEL


def test_large_images_are_decoded_one_at_a_time(tmp_path, monkeypatch):
    """The budget is enough for one of the large images, or for all small ones."""
    active, most = [], {"large": 0, "small": 0}
    original = image_reading.to_rgb

    def count_active(image, encoding):
        kind = "large" if image.width == 100 else "small"
        active.append(kind)
        most[kind] = max(most[kind], active.count(kind))
        time.sleep(0.05)
        active.remove(kind)
        return original(image, encoding)

    monkeypatch.setattr(image_reading, "to_rgb", count_active)
    monkeypatch.setattr(image_reading, "_budget", MemoryBudget(15 * 100 * 100))
    files = []
    for index in range(4):
        for kind, size in (("large", 100), ("small", 10)):
            files.append(tmp_path / f"{kind}_{index}.png")
            Image.fromarray(smooth_image(size, size)).save(files[-1])
    _, unreadable = load_images(files, 32)
    assert unreadable == {}
    assert most["large"] == 1
    assert most["small"] > 1


def test_budget_is_returned_after_an_error():
    budget = MemoryBudget(10)
    with pytest.raises(ValueError, match="damaged"), budget.reserve(10):
        raise ValueError("damaged")
    done = threading.Event()
    with budget.reserve(6):
        waiting = threading.Thread(target=lambda: budget.reserve(5).__enter__() or done.set(), daemon=True)
        waiting.start()
        assert not done.wait(0.05)
    assert done.wait(5)


def test_load_image_refuses_image_beyond_budget(tmp_path, monkeypatch):
    """A JPEG is decoded at a fraction of its size, a progressive one is not."""
    monkeypatch.setattr(image_reading, "_budget", MemoryBudget(10 * 300 * 300))
    image = Image.fromarray(smooth_image(1024, 1024))
    for name, options in (("a.png", {}), ("progressive.jpg", {"progressive": True}), ("a.webp", {})):
        image.save(tmp_path / name, **options)
        with pytest.raises(InputError, match="reduce the image"):
            load_image(tmp_path / name)
    image.save(tmp_path / "a.jpg")
    load_image(tmp_path / "a.jpg")


def test_load_image_reads_in_strips_like_at_once(tmp_path, monkeypatch):
    rgba = np.random.default_rng(0).integers(0, 256, (70, 90, 4), dtype=np.uint8)
    Image.fromarray(rgba).save(tmp_path / "a.png")
    at_once = load_image(tmp_path / "a.png")
    monkeypatch.setattr("cifar_ignite.data.pixel_values.STRIP_PIXELS", 1000)
    assert at_once.equal(load_image(tmp_path / "a.png"))
