"""Flip and crop by integer pixels; rotation and perspective as homographies, composed into one resampling.

Images are float (B, C, H, W). A homography (3, 3) maps the homogeneous coordinates of an output pixel to the
coordinates in the input where its value is sampled. Coordinates are those of pixel centers, with the origin in the
middle of the image, x to the right and y down.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from cifar_ignite.augment.elementwise import arange, blend_where, constant
from cifar_ignite.augment.sampling import bernoulli_mask
from cifar_ignite.config import AugmentConfig


def flip(images: Tensor, mask: Tensor) -> Tensor:
    """Flip images horizontally where `mask`, bool (B,), is true."""
    return blend_where(mask[:, None, None, None], images.flip(-1), images)


def random_crop_offsets(batch: int, padding: int, device: torch.device) -> Tensor:
    """Return int64 (B, 2), row and column of the crops, each uniform in [0, 2 * padding]."""
    return torch.randint(0, 2 * padding + 1, (batch, 2), device=device)


def crop(images: Tensor, offsets: Tensor, padding: int, mode: str) -> Tensor:
    """Pad each side and crop back to the original size.

    Args:
        images: Float (B, C, H, W).
        offsets: Int64 (B, 2), row and column of the top left corner in the padded image, in [0, 2 * padding].
        padding: Padding of each side in pixels.
        mode: Padding mode, "constant" (zeros) or "reflect" (without repeating the edge pixel).
    """
    batch, height, width = len(images), images.shape[-2], images.shape[-1]
    padded = F.pad(images, [padding] * 4, mode=mode)
    device = images.device
    rows, columns = offsets[:, 0, None] + arange(height, device), offsets[:, 1, None] + arange(width, device)
    cropped = padded[arange(batch, device)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return cropped.permute(0, 3, 1, 2)


def rotation_matrices(degrees: Tensor) -> Tensor:
    """Return the homographies, float (B, 3, 3), of counter-clockwise rotations by `degrees`, float (B,).

    All entries are sines, so that one operation computes them: cos x = sin(pi / 2 + x), 0 = sin 0, 1 = sin(pi / 2).
    """
    right, degree = math.pi / 2, math.pi / 180
    offset = constant(((right, 0, 0), (0, right, 0), (0, 0, right)), degrees.device)
    slope = constant(((degree, -degree, 0), (degree, degree, 0), (0, 0, 0)), degrees.device)
    return torch.addcmul(offset, degrees[:, None, None], slope).sin_()


def random_perspective_offsets(batch: int, config: AugmentConfig, size: int, device: torch.device) -> Tensor:
    """Draw the inward moves of the corners from the distribution of torchvision's RandomPerspective.

    Args:
        batch: Number of images B.
        config: Section with `perspective_p` and `distortion_scale`.
        size: Height and width of the images in pixels.
        device: Device of the result.

    Returns:
        Float (B, 4, 2), integer pixels in x and y for the corners top left, top right, bottom right, bottom left; each
        uniform in [0, distortion_scale * size / 2], or all 0 with probability 1 - perspective_p.
    """
    high = int(config.distortion_scale * (size // 2)) + 1
    inward = torch.randint(0, high, (batch, 4, 2), dtype=torch.float32, device=device)
    return inward * bernoulli_mask(batch, config.perspective_p, device)[:, None, None]


def perspective_matrices(offsets: Tensor, size: int) -> Tensor:
    """Return the homographies that map the image into a quadrilateral.

    In homogeneous coordinates, the fourth corner is a combination of the other three, of the image's (1, -1, 1) times
    them and of the quadrilateral's as well if they are scaled. The cross products of the quadrilateral's three corners
    are, up to scale, the rows of the map to these coefficients; the scale makes those of the fourth corner 1.

    Args:
        offsets: Float (B, 4, 2), inward moves of the corners (see `random_perspective_offsets`).
        size: Height and width of the images in pixels.

    Returns:
        Float (B, 3, 3).
    """
    # As in torchvision, corners are pixel indices 0 and size - 1, and the middle is size / 2.
    low, high, device = -size / 2, size / 2 - 1, offsets.device
    corners = constant(((low, low, 1), (high, low, 1), (high, high, 1), (low, high, 1)), device)
    inward = constant(((1, 1, 0), (-1, 1, 0), (-1, -1, 0), (1, -1, 0)), device)
    corners = torch.addcmul(corners, F.pad(offsets, (0, 1)), inward)
    three, fourth = corners[:, :3], corners[:, 3, :, None]
    rows = torch.linalg.cross(three.roll(-1, 1), three.roll(-2, 1))
    to_image = constant(((low, -high, high), (low, -low, high), (1, -1, 1)), device)
    return to_image @ (rows / (rows @ fourth))


def warp_perspective(images: Tensor, matrices: Tensor) -> Tensor:
    """Resample images bilinearly by the homographies `matrices`, float (B, 3, 3); values outside the image are 0."""
    height, width = images.shape[-2:]
    x = constant(tuple(column - (width - 1) / 2 for column in range(width)), images.device)
    y = constant(tuple(row - (height - 1) / 2 for row in range(height)), images.device)
    # grid_sample expects the borders of the image at -1 and 1.
    matrices = matrices * constant(((2 / width,), (2 / height,), (1,)), images.device)
    # Each row of a matrix is an affine function of the output coordinates: (B, 3, H, W).
    x_weights, y_weights, shift = matrices[..., None, None].unbind(2)
    rows = torch.addcmul(torch.addcmul(shift, y_weights, y[:, None]), x_weights, x)
    grid = (rows[:, :2] / rows[:, 2:]).permute(0, 2, 3, 1)
    return F.grid_sample(images, grid, padding_mode="zeros", align_corners=False)
