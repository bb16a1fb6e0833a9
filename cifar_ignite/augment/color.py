"""Brightness, contrast, saturation, hue and sharpness, with one factor per image.

Images are float (B, 3, H, W) in [0, 1].
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from cifar_ignite.augment.elementwise import blend_where, constant
from cifar_ignite.augment.sampling import random_uniform
from cifar_ignite.config import AugmentConfig


def color_jitter(images: Tensor, config: AugmentConfig) -> Tensor:
    """Adjust brightness, contrast, saturation and hue by random factors, drawn for every image.

    torchvision's ColorJitter also shuffles the order of the four operations; here the order is fixed.
    """
    for strength, adjust in (
        (config.brightness, adjust_brightness),
        (config.contrast, adjust_contrast),
        (config.saturation, adjust_saturation),
    ):
        if strength:
            images = adjust(images, random_uniform(len(images), 1 - strength, 1 + strength, images.device))
    if config.hue:
        images = adjust_hue(images, random_uniform(len(images), -config.hue, config.hue, images.device))
    return images


def adjust_brightness(images: Tensor, factors: Tensor) -> Tensor:
    """Scale images by `factors`, float (B,): 0 gives black, 1 the unchanged image."""
    return (images * factors[:, None, None, None]).clamp_(0, 1)


def adjust_contrast(images: Tensor, factors: Tensor) -> Tensor:
    """Blend images with their mean gray by `factors`, float (B,): 0 gives the gray, 1 the unchanged image."""
    return _blend(images, _rgb_to_grayscale(images).mean((1, 2, 3), keepdim=True), factors)


def adjust_saturation(images: Tensor, factors: Tensor) -> Tensor:
    """Blend images with their grayscale version by `factors`, float (B,): 0 gives grayscale, 1 the unchanged image."""
    return _blend(images, _rgb_to_grayscale(images), factors)


def adjust_hue(images: Tensor, shifts: Tensor) -> Tensor:
    """Shift the hue by `shifts`, float (B,), in turns of the color wheel: -0.5 and 0.5 give complementary colors.

    Closed form of the HSV hexcone (Smith, "Color Gamut Transform Pairs", 1978): a channel is the value minus the
    chroma times a piecewise linear function of the distance between the hue and the channel's sextants.
    """
    red, green, blue = images.unbind(1)
    value = images.amax(1)
    chroma = value - images.amin(1)
    # 6 * chroma * hue in turns; the formula depends on the largest channel.
    hue = blend_where(value == green, (blue - red).add_(chroma, alpha=2), (red - green).add_(chroma, alpha=4))
    hue = blend_where(value == red, green - blue, hue).div_(chroma.mul(6).clamp_(min=1e-12))
    turns = (hue + shifts[:, None, None])[:, None] + constant((1 / 2, 1 / 6, -1 / 6), images.device)[:, None, None]
    turns -= turns.round()
    return torch.addcmul(value[:, None], chroma[:, None], turns.abs_().mul_(-6).add_(2).clamp_(0, 1), value=-1)


def adjust_sharpness(images: Tensor, factors: Tensor) -> Tensor:
    """Blend images with a smoothed version by `factors`, float (B,): 0 gives the smoothed one, 1 the unchanged image.

    The outermost pixels are not smoothed.
    """
    kernel = constant(((1, 1, 1), (1, 5, 1), (1, 1, 1)), images.device).div(13).expand(3, 1, 3, 3)
    smoothed = images.clone()
    smoothed[..., 1:-1, 1:-1] = F.conv2d(images, kernel, groups=3)
    return _blend(images, smoothed, factors)


def _rgb_to_grayscale(images: Tensor) -> Tensor:
    """Return luma (B, 1, H, W) with ITU-R 601-2 weights."""
    red, green, blue = images.unbind(1)
    return (0.2989 * red).add_(green, alpha=0.587).add_(blue, alpha=0.114)[:, None]


def _blend(images: Tensor, others: Tensor, factors: Tensor) -> Tensor:
    """Return factors * images + (1 - factors) * others, clamped to [0, 1]."""
    factors = factors[:, None, None, None]
    return (images * factors).add_(others * (1 - factors)).clamp_(0, 1)
