"""Temperature scaling: the fit against a grid search, and what a run saves with its best model."""

import math

import pytest
import torch
import torch.nn.functional as F

from cifar_ignite.checkpointing.io import load_checkpoint
from cifar_ignite.data import load_dataset
from cifar_ignite.data.dataset import train_val_split
from cifar_ignite.data.loaders import EvalLoader
from cifar_ignite.evaluation.inference import create_inference_forward, run_inference
from cifar_ignite.evaluation.trained_model import load_trained_model
from cifar_ignite.training import state
from cifar_ignite.training.calibration import (
    MAX_TEMPERATURE,
    add_tta_temperatures,
    fit_temperature,
    format_temperatures,
)
from cifar_ignite.training.device import resolve_amp_dtype
from cifar_ignite.training.forward import create_tta_forward
from tests.helpers import assert_same_training, only_run
from tests.helpers.runs import set_options

pytestmark = pytest.mark.usefixtures("blank_figures")


def draw_calibrated(count, scale=2.0, seed=0):
    """Return logits, float64 (count, 10), and labels drawn from their softmax: a perfectly calibrated model."""
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(count, 10, dtype=torch.float64, generator=generator)
    return logits, torch.multinomial(logits.softmax(1), 1, generator=generator).flatten()


def nll(logits, labels, temperature):
    return F.cross_entropy(logits / temperature, labels).item()


# --- The fit ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [0.3, 0.9, 1.7, 5.0])
def test_fit_temperature_finds_the_minimum_of_a_grid_search(factor):
    logits, labels = draw_calibrated(500)
    grid = torch.logspace(-1, 1, 2001, dtype=torch.float64)
    losses = torch.tensor([nll(logits * factor, labels, temperature) for temperature in grid])
    fitted = fit_temperature(logits * factor, labels)
    assert fitted == pytest.approx(grid[losses.argmin()].item(), rel=0.0012)  # half a step of the grid
    assert nll(logits * factor, labels, fitted) <= losses.min() + 1e-12


@pytest.mark.parametrize(("factor", "expected"), [(1, 1), (0.4, 0.4), (3, 3)])
def test_fit_temperature_of_a_calibrated_model_is_the_factor_of_its_logits(factor, expected):
    logits, labels = draw_calibrated(20_000)
    assert fit_temperature(logits * factor, labels) == pytest.approx(expected, rel=0.03)


def test_fit_temperature_does_not_depend_on_a_constant_added_to_an_image():
    logits, labels = draw_calibrated(300)
    shifted = logits + torch.linspace(-50, 50, 300, dtype=torch.float64)[:, None]
    assert fit_temperature(shifted, labels) == pytest.approx(fit_temperature(logits, labels), rel=1e-9)


@pytest.mark.parametrize(
    ("logits", "labels", "expected"),
    [
        (5 * torch.eye(10), torch.arange(10), 1),  # all right
        (5 * torch.eye(10), (torch.arange(10) + 1) % 10, MAX_TEMPERATURE),  # all wrong
        (torch.full((10, 10), 3.3), torch.arange(10), 1),  # equal logits
        (torch.randn(10, 1), torch.zeros(10, dtype=torch.long), 1),  # a single class
        (torch.zeros(0, 10), torch.zeros(0, dtype=torch.long), 1),  # no images
        (torch.full((3, 10), math.nan), torch.zeros(3, dtype=torch.long), 1),
        (torch.tensor([[math.inf, 0.0]]), torch.tensor([1]), 1),
    ],
    ids=["all right", "all wrong", "equal logits", "one class", "no images", "nan", "inf"],
)
def test_fit_temperature_of_degenerate_predictions_is_finite(logits, labels, expected):
    assert fit_temperature(logits, labels) == pytest.approx(expected)


def test_fit_temperature_without_a_wrong_image_keeps_the_confidence_of_an_unsure_prediction():
    logits = torch.tensor([[0.6, 0.4], [0.3, 0.7], [0.9, 0.1]]).log()
    temperature = fit_temperature(logits, torch.tensor([0, 1, 0]))
    assert (logits / temperature).softmax(1)[0, 0].item() == pytest.approx(0.6)


def test_fit_temperature_with_one_wrong_image_is_fitted():
    logits = torch.tensor([[2.0, 0.0]]).expand(10, 2)
    labels = torch.tensor([0] * 9 + [1])
    assert fit_temperature(logits, labels) == pytest.approx(2 / math.log(9))  # a confidence of 90%


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_fit_temperature_of_ten_images_is_within_its_bounds(scale):
    for seed in range(20):
        logits, labels = draw_calibrated(10, seed=seed)
        assert 1 / MAX_TEMPERATURE * 0.999 <= fit_temperature(scale * logits.float(), labels) <= MAX_TEMPERATURE * 1.001


def test_fit_temperature_of_labels_of_one_class_is_finite():
    logits, _ = draw_calibrated(50)
    assert math.isfinite(fit_temperature(logits, torch.full((50,), 3)))


def test_format_temperatures_names_each():
    assert format_temperatures({"plain": 0.5}) == "0.500"
    assert format_temperatures({"plain": 0.5, "shift": 0.7, "flip": 0.6}) == "0.500, with TTA: flip 0.600, shift 0.700"


# --- In a run -----------------------------------------------------------------------------------------------------


def load_val_set(path):
    """Return the validation images of the run that saved a model."""
    data = load_trained_model(path, None).config.data
    return train_val_split(load_dataset(data, train=True), data.val_size, data.split_seed)[1]


@pytest.mark.parametrize("ema_decay", ["null", "0.5"])
def test_best_model_has_the_temperatures_of_its_validation_images(copy_run, tmp_path, ema_decay):
    """The same images, predicted by the saved model as an evaluation does."""
    copy_run("train.epochs=4", f"train.ema_decay={ema_decay}")
    path = tmp_path / "outputs" / "best_models" / "tiny_best.pth"
    saved = load_checkpoint(path)["temperatures"]
    trained = load_trained_model(path, None)
    val_set = load_val_set(path)
    forward = create_inference_forward(trained)
    forwards = {
        "plain": forward, "flip": create_tta_forward(forward, "flip"), "shift": create_tta_forward(forward, "shift"),
    }  # fmt: skip
    assert saved.keys() == forwards.keys()
    for name, tta_forward in forwards.items():
        logits, _ = run_inference(trained, tta_forward, val_set)
        assert saved[name] == pytest.approx(fit_temperature(logits, val_set.labels), rel=1e-6), name


def test_run_directory_and_best_models_have_the_same_temperatures(command, tiny_file, tmp_path):
    out = command("train", "--config", tiny_file)[1]
    (path,) = (only_run(tmp_path) / "checkpoints").glob("best_epoch_*.pth")
    temperatures = load_checkpoint(path)["temperatures"]
    assert load_checkpoint(tmp_path / "outputs" / "best_models" / "tiny_best.pth")["temperatures"] == temperatures
    assert f"temperature {format_temperatures(temperatures)}" in out


def test_run_that_stops_early_has_temperatures_with_tta(command, tiny_file, tmp_path):
    words = set_options({"train.epochs": 9, "train.patience": 1, "optimizer.lr": 1e-9})
    out = command("train", "--config", tiny_file, *words)[1]
    assert "early stopping" in out
    assert "with TTA: flip " in out


def test_run_without_validation_images_logs_that_it_has_no_temperature(command, tiny_file, tmp_path):
    out = command("train", "--config", tiny_file, "--set", "data.val_size=0")[1]
    assert "no validation images: the model gets no temperature" in out
    assert "temperatures" not in load_checkpoint(tmp_path / "outputs" / "best_models" / "tiny_val_acc_none_best.pth")


class Killed(BaseException):
    """Ends a run as if its process was killed."""


def test_run_killed_while_temperatures_are_fitted_is_resumed_bit_for_bit(
    command, tiny_file, train_once, tmp_path, monkeypatch
):
    (uninterrupted,) = (train_once() / "training_runs").iterdir()

    def die(*_):
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(state, "add_tta_temperatures", die)
        with pytest.raises(Killed):
            command("train", "--config", tiny_file)
    (path,) = (only_run(tmp_path) / "checkpoints").glob("best_epoch_*.pth")
    assert load_checkpoint(path)["temperatures"].keys() == {"plain"}
    assert command("train", "--config", tiny_file, "--resume", "latest")[0] == 0
    assert_same_training(uninterrupted, only_run(tmp_path))
    assert load_checkpoint(path)["temperatures"].keys() == {"plain", "flip", "shift"}


@pytest.mark.usefixtures("trained_run")
def test_model_saved_without_temperatures_gets_all_of_them(tmp_path):
    """The run began before temperatures were fitted, and no later epoch was better."""
    path = tmp_path / "outputs" / "best_models" / "tiny_best.pth"
    expected = load_checkpoint(path)["temperatures"]
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["temperatures"]
    torch.save(checkpoint, path)
    trained, val_set = load_trained_model(path, None), load_val_set(path)
    loader = EvalLoader(val_set, batch_size=trained.config.data.batch_size, augment=trained.config.augment)
    amp_dtype = resolve_amp_dtype(trained.config.precision, trained.device)
    assert add_tta_temperatures(path, trained.model, loader, amp_dtype) == pytest.approx(expected, rel=1e-6)
    assert load_checkpoint(path)["temperatures"] == pytest.approx(expected, rel=1e-6)


def test_failed_write_of_temperatures_keeps_the_best_model(command, tiny_file, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(state, "add_tta_temperatures", fail)
    status, out, err = command("train", "--config", tiny_file)
    assert (status, err) == (0, "")
    assert "no temperatures with test-time augmentation (" in out
    saved = load_checkpoint(tmp_path / "outputs" / "best_models" / "tiny_best.pth")
    assert saved["temperatures"].keys() == {"plain"}
