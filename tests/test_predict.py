"""The predict command on image files."""

import os
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from cifar_ignite.config import DataConfig
from cifar_ignite.data import load_dataset
from cifar_ignite.data.cifar10 import CIFAR10_CLASSES
from cifar_ignite.predict import predict
from tests.evaluation.helpers import only_evaluation
from tests.helpers import snapshot
from tests.helpers.images import smooth_image

pytestmark = pytest.mark.usefixtures("blank_figures", "trained_run")


def write_unreadable_files(directory, png):
    """Write text, empty, truncated and oversized files; `png` is a valid one."""
    (directory / "text.png").write_text("not an image")
    (directory / "empty.jpg").touch()
    (directory / "truncated.png").write_bytes(png[: len(png) // 2])
    # A decompression bomb: a few bytes that decode to 40,000 x 40,000 pixels.
    header = b"IHDR" + (40_000).to_bytes(4, "big") * 2 + b"\x08\x02\x00\x00\x00"
    chunk = (13).to_bytes(4, "big") + header + zlib.crc32(header).to_bytes(4, "big")
    (directory / "bomb.png").write_bytes(png[:8] + chunk + png[33:])


def test_predict_warns_of_each_unreadable_file_and_predicts_the_rest(command, tmp_path):
    directory = tmp_path / "my images"
    directory.mkdir()
    for index in range(25):
        Image.fromarray(smooth_image(40 + index, 50)).save(directory / f"{index:02d}.png")
    write_unreadable_files(directory, (directory / "00.png").read_bytes())
    status, out, err = command("predict", directory)
    assert (status, err) == (0, "")
    warnings = [line for line in out.splitlines() if line.startswith(f"{directory}/") and ": not a" in line]
    assert [line.split(": ")[0] for line in warnings] == [
        str(directory / name) for name in ("bomb.png", "empty.jpg", "text.png", "truncated.png")
    ]
    assert warnings[2].endswith(": not an image of a known format or pixel type; convert it to PNG or JPEG")
    (path,) = (tmp_path / "outputs" / "predictions").glob("tiny_*/predictions.csv")
    table = pd.read_csv(path)
    assert table.columns.tolist() == ["file", "predicted", "confidence", "unsure", *CIFAR10_CLASSES]
    assert (table["unsure"] == (table["confidence"] < 0.7)).all()
    assert f"unsure (confidence below 70%): {table['unsure'].sum()} of 25" in out
    assert table["file"].tolist() == [str(directory / f"{index:02d}.png") for index in range(25)]
    probabilities = table[list(CIFAR10_CLASSES)]
    assert np.allclose(probabilities.sum(axis=1), 1, atol=1e-4)
    assert (table["predicted"] == probabilities.idxmax(axis=1)).all()
    assert np.allclose(table["confidence"], probabilities.max(axis=1))
    assert out.count(".png  ") == 20
    assert "5 more; total: " in out
    assert "25 of 29 files" in out


def test_predict_matches_evaluate(command, tmp_path, cifar_root):
    """The test images, saved as PNG: the same probabilities as in details.csv, plain and with TTA."""
    dataset = load_dataset(DataConfig(root=cifar_root), train=False)
    (tmp_path / "test").mkdir()
    for index, image in enumerate(dataset.images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "test" / f"{index:02d}.png")
    command("evaluate", "--tta", "flip")
    evaluation_dir = only_evaluation(tmp_path)
    details = pd.read_csv(evaluation_dir / "details.csv")
    overrides = [f"output_dir={tmp_path / 'outputs'}"]
    table = pd.read_csv(predict(tmp_path / "test", overrides=overrides).path)
    assert np.array_equal(table[list(CIFAR10_CLASSES)], details[list(CIFAR10_CLASSES)])
    table = predict([str(tmp_path / "test")], overrides=overrides, tta="flip").table
    labels = pd.read_csv(evaluation_dir / "predictions_tta_flip.csv")["Labels"]
    assert table["predicted"].tolist() == [CIFAR10_CLASSES[label] for label in labels]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("missing.png", "missing.png: No such file or directory"),
        ("empty", "empty: no images in this directory"),
        ("text.png", "text.png: none of 1 files is a readable image"),
        (300 * "x", f"{300 * 'x'}: File name too long"),
        ("a\0b.png", "a?b.png: embedded null"),
        ("~nosuchuser/a.png", "~nosuchuser/a.png: No such file"),
    ],
)
def test_predict_without_readable_image_writes_nothing(command, tmp_path, path, expected):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.png").write_text("not an image")
    before = snapshot(tmp_path)
    status, _, err = command("predict", path)
    assert status == 2
    assert err.startswith(f"cifar_ignite: {expected}")
    assert err.count("\n") == 1
    assert snapshot(tmp_path) == before


def test_predict_keeps_file_name_that_is_not_utf8(command, tmp_path):
    name = os.fsdecode(b"caf\xe9\n.png")
    (tmp_path / "images").mkdir()
    try:
        Image.fromarray(smooth_image(40, 40)).save(tmp_path / "images" / name)
    except OSError:
        pytest.skip("the file system accepts UTF-8 only")
    (tmp_path / "images" / os.fsdecode(b"\xff.txt")).touch()
    status, out, _ = command("predict", tmp_path / "images")
    assert status == 0
    assert "caf??.png" in out
    assert "?.txt: not an image" in out
    (path,) = (tmp_path / "outputs" / "predictions").glob("tiny_*/predictions.csv")
    files = pd.read_csv(path, encoding_errors="surrogateescape")["file"].tolist()
    assert files == [str(tmp_path / "images" / name)]
    assert Path(files[0]).exists()


def test_predict_writes_complete_file_or_nothing(command, tmp_path, monkeypatch):
    def fail_in_the_middle(table, file, **_):
        file.write("file,predicted")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pd.DataFrame, "to_csv", fail_in_the_middle)
    Image.fromarray(smooth_image(40, 40)).save(tmp_path / "a.png")
    status, _, err = command("predict", tmp_path / "a.png")
    assert status == 2
    assert "No space left on device" in err
    assert list((tmp_path / "outputs" / "predictions").iterdir()) == []
