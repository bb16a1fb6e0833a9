"""Figures of images: training batches, samples of each class, misclassified images."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from cifar_ignite.figures import DPI, Axes, Figure, create_figure, default_style, shorten, text_width

MAX_SHEET_CLASSES = 100
GAP = 2  # white pixels between the images of a sheet
TITLE_HEIGHT = 0.3  # of three lines above an image, as a fraction of its height
TITLE_SIZE, LABEL_SIZE, HEADING_SIZE = 8, 10, 12  # points
MAX_LABEL_WIDTH = 3.0  # inches

# A line above an image: the text before a name, the name, which is shortened if it is too long, the text after it.
Line = tuple[str, str, str]


@default_style()
def plot_image_grid(
    images: np.ndarray, titles: Sequence[Sequence[Line]], heading: str, path: Path, columns: int = 6
) -> None:
    """Plot images with a title each.

    Args:
        images: uint8 (N, size, size, 3).
        titles: N titles, of three lines at most.
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
    figure.draw_without_rendering()  # which lays the figure out
    width = np.ptp(axes.transData.transform([(0, 0), (size, 0)])[:, 0]) / DPI
    for index, lines in enumerate(titles):
        title = "\n".join(format_line(line, width) for line in lines)
        row, column = divmod(index, columns)
        left, bottom = column * (size + GAP), row * (size + GAP + header) + header
        center = left + size / 2
        text = axes.text(center, bottom - size / 32, title, fontsize=TITLE_SIZE, ha="center", va="bottom")
        text.set_in_layout(False)  # the figure is laid out
    figure.savefig(path, format="png")


def format_line(line: Line, width: float) -> str:
    """Return a line of a title, with the name shortened so that the line is no wider than `width` inches."""
    before, name, after = line
    return f"{before}{shorten(name, TITLE_SIZE, width - text_width(before + after, TITLE_SIZE))}{after}"


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
        [
            ("pred ", error["predicted"], f" ({error['confidence']:.1%})"),
            ("true ", error["true"], ""),
            ("ID ", str(error["ID"]), ""),
        ]
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
    titles = [target_lines(target, class_names) for target in targets]
    plot_image_grid(images, titles, "First augmented training images", path, columns=8)


def target_lines(target: np.ndarray, class_names: Sequence[str]) -> list[Line]:
    """Return the line "cat", or "cat 70%" and "dog 30%" for a distribution over two classes."""
    labels = [int(label) for label in np.argsort(-target, kind="stable") if target[label] > 0]
    if len(labels) == 1:
        return [("", class_names[labels[0]], "")]
    return [("", class_names[label], f" {target[label]:.0%}") for label in labels]


@default_style()
def plot_class_samples(samples: Sequence[tuple[str, np.ndarray]], path: Path) -> None:
    """Plot a row of images per class; of more than `MAX_SHEET_CLASSES` classes, the first ones.

    Args:
        samples: Label of the row, and images of the class, uint8 (N, size, size, 3), for each class.
        path: PNG file.
    """
    shown = samples[:MAX_SHEET_CLASSES]
    rows, size = [images for _, images in shown], shown[0][1].shape[1]
    columns = max(map(len, rows))
    omitted = f" (the first {len(shown)} of {len(samples)} classes)" if len(shown) < len(samples) else ""
    heading = f"Samples of each class{omitted}"
    labels = [shorten(label, LABEL_SIZE, MAX_LABEL_WIDTH) for label, _ in shown]
    sheet_width = 0.75 * columns + max(text_width(label, LABEL_SIZE) for label in labels)
    width = max(sheet_width, text_width(heading, HEADING_SIZE)) + 0.3
    figure = create_figure((width, 0.75 * len(shown) + 0.8))
    figure.set_layout_engine("compressed")  # leaves room for labels beside axes of a fixed aspect
    figure.suptitle(heading, fontsize=HEADING_SIZE)
    axes = _show_sheet(figure, create_sheet(rows, size, columns))
    axes.set_yticks([(row + 0.5) * (size + GAP) for row in range(len(shown))], labels, fontsize=LABEL_SIZE)
    figure.savefig(path, format="png")
