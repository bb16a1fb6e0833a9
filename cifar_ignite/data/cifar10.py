"""CIFAR-10 from its official files."""

from torchvision.datasets import CIFAR10

from cifar_ignite.config import DataConfig
from cifar_ignite.data.cifar_batches import load_cifar
from cifar_ignite.data.cifar_files import OfficialFiles
from cifar_ignite.data.dataset import ImageDataset
from cifar_ignite.data.registry import register_dataset

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR10_FILES = OfficialFiles(
    title="CIFAR-10",
    source=CIFAR10,
    label_key="labels",
    load_class_names=lambda directory: CIFAR10_CLASSES,  # batches.meta is never read
    meta_md5s={},
    other_versions={
        "*_batch*.gz": "gzipped: gunzip it and the other batches",
        "*_batch*.bin": "of the binary version, which cannot be read",
        "*-batches-bin": "the binary version, which cannot be read",
        "*_batch*.mat": "of the Matlab version, which cannot be read",
        "*-batches-mat": "the Matlab version, which cannot be read",
        "trainLabels.csv": "of Kaggle's PNG version: read it with DATA=folder",
        "cifar*10*.*": f"not the official archive {CIFAR10.filename} (md5 {CIFAR10.tgz_md5})",
    },
)


@register_dataset
def cifar10(config: DataConfig, *, train: bool) -> ImageDataset:
    """CIFAR-10 from `config.root`, unpacked or downloaded on first use."""
    return load_cifar(CIFAR10_FILES, config.root, train=train)
