"""Pictures, drawn without a display."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

TRAIN, VAL = "tab:blue", "tab:orange"


def draw_history(history: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """loss.png, accuracy.png and learning_rate.png of the rows of metrics.csv, into `folder`."""
    table = pd.DataFrame(history).astype(float)
    folder.mkdir(parents=True, exist_ok=True)
    for name, title, columns in (
        ("loss", "Cross-entropy loss", ["train_loss", "val_loss"]),
        ("accuracy", "Accuracy", ["train_acc", "val_acc"]),
        ("learning_rate", "Learning rate", ["lr"]),
    ):
        figure, axes = _figure(title, "epoch")
        for column, color in zip(columns, (TRAIN, VAL), strict=False):
            if table[column].notna().any():
                marker = "o" if len(table) < 30 else None
                axes.plot(table["epoch"], table[column], color=color, marker=marker, label=_LABELS.get(column))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if name == "accuracy":
            axes.yaxis.set_major_formatter(PercentFormatter(1))
        if name != "learning_rate":
            axes.legend()
        figure.savefig(folder / f"{name}.png")


_LABELS = {
    "train_loss": "train (augmented images, smoothed targets)",
    "train_acc": "train (augmented images)",
    "val_loss": "validation",
    "val_acc": "validation",
}


def draw_confusion_matrix(matrix: np.ndarray, class_names: list[str], path: Path) -> None:
    """Counts by true class (row) and predicted class (column), coloured by the share of the row."""
    figure, axes = _figure("Confusion matrix", "predicted", size=(7.5, 7))
    shares = matrix / matrix.sum(axis=1, keepdims=True).clip(min=1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(matrix):
        color = "white" if shares[row, column] > 0.5 else "black"
        axes.text(column, row, str(count), ha="center", va="center", color=color, fontsize=8)
    axes.set_ylabel("true")
    axes.set_xticks(range(len(class_names)), class_names, rotation=45, ha="right")
    axes.set_yticks(range(len(class_names)), class_names)
    axes.grid(False)
    figure.savefig(path)


def draw_reliability(bins: pd.DataFrame, error: float, path: Path) -> None:
    """Accuracy by confidence, and how many images there are of each (Guo et al., 2017, arXiv:1706.04599).

    Args:
        bins: of scores.calibrate.
        error: expected calibration error, in [0, 1].
        path: of the PNG.
    """
    figure = Figure(figsize=(6, 6), dpi=110, layout="constrained")
    above, below = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    width = bins["high"] - bins["low"]
    bars = {"width": width, "align": "edge", "edgecolor": "white"}
    above.bar(bins["low"], bins["accuracy"].fillna(0), color=TRAIN, label="accuracy", **bars)
    above.plot(bins["confidence"], bins["confidence"], color="black", linestyle="--", label="accuracy = confidence")
    above.set(title=f"Calibration: expected error {error:.2%}", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
    above.yaxis.set_major_formatter(PercentFormatter(1))
    above.legend(loc="upper left")
    below.bar(bins["low"], bins["images"] / bins["images"].sum(), color="tab:gray", **bars)
    below.set(xlabel="confidence", ylabel="share of images")
    below.xaxis.set_major_formatter(PercentFormatter(1))
    below.yaxis.set_major_formatter(PercentFormatter(1))
    for axes in (above, below):
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
    figure.savefig(path)


def draw_mistakes(mistakes: pd.DataFrame, pictures: np.ndarray, path: Path) -> None:
    """The most confident mistakes, side by side.

    Args:
        mistakes: of scores.worst_mistakes, N rows.
        pictures: uint8 (N, H, W, 3), in the same order.
        path: of the PNG.
    """
    columns = 6
    rows = max(1, -(-len(mistakes) // columns))
    figure = Figure(figsize=(1.75 * columns, 2.15 * rows + 0.5), dpi=110, layout="constrained")
    figure.suptitle("The most confident mistakes" if len(mistakes) else "No mistakes")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid:
        axes.axis("off")
    for axes, picture, mistake in zip(grid, pictures, mistakes.to_dict("records"), strict=False):
        axes.imshow(picture, interpolation="nearest")
        title = f"{mistake['predicted']} {mistake['confidence']:.1%}\nis {mistake['true']}, ID {mistake['ID']}"
        axes.set_title(title, fontsize=8)
    figure.savefig(path)


def draw_comparison(table: pd.DataFrame, histories: Mapping[str, pd.DataFrame], path: Path) -> None:
    """Validation accuracy by epoch, and best validation and test accuracy, of many runs.

    Args:
        table: of compare.compare, a row a run.
        histories: metrics.csv by run.
        path: of the PNG.
    """
    height = max(4.5, 1.5 + 0.4 * len(table))
    figure = Figure(figsize=(13, height), dpi=110, layout="constrained")
    curves, bars = figure.subplots(1, 2, width_ratios=(3, 2))
    colors = [f"C{number % 10}" for number in range(len(table))]
    places = range(len(table) - 1, -1, -1)  # the first run on top
    for run, color in zip(table["run"], colors, strict=True):
        history = histories[run]
        # Runs that hold nothing out have nothing else to show.
        column, style = ("val_acc", "-") if history["val_acc"].notna().any() else ("train_acc", ":")
        marker = "o" if len(history) == 1 else None
        curves.plot(history["epoch"], history[column], color=color, linestyle=style, marker=marker)
    curves.set(title="Validation accuracy (dotted: training accuracy, nothing held out)", xlabel="epoch")
    curves.xaxis.set_major_locator(MaxNLocator(integer=True))
    bars.barh(places, table["best_val_acc"].fillna(0), color=colors, alpha=0.4)
    bars.plot(table["test_acc"], places, "k|", markersize=14, markeredgewidth=2.5)
    rows = table.to_dict("records")
    for place, row in zip(places, rows, strict=True):
        known = {"val": row["best_val_acc"], "test": row["test_acc"]}
        told = ", ".join(f"{name} {value:.2%}" for name, value in known.items() if pd.notna(value))
        bars.text(0.02, place, told, va="center", fontsize=8)
    bars.set_yticks(list(places), [f"{row['experiment']}\n{row['run']}" for row in rows], fontsize=7)
    bars.set(title="Best validation accuracy (bar) and test accuracy (line)", xlim=(0, 1))
    curves.yaxis.set_major_formatter(PercentFormatter(1))
    bars.xaxis.set_major_formatter(PercentFormatter(1))
    for axes in (curves, bars):
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
    figure.savefig(path)


def _figure(title: str, xlabel: str, size: tuple[float, float] = (7, 4.5)) -> tuple[Figure, Axes]:
    # Figure without pyplot: no display, no global state, nothing to close.
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    axes = figure.add_subplot(title=title, xlabel=xlabel)
    axes.grid(alpha=0.3)
    return figure, axes
