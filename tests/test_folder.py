"""Your own images through all commands."""

import importlib
import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from cifar_ignite import figures
from cifar_ignite.checkpointing.io import load_checkpoint
from cifar_ignite.config_io import parse_config
from cifar_ignite.train import train as train_model
from tests.evaluation.helpers import only_evaluation
from tests.helpers import assert_same_training, only_run, save_blank_figure
from tests.helpers.images import save_photo, smooth_image, write_photos
from tests.helpers.runs import set_options

export_module = importlib.import_module("cifar_ignite.export")  # cifar_ignite.export is the function
pytestmark = pytest.mark.usefixtures("blank_figures")
SIZE = 48
TREE = {
    "experiment": "photos",
    "data": {"dataset": "folder", "root": "photos", "image_size": SIZE, "batch_size": 16},
    "augment": {"mean": None, "std": None},
    "model": {"width": 2},
    "train": {"epochs": 2, "patience": None},
}


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """Directory with photos and the outputs of a run of one epoch on them, which tests copy."""
    directory = tmp_path_factory.mktemp("photos")
    write_photos(directory / "photos", {"train": 20, "test": 6})
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(directory)
        patched.setattr(figures.Figure, "savefig", save_blank_figure)
        train_model(parse_config(TREE, "test", ["train.epochs=1"]))
    return directory


@pytest.fixture
def photos(originals, tmp_path):
    return shutil.copytree(originals / "photos", tmp_path / "photos")


@pytest.fixture
def trained_run(originals, photos, tmp_path):
    """Directory of a run of one epoch on the photos."""
    shutil.copytree(originals / "outputs", tmp_path / "outputs")
    return only_run(tmp_path)


@pytest.fixture
def train(command, tmp_path, photos):
    """A function that trains on the photos and returns what `command` does."""
    (tmp_path / "photos.json").write_text(json.dumps(TREE))
    return lambda *words: command("train", "--config", tmp_path / "photos.json", *words)


def test_folder_is_trained_evaluated_predicted_and_exported(train, command, tmp_path, photos, monkeypatch):
    status, out, err = train()
    assert (status, err) == (0, "")
    run_dir = only_run(tmp_path)
    config = json.loads((run_dir / "config.json").read_text())
    assert all(0 < value < 1 for value in config["augment"]["mean"] + config["augment"]["std"])
    assert config["data"]["val_size"] == 6
    assert json.loads((run_dir / "classes.json").read_text()) == ["cat", "dog", "fish"]

    assert command("evaluate", "--tta", "flip")[0] == 0
    directory = only_evaluation(tmp_path)
    predictions = pd.read_csv(directory / "predictions.csv")
    assert predictions["ID"].tolist()[:3] == ["cat/000.jpg", "dog/000.jpg", "fish/000.jpg"]
    details = pd.read_csv(directory / "details.csv")
    assert (details["true"] == details["ID"].str.partition("/")[0]).all()
    assert json.loads((directory / "metrics.json").read_text())["data"] == "folder test set"

    assert command("predict", photos / "test")[0] == 0
    (path,) = (tmp_path / "outputs" / "predictions").glob("*/predictions.csv")
    predicted = pd.read_csv(path).set_index("file")
    for row in details.to_dict("records"):
        assert predicted.loc[str(photos / "test" / row["ID"]), "predicted"] == row["predicted"]

    monkeypatch.setattr(export_module, "ONNX_PACKAGES", ["no_such_package"])  # slow; see test_export.py
    status, out, _ = command("export")
    assert status == 0
    assert f"input: images (N, 3, {SIZE}, {SIZE})" in out
    program = torch.export.load(tmp_path / "outputs" / "exports" / "photos_uint8.pt2").module()
    assert program(torch.zeros(5, 3, SIZE, SIZE, dtype=torch.uint8)).shape == (5, 3)

    status, out, _ = command("compare")
    assert status == 0
    table = pd.read_csv(tmp_path / "outputs" / "comparison.csv")
    assert table["data"].tolist() == ["folder"]
    assert table["parameters"].tolist() == [sum(w.numel() for w in load_model_parameters(run_dir))]


def load_model_parameters(run_dir):
    """Return the weights of the best model without its buffers."""
    weights = load_checkpoint(next((run_dir / "checkpoints").glob("best_*")))["model"]
    return [weight for name, weight in weights.items() if "running" not in name and "num_batches" not in name]


def test_folder_run_from_its_resolved_configuration_is_the_same(command, trained_run):
    assert command("train", "--config", trained_run / "config.json")[0] == 0
    (second,) = set(trained_run.parent.iterdir()) - {trained_run}
    assert_same_training(trained_run, second)


@pytest.mark.usefixtures("trained_run")
def test_folder_run_is_resumed_with_unresolved_configuration(train):
    """The saved run has numbers where the configuration has null; that is no difference."""
    status, out, _ = train("--resume", "latest", "--set", "train.epochs=2")
    assert status == 0
    assert "kept from the run" not in out
    assert "epoch 2/2" in out


@pytest.mark.usefixtures("trained_run")
def test_folder_that_has_changed_is_not_resumed(train, photos):
    for path in (photos / "train").rglob("*"):
        if path.is_file():
            save_photo(Image.fromarray(255 - smooth_image(40, 40)), path.with_suffix(""), int(path.stem))
    status, _, err = train("--resume", "latest", "--set", "train.epochs=2")
    assert status == 2
    assert "the validation images differ from those of the run" in err
    assert train("--resume", "latest", "--allow-changes", "--set", "train.epochs=2")[0] == 0


def test_folder_with_changed_training_image_is_not_resumed(train, photos):
    """The validation images are in a directory of their own and stay the same."""
    write_photos(photos, {"val": 6})
    assert train("--set", "train.epochs=1")[0] == 0
    path = next(path for path in sorted((photos / "train").rglob("*")) if path.is_file())
    save_photo(Image.fromarray(255 - smooth_image(40, 40)), path.with_suffix(""), int(path.stem))
    status, _, err = train("--resume", "latest", "--set", "train.epochs=2")
    assert (status, err.count("\n")) == (2, 1)
    assert "the training images differ from those of the run" in err
    assert train("--resume", "latest", "--allow-changes", "--set", "train.epochs=2")[0] == 0


@pytest.mark.usefixtures("trained_run")
def test_folder_with_other_classes_is_not_resumed(train, photos):
    (photos / "train" / "cat").rename(photos / "train" / "ant")
    status, _, err = train("--resume", "latest", "--set", "train.epochs=2")
    assert status == 2
    assert "trained on the classes cat, dog, fish; those of the dataset are ant, dog, fish" in err


def test_models_of_other_photos_are_not_compared(train, tmp_path, photos):
    assert "best_models/photos_best.pth updated by this run" in train("--set", "train.epochs=1")[1]
    other = write_photos(tmp_path / "others", {"train": 20}, ("cat", "dog", "fish"))
    shutil.rmtree(other / "train" / "cat")
    shutil.copytree(photos / "train" / "dog", other / "train" / "cat")
    status, out, _ = train("--set", "train.epochs=1", "--set", f"data.root={other}")
    assert status == 0
    assert "photos_best.pth unchanged: validated on other images" in out


def test_folder_with_validation_directory_reports_its_size(train, photos):
    shutil.copytree(photos / "test", photos / "val")
    status, out, _ = train("--set", "train.epochs=1")
    assert status == 0
    assert "data        60 training images, 18 validation images" in out


@pytest.mark.usefixtures("trained_run")
def test_unlabeled_test_set_is_predicted(command, tmp_path, photos):
    shutil.rmtree(photos / "test")
    (photos / "test").mkdir()
    for index in range(12):
        Image.fromarray(smooth_image(50, 60 + index)).save(photos / "test" / f"{index}.png")
    assert command("evaluate")[0] == 0
    directory = only_evaluation(tmp_path)
    assert pd.read_csv(directory / "predictions.csv")["ID"].tolist() == list(range(12))
    assert "accuracy" not in json.loads((directory / "metrics.json").read_text())


@pytest.mark.usefixtures("trained_run")
def test_class_without_test_images_has_no_accuracy(command, tmp_path, photos):
    shutil.rmtree(photos / "test" / "dog")
    status, out, err = command("evaluate")
    assert (status, err) == (0, "")
    (row,) = [line.split() for line in out.splitlines() if line.split()[:2] == ["dog", "0"]]
    assert row[2] == "–"
    directory = only_evaluation(tmp_path)
    dog = json.loads((directory / "metrics.json").read_text(), parse_constant=pytest.fail)["classes"]["dog"]
    assert (dog["images"], dog["recall"], dog["f1"]) == (0, None, None)
    assert '<th scope="row">dog</th><td>0</td><td>–</td>' in (directory / "report.html").read_text()
    assert command("compare")[0] == 0


@pytest.mark.usefixtures("drawn_figures")
def test_data_command_prints_table_and_draws_samples(command, tmp_path, photos):
    options = {"data.dataset": "folder", "data.root": photos, "output_dir": tmp_path / "outputs"}
    status, out, err = command("data", *set_options(options))
    assert (status, err) == (0, "")
    rows = [line.split() for line in out.splitlines()]
    assert ["train", "val", "test"] in rows
    assert ["fish", "18", "2", "6"] in rows
    pixels = np.asarray(Image.open(tmp_path / "outputs" / "data" / "folder_samples.png").convert("L"))
    assert (pixels < 250).mean() > 0.3


def test_data_command_of_other_datasets(command, cifar_root, tmp_path):
    options = {"data.root": cifar_root, "output_dir": tmp_path / "outputs"}
    status, out, _ = command("data", *set_options(options))
    assert status == 0
    assert ["truck", "9", "1", "3"] in [line.split() for line in out.splitlines()]
    assert (tmp_path / "outputs" / "data" / "cifar10_samples.png").exists()


# --- Invalid input ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.root=nowhere"], "nowhere: no directory train (nowhere does not exist)"),
        (["augment.crop_padding=48"], "augment.crop_padding: 48 pixels must be less than data.image_size (48)"),
        (["augment.cutout_size=49"], "augment.cutout_size: 49 pixels must be at most data.image_size (48)"),
        (["data.image_size=4"], "data.image_size: Input should be greater than or equal to 9"),
        (["data.val_size=58"], "data.val_size: 58 of 60 images leave too few"),
        (["data.dataset=cifar10", "data.image_size=48"], "contains no CIFAR-10"),
    ],
)
def test_invalid_options_are_refused_in_one_line(train, refused, tmp_path, photos, monkeypatch, words, message):
    monkeypatch.setattr("cifar_ignite.data.cifar_files.download_and_extract_archive", raise_offline)
    options = [word for text in words for word in ("--set", text)]
    assert message in refused("train", "--config", tmp_path / "photos.json", *options)


def raise_offline(*_, **__):
    raise OSError("offline")


def empty_class(photos):
    (photos / "train" / "bird").mkdir()


def loose_image(photos):
    shutil.copy(photos / "train" / "cat" / "000.jpg", photos / "train" / "loose.jpg")


def single_class(photos):
    for name in ("dog", "fish"):
        shutil.rmtree(photos / "train" / name)


def unreadable_file(photos):
    (photos / "train" / "cat" / "000.jpg").write_bytes(b"\xff\xd8 damaged")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (empty_class, "train/bird: no images in this directory or below; every class directory must contain images"),
        (loose_image, "photos/train: loose.jpg beside the class directories"),
        (single_class, "data.dataset: folder has one class only (cat); training requires at least two"),
        (unreadable_file, "photos/train: 1 of 60 files are unreadable, such as 000.jpg ("),
    ],
)
def test_invalid_folder_is_refused_in_one_line(train, refused, tmp_path, photos, change, message):
    change(photos)
    assert message in refused("train", "--config", tmp_path / "photos.json")


def test_class_of_the_test_set_that_was_not_trained_is_refused(trained_run, refused, photos):
    (photos / "test" / "cat").rename(photos / "test" / "lion")
    assert "test: lion is no class of the training images (cat, dog, fish)" in refused("evaluate")


def test_images_beyond_memory_are_refused_in_one_line(train, refused, tmp_path, monkeypatch):
    monkeypatch.setattr("cifar_ignite.data.memory.available_memory", lambda: 100_000)
    line = refused("train", "--config", tmp_path / "photos.json")
    assert "data.image_size: 60 images of 48 pixels take 0.8 MB of memory, but 0.1 MB are available; use a" in line
