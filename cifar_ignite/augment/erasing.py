"""Random erasing and cutout: boxes in an image that are set to 0.

Boxes are int64 (B, 4): top, left, bottom, right in pixels; bottom and right are exclusive.
"""

import math

import torch
from torch import Tensor

from cifar_ignite.augment.elementwise import arange, constant
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
    side = random_uniform(batch, *config.erasing_scale, device).sqrt_().mul_(size)
    log_ratio = random_uniform(batch, math.log(low), math.log(high), device)
    side *= bernoulli_mask(batch, config.erasing_p, device)
    stretch = (log_ratio[:, None] * constant((1 / 2, -1 / 2), device)).exp_()
    extent = (side[:, None] * stretch).round_().clamp_(max=size - 1)
    corner = (torch.rand(batch, 2, device=device) * (size + 1 - extent)).floor_()
    return torch.cat([corner, corner + extent], dim=-1).long()


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
    position = arange(images.shape[-1], images.device)  # images are square
    is_outside = (position < boxes[:, :2, None]) | (position >= boxes[:, 2:, None])
    # A product with zeros and ones, because masked_fill is not vectorized on a CPU.
    rows, columns = is_outside.to(images.dtype).unbind(1)
    return images * torch.maximum(rows[:, :, None], columns[:, None, :])[:, None]
