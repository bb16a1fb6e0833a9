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


def _figure(title: str, xlabel: str, size: tuple[float, float] = (7, 4.5)) -> tuple[Figure, Axes]:
    # Figure without pyplot: no display, no global state, nothing to close.
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    axes = figure.add_subplot(title=title, xlabel=xlabel)
    axes.grid(alpha=0.3)
    return figure, axes
