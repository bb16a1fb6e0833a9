"""The synthetic dataset: deterministic, balanced, and not linearly separable."""

import numpy as np
import pytest
import torch

from cifar_ignite.config import DataConfig, SyntheticConfig
from cifar_ignite.data import memory
from cifar_ignite.data.registry import load_dataset
from cifar_ignite.data.synthetic import SYNTHETIC_CLASSES, make_synthetic
from cifar_ignite.errors import InputError


def test_make_synthetic_is_function_of_seed_and_split():
    config = SyntheticConfig(train_size=200, test_size=50)
    train, test = make_synthetic(config, train=True), make_synthetic(config, train=False)
    assert train.images.shape == (200, 3, 32, 32)
    assert train.images.dtype == torch.uint8
    assert torch.bincount(train.labels).tolist() == [20] * 10
    assert train.class_names == SYNTHETIC_CLASSES
    assert len(test) == 50
    assert torch.equal(train.images, make_synthetic(config, train=True).images)
    other = make_synthetic(config.model_copy(update={"seed": 1}), train=True)
    assert not torch.equal(train.images, other.images)
    assert not torch.equal(train.images[:50], test.images)


def test_make_synthetic_of_another_size_has_the_same_shapes():
    small, large = (make_synthetic(SyntheticConfig(train_size=64), train=True, size=size) for size in (32, 64))
    assert large.images.shape == (64, 3, 64, 64)
    assert torch.equal(small.labels, large.labels)
    reduced = torch.nn.functional.avg_pool2d(large.images.float(), 2)
    # The noise differs and edges are rendered more finely, but shapes, positions and colors are the same.
    assert (reduced - small.images).abs().median() < 20


def test_load_dataset_reads_synthetic_section():
    config = DataConfig(dataset="synthetic", synthetic=SyntheticConfig(train_size=30, test_size=20, seed=3))
    for train in (True, False):
        loaded, expected = load_dataset(config, train=train), make_synthetic(config.synthetic, train=train)
        assert torch.equal(loaded.images, expected.images)
        assert torch.equal(loaded.labels, expected.labels)


@pytest.mark.parametrize(("train", "count"), [(True, 300), (False, 200)])
def test_synthetic_images_beyond_memory_are_refused_before_drawing(monkeypatch, train, count):
    monkeypatch.setattr(memory, "available_memory", lambda: 10_000_000)
    monkeypatch.setattr("cifar_ignite.data.synthetic.make_synthetic", None)
    config = DataConfig(dataset="synthetic", image_size=1024, synthetic=SyntheticConfig(train_size=300, test_size=200))
    with pytest.raises(InputError, match=rf"data\.image_size: {count} images of 1024 pixels .*10\.0 MB"):
        load_dataset(config, train=train)


def test_make_synthetic_draws_few_large_images_at_a_time(monkeypatch):
    sizes = []

    def random_images(labels, size, rng):
        sizes.append(len(labels) * size**2)
        return np.zeros((len(labels), 3, size, size), np.uint8)

    monkeypatch.setattr("cifar_ignite.data.synthetic._random_images", random_images)
    make_synthetic(SyntheticConfig(test_size=100), train=False, size=1024)
    assert max(sizes) <= 4096 * 128**2
    assert sum(sizes) == 100 * 1024**2


def test_linear_classifier_stays_below_60_percent_on_synthetic():
    """On means of 2x2 pixels: with fewer weights, it generalizes better."""
    config = SyntheticConfig(train_size=3000, test_size=1000)
    train, test = make_synthetic(config, train=True), make_synthetic(config, train=False)

    def features(images):
        flat = torch.nn.functional.avg_pool2d(images.double() / 255, 2).flatten(1)
        return torch.cat([flat, torch.ones(len(flat), 1, dtype=torch.double)], 1)

    x, y = features(train.images), torch.nn.functional.one_hot(train.labels, 10).double()
    weights = torch.linalg.solve(x.T @ x + 100 * torch.eye(x.shape[1]), x.T @ y)
    accuracy = ((features(test.images) @ weights).argmax(1) == test.labels).float().mean().item()
    assert 0.15 < accuracy < 0.6
