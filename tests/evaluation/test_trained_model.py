"""Loading trained models."""

import logging
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cifar_ignite.config import AugmentConfig
from cifar_ignite.errors import InputError
from cifar_ignite.evaluation import trained_model
from cifar_ignite.evaluation.trained_model import NormalizedModel, find_best_model, load_model, load_trained_model
from tests.helpers import posix_only
from tests.helpers.runs import latest_checkpoint


@pytest.fixture
def trained_names(trained_run, tmp_path):
    """A function that writes best models under names, from the latest to the oldest, and returns their directory."""
    directory = tmp_path / "outputs" / "best_models"
    model = (directory / "tiny_best.pth").read_bytes()
    (directory / "tiny_best.pth").unlink()

    def write(*names, contents=model):
        for age, name in enumerate(names):
            (directory / name).write_bytes(contents)
            os.utime(directory / name, (1000 - age, 1000 - age))
        return directory

    return write


def find(directory, model_name, fits=lambda record: True):
    """Return the name of the best model that is found."""
    path, saved = find_best_model(directory.parent, model_name, fits)
    assert saved["record"].config["experiment"] == "tiny"
    return path.name


def test_find_best_model_returns_latest_of_experiment_or_of_all(trained_names):
    directory = trained_names("b_best.pth", "a_val_acc_none_best.pth", "a_best.pth")
    assert find(directory, None) == "b_best.pth"
    assert find(directory, "a") == "a_val_acc_none_best.pth"
    os.utime(directory / "a_best.pth", (2000, 2000))
    assert find(directory, "a") == "a_best.pth"
    with pytest.raises(InputError, match="no best model of experiment 'c'; available: a, a_val_acc_none, b"):
        find(directory, "c")


def test_find_best_model_returns_latest_that_fits_otherwise_latest(trained_names, caplog):
    caplog.set_level(logging.INFO)
    directory = trained_names("c_best.pth", "b_best.pth", "a_val_acc_none_best.pth", "a_best.pth")
    answers = iter([False, True])
    assert find(directory, None, lambda record: next(answers)) == "b_best.pth"
    assert [record.args[0].name for record in caplog.records] == ["c_best.pth"]
    answers = iter([False, True])
    assert find(directory, "a", lambda record: next(answers)) == "a_best.pth"
    assert find(directory, None, lambda record: False) == "c_best.pth"
    assert find(directory, "a", lambda record: False) == "a_val_acc_none_best.pth"


@posix_only
def test_find_best_model_skips_files_that_cannot_be_loaded(trained_names, caplog):
    directory = trained_names("a_best.pth")
    trained_names("damaged_best.pth", "._a_best.pth", contents=b"x")
    (directory / "link_best.pth").symlink_to("/mnt/gone")
    os.utime(directory / "a_best.pth", (10, 10))
    assert find(directory, None) == "a_best.pth"
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "damaged_best.pth" in record.getMessage()
    with pytest.raises(InputError, match=r"damaged_best\.pth: not a checkpoint"):
        find(directory, "damaged")
    with pytest.raises(InputError, match=r"link_best\.pth: no such checkpoint"):
        find(directory, "link")
    (directory / "a_best.pth").unlink()
    with pytest.raises(InputError, match=r"damaged_best\.pth: not a checkpoint"):
        find(directory, None)


@pytest.fixture
def folder_models(trained_names, tmp_path):
    """Best models of folders of cats and dogs, and, later, of ants and bees; photos of each are in directories."""
    directory = trained_names("pets_best.pth", "insects_best.pth")
    for age, (name, class_names) in enumerate({"pets": ["cat", "dog"], "insects": ["ant", "bee"]}.items()):
        checkpoint = torch.load(directory / f"{name}_best.pth", weights_only=True)
        checkpoint["record"]["class_names"] = class_names
        checkpoint["record"]["config"]["data"] |= {"dataset": "folder", "root": f"gone/{name}"}
        for weight in list(checkpoint["model"])[-2:]:  # weight and bias of the head
            checkpoint["model"][weight] = checkpoint["model"][weight][:2].clone()
        torch.save(checkpoint, directory / f"{name}_best.pth")
        os.utime(directory / f"{name}_best.pth", (1000 + age, 1000 + age))
        for class_name in class_names:
            (tmp_path / name / "test" / class_name).mkdir(parents=True)
            Image.new("RGB", (40, 40)).save(tmp_path / name / "test" / class_name / "0.png")


@pytest.mark.usefixtures("folder_models")
@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["data.root=pets"], "pets"),
        (["data.dataset=folder", "data.root=pets"], "pets"),
        (["data.root=insects"], "insects"),
        (["data.dataset=folder"], "insects"),
        (["data.root=nowhere"], "insects"),
        ([], "insects"),
    ],
    ids=str,
)
def test_load_trained_model_selects_the_latest_of_the_classes_of_a_folder(overrides, expected):
    assert load_trained_model(None, None, overrides).path.name == f"{expected}_best.pth"


@pytest.mark.usefixtures("folder_models", "blank_figures")
def test_evaluate_selects_the_latest_model_of_the_classes_of_a_folder(command):
    status, out, err = command("evaluate", "--set", "data.dataset=folder", "--set", "data.root=pets")
    assert (status, err) == (0, "")
    assert "insects_best.pth: trained on other data" in out


def write_unregistered_model(directory):
    """Write the latest best model, of a model that is not registered, as a script with its own leaves it."""
    checkpoint = torch.load(directory / "tiny_best.pth", weights_only=True)
    checkpoint["record"]["config"] |= {"experiment": "mine", "model": {"name": "my_net"}}
    torch.save(checkpoint, directory / "mine_best.pth")
    os.utime(directory / "tiny_best.pth", (10, 10))


@pytest.mark.usefixtures("trained_run", "blank_figures")
def test_find_best_model_skips_models_that_are_not_registered(command, tmp_path):
    write_unregistered_model(tmp_path / "outputs" / "best_models")
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    for words in (["evaluate"], ["predict", "a.png"]):
        status, out, err = command(*words)
        assert (status, err) == (0, "")
        assert "mine_best.pth: model.name: unknown model 'my_net'" in out
        assert "tiny_best.pth (hybrid_resnet" in out


@pytest.mark.usefixtures("trained_run")
def test_unregistered_model_that_is_named_or_the_only_one_is_refused_with_its_path(refused, tmp_path):
    path = tmp_path / "outputs" / "best_models" / "mine_best.pth"
    write_unregistered_model(path.parent)
    for words in (["--model", "mine"], ["--checkpoint", path]):
        assert "mine_best.pth: model.name: unknown model 'my_net'" in refused("evaluate", *words)
    (path.parent / "tiny_best.pth").unlink()
    assert "mine_best.pth: model.name: unknown model 'my_net'" in refused("export")


def test_find_best_model_without_any_names_the_fix(tmp_path):
    with pytest.raises(InputError, match="best_models: no best model; train one first"):
        find(tmp_path / "best_models", None)


@pytest.mark.usefixtures("trained_run")
def test_load_trained_model_keeps_weights_on_cpu_for_gpu_device(monkeypatch):
    """A rank knows its GPU only after the process group is initialized."""
    monkeypatch.setattr(trained_model, "select_device", lambda name: torch.device("cuda"))
    trained = load_trained_model(None, None)
    assert trained.device.type == "cuda"
    assert all(parameter.device.type == "cpu" for parameter in trained.model.parameters())


def test_load_trained_model_prefers_ema_weights(copy_run):
    path = latest_checkpoint(copy_run("train.ema_decay=0.9"))
    saved = torch.load(path, weights_only=True)
    state_dict = load_trained_model(path, None).model.state_dict()
    assert all(torch.equal(state_dict[name], weight) for name, weight in saved["ema"].items())
    assert not all(torch.equal(saved["model"][name], weight) for name, weight in saved["ema"].items())


@pytest.mark.usefixtures("trained_run")
def test_load_trained_model_rejects_weights_of_another_configuration():
    with pytest.raises(InputError, match="tiny_best.pth: the weights do not match the configured hybrid_resnet"):
        load_trained_model(None, None, ["model.width=4"])


@pytest.mark.usefixtures("trained_run")
@pytest.mark.parametrize(
    ("override", "recorded"),
    [
        ("data.image_size=64", "32"),
        ("augment.mean=[0,0,0]", "[0.4914, 0.4822, 0.4465]"),
        ("augment.std=[1,1,1]", "[0.2023, 0.1994, 0.201]"),
    ],
)
def test_override_that_contradicts_the_weights_is_refused(refused, tiny_file, override, recorded):
    for words in (["evaluate"], ["predict", tiny_file], ["export"]):
        line = refused(*words, "--set", override)
        for expected in (f"{override.partition('=')[0]}: ", "tiny_best.pth was trained with", recorded):
            assert expected in line


@pytest.mark.usefixtures("trained_run")
def test_override_with_the_recorded_value_or_null_keeps_it():
    recorded = load_trained_model(None, None).config.augment
    for overrides in (["augment.mean=null", "augment.std=null"], ["augment.mean=[0.4914,0.4822,0.4465]"]):
        trained = load_trained_model(None, None, [*overrides, "data.image_size=32", "unsure_below=0.1"])
        assert trained.config.augment == recorded
        assert trained.config.unsure_below == 0.1


# --- For use in other code ----------------------------------------------------------------------------------------


def test_normalized_model_normalizes_uint8_and_float_images():
    augment = AugmentConfig(mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 1.0))
    model = NormalizedModel(torch.nn.Flatten(), augment, ["a", "b"])
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    expected = (images.numpy() / 255 - np.reshape([0.1, 0.2, 0.3], (3, 1, 1))) / np.reshape([0.5, 0.25, 1], (3, 1, 1))
    assert np.allclose(model(images).numpy().reshape(expected.shape), expected, atol=1e-6)
    assert torch.allclose(model(images / 255), model(images), atol=1e-6)
    assert model.class_names == ("a", "b")


def test_load_model_accepts_path_name_or_nothing(trained_names, tmp_path, monkeypatch):
    directory = trained_names("b_best.pth", "a.v2_best.pth")
    overrides = [f"output_dir={directory.parent}", "device=cpu"]
    monkeypatch.chdir(directory)  # a file without a directory is a path, too
    for source in (None, "a.v2", "a.v2_best.pth", directory / "b_best.pth", str(directory / "b_best.pth")):
        model = load_model(source, overrides)
        assert not model.training
        assert model(torch.zeros(2, 3, 32, 32)).shape == (2, len(model.class_names))


@pytest.mark.parametrize(
    ("source", "message"),
    [("c", "no best model of experiment 'c'; available: b"), ("./c.pth", "c.pth: no such"), (Path("c"), "c: no such")],
)
def test_load_model_that_is_missing_is_refused(trained_names, source, message):
    directory = trained_names("b_best.pth")
    with pytest.raises(InputError, match=message):
        load_model(source, [f"output_dir={directory.parent}"])
