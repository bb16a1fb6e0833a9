"""Metrics against direct computations on the same probabilities."""

import json
import math

import numpy as np
import pandas as pd
import pytest
import torch

from cifar_ignite.data.cifar10 import CIFAR10_CLASSES
from cifar_ignite.data.dataset import ImageDataset
from cifar_ignite.evaluation import metrics
from cifar_ignite.evaluation.inference import run_inference
from cifar_ignite.evaluation.metrics import (
    calibration_bins,
    compute_metrics,
    coverage_curve,
    expected_calibration_error,
    format_per_class_table,
    format_sure,
    most_confident_errors,
    prediction_table,
    sure_predictions,
)
from cifar_ignite.training.forward import create_forward
from tests.evaluation.helpers import FixedLogits, trained_with


@pytest.fixture(params=[1.0, 0.6])
def temperature(request):
    return request.param


@pytest.fixture
def evaluated(temperature):
    """Labels, probabilities, and their metrics as an evaluation computes them, in batches."""
    rng = np.random.default_rng(3)
    labels = torch.from_numpy(rng.permutation(np.arange(200) % 10))
    logits = torch.from_numpy(rng.normal(0, 2, (200, 10))).float()
    logits[torch.arange(200), labels] += 2
    logits[:, 7] = -20  # horse is never predicted
    images = torch.zeros(200, 3, 32, 32, dtype=torch.uint8)
    dataset = ImageDataset(images, labels, list(range(1000, 1200)), CIFAR10_CLASSES)
    trained = trained_with(FixedLogits(logits))
    forward = create_forward(trained.model, trained.device, torch.float32)
    outputs, engine_metrics = run_inference(trained, forward, dataset)
    assert torch.equal(outputs, logits)
    result = compute_metrics(dataset, outputs, engine_metrics, CIFAR10_CLASSES, temperature)
    return labels.numpy(), (logits.double() / temperature).softmax(1), result


def test_summary_matches_direct_computation(evaluated):
    labels, probabilities, result = evaluated
    values, predicted = probabilities.numpy().astype(float), probabilities.argmax(1).numpy()
    summary = result.summary
    assert summary["images"] == 200
    assert summary["accuracy"] == pytest.approx((predicted == labels).mean())
    top2 = [label in np.argsort(row)[-2:] for label, row in zip(labels, values, strict=True)]
    assert summary["top2_accuracy"] == pytest.approx(np.mean(top2))
    cross_entropy = -np.log(values[np.arange(200), labels]).mean()
    assert summary["loss"] == pytest.approx(cross_entropy, rel=1e-5)
    assert summary["mean_confidence"] == pytest.approx(values.max(1).mean(), rel=1e-6)
    assert json.loads(json.dumps(summary)) == summary


def test_per_class_metrics_match_direct_computation(evaluated):
    labels, probabilities, result = evaluated
    predicted = probabilities.argmax(1).numpy()
    for index, name in enumerate(CIFAR10_CLASSES):
        in_class, as_class = labels == index, predicted == index
        correct = (in_class & as_class).sum()
        assert result.summary["classes"][name] == {
            "images": in_class.sum(),
            "precision": pytest.approx(correct / as_class.sum()) if as_class.any() else None,
            "recall": pytest.approx(correct / in_class.sum()),
            "f1": pytest.approx(2 * correct / (in_class.sum() + as_class.sum())),
        }
    expected = np.zeros((10, 10), int)
    np.add.at(expected, (labels, predicted), 1)
    assert np.array_equal(result.confusion_matrix, expected)


def test_calibration_matches_guo_equation_3(evaluated):
    labels, probabilities, result = evaluated
    confidence, predicted = (tensor.numpy() for tensor in probabilities.max(1))
    expected = 0.0
    for index in range(metrics.NUM_BINS):
        low, high = index / metrics.NUM_BINS, (index + 1) / metrics.NUM_BINS
        in_bin = (confidence > low) & (confidence <= high)
        assert result.bins["images"][index] == in_bin.sum()
        if in_bin.any():
            accuracy = (predicted == labels)[in_bin].mean()
            assert result.bins["accuracy"][index] == pytest.approx(accuracy)
            expected += in_bin.mean() * abs(accuracy - confidence[in_bin].mean())
    assert result.summary["expected_calibration_error"] == pytest.approx(expected, rel=1e-5)


def test_calibration_bins_include_confidence_one():
    certain = pd.DataFrame({"true": ["cat", "dog"], "predicted": ["cat", "cat"], "confidence": [1.0, 1.0]})
    bins = calibration_bins(certain)
    assert bins["images"].tolist() == [0] * 14 + [2]
    assert expected_calibration_error(bins) == 0.5
    assert expected_calibration_error(calibration_bins(certain.assign(predicted=certain["true"]))) == 0


def test_prediction_table_keeps_dataset_order_and_probabilities(evaluated):
    _, probabilities, result = evaluated
    table = result.predictions
    assert table.columns.tolist() == ["ID", "true", "predicted", "confidence", *CIFAR10_CLASSES]
    assert table["ID"].tolist() == list(range(1000, 1200))
    assert np.allclose(table[list(CIFAR10_CLASSES)].to_numpy(), probabilities.numpy(), atol=1e-12)


def test_most_confident_errors_are_sorted_and_limited(evaluated):
    labels, probabilities, result = evaluated
    confidence, predicted = (tensor.numpy() for tensor in probabilities.max(1))
    wrong = np.flatnonzero(predicted != labels)
    errors = most_confident_errors(result.predictions, 5)
    assert errors.index.tolist() == wrong[np.argsort(-confidence[wrong], kind="stable")][:5].tolist()
    assert len(most_confident_errors(result.predictions, 999)) == len(wrong)


def test_compute_metrics_without_labels_omits_accuracy(evaluated, temperature):
    _, probabilities, labeled = evaluated
    images = torch.zeros(200, 3, 32, 32, dtype=torch.uint8)
    unlabeled = ImageDataset(images, None, list(range(200)), CIFAR10_CLASSES)
    result = compute_metrics(unlabeled, probabilities.log() * temperature, {}, CIFAR10_CLASSES, temperature)
    assert result.summary.keys() == {"images", "mean_confidence", "temperature", "uncalibrated"}
    assert result.summary["mean_confidence"] == pytest.approx(labeled.summary["mean_confidence"])
    assert result.bins is result.confusion_matrix is None
    assert result.per_class["predicted"].tolist() == labeled.per_class["predicted"].tolist()
    assert math.isnan(result.per_class.loc["horse", "confidence"])


def test_format_per_class_table_shows_percentages_and_undefined_values(evaluated):
    formatted = format_per_class_table(evaluated[2].per_class)
    assert formatted.loc["horse", "predicted"] == "0"
    assert formatted.loc["horse", "mean confidence"] == "–"
    assert formatted.loc["cat", "images"] == "20"
    assert formatted.loc["cat", "accuracy (recall)"].endswith("%")


def test_per_class_metrics_are_exact_and_undefined_without_images_or_predictions():
    """Five images of a, of which all are found; two of c, never predicted; b has no images; d has neither."""
    class_names, labels = ("a", "b", "c", "d"), torch.tensor([0] * 5 + [2] * 2)
    logits = torch.nn.functional.one_hot(torch.tensor([0] * 6 + [1]), 4).float()
    dataset = ImageDataset(torch.zeros(7, 3, 32, 32, dtype=torch.uint8), labels, list(range(7)), class_names)
    trained = trained_with(FixedLogits(logits), class_names)
    outputs, engine_metrics = run_inference(trained, trained.model, dataset)
    result = compute_metrics(dataset, outputs, engine_metrics, class_names)
    assert json.loads(json.dumps(result.summary, allow_nan=False))["classes"] == {
        "a": {"images": 5, "precision": 5 / 6, "recall": 1.0, "f1": 10 / 11},
        "b": {"images": 0, "precision": 0.0, "recall": None, "f1": None},
        "c": {"images": 2, "precision": None, "recall": 0.0, "f1": 0.0},
        "d": {"images": 0, "precision": None, "recall": None, "f1": None},
    }
    formatted = format_per_class_table(result.per_class)[["accuracy (recall)", "precision", "F1"]]
    assert formatted.loc["b"].tolist() == ["–", "0.0%", "–"]
    assert formatted.loc["c"].tolist() == ["0.0%", "–", "0.0%"]


# --- Temperature and coverage -------------------------------------------------------------------------------------


def test_temperature_changes_no_class_and_keeps_the_uncalibrated_metrics(evaluated):
    _, probabilities, _ = evaluated
    logits = probabilities.log()
    labels = torch.arange(200) % 10
    images = torch.zeros(200, 3, 32, 32, dtype=torch.uint8)
    dataset = ImageDataset(images, labels, list(range(200)), CIFAR10_CLASSES)
    engine_metrics = {
        "accuracy": 0.5, "loss": 1.25, "top2_accuracy": 0.6, "confusion": torch.eye(10, dtype=torch.long),
    }  # fmt: skip
    plain = compute_metrics(dataset, logits, engine_metrics, CIFAR10_CLASSES)
    result = compute_metrics(dataset, logits, engine_metrics, CIFAR10_CLASSES, 3.0)
    assert (plain.summary["temperature"], plain.uncalibrated) == (None, None)
    assert "uncalibrated" not in plain.summary
    assert result.predictions["predicted"].equals(plain.predictions["predicted"])
    assert result.summary["accuracy"] == plain.summary["accuracy"] == 0.5
    for name in ("loss", "mean_confidence", "expected_calibration_error"):
        assert result.summary["uncalibrated"][name] == plain.summary[name]
        assert result.summary[name] != plain.summary[name]
    assert result.uncalibrated.predictions.equals(plain.predictions)


def test_predicted_class_is_that_of_the_highest_logit_where_probabilities_round_to_the_same():
    logits = torch.tensor([[0.0, 1000.0, 1000.0001, -5.0]])
    images = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    dataset = ImageDataset(images, None, [0], ("a", "b", "c", "d"))
    for temperature in (None, 1e12):
        assert prediction_table(dataset, logits, dataset.class_names, temperature)["predicted"].tolist() == ["c"]


TABLE = pd.DataFrame({
    "confidence": [0.9, 0.5, 0.9, 0.7, 0.3],
    "true": ["a", "a", "a", "a", "a"],
    "predicted": ["a", "b", "b", "a", "a"],
})  # fmt: skip


def test_coverage_curve_leaves_out_the_least_confident_images_first():
    curve = coverage_curve(TABLE)
    assert curve["confidence"].tolist() == [0.9, 0.9, 0.7, 0.5, 0.3]
    assert curve["coverage"].tolist() == [0.4, 0.4, 0.6, 0.8, 1.0]
    assert curve["accuracy"].tolist() == pytest.approx([1 / 2, 1 / 2, 2 / 3, 2 / 4, 3 / 5])


@pytest.mark.parametrize(
    ("min_confidence", "fraction", "accuracy"), [(0.0, 1.0, 0.6), (0.7, 0.6, 2 / 3), (0.71, 0.4, 0.5), (1.0, 0.0, None)]
)
def test_sure_predictions_have_at_least_the_confidence(min_confidence, fraction, accuracy):
    sure = sure_predictions(TABLE, min_confidence)
    assert sure == {"min_confidence": min_confidence, "fraction": fraction, "accuracy": pytest.approx(accuracy)}
    assert f"at least {100 * min_confidence:g}% are {fraction:.1%} of the images" in format_sure(sure)
