"""Metrics of a set of predictions, as tables that are written, plotted and printed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor

from cifar_ignite.data.dataset import ImageDataset

NUM_BINS = 15
PER_CLASS_HEADINGS = {
    "images": "images",
    "recall": "accuracy (recall)",
    "precision": "precision",
    "f1": "F1",
    "predicted": "predicted",
    "share": "share of predictions",
    "confidence": "mean confidence",
}


@dataclass(frozen=True)
class EvaluationResult:
    """Metrics of one set of predictions; the last two are None without labels.

    Attributes:
        predictions: Table of `prediction_table`, one row per image.
        per_class: Table of `per_class_table`, one row per class.
        summary: Numbers of `summary_metrics`.
        bins: Table of `calibration_bins`, one row per range of confidence.
        confusion_matrix: int64 (num_classes, num_classes), images by true (row) and predicted (column) class.
    """

    predictions: pd.DataFrame
    per_class: pd.DataFrame
    summary: dict[str, Any]
    bins: pd.DataFrame | None
    confusion_matrix: np.ndarray | None


def compute_metrics(
    dataset: ImageDataset, probabilities: Tensor, metrics: Mapping[str, Any], class_names: Sequence[str]
) -> EvaluationResult:
    """Compute all metrics of a set of predictions.

    Args:
        dataset: N images, labeled or unlabeled.
        probabilities: float (N, num_classes) on the CPU.
        metrics: Metrics of the evaluator if there are labels: "accuracy", "loss", "top2_accuracy", "confusion", and
            "precision", "recall" and "f1" of shape (num_classes,); otherwise empty.
        class_names: Names in label order.
    """
    predictions = prediction_table(dataset, probabilities, class_names)
    per_class = per_class_table(predictions, metrics, class_names)
    has_labels = dataset.labels is not None
    bins = calibration_bins(predictions) if has_labels else None
    confusion_matrix = metrics["confusion"].cpu().numpy() if has_labels else None
    summary = summary_metrics(predictions, metrics, per_class, bins)
    return EvaluationResult(predictions, per_class, summary, bins, confusion_matrix)


# --- Per image ----------------------------------------------------------------------------------------------------


def prediction_table(dataset: ImageDataset, probabilities: Tensor, class_names: Sequence[str]) -> pd.DataFrame:
    """Return the table of details.csv: one row per image, in the order of the dataset.

    Args:
        dataset: N images.
        probabilities: float (N, num_classes).
        class_names: Names in label order.

    Returns:
        Columns ID, true (name of the class; only with labels), predicted (name of the class), confidence (highest
        probability), and the probability of each class under its name.
    """
    confidence, predicted = probabilities.max(1)
    table = pd.DataFrame({"ID": dataset.ids})
    if dataset.labels is not None:
        table["true"] = [class_names[label] for label in dataset.labels.tolist()]
    table["predicted"] = [class_names[label] for label in predicted.tolist()]
    table["confidence"] = confidence.numpy()
    return pd.concat([table, pd.DataFrame(probabilities.numpy(), columns=pd.Index(class_names))], axis=1)


def most_confident_errors(predictions: pd.DataFrame, count: int) -> pd.DataFrame:
    """Return at most `count` misclassified rows, by descending confidence; the index is the row of the image."""
    errors = predictions[predictions["true"] != predictions["predicted"]]
    return errors.sort_values("confidence", ascending=False, kind="stable").head(count)


# --- Calibration --------------------------------------------------------------------------------------------------


def calibration_bins(predictions: pd.DataFrame) -> pd.DataFrame:
    """Group predictions by confidence and compare it with the accuracy (Guo et al., 2017, arXiv:1706.04599).

    Args:
        predictions: Table of `prediction_table` with labels.

    Returns:
        One row for each of `NUM_BINS` ranges of confidence of equal width (open below, closed above), with the columns
        low, high, images, and the means confidence and accuracy (NaN in an empty bin).
    """
    edges = [index / NUM_BINS for index in range(NUM_BINS + 1)]
    bin_indices = pd.cut(predictions["confidence"], edges, include_lowest=True, labels=False)
    is_correct = (predictions["true"] == predictions["predicted"]).astype(float)
    groups = pd.DataFrame({"confidence": predictions["confidence"], "accuracy": is_correct}).groupby(bin_indices)
    means = groups.mean().reindex(range(NUM_BINS))
    counts = groups.size().reindex(range(NUM_BINS), fill_value=0)
    return means.assign(low=edges[:-1], high=edges[1:], images=counts).rename_axis(None)


def expected_calibration_error(bins: pd.DataFrame) -> float:
    """Return the mean of |confidence - accuracy| over the bins, weighted by their images, in [0, 1]."""
    gaps = (bins["confidence"] - bins["accuracy"]).abs().fillna(0.0)
    return float((gaps * bins["images"]).sum() / bins["images"].sum())


# --- Per class and summary ----------------------------------------------------------------------------------------


def per_class_table(predictions: pd.DataFrame, metrics: Mapping[str, Any], class_names: Sequence[str]) -> pd.DataFrame:
    """Return one row per class.

    Args:
        predictions: Table of `prediction_table`.
        metrics: Metrics of the evaluator; with labels "precision", "recall" and "f1", float (num_classes,).
        class_names: Names in label order, the index of the result.

    Returns:
        Columns predicted (images), share (of all images), confidence (mean; NaN if never predicted), and with labels
        images (of the class), precision, recall (the accuracy on the class) and f1, each in [0, 1].
    """
    groups = predictions.groupby("predicted")["confidence"].agg(["size", "mean"]).reindex(list(class_names))
    table = pd.DataFrame({"predicted": groups["size"].fillna(0).astype(int), "confidence": groups["mean"]})
    table.insert(1, "share", table["predicted"] / len(predictions))
    if "true" in predictions:
        table["images"] = predictions["true"].value_counts().reindex(list(class_names), fill_value=0)
        for name in ("precision", "recall", "f1"):
            table[name] = metrics[name].tolist()
    return table


def format_per_class_table(per_class: pd.DataFrame) -> pd.DataFrame:
    """Return the table of `per_class_table` as text: headings in words, percentages, "–" for undefined values."""
    formatted = pd.DataFrame(index=list(per_class.index))
    for name, heading in PER_CLASS_HEADINGS.items():
        if name in per_class:
            template = "{:,.0f}" if name in ("images", "predicted") else "{:.1%}"
            formatted[heading] = ["–" if pd.isna(value) else template.format(value) for value in per_class[name]]
    return formatted


def summary_metrics(
    predictions: pd.DataFrame, metrics: Mapping[str, Any], per_class: pd.DataFrame, bins: pd.DataFrame | None
) -> dict[str, Any]:
    """Return the numbers of metrics.json; accuracies and confidences are in [0, 1].

    Args:
        predictions: Table of `prediction_table`.
        metrics: Metrics of the evaluator.
        per_class: Table of `per_class_table`.
        bins: Table of `calibration_bins`; None without labels.
    """
    summary: dict[str, Any] = {"images": len(predictions), "mean_confidence": float(predictions["confidence"].mean())}
    if bins is not None:
        summary |= {
            "accuracy": float(metrics["accuracy"]),
            "top2_accuracy": float(metrics["top2_accuracy"]),
            "loss": float(metrics["loss"]),
            "expected_calibration_error": expected_calibration_error(bins),
            "classes": per_class[["images", "precision", "recall", "f1"]].to_dict("index"),
        }
    return summary
