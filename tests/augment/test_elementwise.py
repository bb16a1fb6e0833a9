"""Elementwise operations against torch and torchvision."""

import torch
from torchvision.transforms.v2 import functional as oracle

from cifar_ignite.augment.elementwise import blend_where, constant, normalize, to_float
from cifar_ignite.config import AugmentConfig
from tests.augment.oracle import CPU


def test_to_float_maps_bytes_to_unit_interval():
    images = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_float(images), torch.arange(256) / 255)


def test_normalize_matches_torchvision(images):
    config = AugmentConfig()
    expected = oracle.normalize(images, list(config.mean), list(config.std))
    assert torch.allclose(normalize(images, config.mean, config.std), expected, atol=1e-6)


def test_constant_is_copied_to_device_once():
    assert torch.equal(constant((1, 2.5), CPU), torch.tensor([1, 2.5]))
    assert constant((1, 2.5), CPU) is constant((1, 2.5), CPU)


def test_blend_where_equals_torch_where():
    torch.manual_seed(0)
    selected, other, mask = torch.randn(1000) * 1e3, torch.randn(1000), torch.rand(1000) < 0.5
    assert torch.equal(blend_where(mask, selected, other), torch.where(mask, selected, other))
