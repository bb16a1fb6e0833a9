"""The models command: all registered models, with their sizes for images of CIFAR-10."""

from cifar_ignite.data.batch_entries import CIFAR_SIZE
from cifar_ignite.data.cifar10 import CIFAR10_CLASSES
from cifar_ignite.models.registry import format_model_table


def list_models() -> str:
    """Return a table of the registered models."""
    return format_model_table(num_classes=len(CIFAR10_CLASSES), image_size=CIFAR_SIZE)
