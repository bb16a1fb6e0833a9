"""Color operations against torchvision."""

import pytest
import torch
from torchvision.transforms.v2 import functional as oracle

from cifar_ignite.augment.color import adjust_brightness, adjust_contrast, adjust_hue, adjust_saturation
from tests.augment.oracle import apply_per_image, max_abs


@pytest.mark.parametrize(
    ("adjust", "oracle_adjust", "low", "high"),
    [
        (adjust_brightness, oracle.adjust_brightness, 0.0, 2.0),
        (adjust_contrast, oracle.adjust_contrast, 0.0, 2.0),
        (adjust_saturation, oracle.adjust_saturation, 0.0, 2.0),
        (adjust_hue, oracle.adjust_hue, -0.5, 0.5),
    ],
)
def test_color_adjustment_matches_torchvision(images, adjust, oracle_adjust, low, high):
    factors = torch.linspace(low, high, 16)
    expected = apply_per_image(lambda image, factor: oracle_adjust(image, factor.item()), images, factors)
    assert max_abs(adjust(images, factors) - expected) < 1e-5
    as_bytes = (images * 255).round().to(torch.uint8)
    expected = apply_per_image(lambda image, factor: oracle_adjust(image, factor.item()), as_bytes, factors)
    assert (255 * adjust(as_bytes / 255, factors) - expected).abs().max() <= 2
