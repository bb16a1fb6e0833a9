"""Labels in a CSV of two columns, id and label, as in Kaggle's competitions."""

import csv
from collections import Counter
from pathlib import Path

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
        InputError: If it is malformed or has no labels, or an id is repeated.
    """
    pairs = _read_rows(path)[1:]
    if not pairs:
        raise InputError(f"{path}: no labels; expected a header line, and a line with id and label for each image")
    if repeated := [id_ for id_, count in Counter(id_ for id_, _ in pairs).items() if count > 1]:
        raise InputError(f"{path}: {_examples(repeated)}: repeated ids; each image has one label")
    if missing := [id_ for id_, label in pairs if not label]:
        raise InputError(f"{path}: {_examples(missing)}: ids without a label")
    return dict(pairs)


def _read_rows(path: Path) -> list[tuple[str, str]]:
    """Return the first two cells of each line that is not blank; the others must be empty."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, skipinitialspace=True, strict=True)
            rows = [cells for row in reader if any(cells := [cell.strip() for cell in row])]
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8; save the file as UTF-8") from None
    except (OSError, csv.Error) as error:
        raise InputError(f"{path}: cannot read the labels: {first_line(error)}") from None
    for row in rows:
        if len(row) < 2 or any(row[2:]):
            found = f"{len(row)} ({', '.join(map(printable, row[:MAX_NAMES]))})"
            raise InputError(f"{path}: expected two columns, id and label, separated by a comma; found {found}")
    return [(row[0], row[1]) for row in rows]


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
        raise InputError(
            f"{path}: {_examples(unlabeled)}: no such id, although {directory} contains the image; add a line for it "
            "(the first line is the header)"
        )
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
