"""Figures of images: training batches, samples of each class, misclassified images."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cifar_ignite.plots import create_figure, default_style

MAX_SHEET_CLASSES = 100
GAP = 2  # white pixels between the images of a sheet
MAX_TITLE_ID = 10  # characters
TITLE_HEIGHT = 0.28  # of two lines above an image, as a fraction of its height


@default_style
def plot_image_grid(images: np.ndarray, titles: Sequence[str], heading: str, path: Path, columns: int = 6) -> None:
    """Plot images with a title each.

    Args:
        images: uint8 (N, size, size, 3).
        titles: N titles, of two lines at most.
        heading: Title of the figure.
        path: PNG file.
        columns: Images per row.
    """
    rows = [images[start : start + columns] for start in range(0, len(images), columns)] or [images]
    size = images.shape[1]
    header = round(TITLE_HEIGHT * size)
    figure = create_figure((1.75 * columns, 2.15 * len(rows) + 0.5))
    figure.suptitle(heading)
    axes = _show_sheet(figure, create_sheet(rows, size, columns, header))
    axes.set_yticks([])
    for index, title in enumerate(titles):
        row, column = divmod(index, columns)
        left, bottom = column * (size + GAP), row * (size + GAP + header) + header
        text = axes.text(left + size / 2, bottom - size / 32, title, fontsize=8, ha="center", va="bottom")
        text.set_in_layout(False)  # a long title would shrink the images
    figure.savefig(path, format="png")


def create_sheet(rows: Sequence[np.ndarray], size: int, columns: int, header: int = 0) -> np.ndarray:
    """Return rows of images as one image: on many axes instead, drawing takes seconds.

    Args:
        rows: Images of each row, uint8 (N, size, size, 3) with N of at most `columns`.
        size: Height and width of the images.
        columns: Images per row.
        header: White pixels above each image.

    Returns:
        uint8 (H, W, 3), white between the images.
    """
    height, width = size + GAP + header, size + GAP
    sheet = np.full((len(rows) * height, columns * width, 3), 255, np.uint8)
    for row, images in enumerate(rows):
        for column, image in enumerate(images):
            top, left = row * height + header, column * width
            sheet[top : top + size, left : left + size] = image
    return sheet


def _show_sheet(figure: Figure, sheet: np.ndarray) -> Axes:
    axes = figure.add_subplot()
    axes.imshow(sheet, interpolation="nearest")
    axes.set_xticks([])
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    return axes


def plot_misclassified(errors: pd.DataFrame, images: np.ndarray, path: Path) -> None:
    """Plot the most confident errors as a grid of images with predicted and true class.

    Args:
        errors: N rows of `evaluation.metrics.most_confident_errors`.
        images: uint8 (N, H, W, 3), in the same order.
        path: PNG file.
    """
    titles = [
        f"pred {error['predicted']} ({error['confidence']:.1%})\ntrue {error['true']}, ID {shorten(str(error['ID']))}"
        for error in errors.to_dict("records")
    ]
    plot_image_grid(images, titles, "Most confident errors" if len(errors) else "No errors", path)


def shorten(text: str) -> str:
    """Return the end of a text that would not fit above an image: that of a path distinguishes it."""
    return text if len(text) <= MAX_TITLE_ID else f"…{text[1 - MAX_TITLE_ID :]}"


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
    rows, size = [images for _, images in shown], shown[0][1].shape[1]
    columns = max(map(len, rows))
    figure = create_figure((0.75 * columns + 2.5, 0.75 * len(shown) + 0.8))
    axes = _show_sheet(figure, create_sheet(rows, size, columns))
    omitted = f" (the first {len(shown)} of {len(samples)} classes)" if len(shown) < len(samples) else ""
    axes.set_title(f"Samples of each class{omitted}")
    axes.set_yticks([(row + 0.5) * (size + GAP) for row in range(len(shown))], [label for label, _ in shown])
    figure.savefig(path, format="png")
