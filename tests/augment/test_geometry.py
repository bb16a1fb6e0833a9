"""Flip, crop, rotation and perspective against torchvision."""

import pytest
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as oracle

from cifar_ignite.augment.geometry import (
    crop,
    flip,
    perspective_matrices,
    random_crop_offsets,
    random_perspective_offsets,
    rotation_matrices,
    warp_perspective,
)
from cifar_ignite.config import AugmentConfig
from tests.augment.oracle import CPU, SIZE, apply_per_image, max_abs

EDGE = SIZE - 1
CORNERS = [[0, 0], [EDGE, 0], [EDGE, EDGE], [0, EDGE]]


def random_offsets(count, p, distortion_scale):
    return random_perspective_offsets(
        count, AugmentConfig(perspective_p=p, distortion_scale=distortion_scale), SIZE, CPU
    )


def test_flip_is_exact(images):
    mask = torch.arange(16) % 3 == 0
    expected = apply_per_image(lambda image, m: oracle.horizontal_flip(image) if m else image, images, mask)
    assert torch.equal(flip(images, mask), expected)


@pytest.mark.parametrize("mode", ["constant", "reflect"])
def test_crop_is_exact(images, mode):
    offsets = random_crop_offsets(16, 4, CPU)
    expected = apply_per_image(
        lambda image, at: oracle.crop(oracle.pad(image, [4], padding_mode=mode), int(at[0]), int(at[1]), SIZE, SIZE),
        images,
        offsets,
    )
    assert torch.equal(crop(images, offsets, 4, mode), expected)


def test_random_crop_offsets_fill_their_range():
    torch.manual_seed(0)
    assert torch.equal(random_crop_offsets(20_000, 4, CPU).unique(), torch.arange(9))


def test_rotation_matches_torchvision(images):
    degrees = torch.linspace(-30, 30, 16)
    expected = apply_per_image(
        lambda image, angle: oracle.rotate(image, angle.item(), InterpolationMode.BILINEAR), images, degrees
    )
    warped = warp_perspective(images, rotation_matrices(degrees))
    assert max_abs(warped - expected, border=2) < 2 / 255
    assert max_abs(warped - expected) < 1e-4


def test_perspective_matches_torchvision(images):
    offsets = random_offsets(16, 1.0, 0.4)

    def perspective(image, inward):
        end = [
            [x + (dx if x == 0 else -dx), y + (dy if y == 0 else -dy)]
            for (x, y), (dx, dy) in zip(CORNERS, inward.int().tolist(), strict=True)
        ]
        return oracle.perspective(image, CORNERS, end, InterpolationMode.BILINEAR)

    warped = warp_perspective(images, perspective_matrices(offsets, SIZE))
    expected = apply_per_image(perspective, images, offsets)
    assert max_abs(warped - expected, border=2) < 2 / 255
    assert max_abs(warped - expected) < 1e-3


def test_strongest_perspective_is_finite():
    strongest = next(
        bound.le for bound in AugmentConfig.model_fields["distortion_scale"].metadata if hasattr(bound, "le")
    )
    offsets = torch.cartesian_prod(*[torch.tensor([0.0, int(strongest * (SIZE // 2))])] * 8).view(-1, 4, 2)
    assert perspective_matrices(offsets, SIZE).isfinite().all()
    images = torch.rand(1, 3, SIZE, SIZE).expand(len(offsets), -1, -1, -1)
    assert warp_perspective(images, perspective_matrices(offsets, SIZE)).isfinite().all()


def test_random_perspective_offsets_fill_their_range():
    torch.manual_seed(0)
    offsets = random_offsets(20_000, 0.5, 0.2)
    assert torch.equal(offsets.unique(), torch.arange(4.0))  # integer pixels from 0 to 0.2 * 16
    assert offsets.any(-1).any(-1).float().mean() == pytest.approx(0.5, abs=0.02)


def test_identity_warp_changes_nothing(images):
    matrices = rotation_matrices(torch.zeros(16)) @ perspective_matrices(torch.zeros(16, 4, 2), SIZE)
    assert max_abs(warp_perspective(images, matrices) - images) < 1e-4


def test_composed_warps_equal_warp_by_product():
    """Where the intermediate image is smooth, warping twice and warping once by the product agree."""
    y, x = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    smooth = torch.stack([torch.sin(x / 9), torch.cos(y / 8), torch.sin((x + y) / 10)]).expand(8, -1, -1, -1) / 2 + 0.5
    rotation = rotation_matrices(torch.linspace(-15, 15, 8))
    perspective = perspective_matrices(random_offsets(8, 1.0, 0.2), SIZE)
    twice = warp_perspective(warp_perspective(smooth, rotation), perspective)
    once = warp_perspective(smooth, rotation @ perspective)
    assert max_abs(twice - once, border=9) < 2 / 255


def test_rotation_then_perspective_has_torchvisions_order():
    """The position of a dot shows which of the two was applied first."""
    dot = torch.zeros(1, 3, SIZE, SIZE)
    dot[..., 8:11, 21:24] = 1
    offsets = torch.tensor([[[6.0, 1.0], [0.0, 5.0], [3.0, 0.0], [0.0, 6.0]]])
    matrices = rotation_matrices(torch.tensor([40.0])) @ perspective_matrices(offsets, SIZE)
    end = [[6, 1], [EDGE, 5], [EDGE - 3, EDGE], [0, EDGE - 6]]
    rotated = oracle.rotate(dot, 40.0, InterpolationMode.BILINEAR)
    expected = oracle.perspective(rotated, CORNERS, end, InterpolationMode.BILINEAR)

    def center(image):
        weight = image[0, 0]
        grid = torch.arange(SIZE, dtype=torch.float)
        return torch.stack([(weight.sum(1) * grid).sum(), (weight.sum(0) * grid).sum()]) / weight.sum()

    assert (center(warp_perspective(dot, matrices)) - center(expected)).abs().max() < 0.1
