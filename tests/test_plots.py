"""Figures of training histories and predictions."""

import subprocess
import sys
from functools import partial

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from cifar_ignite.image_plots import format_target, plot_class_samples, plot_misclassified, plot_train_batch
from cifar_ignite.plots import plot_comparison, plot_confusion_matrix, plot_coverage, plot_training_curves
from tests.helpers import REPOSITORY, epoch_metrics


def dark_fraction(path):
    """Return the fraction of pixels that are not white."""
    return (np.asarray(Image.open(path).convert("L")) < 250).mean()


@pytest.mark.parametrize("val_accs", [[0.1, 0.2, 0.3], [None, None], [0.5]])
def test_plot_training_curves_writes_three_figures(tmp_path, val_accs):
    history = [epoch_metrics(epoch, val_acc) for epoch, val_acc in enumerate(val_accs, 1)]
    plot_training_curves(history, tmp_path / "figures")
    names = sorted(path.name for path in (tmp_path / "figures").iterdir())
    assert names == ["accuracy.png", "learning_rate.png", "loss.png"]
    assert all(dark_fraction(tmp_path / "figures" / name) > 0.01 for name in names)


def test_plot_confusion_matrix_with_empty_class(tmp_path):
    plot_confusion_matrix(np.array([[3, 1], [0, 0]]), ("a", "b"), tmp_path / "a.png")
    assert dark_fraction(tmp_path / "a.png") > 0.05


@pytest.mark.parametrize("confidences", [[0.95, 0.8, 0.4], [0.2, 0.2, 0.1]])
def test_plot_coverage_whatever_the_confidences(tmp_path, confidences):
    curve = pd.DataFrame({"confidence": confidences, "coverage": [1 / 3, 2 / 3, 1.0], "accuracy": [1.0, 0.5, 2 / 3]})
    plot_coverage(curve, 0.7, tmp_path / "a.png")
    assert dark_fraction(tmp_path / "a.png") > 0.01


def test_plot_misclassified_without_errors_writes_a_figure(tmp_path):
    plot_misclassified(pd.DataFrame(), np.zeros((0, 32, 32, 3), np.uint8), tmp_path / "a.png")
    assert (tmp_path / "a.png").exists()


def test_plot_confusion_matrix_grows_with_the_number_of_classes(tmp_path):
    for num_classes in (2, 20, 21, 100):
        names = [f"class {label}" for label in range(num_classes)]
        plot_confusion_matrix(np.eye(num_classes, dtype=int) * 100, names, tmp_path / f"{num_classes}.png")
    widths = [Image.open(tmp_path / f"{num_classes}.png").width for num_classes in (2, 20, 21, 100)]
    assert widths[0] <= widths[1] <= widths[2] < widths[3]
    assert widths[3] > 100 * 20  # pixels per class: enough for three digits


def test_plot_misclassified_with_long_names_keeps_the_size_of_the_images(tmp_path):
    images = np.full((30, 16, 16, 3), 99, np.uint8)
    for name, text in (("short", "a"), ("long", "an_unusually_long_name/" * 5)):
        rows = [{"ID": f"{text}{index}", "true": text, "predicted": text, "confidence": 0.5} for index in range(30)]
        plot_misclassified(pd.DataFrame(rows), images, tmp_path / f"{name}.png")
    gray = [(np.asarray(Image.open(tmp_path / f"{name}.png").convert("L")) == 99).sum() for name in ("short", "long")]
    assert gray[1] == pytest.approx(gray[0], rel=0.1)


def test_plot_train_batch_names_both_labels_of_mixed_images(tmp_path):
    assert format_target(np.array([0, 1.0, 0]), "abc") == "b"
    assert format_target(np.array([0.3, 0, 0.7]), "abc") == "c 70%\na 30%"
    images = np.full((9, 16, 16, 3), 99, np.uint8)
    plot_train_batch(images, np.eye(3)[[0, 1, 2] * 3], "abc", tmp_path / "a.png")
    assert dark_fraction(tmp_path / "a.png") > 0.2


def test_plot_class_samples_has_a_row_per_class(tmp_path):
    heights = []
    for num_classes in (2, 100, 130):
        images = [np.full((label % 3 + 1, 8, 8, 3), label, np.uint8) for label in range(num_classes)]
        plot_class_samples([(f"class {label}", each) for label, each in enumerate(images)], tmp_path / "a.png")
        heights.append(Image.open(tmp_path / "a.png").height)
    assert heights[0] < heights[1] == heights[2]
    assert dark_fraction(tmp_path / "a.png") > 0.2


def test_plot_comparison_shows_training_accuracy_without_validation(tmp_path):
    run = {"run": "r", "experiment": "e", "best_val_acc": np.nan, "test_acc": 0.5}
    history = pd.DataFrame([epoch_metrics(1, None), epoch_metrics(2, None)]).astype(float)
    plot_comparison(pd.DataFrame([run]), {"r": history}, tmp_path / "a.png")
    assert dark_fraction(tmp_path / "a.png") > 0.01


NAME = "0 $a_$ .png"  # between its dollar signs is no valid formula
IMAGES = np.full((1, 8, 8, 3), 99, np.uint8)
ERRORS = pd.DataFrame([{"ID": NAME, "true": NAME, "predicted": NAME, "confidence": 0.5}])
RUNS = pd.DataFrame([{"run": NAME, "experiment": NAME, "best_val_acc": 0.5, "test_acc": 0.5}])
HISTORIES = {NAME: pd.DataFrame([epoch_metrics(1, 0.5)]).astype(float)}


@pytest.mark.parametrize(
    "plot",
    [
        partial(plot_confusion_matrix, np.eye(2, dtype=int), (NAME, "b")),
        partial(plot_misclassified, ERRORS, IMAGES),
        partial(plot_train_batch, IMAGES, np.array([[1.0, 0.0]]), (NAME, "b")),
        partial(plot_class_samples, [(NAME, IMAGES)]),
        partial(plot_comparison, RUNS, HISTORIES),
    ],
    ids=lambda plot: plot.func.__name__,
)
def test_plot_shows_dollar_signs_in_a_name_as_they_are(tmp_path, plot):
    plot(tmp_path / "a.png")
    assert dark_fraction(tmp_path / "a.png") > 0.01


def test_plots_do_not_import_pyplot():
    """pyplot would need a display or a backend, and keeps global state."""
    code = "import sys, cifar_ignite.plots; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False).returncode == 0
