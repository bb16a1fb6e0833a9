"""The predict command: classes of image files."""

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

import pandas as pd

from cifar_ignite.config import Config
from cifar_ignite.data.dataset import ImageDataset
from cifar_ignite.data.image_files import find_images, load_images, printable
from cifar_ignite.errors import InputError, check_named
from cifar_ignite.evaluation.arguments import check_arguments
from cifar_ignite.evaluation.inference import create_inference_forward, run_inference
from cifar_ignite.evaluation.metrics import prediction_table
from cifar_ignite.evaluation.trained_model import load_trained_model, log_temperature
from cifar_ignite.files import atomic_write, create_unique_dir, timestamp, translate_write_errors
from cifar_ignite.training.forward import create_tta_forward

MAX_LOGGED_ROWS = 20

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Predictions:
    """Predicted classes of image files.

    Attributes:
        table: One row per readable image: file, predicted (name of the class), confidence (its probability), unsure
            (whether that is below `unsure_below`), and the probability of each class under its name.
        path: predictions.csv, which contains the table.
    """

    table: pd.DataFrame = field(repr=False)
    path: Path


def predict(
    paths: str | Path | Sequence[str | Path],
    checkpoint: str | Path | None = None,
    model_name: str | None = None,
    overrides: Sequence[str] = (),
    tta: str | None = None,
) -> Predictions:
    """Classify image files.

    Args:
        paths: An image file, or a directory that is searched recursively (see `find_images`), or several of them.
        checkpoint: Any checkpoint of this project; None loads the latest best model.
        model_name: Experiment whose latest best model is loaded; None allows all experiments.
        overrides: Strings `section.key=value`, applied to the checkpoint's configuration.
        tta: Test-time augmentation, "flip" or "shift" (see `create_tta_forward`); None predicts without.

    Returns:
        Table of predictions, and predictions.csv in a new directory.

    Raises:
        InputError: If an argument is invalid, there is no checkpoint, a path does not exist, or no file is readable;
            nothing was written.
    """
    check_arguments(checkpoint, model_name, tta)
    named = check_paths([paths] if isinstance(paths, str | Path) else paths)
    trained = load_trained_model(checkpoint, model_name, overrides)
    files = find_images(named)
    images, unreadable = load_images(files, trained.config.data.image_size)
    for file, reason in unreadable.items():
        logger.warning("%s: %s", printable(file), printable(reason))
    readable = [file for file in files if file not in unreadable]
    if not readable:
        raise InputError(f"{printable(named[0])}: none of {len(files)} files is a readable image")
    class_names = tuple(trained.record.class_names)
    dataset = ImageDataset(images, None, list(range(len(readable))), class_names)
    forward = create_inference_forward(trained)
    logits, _ = run_inference(trained, create_tta_forward(forward, tta) if tta else forward, dataset)
    table = prediction_table(dataset, logits, class_names, trained.temperature(tta)).rename(columns={"ID": "file"})
    table.insert(3, "unsure", table["confidence"] < trained.config.unsure_below)
    # Not the default type for strings: with pyarrow installed, it refuses file names that are not UTF-8.
    table["file"] = pd.Series([str(file) for file in readable], dtype=object)
    log_temperature(trained, tta)
    log_predictions(table, trained.config.unsure_below)
    path = write_predictions(table, trained.config)
    logger.info("predictions  %s (%d of %d files)", printable(path), len(readable), len(files))
    return Predictions(table, path)


def check_paths(paths: Sequence[str | Path]) -> list[Path]:
    """Return the paths that a user named.

    Raises:
        InputError: If there are none, or one is empty.
    """
    if not len(paths):
        raise InputError("paths: no image or directory of images is named")
    for path in paths:
        check_named(paths=path)
    return [Path(path) for path in paths]


def write_predictions(table: pd.DataFrame, config: Config) -> Path:
    """Write predictions.csv into a new directory and return its path.

    Raises:
        InputError: If it cannot be written; no directory remains.
    """
    with translate_write_errors(config.output_dir):
        directory = create_unique_dir(config.output_dir / "predictions", f"{config.experiment}_{timestamp()}")
        path = directory / "predictions.csv"
        try:
            with atomic_write(path) as temp_path, _open_csv(temp_path) as file:
                table.to_csv(file, index=False, float_format="%.6f", lineterminator="\n")
        except BaseException:
            directory.rmdir()
            raise
    return path


def _open_csv(path: Path) -> TextIO:
    """Open a new file for text in which file names keep bytes that are not UTF-8."""
    return path.open("w", encoding="utf-8", errors=sys.getfilesystemencodeerrors(), newline="")


def log_predictions(table: pd.DataFrame, unsure_below: float) -> None:
    """Log the first predictions, and if there are more, the number of images per class; mark the unsure ones."""
    first = table[["file", "predicted", "confidence"]].head(MAX_LOGGED_ROWS)
    first = first.assign(file=first["file"].map(printable), confidence=first["confidence"].map("{:.1%}".format))
    first[""] = table["unsure"].map({True: "unsure", False: ""})
    logger.info("\n%s\n", first.to_string(index=False))
    logger.info("unsure (confidence below %g%%): %d of %d", 100 * unsure_below, table["unsure"].sum(), len(table))
    if len(table) > MAX_LOGGED_ROWS:
        counts = ", ".join(f"{count} {name}" for name, count in table["predicted"].value_counts().items())
        logger.info("%d more; total: %s", len(table) - MAX_LOGGED_ROWS, counts)
