"""Distributions of the elementary random parameters."""

import math

import pytest
import torch

from cifar_ignite.augment.sampling import bernoulli_mask, random_uniform
from tests.augment.oracle import CPU

COUNT = 20_000


def test_random_uniform_fills_its_range():
    torch.manual_seed(0)
    degrees = random_uniform(COUNT, -15, 15, CPU)
    assert -15 <= degrees.min() < -14.9
    assert 14.9 < degrees.max() < 15
    assert degrees.mean().abs() < 0.3
    assert degrees.std() == pytest.approx(30 / math.sqrt(12), rel=0.02)


def test_bernoulli_mask_has_given_probability():
    torch.manual_seed(0)
    assert bernoulli_mask(COUNT, 0.3, CPU).float().mean() == pytest.approx(0.3, abs=0.015)
    assert not bernoulli_mask(COUNT, 0.0, CPU).any()
    assert bernoulli_mask(COUNT, 1.0, CPU).all()
