"""Inputs of the evaluation tests."""

import pickle
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cifar_ignite.checkpointing.run_record import RunRecord
from cifar_ignite.config_io import parse_config
from cifar_ignite.data.cifar10 import CIFAR10_CLASSES
from cifar_ignite.evaluation.trained_model import TrainedModel


class FixedLogits(torch.nn.Module):
    """A model that returns given logits (N, num_classes), row by row, for any images."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits, self.num_done = logits, 0

    def forward(self, images: Tensor) -> Tensor:
        self.num_done += len(images)
        return self.logits[self.num_done - len(images) : self.num_done]


def trained_with(model: torch.nn.Module, class_names: tuple[str, ...] = CIFAR10_CLASSES) -> TrainedModel:
    """Return a model as if it was loaded from a checkpoint; batches have 64 images."""
    config = parse_config({"data": {"batch_size": 64}}, "test")
    record = RunRecord("run", {}, list(class_names))
    return TrainedModel(Path("model.pth"), record, config, torch.device("cpu"), model)


def write_unlabeled_test_file(path: Path) -> Path:
    """Write the competition's test pickle with 12 images; return `path`."""
    data = np.random.default_rng(0).integers(0, 256, (12, 3072), dtype=np.uint8)
    path.write_bytes(pickle.dumps({b"data": data, b"ids": np.arange(12)[::-1].copy()}))
    return path


def load_test_labels(cifar_root: Path) -> np.ndarray:
    """Return the labels of the test set, read without the package."""
    with (cifar_root / "cifar-10-batches-py" / "test_batch").open("rb") as file:
        return np.array(pickle.load(file, encoding="bytes")[b"labels"])


def only_evaluation(directory: Path) -> Path:
    """Return the only evaluation below directory/outputs."""
    (evaluation_dir,) = (directory / "outputs" / "evaluations").iterdir()
    return evaluation_dir
