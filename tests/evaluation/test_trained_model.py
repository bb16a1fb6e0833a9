"""Loading trained models."""

import logging
import os

import pytest
import torch

from cifar_ignite.errors import InputError
from cifar_ignite.evaluation import trained_model
from cifar_ignite.evaluation.trained_model import find_best_model, load_trained_model
from tests.helpers import posix_only


@pytest.fixture
def trained_names(command, tiny_file, tmp_path):
    """A function that writes best models under names, from the latest to the oldest, and returns their directory."""
    assert command("train", "--config", tiny_file)[0] == 0
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


def test_find_best_model_without_any_names_the_fix(tmp_path):
    with pytest.raises(InputError, match="best_models: no best model; train one first"):
        find(tmp_path / "best_models", None)


def test_load_trained_model_keeps_weights_on_cpu_for_gpu_device(command, tiny_file, monkeypatch):
    """A rank knows its GPU only after the process group is initialized."""
    assert command("train", "--config", tiny_file)[0] == 0
    monkeypatch.setattr(trained_model, "select_device", lambda name: torch.device("cuda"))
    trained = load_trained_model(None, None)
    assert trained.device.type == "cuda"
    assert all(parameter.device.type == "cpu" for parameter in trained.model.parameters())


def test_load_trained_model_prefers_ema_weights(command, tiny_file, tmp_path):
    command("train", "--config", tiny_file, "--set", "train.ema_decay=0.9")
    (run_dir,) = (tmp_path / "outputs" / "training_runs").iterdir()
    path = max((run_dir / "checkpoints").glob("latest_*.pt"))
    saved = torch.load(path, weights_only=True)
    state_dict = load_trained_model(path, None).model.state_dict()
    assert all(torch.equal(state_dict[name], weight) for name, weight in saved["ema"].items())
    assert not all(torch.equal(saved["model"][name], weight) for name, weight in saved["ema"].items())


def test_load_trained_model_rejects_weights_of_another_configuration(command, tiny_file):
    command("train", "--config", tiny_file)
    with pytest.raises(InputError, match="tiny_best.pth: the weights do not match the configured hybrid_resnet"):
        load_trained_model(None, None, ["model.width=4"])
