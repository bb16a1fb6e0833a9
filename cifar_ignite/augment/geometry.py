"""Flip and crop by integer pixels; rotation and perspective as homographies, composed into one resampling.

Images are float (B, C, H, W). A homography (3, 3) maps the homogeneous coordinates of an output pixel to the
coordinates in the input where its value is sampled. Coordinates are those of pixel centers, with the origin in the
middle of the image, x to the right and y down.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from cifar_ignite.augment.elementwise import blend_where, constant
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
    rows = offsets[:, 0, None] + torch.arange(height, device=device)
    columns = offsets[:, 1, None] + torch.arange(width, device=device)
    cropped = padded[torch.arange(batch, device=device)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return cropped.permute(0, 3, 1, 2)


def rotation_matrices(degrees: Tensor) -> Tensor:
    """Return the homographies, float (B, 3, 3), of counter-clockwise rotations by `degrees`, float (B,)."""
    angle = torch.deg2rad(degrees)
    cos, sin, zero, one = angle.cos(), angle.sin(), torch.zeros_like(angle), torch.ones_like(angle)
    return torch.stack([cos, -sin, zero, sin, cos, zero, zero, zero, one], dim=-1).view(-1, 3, 3)


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
    inward = torch.randint(0, int(config.distortion_scale * (size // 2)) + 1, (batch, 4, 2), device=device)
    return (inward * bernoulli_mask(batch, config.perspective_p, device)[:, None, None]).float()


def perspective_matrices(offsets: Tensor, size: int) -> Tensor:
    """Return the homographies that map the image into a quadrilateral.

    Args:
        offsets: Float (B, 4, 2), inward moves of the corners (see `random_perspective_offsets`).
        size: Height and width of the images in pixels.

    Returns:
        Float (B, 3, 3).
    """
    unit_square = constant(((0, 0), (1, 0), (1, 1), (0, 1)), offsets.device)
    # As in torchvision, corners are pixel indices 0 and size - 1, and the middle is size / 2.
    edge, middle = size - 1, size / 2
    inward = 1 - 2 * unit_square
    corners = unit_square * edge - middle + offsets * inward
    square_to_image = constant(((edge, 0, -middle), (0, edge, -middle), (0, 0, 1)), offsets.device)
    return square_to_image @ _quadrilateral_to_unit_square(corners)


def _quadrilateral_to_unit_square(corners: Tensor) -> Tensor:
    """Return the homographies, float (B, 3, 3), from the quadrilaterals `corners`, float (B, 4, 2), to the unit square.

    The map from the unit square to a quadrilateral has a closed form (Heckbert, "Fundamentals of Texture Mapping and
    Image Warping", 1989, section 2.2.3); its inverse up to scale is the adjugate, whose rows are cross products.
    """
    x, y = corners.unbind(-1)
    (x0, x1, x2, x3), (y0, y1, y2, y3) = x.unbind(-1), y.unbind(-1)
    sum_x, sum_y = x0 - x1 + x2 - x3, y0 - y1 + y2 - y3
    determinant = (x1 - x2) * (y3 - y2) - (x3 - x2) * (y1 - y2)
    g = (sum_x * (y3 - y2) - (x3 - x2) * sum_y) / determinant
    h = ((x1 - x2) * sum_y - sum_x * (y1 - y2)) / determinant
    first = torch.stack([x1 - x0 + g * x1, y1 - y0 + g * y1, g], dim=-1)
    second = torch.stack([x3 - x0 + h * x3, y3 - y0 + h * y3, h], dim=-1)
    third = torch.stack([x0, y0, torch.ones_like(x0)], dim=-1)
    return torch.stack(
        [torch.linalg.cross(second, third), torch.linalg.cross(third, first), torch.linalg.cross(first, second)], dim=-2
    )


def warp_perspective(images: Tensor, matrices: Tensor) -> Tensor:
    """Resample images bilinearly by the homographies `matrices`, float (B, 3, 3); values outside the image are 0."""
    height, width = images.shape[-2:]
    x = torch.arange(width, device=images.device) - (width - 1) / 2
    y = torch.arange(height, device=images.device) - (height - 1) / 2
    # Each row of a matrix is an affine function of the output coordinates: (B, 3, H, W).
    x_weights, y_weights, shift = matrices.unbind(-1)
    rows = x_weights[..., None, None] * x + (y_weights[..., None] * y + shift[..., None])[..., None]
    source_x, source_y, scale = rows.unbind(1)
    # grid_sample expects the borders of the image at -1 and 1.
    grid = torch.stack([source_x / (scale * (width / 2)), source_y / (scale * (height / 2))], dim=-1)
    return F.grid_sample(images, grid, padding_mode="zeros", align_corners=False)
