"""Figures of training histories and predictions."""

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from cifar_ignite.image_plots import (
    plot_misclassified,
)
from cifar_ignite.plots import plot_comparison, plot_confusion_matrix, plot_training_curves
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


def test_plot_misclassified_without_errors_writes_a_figure(tmp_path):
    plot_misclassified(pd.DataFrame(), np.zeros((0, 32, 32, 3), np.uint8), tmp_path / "a.png")
    assert (tmp_path / "a.png").exists()


def test_plot_comparison_shows_training_accuracy_without_validation(tmp_path):
    run = {"run": "r", "experiment": "e", "best_val_acc": np.nan, "test_acc": 0.5}
    history = pd.DataFrame([epoch_metrics(1, None), epoch_metrics(2, None)]).astype(float)
    plot_comparison(pd.DataFrame([run]), {"r": history}, tmp_path / "a.png")
    assert dark_fraction(tmp_path / "a.png") > 0.01


def test_plots_do_not_import_pyplot():
    """pyplot would need a display or a backend, and keeps global state."""
    code = "import sys, cifar_ignite.plots; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False).returncode == 0
