"""The predict command: classes of image files."""

import logging
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from cifar_ignite.data.dataset import ImageDataset
from cifar_ignite.errors import InputError
from cifar_ignite.evaluation.image_files import find_images, load_images
from cifar_ignite.evaluation.inference import create_inference_forward, create_tta_forward, run_inference
from cifar_ignite.evaluation.metrics import prediction_table
from cifar_ignite.evaluation.trained_model import load_trained_model
from cifar_ignite.files import create_unique_dir, timestamp, translate_write_errors

MAX_LOGGED_ROWS = 20

logger = logging.getLogger(__name__)


def predict(
    paths: Sequence[Path],
    checkpoint: Path | None = None,
    model_name: str | None = None,
    overrides: Sequence[str] = (),
    tta: str | None = None,
) -> Path:
    """Classify image files.

    Args:
        paths: Image files, and directories that are searched recursively.
        checkpoint: Any checkpoint of this project; None loads the latest best model.
        model_name: Experiment whose latest best model is loaded; None allows all experiments.
        overrides: Strings `section.key=value`, applied to the checkpoint's configuration.
        tta: Test-time augmentation, "flip" or "shift" (see `create_tta_forward`); None predicts without.

    Returns:
        predictions.csv in a new directory, with the columns file, predicted, confidence, and the probability of each
        class.

    Raises:
        InputError: If there is no checkpoint, a path does not exist, or no file is readable; nothing was written.
    """
    trained = load_trained_model(checkpoint, model_name, overrides)
    files = find_images(paths)
    readable, images = load_images(files)
    if not readable:
        raise InputError(f"{paths[0]}: none of {len(files)} files is a readable image")
    class_names = tuple(trained.record.class_names)
    dataset = ImageDataset(images, None, [str(file) for file in readable], class_names)
    forward = create_inference_forward(trained)
    probabilities, _ = run_inference(trained, create_tta_forward(forward, tta) if tta else forward, dataset)
    table = prediction_table(dataset, probabilities, class_names).rename(columns={"ID": "file"})
    log_predictions(table)
    with translate_write_errors(trained.config.output_dir):
        name = f"{trained.config.experiment}_{timestamp()}"
        path = create_unique_dir(trained.config.output_dir / "predictions", name) / "predictions.csv"
        table.to_csv(path, index=False, float_format="%.6f")
    logger.info("predictions  %s (%d of %d files)", path, len(readable), len(files))
    return path


def log_predictions(table: pd.DataFrame) -> None:
    """Log the first predictions, and if there are more, the number of images per class."""
    first = table[["file", "predicted", "confidence"]].head(MAX_LOGGED_ROWS)
    logger.info("\n%s\n", first.assign(confidence=first["confidence"].map("{:.1%}".format)).to_string(index=False))
    if len(table) > MAX_LOGGED_ROWS:
        counts = ", ".join(f"{count} {name}" for name, count in table["predicted"].value_counts().items())
        logger.info("%d more; total: %s", len(table) - MAX_LOGGED_ROWS, counts)
