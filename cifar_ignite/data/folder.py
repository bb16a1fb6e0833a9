"""Your own images: a directory per class, as for torchvision's ImageFolder, or a CSV of labels, as on Kaggle."""

import logging
import os
import re
from pathlib import Path
from typing import Any

from cifar_ignite.config import DataConfig
from cifar_ignite.data.file_dataset import ImageFiles
from cifar_ignite.data.image_files import find_images, is_system_name, printable
from cifar_ignite.data.label_csv import find_label_file, match_labels, read_labels
from cifar_ignite.data.registry import register_dataset
from cifar_ignite.errors import InputError
from cifar_ignite.files import is_directory

logger = logging.getLogger(__name__)

TRAIN, VAL, TEST = "train", "val", "test"
MAX_NAMES = 5
LAYOUT_HINT = "put the images into {root}/train/CLASS/, or name the directory that contains train with DATA_DIR="


@register_dataset
def folder(config: DataConfig, *, train: bool) -> ImageFiles:
    """Your own images in `config.root`: train/CLASS/*, test/CLASS/*, and optionally val/CLASS/*."""
    class_names = list_classes(config.root)
    if not train:
        return list_split(config.root, TEST, class_names)
    val = list_split(config.root, VAL, class_names) if is_directory(config.root / VAL) else None
    if val and val.labels is None:
        raise InputError(f"{val.directory}: no class directories, and no valLabels.csv; validation requires labels")
    listed = list_split(config.root, TRAIN, class_names)
    return ImageFiles(listed.directory, listed.files, listed.labels, listed.ids, class_names, val)


def list_classes(root: Path) -> tuple[str, ...]:
    """Return the names of the classes in alphabetical order: those of `train`, otherwise those of `test`.

    Raises:
        InputError: If there are none.
    """
    split = TEST if not is_directory(root / TRAIN) and is_directory(root / TEST) else TRAIN
    if not is_directory(root / split):
        raise InputError(f"{root}: no directory train ({_describe(root)}); {LAYOUT_HINT.format(root=root)}")
    names = list_subdirectories(root / split)
    if not names and (label_file := find_label_file(root, split)):
        names = sorted(set(read_labels(label_file).values()))
    if not names and split == TEST:
        raise InputError(
            f"{root}: no directory train, and no class directories or testLabels.csv for test, which would name the "
            f"classes; predict classifies unlabeled images: make predict IMAGES={root / TEST}"
        )
    if not names:
        raise InputError(
            f"{root / split}: no class directories, and no {split}Labels.csv in {root}; {LAYOUT_HINT.format(root=root)}"
        )
    if invalid := [name for name in names if printable(name) != name]:
        raise InputError(f"{root / split}: a class name cannot be printed ({printable(invalid[0])}); rename the class")
    return tuple(names)


def list_split(root: Path, split: str, class_names: tuple[str, ...]) -> ImageFiles:
    """List the images of one split in a fixed order: by their file names, with numbers by value, then by class.

    Args:
        root: Directory of the dataset.
        split: Name of its directory: "train", "val" or "test".
        class_names: Names of the classes in the order of the labels.

    Raises:
        InputError: If there is no such directory, it contains no images, or another class.
    """
    directory = root / split
    if not is_directory(directory):
        what = "not a directory" if os.path.exists(directory) else "no such directory"
        raise InputError(f"{directory}: {what} ({_describe(root)}); put the {split} images there")
    label_file = find_label_file(root, split)
    if names := list_subdirectories(directory):
        if label_file:
            logger.warning("%s is not read: the directories in %s are the classes", label_file, directory)
        return _list_class_directories(directory, names, class_names)
    files = sorted(find_images([directory]), key=lambda file: natural_key(file.relative_to(directory)))
    ids: list[Any] = [_relative_name(file, directory) for file in files]
    if label_file:
        names_by_file = match_labels(label_file, directory, files)
        _check_known(label_file, sorted(set(names_by_file.values())), class_names)
        label_by_name = {name: label for label, name in enumerate(class_names)}
        labels = [label_by_name[names_by_file[file]] for file in files]
        return ImageFiles(directory, files, labels, _short_ids(files, ids), class_names)
    return ImageFiles(directory, files, None, _short_ids(files, ids), class_names)


def _list_class_directories(directory: Path, names: list[str], class_names: tuple[str, ...]) -> ImageFiles:
    _check_known(directory, names, class_names)
    if loose := [name for name in _list_names(directory) if name not in names]:
        raise InputError(
            f"{directory}: {_enumerate([printable(name) for name in loose])} beside the class directories; move each "
            "file into the directory of its class, or out of this one"
        )
    keyed = []
    for name in names:
        try:
            files = find_images([directory / name])
        except InputError as error:
            raise InputError(f"{error}; every class directory must contain images") from None
        label = class_names.index(name)
        keyed += [(natural_key(file.relative_to(directory / name)), label, file) for file in files]
    keyed.sort()
    files, labels = [file for *_, file in keyed], [label for _, label, _ in keyed]
    return ImageFiles(directory, files, labels, [_relative_name(file, directory) for file in files], class_names)


def _check_known(source: Path, names: list[str], class_names: tuple[str, ...]) -> None:
    """Raise an `InputError` if a class is not one of the training images."""
    if unknown := [name for name in names if name not in class_names]:
        raise InputError(
            f"{printable(source)}: {_enumerate(unknown)} is no class of the training images "
            f"({_enumerate(class_names)}); rename it, or put unlabeled images directly into the directory"
        )


def list_subdirectories(directory: Path) -> list[str]:
    """Return the sorted names of the subdirectories that are not hidden.

    Raises:
        InputError: If the directory cannot be listed.
    """
    return [name for name in _list_names(directory) if os.path.isdir(directory / name)]


def _list_names(directory: Path) -> list[str]:
    try:
        return sorted(name for name in os.listdir(directory) if not is_system_name(name))
    except OSError as error:
        raise InputError(f"{directory}: cannot list this directory: {error.strerror}") from None


def natural_key(path: Path) -> tuple[Any, ...]:
    """Return a sorting key in which numbers are ordered by value: 2.png before 10.png."""
    parts = re.split("([0-9]+)", path.as_posix())
    return [int(part) if index % 2 else part for index, part in enumerate(parts)], path.as_posix()


def _relative_name(file: Path, directory: Path) -> str:
    return printable(file.relative_to(directory).as_posix())


def _short_ids(files: list[Path], ids: list[Any]) -> list[Any]:
    """Return the names without extensions, as a submission on Kaggle has them, if they are unique."""
    stems = [printable(file.stem) for file in files]
    return stems if len(set(stems)) == len(stems) else ids


def _describe(root: Path) -> str:
    if not is_directory(root):
        return f"{root} {'is not a directory' if os.path.exists(root) else 'does not exist'}"
    return f"{root} contains {_enumerate(_list_names(root)) or 'nothing'}"


def _enumerate(names: Any) -> str:
    names = [printable(name) for name in names]
    return ", ".join(names[:MAX_NAMES]) + (f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else "")
