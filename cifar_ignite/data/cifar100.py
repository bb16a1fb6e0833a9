"""CIFAR-100 from its official files, with its 100 fine labels."""

from pathlib import Path

from torchvision.datasets import CIFAR100

from cifar_ignite.config import DataConfig
from cifar_ignite.data.batch_entries import describe, get_entry, to_list
from cifar_ignite.data.cifar_batches import load_cifar
from cifar_ignite.data.cifar_files import OfficialFiles
from cifar_ignite.data.dataset import ImageDataset
from cifar_ignite.data.registry import register_dataset
from cifar_ignite.data.unpickling import load_pickle
from cifar_ignite.errors import InputError

META_FILE, NAMES_KEY = CIFAR100.meta["filename"], CIFAR100.meta["key"]
NUM_CLASSES = 100


def load_class_names(directory: Path) -> tuple[str, ...]:
    """Load the names of the classes in the order of the labels from the directory of the official files.

    Raises:
        InputError: If the file is missing, malformed or unsafe.
    """
    path = directory / META_FILE
    names = to_list(get_entry(load_pickle(path), NAMES_KEY, path), NAMES_KEY, NUM_CLASSES, path)
    decoded = tuple(name.decode(errors="replace") if isinstance(name, bytes) else name for name in names)
    if not all(isinstance(name, str) for name in decoded) or len(set(decoded)) < NUM_CLASSES:
        raise InputError(f"{path}: {NAMES_KEY!r} must be {NUM_CLASSES} different names, got {describe(names)}")
    return decoded


CIFAR100_FILES = OfficialFiles(
    title="CIFAR-100",
    source=CIFAR100,
    label_key="fine_labels",
    load_class_names=load_class_names,
    meta_md5s={META_FILE: CIFAR100.meta["md5"]},
    other_versions={
        "*.bin": "of the binary version, which cannot be read",
        "cifar-100-binary": "the binary version, which cannot be read",
        "*.mat": "of the Matlab version, which cannot be read",
        "cifar-100-matlab": "the Matlab version, which cannot be read",
        "cifar*100*.*": f"not the official archive {CIFAR100.filename} (md5 {CIFAR100.tgz_md5})",
    },
)


@register_dataset
def cifar100(config: DataConfig, *, train: bool) -> ImageDataset:
    """CIFAR-100 with fine labels from `config.root`, unpacked or downloaded on first use."""
    return load_cifar(CIFAR100_FILES, config.root, train=train)
