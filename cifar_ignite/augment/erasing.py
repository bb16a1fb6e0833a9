"""Random erasing and cutout: boxes in an image that are set to 0.

Boxes are int64 (B, 4): top, left, bottom, right in pixels; bottom and right are exclusive.
"""

import math

import torch
from torch import Tensor

from cifar_ignite.augment.sampling import bernoulli_mask, random_uniform
from cifar_ignite.config import AugmentConfig


def random_erasing_boxes(batch: int, config: AugmentConfig, size: int, device: torch.device) -> Tensor:
    """Draw boxes for random erasing (Zhong et al., 2017, arXiv:1708.04896).

    Args:
        batch: Number of images B.
        config: Section with `erasing_p`, the probability of a box (all others are empty), `erasing_scale`, the range of
            the box's fraction of the image (uniform), and `erasing_ratio`, the range of height / width (log-uniform).
        size: Height and width of the images in pixels. A box is at most size - 1 high and wide.
        device: Device of the result.

    Returns:
        Int64 (B, 4), inside the image.
    """
    low, high = config.erasing_ratio
    area = random_uniform(batch, *config.erasing_scale, device) * size**2
    ratio = random_uniform(batch, math.log(low), math.log(high), device).exp()
    mask = bernoulli_mask(batch, config.erasing_p, device)
    extent = torch.stack([area * ratio, area / ratio], dim=-1).sqrt().round().clamp(max=size - 1).long()
    extent = extent * mask[:, None]
    corner = (torch.rand(batch, 2, device=device) * (size - extent + 1)).long()
    return torch.cat([corner, corner + extent], dim=-1)


def random_cutout_boxes(batch: int, side: int, size: int, device: torch.device) -> Tensor:
    """Draw boxes for cutout (DeVries and Taylor, 2017, arXiv:1708.04552): squares centered on any pixel.

    Args:
        batch: Number of images B.
        side: Side of the squares in pixels.
        size: Height and width of the images in pixels.
        device: Device of the result.

    Returns:
        Int64 (B, 4); boxes may extend beyond the image.
    """
    corner = torch.randint(0, size, (batch, 2), device=device) - side // 2
    return torch.cat([corner, corner + side], dim=-1)


def erase(images: Tensor, boxes: Tensor) -> Tensor:
    """Set the inside of `boxes`, int64 (B, 4), to 0, which is the mean of normalized images."""
    top, left, bottom, right = boxes[:, :, None].unbind(1)
    row = torch.arange(images.shape[-2], device=images.device)
    column = torch.arange(images.shape[-1], device=images.device)
    rows, columns = (row >= top) & (row < bottom), (column >= left) & (column < right)
    # A product of zeros and ones, because masked_fill is not vectorized on a CPU.
    inside = rows[:, :, None].to(images.dtype) * columns[:, None, :].to(images.dtype)
    return images * (1 - inside)[:, None]
