"""Figures of images: training batches, samples of each class, misclassified images."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from cifar_ignite.plots import create_figure, default_style

MAX_SHEET_CLASSES = 100
GAP = 2  # white pixels between the images of a sheet


@default_style
def plot_image_grid(images: np.ndarray, titles: Sequence[str], heading: str, path: Path, columns: int = 6) -> None:
    """Plot images with a title each.

    Args:
        images: uint8 (N, H, W, 3).
        titles: N titles, of two lines at most.
        heading: Title of the figure.
        path: PNG file.
        columns: Images per row.
    """
    rows = max(1, -(-len(images) // columns))
    figure = create_figure((1.75 * columns, 2.15 * rows + 0.5))
    figure.suptitle(heading)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid:
        axes.axis("off")
    for axes, image, title in zip(grid, images, titles, strict=False):
        axes.imshow(image, interpolation="nearest")
        axes.set_title(title, fontsize=8)
    figure.savefig(path, format="png")


def plot_misclassified(errors: pd.DataFrame, images: np.ndarray, path: Path) -> None:
    """Plot the most confident errors as a grid of images with predicted and true class.

    Args:
        errors: N rows of `evaluation.metrics.most_confident_errors`.
        images: uint8 (N, H, W, 3), in the same order.
        path: PNG file.
    """
    titles = [
        f"pred {error['predicted']} ({error['confidence']:.1%})\ntrue {error['true']}, ID {error['ID']}"
        for error in errors.to_dict("records")
    ]
    plot_image_grid(images, titles, "Most confident errors" if len(errors) else "No errors", path)


def plot_train_batch(images: np.ndarray, targets: np.ndarray, class_names: Sequence[str], path: Path) -> None:
    """Plot augmented images as the network sees them, with their labels; a mixed image has two, with weights.

    Args:
        images: uint8 (N, H, W, 3).
        targets: float (N, num_classes), each row a distribution over the classes.
        class_names: Names in label order.
        path: PNG file.
    """
    titles = [format_target(target, class_names) for target in targets]
    plot_image_grid(images, titles, "First augmented training images", path, columns=8)


def format_target(target: np.ndarray, class_names: Sequence[str]) -> str:
    """Return "cat", or "cat 70%" and "dog 30%" in two lines for a distribution over two classes."""
    labels = [int(label) for label in np.argsort(-target, kind="stable") if target[label] > 0]
    if len(labels) == 1:
        return class_names[labels[0]]
    return "\n".join(f"{class_names[label]} {target[label]:.0%}" for label in labels)


@default_style
def plot_class_samples(samples: Sequence[tuple[str, np.ndarray]], path: Path) -> None:
    """Plot a row of images per class; of more than `MAX_SHEET_CLASSES` classes, the first ones.

    Args:
        samples: Label of the row, and images of the class, uint8 (N, size, size, 3), for each class.
        path: PNG file.
    """
    shown = samples[:MAX_SHEET_CLASSES]
    columns, cell = max(len(images) for _, images in shown), shown[0][1].shape[1] + GAP
    sheet = np.full((len(shown) * cell, columns * cell, 3), 255, np.uint8)
    for row, (_, images) in enumerate(shown):
        for column, image in enumerate(images):
            top, left = row * cell, column * cell
            sheet[top : top + cell - GAP, left : left + cell - GAP] = image
    figure = create_figure((0.75 * columns + 2.5, 0.75 * len(shown) + 0.8))
    omitted = f" (the first {len(shown)} of {len(samples)} classes)" if len(shown) < len(samples) else ""
    axes = figure.add_subplot(title=f"Samples of each class{omitted}")
    axes.imshow(sheet, interpolation="nearest")
    axes.set_yticks([(row + 0.5) * cell for row in range(len(shown))], [label for label, _ in shown])
    axes.set_xticks([])
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    figure.savefig(path, format="png")
