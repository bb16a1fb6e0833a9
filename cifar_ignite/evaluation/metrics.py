"""Metrics of a set of predictions, as tables that are written, plotted and printed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch.nn.functional as F
from torch import Tensor

from cifar_ignite.data.dataset import ImageDataset

NUM_BINS = 15
CALIBRATION_METRICS = ("mean_confidence", "loss", "expected_calibration_error")
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
    """Metrics of one set of predictions; `bins` and `confusion_matrix` are None without labels.

    Attributes:
        predictions: Table of `prediction_table`, one row per image.
        per_class: Table of `per_class_table`, one row per class.
        summary: Numbers of `summary_metrics`.
        bins: Table of `calibration_bins`, one row per range of confidence.
        confusion_matrix: int64 (num_classes, num_classes), images by true (row) and predicted (column) class.
        uncalibrated: The same with a temperature of 1; None if that is what this is.
    """

    predictions: pd.DataFrame
    per_class: pd.DataFrame
    summary: dict[str, Any]
    bins: pd.DataFrame | None
    confusion_matrix: np.ndarray | None
    uncalibrated: "EvaluationResult | None" = None


def compute_metrics(
    dataset: ImageDataset,
    logits: Tensor,
    metrics: Mapping[str, Any],
    class_names: Sequence[str],
    temperature: float | None = None,
) -> EvaluationResult:
    """Compute all metrics of a set of predictions.

    Args:
        dataset: N images, labeled or unlabeled.
        logits: float (N, num_classes) on the CPU.
        metrics: Metrics of the evaluator if there are labels: "accuracy", "loss", "top2_accuracy", and "confusion",
            int64 (num_classes, num_classes); otherwise empty.
        class_names: Names in label order.
        temperature: Temperature of the probabilities; None if there is none.
    """
    uncalibrated = None
    if temperature is not None:
        uncalibrated = compute_metrics(dataset, logits, metrics, class_names)
        metrics = {**metrics, "loss": calibrated_loss(logits, dataset.labels, temperature)}
    predictions = prediction_table(dataset, logits, class_names, temperature)
    has_labels = dataset.labels is not None
    bins = calibration_bins(predictions) if has_labels else None
    confusion_matrix = metrics["confusion"].cpu().numpy() if has_labels else None
    per_class = per_class_table(predictions, confusion_matrix, class_names)
    summary = summary_metrics(predictions, metrics, per_class, bins) | {"temperature": temperature}
    if uncalibrated:
        names = [name for name in CALIBRATION_METRICS if name in summary]
        summary["uncalibrated"] = {name: uncalibrated.summary[name] for name in names}
    return EvaluationResult(predictions, per_class, summary, bins, confusion_matrix, uncalibrated)


# --- Per image ----------------------------------------------------------------------------------------------------


def prediction_table(
    dataset: ImageDataset, logits: Tensor, class_names: Sequence[str], temperature: float | None = None
) -> pd.DataFrame:
    """Return the table of details.csv: one row per image, in the order of the dataset.

    The predicted class is that of the highest logit, so that no rounding of probabilities can change it.

    Args:
        dataset: N images.
        logits: float (N, num_classes) on the CPU.
        class_names: Names in label order.
        temperature: Temperature of the probabilities; None is 1.

    Returns:
        Columns ID, true (name of the class; only with labels), predicted (name of the class), confidence (highest
        probability), and the probability of each class under its name.
    """
    probabilities = (logits.double() / (temperature or 1.0)).softmax(1)
    table = pd.DataFrame({"ID": dataset.ids})
    if dataset.labels is not None:
        table["true"] = [class_names[label] for label in dataset.labels.tolist()]
    table["predicted"] = [class_names[label] for label in logits.argmax(1).tolist()]
    table["confidence"] = probabilities.amax(1).numpy()
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


def calibrated_loss(logits: Tensor, labels: Tensor | None, temperature: float) -> float | None:
    """Return the mean cross-entropy of calibrated probabilities; None without labels."""
    return None if labels is None else F.cross_entropy(logits.double() / temperature, labels.cpu()).item()


def coverage_curve(predictions: pd.DataFrame) -> pd.DataFrame:
    """Return what is gained by leaving out the images with the lowest confidences (a risk-coverage curve).

    Args:
        predictions: Table of `prediction_table` with labels, N rows.

    Returns:
        N rows by descending confidence: confidence, coverage (fraction of the images with at least this confidence) and
        accuracy (on them). Images of equal confidence have the same values.
    """
    is_correct = (predictions["true"] == predictions["predicted"]).astype(float)
    table = pd.DataFrame({"confidence": predictions["confidence"], "is_correct": is_correct})
    table = table.sort_values("confidence", ascending=False, kind="stable", ignore_index=True)
    table["accuracy"] = table["is_correct"].expanding().mean()
    table["coverage"] = (table.index + 1) / len(table)
    curve = table.groupby("confidence", sort=False)[["coverage", "accuracy"]].transform("last")
    return pd.concat([table["confidence"], curve], axis=1)


def sure_predictions(predictions: pd.DataFrame, min_confidence: float) -> dict[str, float | None]:
    """Return the fraction of the images with at least a confidence, and the accuracy on them (None if there are none).

    Args:
        predictions: Table of `prediction_table` with labels.
        min_confidence: Lowest confidence of a prediction that counts as sure.
    """
    sure = predictions[predictions["confidence"] >= min_confidence]
    accuracy = float((sure["true"] == sure["predicted"]).mean()) if len(sure) else None
    return {"min_confidence": min_confidence, "fraction": len(sure) / len(predictions), "accuracy": accuracy}


def format_sure(sure: Mapping[str, Any]) -> str:
    """Return the fraction and accuracy of `sure_predictions` as a sentence."""
    threshold = f"{100 * sure['min_confidence']:g}%"
    text = f"Predictions with a confidence of at least {threshold} are {sure['fraction']:.1%} of the images"
    return f"{text}, of which {sure['accuracy']:.1%} are correct." if sure["fraction"] else f"{text}."


def format_calibration(summary: Mapping[str, Any]) -> str:
    """Return the expected calibration error, with that before temperature scaling if there is a temperature."""
    text = f"expected calibration error {summary['expected_calibration_error']:.2%}"
    if summary["temperature"] is None:
        return f"{text}, without temperature"
    return f"{text}, before temperature scaling {summary['uncalibrated']['expected_calibration_error']:.2%}"


def expected_calibration_error(bins: pd.DataFrame) -> float:
    """Return the mean of |confidence - accuracy| over the bins, weighted by their images, in [0, 1]."""
    gaps = (bins["confidence"] - bins["accuracy"]).abs().fillna(0.0)
    return float((gaps * bins["images"]).sum() / bins["images"].sum())


# --- Per class and summary ----------------------------------------------------------------------------------------


def per_class_table(
    predictions: pd.DataFrame, confusion_matrix: np.ndarray | None, class_names: Sequence[str]
) -> pd.DataFrame:
    """Return one row per class.

    Args:
        predictions: Table of `prediction_table`.
        confusion_matrix: int64 (num_classes, num_classes), images by true (row) and predicted class; None without
            labels.
        class_names: Names in label order, the index of the result.

    Returns:
        Columns predicted (images), share (of all images), confidence (mean; NaN if never predicted), and with labels
        images (of the class), precision (NaN if never predicted), recall (the accuracy on the class) and f1 (both NaN
        if the class has no images), each in [0, 1].
    """
    groups = predictions.groupby("predicted")["confidence"].agg(["size", "mean"]).reindex(list(class_names))
    table = pd.DataFrame({"predicted": groups["size"].fillna(0).astype(int), "confidence": groups["mean"]})
    table.insert(1, "share", table["predicted"] / len(predictions))
    if confusion_matrix is not None:
        correct, table["images"] = confusion_matrix.diagonal(), confusion_matrix.sum(axis=1)
        table["precision"] = correct / table["predicted"]
        table["recall"] = correct / table["images"]
        table["f1"] = (2 * correct / (table["predicted"] + table["images"])).where(table["images"] > 0)
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
            "classes": {
                name: {key: None if pd.isna(value) else value for key, value in row.items()}
                for name, row in per_class[["images", "precision", "recall", "f1"]].to_dict("index").items()
            },
        }
    return summary
