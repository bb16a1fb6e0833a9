"""Figures as PNG files, drawn without a display: on Agg's canvas and in matplotlib's default style.

Neither MPLBACKEND nor a matplotlibrc file has an effect.
"""

import contextlib
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd


def _import_matplotlib() -> None:
    """Import matplotlib, which raises if MPLBACKEND names a backend that is not installed.

    Child processes of a notebook inherit its MPLBACKEND. Where that is valid, it stays the backend of other figures.
    """
    if "matplotlib" in sys.modules:
        return
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    if backend:
        with contextlib.suppress(ValueError):
            matplotlib.rcParams["backend"] = backend


_import_matplotlib()

from matplotlib import style  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.ticker import MaxNLocator, PercentFormatter  # noqa: E402

# A decorator: figures are drawn in this style. Dollar signs in names of classes, files and runs start no formula.
default_style = style.context(["default", {"text.parse_math": False}])
DPI = 110
# Above this number of classes, a confusion matrix shows errors only, in a smaller text.
MANY_CLASSES = 20
# Confidences that are marked in the curve of accuracy against coverage.
MARKED_CONFIDENCES = (0.5, 0.9, 0.99)
# The accuracy on less is noise: one error among the very first images would set the scale.
MIN_COVERAGE = 0.01
TRAIN_COLOR, VAL_COLOR = "tab:blue", "tab:orange"
CURVE_LABELS = {
    "train_loss": "train (augmented images, smoothed targets)",
    "train_acc": "train (augmented images)",
    "val_loss": "validation",
    "val_acc": "validation",
}


@default_style
def plot_training_curves(history: Sequence[Mapping[str, Any]], directory: Path) -> None:
    """Write loss.png, accuracy.png and learning_rate.png into `directory`.

    Args:
        history: Rows of metrics.csv, one per epoch.
        directory: Directory of the figures, created if missing.
    """
    table = pd.DataFrame(history).astype(float)
    directory.mkdir(parents=True, exist_ok=True)
    for name, title, columns in (
        ("loss", "Cross-entropy loss", ["train_loss", "val_loss"]),
        ("accuracy", "Accuracy", ["train_acc", "val_acc"]),
        ("learning_rate", "Learning rate", ["lr"]),
    ):
        figure, axes = _create_axes(title, "epoch")
        for column, color in zip(columns, (TRAIN_COLOR, VAL_COLOR), strict=False):
            if table[column].notna().any():
                marker = "o" if len(table) < 30 else None
                axes.plot(table["epoch"], table[column], color=color, marker=marker, label=CURVE_LABELS.get(column))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if name == "accuracy":
            axes.yaxis.set_major_formatter(PercentFormatter(1))
        if name != "learning_rate":
            axes.legend()
        figure.savefig(directory / f"{name}.png", format="png")


@default_style
def plot_confusion_matrix(matrix: np.ndarray, class_names: Sequence[str], path: Path) -> None:
    """Plot counts by true class (row) and predicted class (column), colored by their fraction of the row.

    The figure grows with the number of classes; with many, zeros are left out and the text is smaller.
    """
    num_classes = len(class_names)
    is_large = num_classes > MANY_CLASSES
    side = max(7.0, 0.24 * num_classes + 2)
    figure, axes = _create_axes("Confusion matrix", "predicted class", size=(side + 0.5, side))
    fractions = matrix / matrix.sum(axis=1, keepdims=True).clip(min=1)
    axes.imshow(fractions, cmap="Blues", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(matrix):
        if count or not is_large:
            color = "white" if fractions[row, column] > 0.5 else "black"
            axes.text(column, row, str(count), ha="center", va="center", color=color, fontsize=5.5 if is_large else 8)
    axes.set_ylabel("true class")
    angle = {"rotation": 90} if is_large else {"rotation": 45, "ha": "right"}
    axes.set_xticks(range(num_classes), list(class_names), fontsize=8 if is_large else None, **angle)
    axes.set_yticks(range(num_classes), list(class_names), fontsize=8 if is_large else None)
    axes.grid(False)
    figure.savefig(path, format="png")


@default_style
def plot_reliability(panels: Mapping[str, pd.DataFrame], path: Path) -> None:
    """Plot reliability diagrams side by side, each over a histogram of the confidences (Guo et al., 2017).

    Args:
        panels: Table of `evaluation.metrics.calibration_bins` of each diagram, by its title.
        path: PNG file.
    """
    figure = create_figure((6 * len(panels), 6))
    grid = figure.subplots(2, len(panels), sharex=True, sharey="row", height_ratios=(3, 1), squeeze=False)
    for (title, bins), diagram, histogram in zip(panels.items(), *grid, strict=True):
        _plot_reliability_bins(bins, diagram, histogram)
        diagram.set(title=title, ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
        histogram.set(xlabel="confidence", ylabel="fraction of images")
        histogram.xaxis.set_major_formatter(PercentFormatter(1))
        for axes in (diagram, histogram):
            axes.yaxis.set_major_formatter(PercentFormatter(1))
            _style_grid(axes)
    figure.savefig(path, format="png")


def _plot_reliability_bins(bins: pd.DataFrame, diagram: Axes, histogram: Axes) -> None:
    width = bins["high"] - bins["low"]
    bars: dict[str, Any] = {"width": width, "align": "edge", "edgecolor": "white"}
    diagram.bar(bins["low"], bins["accuracy"].fillna(0), color=TRAIN_COLOR, label="accuracy", **bars)
    diagram.plot(bins["confidence"], bins["confidence"], color="black", linestyle="--", label="perfect calibration")
    diagram.legend(loc="upper left")
    histogram.bar(bins["low"], bins["images"] / bins["images"].sum(), color="tab:gray", **bars)


@default_style
def plot_coverage(curve: pd.DataFrame, min_confidence: float, path: Path) -> None:
    """Plot the accuracy on the most confident images against their fraction, with marks at several confidences.

    Args:
        curve: Table of `evaluation.metrics.coverage_curve`.
        min_confidence: Confidence that is marked in another color.
        path: PNG file.
    """
    figure, axes = _create_axes("Accuracy on the most confident predictions", "coverage (fraction of images)")
    shown = curve[curve["coverage"] >= MIN_COVERAGE]
    axes.plot(shown["coverage"], shown["accuracy"], color=TRAIN_COLOR)
    for confidence in sorted({*MARKED_CONFIDENCES, min_confidence}):
        sure = curve[curve["confidence"] >= confidence]
        if len(sure) >= MIN_COVERAGE * len(curve):
            point = (sure["coverage"].iloc[-1], sure["accuracy"].iloc[-1])
            color = VAL_COLOR if confidence == min_confidence else TRAIN_COLOR
            axes.plot(*point, "o", color=color)
            is_right = point[0] > 0.4  # there is room for the text on the left
            side: dict[str, Any] = {"xytext": (-6 if is_right else 6, -12), "ha": "right" if is_right else "left"}
            axes.annotate(f"confidence ≥ {100 * confidence:g}%", point, textcoords="offset points", **side)
    axes.set(ylabel="accuracy on them", xlim=(0, 1.02))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1))
    figure.savefig(path, format="png")


@default_style
def plot_comparison(table: pd.DataFrame, histories: Mapping[str, pd.DataFrame], path: Path) -> None:
    """Plot validation accuracy by epoch, and the best validation and test accuracy, of several runs.

    Args:
        table: Rows of comparison.csv, one per run.
        histories: metrics.csv of each run, by the name of the run.
        path: PNG file.
    """
    height = max(4.5, 1.5 + 0.4 * len(table))
    figure = create_figure((13, height))
    curves, bars = figure.subplots(1, 2, width_ratios=(3, 2))
    colors = [f"C{index % 10}" for index in range(len(table))]
    _plot_run_curves(curves, [histories[run] for run in table["run"]], colors)
    _plot_run_bars(bars, table, colors)
    for axes in (curves, bars):
        _style_grid(axes)
    figure.savefig(path, format="png")


def _plot_run_curves(axes: Axes, histories: Sequence[pd.DataFrame], colors: Sequence[str]) -> None:
    for history, color in zip(histories, colors, strict=True):
        # A run without validation images has a training accuracy only.
        column, style = ("val_acc", "-") if history["val_acc"].notna().any() else ("train_acc", ":")
        marker = "o" if len(history) == 1 else None
        axes.plot(history["epoch"], history[column], color=color, linestyle=style, marker=marker)
    axes.set(title="Validation accuracy (dotted: training accuracy of runs without validation)", xlabel="epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(PercentFormatter(1))


def _plot_run_bars(axes: Axes, table: pd.DataFrame, colors: Sequence[str]) -> None:
    positions = range(len(table) - 1, -1, -1)  # the first run at the top
    axes.barh(positions, table["best_val_acc"].fillna(0), color=colors, alpha=0.4)
    axes.plot(table["test_acc"], positions, "k|", markersize=14, markeredgewidth=2.5)
    runs = table.to_dict("records")
    for position, run in zip(positions, runs, strict=True):
        accuracies = {"val": run["best_val_acc"], "test": run["test_acc"]}
        text = ", ".join(f"{name} {value:.2%}" for name, value in accuracies.items() if pd.notna(value))
        axes.text(0.02, position, text, va="center", fontsize=8)
    axes.set_yticks(list(positions), [f"{run['experiment']}\n{run['run']}" for run in runs], fontsize=7)
    axes.set(title="Best validation accuracy (bar) and test accuracy (line)", xlim=(0, 1))
    axes.xaxis.set_major_formatter(PercentFormatter(1))


def create_figure(size: tuple[float, float]) -> Figure:
    """Return an empty figure of a size in inches."""
    # Figure without pyplot: no display, no global state, nothing to close.
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _create_axes(title: str, xlabel: str, size: tuple[float, float] = (7, 4.5)) -> tuple[Figure, Axes]:
    figure = create_figure(size)
    axes = figure.add_subplot(title=title, xlabel=xlabel)
    axes.grid(alpha=0.3)
    return figure, axes


def _style_grid(axes: Axes) -> None:
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
