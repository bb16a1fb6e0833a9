"""The temperature of a model in everything that shows or writes probabilities."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from cifar_ignite.data.cifar10 import CIFAR10_CLASSES
from tests.helpers import only_run
from tests.helpers.images import smooth_image
from tests.helpers.runs import latest_checkpoint

PROBABILITIES = list(CIFAR10_CLASSES)


pytestmark = pytest.mark.usefixtures("blank_figures")


@pytest.fixture
def best_model(trained_run, tmp_path):
    """Best model of a run, with clearly different temperatures."""
    path = tmp_path / "outputs" / "best_models" / "tiny_best.pth"
    set_temperatures(path, {"plain": 0.25, "flip": 0.5, "shift": 4.0})
    return path


def set_temperatures(path, temperatures):
    """Replace the temperatures of a saved model; None removes them, as in a file of before they were fitted."""
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["temperatures"]
    torch.save(checkpoint | ({} if temperatures is None else {"temperatures": temperatures}), path)


@pytest.fixture
def evaluate(command, tmp_path):
    """A function that evaluates and returns (directory, metrics.json, details.csv, log)."""

    def run(*words):
        directory = tmp_path / "outputs" / "evaluations"
        before = set(directory.glob("*"))
        status, out, err = command("evaluate", *words)
        assert (status, err) == (0, "")
        (evaluation_dir,) = set(directory.glob("*")) - before
        metrics = json.loads((evaluation_dir / "metrics.json").read_text())
        return evaluation_dir, metrics, pd.read_csv(evaluation_dir / "details.csv"), out

    return run


def test_evaluate_calibrates_probabilities_and_keeps_predictions_byte_for_byte(best_model, evaluate):
    calibrated_dir, metrics, details, out = evaluate("--tta", "flip")
    set_temperatures(best_model, None)
    plain_dir, plain_metrics, plain_details, _ = evaluate("--tta", "flip")
    for name in ("predictions.csv", "predictions_tta_flip.csv"):
        assert (calibrated_dir / name).read_bytes() == (plain_dir / name).read_bytes()
    # softmax(logits / 0.25) is proportional to softmax(logits) ** 4
    expected = plain_details[PROBABILITIES] ** 4
    expected = expected.div(expected.sum(axis=1), axis=0)
    assert np.allclose(details[PROBABILITIES], expected, atol=1e-5)
    assert np.allclose(details["confidence"], expected.max(axis=1), atol=1e-5)
    assert (metrics["temperature"], metrics["tta"]["temperature"]) == (0.25, 0.5)
    assert plain_metrics["temperature"] is None
    for name in ("loss", "mean_confidence", "expected_calibration_error"):
        assert metrics["uncalibrated"][name] == plain_metrics[name] != metrics[name]
        assert metrics["tta"]["uncalibrated"][name] == plain_metrics["tta"][name] != metrics["tta"][name]
    assert metrics["accuracy"] == plain_metrics["accuracy"]
    for expected in ("temperature 0.250 without test-time augmentation", "temperature 0.500 with flip"):
        assert expected in out
    errors = (metrics["expected_calibration_error"], plain_metrics["expected_calibration_error"])
    assert "expected calibration error {:.2%}, before temperature scaling {:.2%}".format(*errors) in out


@pytest.mark.usefixtures("best_model")
def test_evaluate_reports_the_accuracy_above_the_stated_confidence(evaluate):
    _, _, details, _ = evaluate()
    threshold = round(details["confidence"].median(), 3)
    _, metrics, details, out = evaluate("--set", f"unsure_below={threshold}")
    sure = details[details["confidence"] >= threshold]
    assert 0 < len(sure) < len(details)
    accuracy, fraction = (sure["true"] == sure["predicted"]).mean(), len(sure) / len(details)
    assert metrics["sure"] == {"min_confidence": threshold, "fraction": fraction, "accuracy": pytest.approx(accuracy)}
    fractions = f"are {fraction:.1%} of the images, of which {accuracy:.1%} are correct"
    assert f"confidence of at least {100 * threshold:g}% {fractions}" in out


@pytest.mark.usefixtures("best_model")
def test_predict_calibrates_and_marks_unsure_predictions(command, tmp_path):
    (tmp_path / "images").mkdir()
    for index in range(5):
        Image.fromarray(smooth_image(32, 32 + index)).save(tmp_path / "images" / f"{index}.png")
    tables = {}
    for tta in ((), ("--tta", "shift")):
        status, out, _ = command("predict", tmp_path / "images", *tta, "--set", "unsure_below=0.9")
        assert status == 0
        path = max((tmp_path / "outputs" / "predictions").glob("*/*.csv"), key=lambda path: path.stat().st_mtime_ns)
        tables[tta] = table = pd.read_csv(path)
        assert (table["unsure"] == (table["confidence"] < 0.9)).all()
        assert f"unsure (confidence below 90%): {table['unsure'].sum()} of 5" in out
        assert out.count(" unsure\n") == table["unsure"].sum()
    assert "temperature 4.000 with shift" in out
    assert tables[()]["confidence"].mean() > tables["--tta", "shift"]["confidence"].mean()


def test_tta_without_its_own_temperature_uses_the_plain_one(best_model, evaluate):
    """The run was stopped before its end."""
    set_temperatures(best_model, {"plain": 0.25})
    _, metrics, _, out = evaluate("--tta", "shift")
    assert metrics["tta"]["temperature"] == 0.25
    assert "temperature 0.250 with shift: the run did not reach its end" in out


def test_checkpoints_without_temperature_are_evaluated_and_predicted_with(best_model, evaluate, command, tmp_path):
    set_temperatures(best_model, None)
    directory, metrics, _, out = evaluate()
    assert metrics["temperature"] is None
    assert "uncalibrated" not in metrics
    assert "temperature none: " in out
    assert "its probabilities are not calibrated" in (directory / "report.html").read_text()
    _, _, _, out = evaluate("--checkpoint", latest_checkpoint(only_run(tmp_path)))
    assert "temperature none: " in out
    Image.fromarray(smooth_image(32, 32)).save(tmp_path / "a.png")
    assert "temperature none: " in command("predict", tmp_path / "a.png")[1]


def test_model_without_validation_images_is_evaluated_without_temperature(copy_run, evaluate):
    copy_run("data.val_size=0")
    _, metrics, _, out = evaluate()
    assert metrics["temperature"] is None
    assert "temperature none: " in out


def test_checkpoint_with_a_damaged_temperature_is_refused(best_model, command):
    set_temperatures(best_model, {"plain": -1.0})
    status, _, err = command("evaluate")
    assert status == 2
    assert "temperatures are not positive numbers" in err
