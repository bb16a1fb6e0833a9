"""Figures of training histories, predictions and runs, as PNG files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cifar_ignite.figures import (
    Axes,
    MaxNLocator,
    PercentFormatter,
    create_axes,
    create_figure,
    default_style,
    shorten,
    text_width,
)

# Above this number of classes, a confusion matrix shows errors only, in a smaller text.
MANY_CLASSES = 20
MAX_NAME_WIDTH = 2.0  # inches; longer names are shortened
# Confidences that are marked in the curve of accuracy against coverage.
MARKED_CONFIDENCES = (0.5, 0.9, 0.99)
MARKERS = "os^D"  # of these confidences and another one; where they coincide, their shapes can be distinguished
# The accuracy on less is noise: one error among the very first images would set the scale.
MIN_COVERAGE = 0.01
TRAIN_COLOR, VAL_COLOR = "tab:blue", "tab:orange"
CURVE_LABELS = {
    "train_loss": "train (augmented images, smoothed targets)",
    "train_acc": "train (augmented images)",
    "val_loss": "validation",
    "val_acc": "validation",
}


@default_style()
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
        figure, axes = create_axes(title, "epoch")
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


@default_style()
def plot_confusion_matrix(matrix: np.ndarray, class_names: Sequence[str], path: Path) -> None:
    """Plot counts by true class (row) and predicted class (column), colored by their fraction of the row.

    The figure grows with the number of classes, the largest count and the names; with many classes, zeros are left out
    and the text is smaller.
    """
    num_classes = len(class_names)
    is_large = num_classes > MANY_CLASSES
    font_size, name_size = (5.5, 8) if is_large else (8, 10)
    names = [shorten(name, name_size, MAX_NAME_WIDTH) for name in class_names]
    cell = max(0.24, text_width(str(matrix.max()), font_size) + 0.08)
    side = max(5.0, cell * num_classes) + max(text_width(name, name_size) for name in names) + 1
    figure, axes = create_axes("Confusion matrix", "predicted class", size=(side, side))
    fractions = matrix / matrix.sum(axis=1, keepdims=True).clip(min=1)
    axes.imshow(fractions, cmap="Blues", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(matrix):
        if count or not is_large:
            color = "white" if fractions[row, column] > 0.5 else "black"
            axes.text(column, row, str(count), ha="center", va="center", color=color, fontsize=font_size)
    axes.set_ylabel("true class")
    angle = {"rotation": 90} if is_large else {"rotation": 45, "ha": "right"}
    axes.set_xticks(range(num_classes), names, fontsize=name_size, **angle)
    axes.set_yticks(range(num_classes), names, fontsize=name_size)
    axes.grid(False)
    figure.savefig(path, format="png")


@default_style()
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
    diagram.plot([0, 1], [0, 1], color="black", linestyle="--", label="perfect calibration")
    diagram.legend(loc="upper left")
    histogram.bar(bins["low"], bins["images"] / bins["images"].sum(), color="tab:gray", **bars)


@default_style()
def plot_coverage(curve: pd.DataFrame, min_confidence: float, path: Path) -> None:
    """Plot the accuracy on the most confident images against their fraction, with marks at several confidences.

    Args:
        curve: Table of `evaluation.metrics.coverage_curve`.
        min_confidence: Confidence that is marked in another color.
        path: PNG file.
    """
    figure, axes = create_axes("Accuracy on the most confident predictions", "coverage (fraction of images)", (7, 5.4))
    shown = curve[curve["coverage"] >= MIN_COVERAGE]
    axes.plot(shown["coverage"], shown["accuracy"], color=TRAIN_COLOR)
    for confidence, marker in zip(sorted({*MARKED_CONFIDENCES, min_confidence}), MARKERS, strict=False):
        sure = curve[curve["confidence"] >= confidence]
        if len(sure) >= MIN_COVERAGE * len(curve):
            coverage, accuracy = sure[["coverage", "accuracy"]].iloc[-1]
            color = VAL_COLOR if confidence == min_confidence else TRAIN_COLOR
            label = f"confidence ≥ {100 * confidence:g}%: {coverage:.1%} of the images, accuracy {accuracy:.1%}"
            axes.plot(coverage, accuracy, marker, color=color, fillstyle="none", markersize=9, label=label)
    if len(axes.lines) > 1:  # next to the marks, which may coincide, the texts would overlap
        figure.legend(loc="outside lower center")
    axes.set(ylabel="accuracy on them", xlim=(0, 1.02))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1))
    figure.savefig(path, format="png")


@default_style()
def plot_comparison(table: pd.DataFrame, histories: Mapping[str, pd.DataFrame], path: Path) -> None:
    """Plot validation accuracy by epoch, and the best validation and test accuracy, of several runs.

    Args:
        table: Rows of comparison.csv, one per run.
        histories: metrics.csv of each run, by the name of the run.
        path: PNG file.
    """
    height = max(4.5, 1.5 + 0.4 * len(table))
    figure = create_figure((14, height))
    curves, bars = figure.subplots(1, 2)
    colors = [f"C{index % 10}" for index in range(len(table))]
    _plot_run_curves(curves, [histories[run] for run in table["run"]], colors)
    train_accs = [histories[run]["train_acc"].iloc[-1] for run in table["run"]]
    _plot_run_bars(bars, table.assign(train_acc=train_accs), colors)
    for axes in (curves, bars):
        _style_grid(axes)
    figure.savefig(path, format="png")


def _plot_run_curves(axes: Axes, histories: Sequence[pd.DataFrame], colors: Sequence[str]) -> None:
    for history, color in zip(histories, colors, strict=True):
        # A run without validation images has a training accuracy only.
        column, style = ("val_acc", "-") if history["val_acc"].notna().any() else ("train_acc", ":")
        marker = "o" if len(history) == 1 else None
        axes.plot(history["epoch"], history[column], color=color, linestyle=style, marker=marker)
    axes.set_title("Validation accuracy\n(dotted: training accuracy of runs without validation)", fontsize=10)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(PercentFormatter(1))


def _plot_run_bars(axes: Axes, table: pd.DataFrame, colors: Sequence[str]) -> None:
    positions = range(len(table) - 1, -1, -1)  # the first run at the top
    runs = table.to_dict("records")
    for position, run, color in zip(positions, runs, colors, strict=True):
        has_val = pd.notna(run["best_val_acc"])
        name, accuracy = ("val", run["best_val_acc"]) if has_val else ("train", run["train_acc"])
        dotted: dict[str, Any] = {"fill": False, "edgecolor": color, "linestyle": ":", "linewidth": 2}
        axes.barh(position, accuracy, **({"color": color, "alpha": 0.4} if has_val else dotted))
        accuracies = {name: accuracy, "test": run["test_acc"]}
        text = ", ".join(f"{name} {value:.2%}" for name, value in accuracies.items() if pd.notna(value))
        axes.text(1.02, position, text, va="center", fontsize=8)  # beside the axes, where no line crosses it
    names = ["\n".join(shorten(run[key], 7, MAX_NAME_WIDTH) for key in ("experiment", "run")) for run in runs]
    axes.plot(table["test_acc"], positions, "k|", markersize=14, markeredgewidth=2.5)
    axes.set_yticks(list(positions), names, fontsize=7)
    axes.set_title("Best validation accuracy (bar; dotted: training)\nand test accuracy (line)", fontsize=10)
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(PercentFormatter(1))


def _style_grid(axes: Axes) -> None:
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
