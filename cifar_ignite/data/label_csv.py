"""Labels in a CSV of two columns, id and label, as in Kaggle's competitions."""

from collections import Counter
from pathlib import Path

import pandas as pd

from cifar_ignite.data.image_files import printable
from cifar_ignite.errors import InputError, first_line

# By split: names of the CSV in the directory of the dataset; the first one that exists is used.
LABEL_FILES = {
    "train": ("trainLabels.csv", "train_labels.csv", "train.csv", "labels.csv"),
    "val": ("valLabels.csv", "val_labels.csv", "val.csv"),
    "test": ("testLabels.csv", "test_labels.csv"),
}
MAX_NAMES = 3


def find_label_file(root: Path, split: str) -> Path | None:
    """Return the CSV with the labels of a split, or None if there is none."""
    return next((root / name for name in LABEL_FILES[split] if (root / name).is_file()), None)


def read_labels(path: Path) -> dict[str, str]:
    """Read a CSV with a header line and two columns, id and label, whatever their names.

    Raises:
        InputError: If it is malformed, or an id is repeated.
    """
    try:
        # As text: 007 is an id, and NA a label.
        table = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except (OSError, ValueError) as error:  # ValueError: not a CSV, or not UTF-8
        raise InputError(f"{path}: cannot read the labels: {first_line(error)}") from None
    if table.shape[1] != 2:
        columns = ", ".join(map(printable, table.columns[:MAX_NAMES]))
        raise InputError(f"{path}: expected two columns, id and label; found {table.shape[1]} ({columns})")
    ids, labels = (table[name].str.strip().tolist() for name in table.columns)
    if repeated := [value for value, count in Counter(ids).items() if count > 1]:
        raise InputError(f"{path}: {_examples(repeated)}: repeated ids; each image has one label")
    if missing := [value for value, label in zip(ids, labels, strict=True) if not label]:
        raise InputError(f"{path}: {_examples(missing)}: ids without a label")
    return dict(zip(ids, labels, strict=True))


def match_labels(path: Path, directory: Path, files: list[Path]) -> dict[Path, str]:
    """Return the label of each file, whose id is its name, with or without extension, or its path below the directory.

    Args:
        path: CSV of the labels.
        directory: Directory of the files.
        files: Image files.

    Raises:
        InputError: If an id has no file, or a file no id, or the CSV is malformed.
    """
    labels = read_labels(path)
    ids = {file: _find_id(file, directory, labels) for file in files}
    if unlabeled := [file.name for file, id_ in ids.items() if id_ is None]:
        raise InputError(f"{path}: {_examples(unlabeled)}: no such id, although {directory} contains the image")
    found = Counter(id_ for id_ in ids.values() if id_ is not None)
    if unknown := [id_ for id_ in labels if id_ not in found]:
        raise InputError(f"{path}: {_examples(unknown)}: no such image in {directory}; add it, or remove the line")
    if ambiguous := [id_ for id_, count in found.items() if count > 1]:
        raise InputError(f"{path}: {_examples(ambiguous)}: several images in {directory} have this id")
    return {file: labels[id_] for file, id_ in ids.items() if id_ is not None}


def _find_id(file: Path, directory: Path, labels: dict[str, str]) -> str | None:
    names = (file.stem, file.name, file.relative_to(directory).as_posix())
    return next((name for name in names if name in labels), None)


def _examples(names: list[str]) -> str:
    listed = ", ".join(printable(name) for name in names[:MAX_NAMES])
    return listed + (f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else "")
