"""Random erasing and cutout against torchvision."""

import pytest
import torch

from cifar_ignite.augment.erasing import erase, random_cutout_boxes, random_erasing_boxes
from cifar_ignite.config import AugmentConfig
from tests.augment.oracle import CPU, SIZE, apply_per_image, erase_box


def test_erasing_is_exact(images):
    config = AugmentConfig(erasing_p=0.7, erasing_scale=(0.02, 0.4))
    boxes = random_erasing_boxes(16, config, SIZE, CPU)
    assert torch.equal(erase(images, boxes), apply_per_image(erase_box, images, boxes.tolist()))


def test_cutout_is_clipped_at_border(images):
    boxes = random_cutout_boxes(16, 12, SIZE, CPU)
    assert (boxes < 0).any()
    assert (boxes > SIZE).any()
    assert torch.equal(erase(images, boxes), apply_per_image(erase_box, images, boxes.clamp(0, SIZE).tolist()))


def test_random_erasing_boxes_have_given_probability_area_and_ratio():
    torch.manual_seed(0)
    config = AugmentConfig(erasing_p=0.3, erasing_scale=(0.02, 0.2), erasing_ratio=(0.3, 3.3))
    boxes = random_erasing_boxes(20_000, config, SIZE, CPU)
    extent = (boxes[:, 2:] - boxes[:, :2]).float()
    is_erased = extent.prod(1) > 0
    assert is_erased.float().mean() == pytest.approx(0.3, abs=0.015)
    area, ratio = extent[is_erased].prod(1) / SIZE**2, extent[is_erased, 0] / extent[is_erased, 1]
    # Rounding to integer pixels changes the area of a narrow box by a few percent of the image.
    assert 0.01 < area.min() < 0.03
    assert 0.19 < area.max() < 0.23
    assert area.mean() == pytest.approx(0.11, abs=0.005)
    assert ratio.log().mean().abs() < 0.05
    assert 0.2 < ratio.min() < 0.4
    assert 2.8 < ratio.max() < 4.5
    assert boxes.min() == 0
    assert boxes.max() == SIZE
