"""Pictures of all kinds, as people have them on their disks."""

import zlib

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import snapshot
from PIL import Image
from torchvision.transforms.v2 import functional

from cifar_ignite.config import SyntheticConfig
from cifar_ignite.data import CIFAR10_CLASSES, draw_synthetic
from cifar_ignite.predict import find_pictures, predict, read_picture, read_pictures


@pytest.fixture
def trained(command, tiny_file):
    assert command("train", "--config", tiny_file)[0] == 0


def picture(height, width, channels=3):
    """Smooth, so that resampling has something to keep: uint8 (height, width, channels)."""
    row, column = np.mgrid[0:height, 0:width] / max(height, width)
    planes = [128 + 100 * np.sin(5 * row + number) * np.cos(4 * column) for number in range(channels)]
    return np.stack(planes, -1).astype(np.uint8)


def as_array(path):
    tensor = read_picture(path)
    assert (tensor.dtype, tuple(tensor.shape)) == (torch.uint8, (3, 32, 32))
    return tensor.permute(1, 2, 0).numpy()


def test_a_picture_of_the_right_size_keeps_its_values(tmp_path):
    image = draw_synthetic(SyntheticConfig(test_size=1), train=False).images[0].permute(1, 2, 0).numpy()
    for ending, options in (("png", {}), ("webp", {"lossless": True}), ("bmp", {}), ("tiff", {})):
        Image.fromarray(image).save(tmp_path / f"a.{ending}", **options)
        assert np.array_equal(as_array(tmp_path / f"a.{ending}"), image), ending


@pytest.mark.parametrize(("height", "width"), [(64, 64), (90, 200), (1, 1), (5, 300), (700, 320)])
def test_the_middle_square_is_shown(tmp_path, height, width):
    image = picture(height, width)
    Image.fromarray(image).save(tmp_path / "a.png")
    side = min(height, width)
    middle = functional.center_crop(torch.from_numpy(image).permute(2, 0, 1), [side, side])
    expected = functional.resize(middle, [32, 32], antialias=True).permute(1, 2, 0).numpy()
    difference = np.abs(as_array(tmp_path / "a.png").astype(int) - expected)
    assert difference.mean() < 2.5  # another filter, and half a pixel where a margin is odd


def test_a_large_jpeg_is_what_its_png_is(tmp_path):
    """Decoded at a fraction of its size, which is fast, it looks the same."""
    image = Image.fromarray(picture(1500, 2000))
    image.save(tmp_path / "a.png")
    image.save(tmp_path / "a.jpg", quality=95)
    assert np.abs(as_array(tmp_path / "a.jpg").astype(int) - as_array(tmp_path / "a.png")).max() <= 6


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_says_how_it_was_held(tmp_path, orientation):
    upright = picture(60, 60)
    exif = Image.Exif()
    exif[0x0112] = orientation
    undo = {
        1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1), 7: lambda a: np.rot90(a, 2).transpose(1, 0, 2), 8: lambda a: np.rot90(a, -1),
    }  # fmt: skip
    Image.fromarray(np.ascontiguousarray(undo[orientation](upright))).save(tmp_path / "held.png", exif=exif)
    Image.fromarray(upright).save(tmp_path / "upright.png")
    assert np.abs(as_array(tmp_path / "held.png").astype(int) - as_array(tmp_path / "upright.png")).max() <= 1


def test_colours_of_all_kinds(tmp_path):
    grey = picture(32, 32, 1)[..., 0]
    Image.fromarray(grey).save(tmp_path / "grey.png")
    assert np.array_equal(as_array(tmp_path / "grey.png"), np.stack([grey] * 3, -1))
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "deep.png")  # 16 bits
    assert np.array_equal(as_array(tmp_path / "deep.png"), np.stack([grey] * 3, -1))
    Image.fromarray(grey > 128).save(tmp_path / "bits.png")
    assert set(np.unique(as_array(tmp_path / "bits.png"))) == {0, 255}
    # Transparent on the left, half in the middle row, as the browser shows it on white.
    rgba = np.zeros((32, 32, 4), np.uint8)
    rgba[:, 16:, 3], rgba[:, :16, 0], rgba[16, 16:, 3] = 255, 200, 128
    Image.fromarray(rgba).save(tmp_path / "rgba.png")
    shown = as_array(tmp_path / "rgba.png")
    assert (shown[:, :16] == 255).all()
    assert (shown[:16, 16:] == 0).all()
    assert np.abs(shown[16, 16:].astype(int) - 127).max() <= 1
    Image.fromarray(rgba).save(tmp_path / "palette.gif")
    assert (as_array(tmp_path / "palette.gif")[:, :16] == 255).all()
    Image.fromarray(picture(32, 32, 4), mode="CMYK").save(tmp_path / "print.jpg")
    as_array(tmp_path / "print.jpg")
    frames = [Image.fromarray(np.full((32, 32), value, np.uint8)) for value in (10, 200)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert (as_array(tmp_path / "moving.gif") == 10).all()


def test_folders_are_searched_for_pictures_and_files_are_taken_as_named(tmp_path):
    for name in ("b.PNG", "a/c.jpeg", "a/z.webp", "notes.txt", "a/.hidden"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = find_pictures([tmp_path, tmp_path / "notes.txt"])
    assert [path.relative_to(tmp_path).as_posix() for path in found] == ["a/c.jpeg", "a/z.webp", "b.PNG", "notes.txt"]


def test_each_unreadable_file_gets_one_line_and_the_rest_is_done(command, trained, tmp_path):
    folder = tmp_path / "my pictures"
    folder.mkdir()
    for number in range(25):
        Image.fromarray(picture(40 + number, 50)).save(folder / f"{number:02d}.png")
    (folder / "text.png").write_text("I am no picture")
    (folder / "empty.jpg").touch()
    whole = (folder / "00.png").read_bytes()
    (folder / "short.png").write_bytes(whole[: len(whole) // 2])
    # A bomb: a few bytes that unpack to 40,000 x 40,000 pixels.
    header = b"IHDR" + (40_000).to_bytes(4, "big") * 2 + b"\x08\x02\x00\x00\x00"
    chunk = (13).to_bytes(4, "big") + header + zlib.crc32(header).to_bytes(4, "big")
    (folder / "bomb.png").write_bytes(whole[:8] + chunk + whole[33:])
    status, out, err = command("predict", folder)
    assert (status, err) == (0, "")
    lines = [line for line in out.splitlines() if line.startswith(f"{folder}/") and ": not a " in line]
    assert [line.split(": ")[0] for line in lines] == [
        str(folder / name) for name in ("bomb.png", "empty.jpg", "short.png", "text.png")
    ]
    assert lines[3].endswith(": not a picture of a known format")
    (path,) = (tmp_path / "outputs" / "predictions").glob("tiny_*/predictions.csv")
    table = pd.read_csv(path)
    assert table.columns.tolist() == ["file", "predicted", "confidence", *CIFAR10_CLASSES]
    assert table["file"].tolist() == [str(folder / f"{number:02d}.png") for number in range(25)]
    probabilities = table[list(CIFAR10_CLASSES)]
    assert np.allclose(probabilities.sum(axis=1), 1, atol=1e-4)
    assert (table["predicted"] == probabilities.idxmax(axis=1)).all()
    assert np.allclose(table["confidence"], probabilities.max(axis=1))
    assert out.count(".png  ") == 20
    assert "5 more; in all: " in out
    assert "25 of 29 files" in out


def test_predictions_are_those_of_the_evaluation(command, trained, tmp_path, cifar_root):
    """The test images, saved as PNG: the same probabilities as in details.csv, plain and with views."""
    from cifar_ignite.config import DataConfig
    from cifar_ignite.data import load_images

    images = load_images(DataConfig(root=cifar_root), train=False)
    (tmp_path / "test").mkdir()
    for number, image in enumerate(images.images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "test" / f"{number:02d}.png")
    command("evaluate", "--tta", "flip")
    (folder,) = (tmp_path / "outputs" / "evaluations").iterdir()
    details = pd.read_csv(folder / "details.csv")
    table = pd.read_csv(predict([tmp_path / "test"], overrides=[f"output_dir={tmp_path / 'outputs'}"]))
    assert np.array_equal(table[list(CIFAR10_CLASSES)], details[list(CIFAR10_CLASSES)])
    table = pd.read_csv(predict([tmp_path / "test"], overrides=[f"output_dir={tmp_path / 'outputs'}"], tta="flip"))
    labels = pd.read_csv(folder / "predictions_tta_flip.csv")["Labels"]
    assert table["predicted"].tolist() == [CIFAR10_CLASSES[label] for label in labels]


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (["nowhere.png"], "nowhere.png: no such file or folder"),
        (["empty"], "empty: no pictures there (PNG, JPEG, WebP, GIF, BMP, TIFF, ...)"),
        (["text.png"], "text.png: none of 1 files is a readable picture"),
    ],
)
def test_without_a_picture_nothing_is_written(command, trained, tmp_path, paths, expected):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.png").write_text("I am no picture")
    before = snapshot(tmp_path)
    status, _, err = command("predict", *paths)
    assert (status, err) == (2, f"cifar_ignite: {expected}\n")
    assert snapshot(tmp_path) == before


def test_nothing_read_is_no_picture():
    read, pictures = read_pictures([])
    assert read == []
    assert pictures.shape == (0, 3, 32, 32)
