"""What predictions are worth: the figures of an evaluation, as tables that are written, drawn and shown."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor

from cifar_ignite.data import Images

BINS = 15


@dataclass(frozen=True)
class Scores:
    """What is said of one set of predictions; the last two are None where labels are not known.

    Attributes:
        details: of `tabulate`, a row an image.
        classes: of `tabulate_classes`, a row a class.
        summary: of `summarize`, single figures.
        bins: of `calibrate`, a row a range of confidence.
        matrix: int64 (10, 10), images by true (row) and predicted class.
    """

    details: pd.DataFrame
    classes: pd.DataFrame
    summary: dict[str, Any]
    bins: pd.DataFrame | None
    matrix: np.ndarray | None


def score(images: Images, probabilities: Tensor, metrics: Mapping[str, Any], class_names: Sequence[str]) -> Scores:
    """Judge predictions.

    Args:
        images: N of them, with labels or without.
        probabilities: float (N, 10) on the CPU.
        metrics: where labels are known, the evaluator's "accuracy", "loss", "top2_accuracy", "confusion" and, (10,)
            each, "precision", "recall" and "f1".
        class_names: in label order.
    """
    details = tabulate(images, probabilities, class_names)
    classes = tabulate_classes(details, metrics, class_names)
    known = images.labels is not None
    bins = calibrate(details) if known else None
    matrix = metrics["confusion"].cpu().numpy() if known else None
    return Scores(details, classes, summarize(details, metrics, classes, bins), bins, matrix)


def tabulate(images: Images, probabilities: Tensor, class_names: Sequence[str]) -> pd.DataFrame:
    """details.csv: a row an image, in the order of the test set.

    Args:
        images: N of them.
        probabilities: float (N, 10).
        class_names: in label order.

    Returns:
        Columns ID, true (a class name; only where labels are known), predicted (a class name), confidence (the highest
        of the probabilities), and the probability of each class, by its name.
    """
    confidence, predicted = probabilities.max(1)
    table = pd.DataFrame({"ID": images.ids})
    if images.labels is not None:
        table["true"] = [class_names[label] for label in images.labels.tolist()]
    table["predicted"] = [class_names[label] for label in predicted.tolist()]
    table["confidence"] = confidence.numpy()
    return pd.concat([table, pd.DataFrame(probabilities.numpy(), columns=pd.Index(class_names))], axis=1)


def calibrate(details: pd.DataFrame) -> pd.DataFrame:
    """How often predictions of a given confidence are right (Guo et al., 2017, arXiv:1706.04599).

    Args:
        details: of `tabulate`, labels known.

    Returns:
        A row for each of `BINS` equal ranges of confidence, closed above: low, high, images, and the means confidence
        and accuracy (NaN where there is no image).
    """
    edges = [number / BINS for number in range(BINS + 1)]
    ranges = pd.cut(details["confidence"], edges, include_lowest=True, labels=False)
    right = (details["true"] == details["predicted"]).astype(float)
    groups = pd.DataFrame({"confidence": details["confidence"], "accuracy": right}).groupby(ranges)
    means = groups.mean().reindex(range(BINS))
    counts = groups.size().reindex(range(BINS), fill_value=0)
    return means.assign(low=edges[:-1], high=edges[1:], images=counts).rename_axis(None)


def expected_calibration_error(bins: pd.DataFrame) -> float:
    """Mean distance in [0, 1] between confidence and accuracy of the bins of `calibrate`, weighted by their images."""
    distances = (bins["confidence"] - bins["accuracy"]).abs().fillna(0.0)
    return float((distances * bins["images"]).sum() / bins["images"].sum())


def worst_mistakes(details: pd.DataFrame, count: int) -> pd.DataFrame:
    """At most `count` rows of `tabulate` that are wrong, the most confident first; the index is the image's row."""
    wrong = details[details["true"] != details["predicted"]]
    return wrong.sort_values("confidence", ascending=False, kind="stable").head(count)


def tabulate_classes(details: pd.DataFrame, metrics: Mapping[str, Any], class_names: Sequence[str]) -> pd.DataFrame:
    """By class: how often it was predicted and how confidently; where labels are known, also how rightly.

    Args:
        details: of `tabulate`.
        metrics: of the evaluator; "precision", "recall" and "f1", float (10,), where labels are known.
        class_names: in label order; the index of the table.

    Returns:
        Columns predicted (images), share (of all images), confidence (mean, NaN if never predicted), and with labels
        images (of the class), precision, recall (the accuracy on the class) and f1, each in [0, 1].
    """
    groups = details.groupby("predicted")["confidence"].agg(["size", "mean"]).reindex(list(class_names))
    table = pd.DataFrame({"predicted": groups["size"].fillna(0).astype(int), "confidence": groups["mean"]})
    table.insert(1, "share", table["predicted"] / len(details))
    if "true" in details:
        table["images"] = details["true"].value_counts().reindex(list(class_names), fill_value=0)
        for name in ("precision", "recall", "f1"):
            table[name] = metrics[name].tolist()
    return table


def summarize(
    details: pd.DataFrame, metrics: Mapping[str, Any], classes: pd.DataFrame, bins: pd.DataFrame | None
) -> dict[str, Any]:
    """metrics.json: what can be said of the predictions in numbers, all accuracies and confidences in [0, 1].

    Args:
        details: of `tabulate`.
        metrics: of the evaluator.
        classes: of `tabulate_classes`.
        bins: of `calibrate`; None where labels are not known.
    """
    summary: dict[str, Any] = {"images": len(details), "mean_confidence": float(details["confidence"].mean())}
    if bins is not None:
        summary |= {
            "accuracy": float(metrics["accuracy"]),
            "top2_accuracy": float(metrics["top2_accuracy"]),
            "loss": float(metrics["loss"]),
            # The same figure: the name by which calibration is discussed.
            "negative_log_likelihood": float(metrics["loss"]),
            "expected_calibration_error": expected_calibration_error(bins),
            "classes": classes[["images", "precision", "recall", "f1"]].to_dict("index"),
        }
    return summary


def format_classes(classes: pd.DataFrame) -> pd.DataFrame:
    """`tabulate_classes` as people read it: headings in words, shares in percent, "–" for what cannot be said."""
    columns = {
        "images": "images",
        "recall": "accuracy (recall)",
        "precision": "precision",
        "f1": "F1",
        "predicted": "predicted",
        "share": "share of predictions",
        "confidence": "mean confidence",
    }
    shown = pd.DataFrame(index=classes.index)
    for name, heading in columns.items():
        if name in classes:
            counts = name in ("images", "predicted")
            shown[heading] = [
                "–" if pd.isna(value) else f"{value:,.0f}" if counts else f"{value:.1%}" for value in classes[name]
            ]
    return shown
