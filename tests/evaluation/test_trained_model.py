"""Loading trained models."""

import os

import pytest
import torch

from cifar_ignite.errors import InputError
from cifar_ignite.evaluation import trained_model
from cifar_ignite.evaluation.trained_model import find_best_model, load_trained_model


def test_find_best_model_returns_latest_of_experiment_or_of_all(tmp_path):
    directory = tmp_path / "best_models"
    directory.mkdir()
    for age, name in enumerate(("b_best.pth", "a_val_acc_none_best.pth", "a_best.pth")):
        (directory / name).touch()
        os.utime(directory / name, (1000 - age, 1000 - age))
    assert find_best_model(tmp_path, None).name == "b_best.pth"
    assert find_best_model(tmp_path, "a").name == "a_val_acc_none_best.pth"
    os.utime(directory / "a_best.pth", (2000, 2000))
    assert find_best_model(tmp_path, "a").name == "a_best.pth"
    with pytest.raises(InputError, match="no best model of experiment 'c'; available: a, a_val_acc_none, b"):
        find_best_model(tmp_path, "c")


def test_find_best_model_without_any_names_the_fix(tmp_path):
    with pytest.raises(InputError, match="best_models: no best model; train one first"):
        find_best_model(tmp_path, None)


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
