"""The data command: what a dataset contains, as a table and a sheet of samples."""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cifar_ignite.config_io import parse_config
from cifar_ignite.data.dataset import ImageDataset
from cifar_ignite.data.inspection import describe_duplicates, find_duplicates, inspect_dataset
from cifar_ignite.files import atomic_write, translate_write_errors
from cifar_ignite.image_plots import plot_class_samples

NUM_SAMPLES = 10

logger = logging.getLogger(__name__)


def inspect_data(overrides: Sequence[str] = ()) -> Path:
    """Log the number of images per class and split, and what is wrong with them; draw samples of each class.

    Args:
        overrides: Strings `section.key=value`; the section `data` and `output_dir` are used.

    Returns:
        PNG file of the samples: data/{dataset}_samples.png in the output directory.

    Raises:
        InputError: If the training set is invalid, or the figure cannot be written.
    """
    config = parse_config({}, "--set", overrides)
    report = inspect_dataset(config.data)
    logger.info("\n%s\n", report.class_table.to_string())
    logger.info("%s: %s", config.data.dataset, report.describe())
    if len(report.sizes):
        logger.info("sizes: %s", report.describe_sizes(config.data.image_size))
    if report.missing_test:
        logger.warning("no test set: %s", report.missing_test)
    for name, count in report.num_unreadable.items():
        if count:
            logger.warning("%d files of %s are unreadable, see above", count, name)
    for line in describe_duplicates(find_duplicates(report.splits)):
        logger.warning("duplicates: %s", line)
    path = config.output_dir / "data" / f"{config.data.dataset}_samples.png"
    with translate_write_errors(config.output_dir):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as temp_path:
            plot_class_samples(select_samples(report.splits["train"]), temp_path)
    logger.info("samples: %s", path)
    return path


def select_samples(dataset: ImageDataset) -> list[tuple[str, np.ndarray]]:
    """Return for each class its name and size, and up to `NUM_SAMPLES` of its images, spread over the class."""
    assert dataset.labels is not None, "the training set has labels"
    samples = []
    for label, name in enumerate(dataset.class_names):
        rows = (dataset.labels == label).nonzero().flatten()
        chosen = rows[np.linspace(0, len(rows) - 1, min(NUM_SAMPLES, len(rows))).round().astype(int)]
        images = dataset.images[chosen].permute(0, 2, 3, 1).numpy()
        samples.append((f"{name} ({len(rows):,})", images))
    return samples
