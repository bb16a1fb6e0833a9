"""Configuration values that null leaves to the data."""

import pytest
import torch

from cifar_ignite.config import Config
from cifar_ignite.config_io import parse_config
from cifar_ignite.data.dataset import ImageDataset
from cifar_ignite.data.resolving import channel_statistics, resolve_config
from cifar_ignite.errors import InputError


def noise(count=40, size=16):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)
    images[:, 1] //= 4
    return ImageDataset(images, torch.arange(count) % 2, list(range(count)), ("a", "b"))


def test_channel_statistics_match_torch_and_do_not_depend_on_order():
    images = noise().images
    mean, std = channel_statistics(images)
    values = images.double() / 255
    assert mean == pytest.approx(values.mean((0, 2, 3)).tolist(), abs=6e-5)
    assert std == pytest.approx(values.std((0, 2, 3), correction=0).tolist(), abs=6e-5)
    assert channel_statistics(images.flip(0)) == (mean, std)


def test_resolve_config_replaces_nulls_by_values_of_the_training_images():
    dataset = noise()
    config = parse_config({"augment": {"mean": None, "std": None}}, "test")
    resolved = resolve_config(config, dataset, noise(7))
    assert resolved.augment.normalization == channel_statistics(dataset.images)
    assert resolved.data.val_size == 7
    assert parse_config(resolved.model_dump(mode="json"), "test") == resolved


def test_resolve_config_keeps_given_values():
    half = parse_config({"augment": {"mean": None}}, "test")
    assert resolve_config(Config(), noise(), noise(7)).augment == Config().augment
    assert resolve_config(half, noise(), noise(7)).augment.std == Config().augment.std


def test_resolve_config_of_constant_images_names_the_key():
    black = ImageDataset(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.arange(4) % 2, [0] * 4, ("a", "b"))
    with pytest.raises(InputError, match=r"augment\.std: null.* constant"):
        resolve_config(parse_config({"augment": {"std": None}}, "test"), black, black)


def test_normalization_without_training_names_the_key():
    with pytest.raises(InputError, match=r"augment\.std: null"):
        _ = parse_config({"augment": {"std": None}}, "test").augment.normalization
