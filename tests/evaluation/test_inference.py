"""Inference and test-time augmentation."""

import pytest
import torch
from ignite.metrics import ConfusionMatrix
from torchvision.transforms.v2 import functional

from cifar_ignite.data.dataset import ImageDataset
from cifar_ignite.evaluation.inference import (
    DeviceConfusionMatrix,
    create_inference_forward,
    run_inference,
)
from cifar_ignite.training.forward import create_tta_forward
from tests.evaluation.helpers import FixedLogits, trained_with


def test_tta_forward_averages_views_of_torchvision():
    """A linear model distinguishes all views, because each pixel has its own weight."""
    torch.manual_seed(0)
    images, weights = torch.rand(4, 3, 32, 32), torch.randn(3 * 32 * 32, 10)

    def forward(batch):
        return batch.flatten(1) @ weights

    def both(batch):
        return (forward(batch) + forward(functional.horizontal_flip(batch))) / 2

    padded = functional.pad(images, [1], padding_mode="reflect")
    up_left, down_right = (functional.crop(padded, offset, offset, 32, 32) for offset in (2, 0))
    assert torch.allclose(create_tta_forward(forward, "flip")(images), both(images), atol=1e-4)
    expected = 0.5 * both(images) + 0.25 * both(up_left) + 0.25 * both(down_right)
    assert torch.allclose(create_tta_forward(forward, "shift")(images), expected, atol=1e-4)


@pytest.mark.parametrize("num_classes", [3, 10])
def test_run_inference_sizes_metrics_by_class_names_of_record(num_classes):
    class_names = tuple(f"class {index}" for index in range(num_classes))
    logits, labels = torch.randn(100, num_classes), torch.arange(100) % num_classes
    dataset = ImageDataset(torch.zeros(100, 3, 32, 32, dtype=torch.uint8), labels, list(range(100)), class_names)
    trained = trained_with(FixedLogits(logits), class_names)
    outputs, metrics = run_inference(trained, create_inference_forward(trained), dataset)
    assert outputs.shape == (100, num_classes)
    assert metrics["confusion"].shape == (num_classes, num_classes)
    assert metrics["confusion"].sum() == 100


def test_run_inference_without_labels_returns_logits_only():
    logits = torch.randn(70, 10)
    trained = trained_with(FixedLogits(logits))
    images = torch.zeros(70, 3, 32, 32, dtype=torch.uint8)
    dataset = ImageDataset(images, None, list(range(70)), tuple(trained.record.class_names))
    outputs, metrics = run_inference(trained, trained.model, dataset)
    assert torch.equal(outputs, logits)
    assert metrics == {}


def test_device_confusion_matrix_equals_ignites():
    torch.manual_seed(0)
    ours, theirs = DeviceConfusionMatrix(4), ConfusionMatrix(4)
    for size in (50, 7, 0):
        output = torch.randn(size, 4), torch.randint(4, (size,))
        ours.update(output)
        if size:  # Ignite's own refuses an empty batch
            theirs.update(output)
    assert torch.equal(ours.compute(), theirs.compute())
