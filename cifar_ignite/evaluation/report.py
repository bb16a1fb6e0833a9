"""report.html: an evaluation as one self-contained page with embedded images."""

import base64
import io
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor

from cifar_ignite.checkpointing.run_record import EpochMetrics, RunRecord
from cifar_ignite.config_io import diff_from_defaults
from cifar_ignite.data.dataset import ImageDataset
from cifar_ignite.evaluation.metrics import (
    EvaluationResult,
    coverage_curve,
    format_calibration,
    format_per_class_table,
    format_sure,
    most_confident_errors,
    sure_predictions,
)
from cifar_ignite.evaluation.reproduction import reproducing_commands
from cifar_ignite.evaluation.trained_model import TrainedModel
from cifar_ignite.files import write_text
from cifar_ignite.image_plots import plot_misclassified
from cifar_ignite.plots import (
    MANY_CLASSES,
    plot_confusion_matrix,
    plot_coverage,
    plot_reliability,
    plot_training_curves,
)
from cifar_ignite.training.environment import Environment

TEMPLATE = "report.html.j2"
MAX_ERRORS = 24
MAX_CONFUSIONS = 20
WHITE, DARK_BLUE, DARK_RED = (255, 255, 255), (8, 62, 130), (160, 20, 40)
# On a background of this luminance, black and white text both have contrast 4.6; on any other, one of them has more.
EQUAL_CONTRAST_LUMINANCE = 0.179


@dataclass(frozen=True, eq=False)
class Evaluation:
    """A trained model evaluated on a dataset.

    Attributes:
        trained: Trained model.
        dataset: Evaluated images, on the CPU.
        dataset_name: Name of the dataset, for example "cifar10 test set".
        environment: Environment of the evaluation.
        result: Metrics of the model.
        tta: Name of the test-time augmentation; None without.
        tta_result: Metrics with test-time augmentation; None without.
        test_file: Unlabeled test pickle that was evaluated; None for the test set of a dataset.
        directory: Directory that the files were written into; None on ranks other than 0.
    """

    trained: TrainedModel = field(repr=False)
    dataset: ImageDataset = field(repr=False)
    dataset_name: str
    environment: Environment = field(repr=False)
    result: EvaluationResult = field(repr=False)
    tta: str | None = None
    tta_result: EvaluationResult | None = field(default=None, repr=False)
    test_file: Path | None = None
    directory: Path | None = None

    @property
    def summary(self) -> dict[str, Any]:
        """Contents of metrics.json: with labels "accuracy" in [0, 1], "loss", and others."""
        record = self.trained.record
        summary = {"run": record.run, "epoch": record.epoch, "data": self.dataset_name} | self.result.summary
        if self.tta_result:
            summary["tta"] = {"name": self.tta} | self.tta_result.summary
        if self.dataset.labels is not None:
            summary["sure"] = sure_predictions(self.result.predictions, self.trained.config.unsure_below)
        return summary | {"environment": self.environment}


def write_report(evaluation: Evaluation, directory: Path) -> None:
    """Write report.html and, with labels, the figures of the evaluation.

    Args:
        evaluation: Evaluation to report.
        directory: Existing directory of the evaluation.

    Raises:
        OSError: If a file cannot be written.
    """
    trained, record = evaluation.trained, evaluation.trained.record
    page = _load_template().render(
        experiment=trained.config.experiment,
        model=trained.config.model.name,
        num_parameters=f"{sum(parameter.numel() for parameter in trained.model.parameters()):,}",
        record=record,
        summary=evaluation.summary,
        headline_metrics=headline_metrics(evaluation.summary),
        curves=training_curves(record.history, directory),
        is_large=len(record.class_names) > MANY_CLASSES,
        per_class=format_per_class_table(evaluation.result.per_class),
        figures=write_figures(evaluation, directory),
        commands=reproducing_commands(trained, evaluation.tta, evaluation.test_file),
        environment=environment_table({**training_environments(record), "evaluation": evaluation.environment}),
        changed_keys=diff_from_defaults(record.config),
        config=json.dumps(record.config, indent=2),
    )
    write_text(directory / "report.html", page)


def _load_template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    return environment.get_template(TEMPLATE)


def write_figures(evaluation: Evaluation, directory: Path) -> dict[str, Any]:
    """Write the figures that require labels; return what the page shows of them, which is empty without labels."""
    result, class_names = evaluation.result, evaluation.trained.record.class_names
    if result.confusion_matrix is None or result.bins is None:
        return {}
    errors = most_confident_errors(result.predictions, MAX_ERRORS)
    images = evaluation.dataset.images[torch.from_numpy(errors.index.to_numpy().copy())]
    calibration, sure = format_calibration(result.summary), evaluation.summary["sure"]
    curve = coverage_curve(result.predictions)
    plot_confusion_matrix(result.confusion_matrix, class_names, directory / "confusion_matrix.png")
    plot_reliability(reliability_panels(result), directory / "reliability.png")
    plot_coverage(curve, sure["min_confidence"], directory / "coverage.png")
    plot_misclassified(errors, images.permute(0, 2, 3, 1).numpy(), directory / "mistakes.png")
    return {
        "confusion": confusion_cells(result.confusion_matrix, class_names),
        "confusions": most_frequent_confusions(result.confusion_matrix, class_names),
        "reliability": data_uri((directory / "reliability.png").read_bytes()),
        "coverage": data_uri((directory / "coverage.png").read_bytes()),
        "calibration": calibration,
        "sure": format_sure(sure),
        "errors": error_gallery(errors, images),
    }


def reliability_panels(result: EvaluationResult) -> dict[str, pd.DataFrame]:
    """Return the bins of each reliability diagram, by its title: before and after temperature scaling, if it was."""
    panels = {"": result} if result.uncalibrated is None else {"before: ": result.uncalibrated, "after: ": result}
    return {
        f"{name}expected calibration error {shown.summary['expected_calibration_error']:.2%}": shown.bins
        for name, shown in panels.items()
        if shown.bins is not None
    }


def headline_metrics(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return (value, name) of each number at the top of the page."""
    metrics = []
    if "accuracy" in summary:
        metrics.append((f"{summary['accuracy']:.2%}", "accuracy"))
        if "tta" in summary:
            tta = summary["tta"]
            metrics.append((f"{tta['accuracy']:.2%}", f"accuracy with test-time augmentation ({tta['name']})"))
        metrics += [
            (f"{summary['top2_accuracy']:.2%}", "top-2 accuracy"),
            (f"{summary['loss']:.4f}", "cross-entropy"),
            (f"{summary['expected_calibration_error']:.2%}", "expected calibration error"),
        ]
    return [*metrics, (f"{summary['mean_confidence']:.2%}", "mean confidence")]


def training_curves(history: Sequence[EpochMetrics], directory: Path) -> list[dict[str, str]]:
    """Return the training curves as images with alternative text; none before the first epoch.

    Args:
        history: One row per epoch.
        directory: Existing directory for temporary files.
    """
    if not history:
        return []
    with tempfile.TemporaryDirectory(dir=directory, ignore_cleanup_errors=True) as scratch:
        plot_training_curves(history, Path(scratch))
        sources = {name: data_uri((Path(scratch) / f"{name}.png").read_bytes()) for name in ("accuracy", "loss")}
    return [
        {"source": sources[name], "alt": f"{name} by epoch: {_describe_curves(history, key)}"}
        for name, key in (("accuracy", "acc"), ("loss", "loss"))
    ]


def _describe_curves(history: Sequence[EpochMetrics], key: str) -> str:
    descriptions = [f"{len(history)} epochs"]
    for name, column in (("train", f"train_{key}"), ("validation", f"val_{key}")):
        values = [row[column] for row in history if row[column] is not None]  # type: ignore[literal-required]
        if values:
            descriptions.append(f"{name} from {values[0]:.3f} to {values[-1]:.3f}")
    return ", ".join(descriptions)


def training_environments(record: RunRecord) -> dict[str, Environment]:
    """Return the environments that a run was trained in, by their heading; none in a checkpoint without them."""
    starts = [environment["from_iteration"] for environment in record.environments]
    headings = [f"training from iteration {start:,}" if start else "training" for start in starts]
    return dict(zip(headings, record.environments, strict=True))


def environment_table(environments: Mapping[str, Environment]) -> pd.DataFrame:
    """Return environments as text: one row per key, one column per environment, "–" for unknown values."""
    keys = list(dict.fromkeys(key for environment in environments.values() for key in environment))
    cells = {
        heading: ["–" if (value := environment.get(key)) is None else str(value) for key in keys]
        for heading, environment in environments.items()
    }
    return pd.DataFrame(cells, index=keys).drop(index="from_iteration", errors="ignore")


def confusion_cells(matrix: np.ndarray, class_names: Sequence[str]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Return (true class, cells) for each row of the confusion matrix; a cell has a count, colors and a tooltip."""
    rows = []
    for true, counts in zip(class_names, matrix.tolist(), strict=True):
        cells = []
        for predicted, count in zip(class_names, counts, strict=True):
            fraction = count / max(1, sum(counts))
            color = _cell_color(fraction, is_correct=true == predicted)
            share = f"{count:,} of {sum(counts):,} images of {true} ({fraction:.1%})"
            cells.append(
                {
                    "count": count,
                    "color": "#" + "".join(f"{channel:02x}" for channel in color),
                    "text_color": text_color(color),
                    "tooltip": f"{share} predicted as {predicted}",
                }
            )
        rows.append((true, cells))
    return rows


def most_frequent_confusions(matrix: np.ndarray, class_names: Sequence[str]) -> list[tuple[str, str, str, str]]:
    """Return true class, predicted class, count and share of the true class of the largest cells off the diagonal."""
    counts = pd.DataFrame(matrix, index=list(class_names), columns=list(class_names)).stack()
    errors = counts[[true != predicted for true, predicted in counts.index]]
    largest = errors[errors > 0].sort_values(ascending=False, kind="stable").head(MAX_CONFUSIONS)
    totals = dict(zip(class_names, matrix.sum(axis=1).tolist(), strict=True))
    return [
        (true, predicted, f"{count:,}", f"{count / totals[true]:.1%}") for (true, predicted), count in largest.items()
    ]


def _cell_color(fraction: float, *, is_correct: bool) -> list[int]:
    """Return a color from white to dark blue, or off the diagonal, where 20% is already the darkest, to dark red."""
    depth = fraction if is_correct else min(1.0, 5 * fraction)
    darkest = DARK_BLUE if is_correct else DARK_RED
    return [round(light + (dark - light) * depth) for light, dark in zip(WHITE, darkest, strict=True)]


def text_color(background: Sequence[int]) -> str:
    """Return black or white, whichever has the higher contrast on an sRGB color."""
    return "#000" if relative_luminance(background) > EQUAL_CONTRAST_LUMINANCE else "#fff"


def relative_luminance(color: Sequence[int]) -> float:
    """Return the relative luminance in [0, 1] of an sRGB color with channels in [0, 255] (WCAG 2)."""
    channels = [channel / 255 for channel in color]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def error_gallery(errors: pd.DataFrame, images: Tensor) -> list[dict[str, str]]:
    """Return the misclassified images, uint8 (N, 3, H, W), with predicted and true class and alternative text."""
    return [
        {
            "source": data_uri(encode_png(image)),
            "alt": f"image {row['ID']}, true class {row['true']}, predicted {row['predicted']}",
            "id": str(row["ID"]),
            "true": row["true"],
            "predicted": row["predicted"],
            "confidence": f"{row['confidence']:.1%}",
        }
        for row, image in zip(errors.to_dict("records"), images, strict=True)
    ]


def encode_png(image: Tensor) -> bytes:
    """Encode an image, uint8 (3, H, W), as PNG."""
    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "PNG")
    return file.getvalue()


def data_uri(png: bytes) -> str:
    """Return a PNG file as the source of an HTML image."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
