"""Datasets and their registry; importing a module with datasets registers them."""

from cifar_ignite.data import cifar10, cifar100, folder, synthetic
from cifar_ignite.data.registry import DATASETS, load_dataset, register_dataset

__all__ = ["DATASETS", "cifar10", "cifar100", "folder", "load_dataset", "register_dataset", "synthetic"]
