"""Figures of training histories and predictions."""

import itertools
import subprocess
import sys
import warnings
from functools import partial

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex
from matplotlib.text import Text
from PIL import Image

from cifar_ignite import figures
from cifar_ignite.image_plots import plot_class_samples, plot_misclassified, plot_train_batch, target_lines
from cifar_ignite.plots import (
    plot_comparison,
    plot_confusion_matrix,
    plot_coverage,
    plot_reliability,
    plot_training_curves,
)
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
    assert widths[0] <= widths[1]
    assert widths[2] < widths[3]
    assert widths[3] > 100 * 20  # pixels per class: enough for three digits


def test_plot_misclassified_with_long_names_keeps_the_size_of_the_images(tmp_path):
    images = np.full((30, 16, 16, 3), 99, np.uint8)
    for name, text in (("short", "a"), ("long", "an_unusually_long_name/" * 5)):
        rows = [{"ID": f"{text}{index}", "true": text, "predicted": text, "confidence": 0.5} for index in range(30)]
        plot_misclassified(pd.DataFrame(rows), images, tmp_path / f"{name}.png")
    gray = [(np.asarray(Image.open(tmp_path / f"{name}.png").convert("L")) == 99).sum() for name in ("short", "long")]
    assert gray[1] == pytest.approx(gray[0], rel=0.1)


def test_plot_train_batch_names_both_labels_of_mixed_images(tmp_path):
    assert target_lines(np.array([0, 1.0, 0]), "abc") == [("", "b", "")]
    assert target_lines(np.array([0.3, 0, 0.7]), "abc") == [("", "c", " 70%"), ("", "a", " 30%")]
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


# --- Texts --------------------------------------------------------------------------------------------------------

LONG_NAMES = (
    "American_golden_retriever_puppy_of_Africa",
    "W" * 40,
    "cat",
    "flat-coated retriever of Newfoundland, " * 3,
)


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """A function that draws a figure and returns it."""
    drawn_figures = []
    save = figures.Figure.savefig

    def save_and_keep(figure, *arguments, **options):
        drawn_figures.append(figure)
        save(figure, *arguments, **options)

    def draw(plot):
        monkeypatch.setattr(figures.Figure, "savefig", save_and_keep)
        plot(tmp_path / "a.png")
        return drawn_figures.pop()

    return draw


def drawn_texts(figure):
    """Return the horizontal texts of a figure, without the labels of ticks outside of the axes, which are not drawn."""
    texts = {
        text for text in figure.findobj(Text) if text.get_visible() and text.get_text() and not text.get_rotation()
    }
    for axis in [axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)]:
        low, high = sorted(axis.get_view_interval())
        texts -= {tick.label1 for tick in axis.get_major_ticks() if not low <= tick.get_loc() <= high}
    return texts


def assert_texts_are_readable(figure):
    """Assert that texts are inside the figure, and that no two of them overlap; half a pixel is rounding."""
    boxes = [(text.get_text(), text.get_window_extent().padded(-0.5)) for text in drawn_texts(figure)]
    assert len(boxes) > 2
    for text, box in boxes:
        assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1, text
        assert figure.bbox.y0 <= box.y0 < box.y1 <= figure.bbox.y1, text
    for (text, box), (other, other_box) in itertools.combinations(boxes, 2):
        assert not box.overlaps(other_box), (text, other)


def misclassified(count):
    rows = [
        {"ID": f"photos/{index}/a long name.png", "true": LONG_NAMES[index % 4], "predicted": LONG_NAMES[index % 3]}
        for index in range(count)
    ]
    return pd.DataFrame(rows).assign(confidence=np.linspace(1, 0.5, count))


SAME_CONFIDENCE = pd.DataFrame({"confidence": 0.999, "coverage": 1.0, "accuracy": 1.0}, index=range(9))
PAIRS = np.eye(4) * 0.7 + np.roll(np.eye(4), 1, 0) * 0.3
COUNTS = np.arange(400).reshape(20, 20) * 150 + 10_000
ACCURACIES = ((0.95, 0.94), (np.nan, 0.9), (0.6, 0.1), (0.3, 0.12), (np.nan, np.nan))
MANY_RUNS = pd.DataFrame(
    [
        {"run": f"run {index}", "experiment": 2 * LONG_NAMES[index % 4], "best_val_acc": val, "test_acc": test}
        for index, (val, test) in enumerate(ACCURACIES)
    ]
)
MANY_HISTORIES = {
    run["run"]: pd.DataFrame([epoch_metrics(epoch, run["best_val_acc"]) for epoch in (1, 2)])
    for run in MANY_RUNS.to_dict("records")
}


@pytest.mark.parametrize(
    "plot",
    [
        partial(plot_misclassified, misclassified(9), np.tile(IMAGES, (9, 1, 1, 1))),
        partial(plot_train_batch, np.tile(IMAGES, (4, 1, 1, 1)), PAIRS, LONG_NAMES),
        partial(plot_class_samples, [(f"{name} (1)", IMAGES) for name in LONG_NAMES]),
        partial(plot_class_samples, [("cat (2)", np.tile(IMAGES, (2, 1, 1, 1))), ("dog (1)", IMAGES)]),
        partial(plot_class_samples, [(f"class {label}", IMAGES) for label in range(101)]),
        partial(plot_coverage, SAME_CONFIDENCE, 0.7),
        partial(plot_confusion_matrix, COUNTS, [f"{LONG_NAMES[label % 4]} {label}" for label in range(20)]),
        partial(plot_confusion_matrix, COUNTS[:2, :2], LONG_NAMES[:2]),
        partial(plot_comparison, MANY_RUNS, MANY_HISTORIES),
    ],
    ids=lambda plot: plot.func.__name__,
)
def test_texts_of_plot_are_inside_the_figure_and_do_not_overlap(drawn, plot):
    assert_texts_are_readable(drawn(plot))


def test_plot_comparison_has_a_bar_in_the_color_of_each_curve_and_its_text_outside(drawn):
    curves, bars = drawn(partial(plot_comparison, MANY_RUNS, MANY_HISTORIES)).axes
    colors = [bar.get_facecolor() if bar.get_fill() else bar.get_edgecolor() for bar in bars.patches]
    assert [to_hex(color) for color in colors] == [to_hex(line.get_color()) for line in curves.lines]
    assert [bar.get_fill() for bar in bars.patches] == [line.get_linestyle() == "-" for line in curves.lines]
    assert [text.get_text() for text in bars.texts][:2] == ["val 95.00%, test 94.00%", "train 50.00%, test 90.00%"]
    assert all(text.get_window_extent().x0 > bars.bbox.x1 for text in bars.texts)


def test_plot_reliability_draws_perfect_calibration_over_the_whole_range(drawn):
    bins = pd.DataFrame({"low": [0.0, 0.5], "high": [0.5, 1.0], "images": [0, 9], "confidence": [np.nan, 0.8]})
    diagram, _ = drawn(partial(plot_reliability, {"title": bins.assign(accuracy=[np.nan, 0.7])})).axes
    assert diagram.lines[0].get_xydata().tolist() == [[0, 0], [1, 1]]


@pytest.mark.parametrize("text", ["", "a", "0123456789" * 9, "W" * 50, "i" * 300])
@pytest.mark.parametrize("width", [0.2, 1.0])
def test_shorten_keeps_both_ends_within_the_width(text, width):
    shortened = figures.shorten(text, 8, width)
    head, ellipsis, tail = shortened.partition("…")
    assert figures.text_width(shortened, 8) <= width
    assert text.startswith(head)
    assert text.endswith(tail)
    assert bool(ellipsis) == (figures.text_width(text, 8) > width)


def test_missing_glyphs_are_logged_once_and_other_warnings_are_kept(tmp_path, caplog, recwarn):
    figures.log_missing_glyphs.cache_clear()
    names = ("猫", "犬", "שלום")
    for _ in range(2):
        plot_confusion_matrix(np.eye(3, dtype=int), names, tmp_path / "a.png")
        plot_class_samples([(name, IMAGES) for name in names], tmp_path / "a.png")
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert len(recwarn) == 0
    with pytest.warns(RuntimeWarning, match="other"), figures.default_style():
        warnings.warn("other", RuntimeWarning, stacklevel=1)


def test_plots_do_not_import_pyplot():
    """pyplot would need a display or a backend, and keeps global state."""
    code = "import sys, cifar_ignite.plots; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False).returncode == 0
