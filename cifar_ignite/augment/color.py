"""Brightness, contrast, saturation, hue and sharpness, with one factor per image.

Images are float (B, 3, H, W) in [0, 1].
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from cifar_ignite.augment.elementwise import constant
from cifar_ignite.augment.sampling import random_uniform
from cifar_ignite.config import AugmentConfig


def random_color_factors(batch: int, config: AugmentConfig, device: torch.device) -> dict[str, Tensor]:
    """Draw the parameters of `color_jitter`, float (B,) each, for the operations whose strength is not 0."""
    operations = (("brightness", 1), ("contrast", 1), ("saturation", 1), ("hue", 0))
    strengths = [(name, middle, getattr(config, name)) for name, middle in operations if getattr(config, name)]
    return {name: random_uniform(batch, middle - width, middle + width, device) for name, middle, width in strengths}


def color_jitter(images: Tensor, factors: dict[str, Tensor]) -> Tensor:
    """Adjust brightness, contrast, saturation and hue, in this order, by the factors of `random_color_factors`.

    torchvision's ColorJitter also shuffles the order of the four operations; here the order is fixed.
    """
    if "brightness" in factors:
        images = adjust_brightness(images, factors["brightness"])
    if "contrast" in factors:
        images = adjust_contrast(images, factors["contrast"])
    if "saturation" in factors:
        images = adjust_saturation(images, factors["saturation"])
    if "hue" in factors:
        images = adjust_hue(images, factors["hue"])
    return images


def adjust_brightness(images: Tensor, factors: Tensor) -> Tensor:
    """Scale images by `factors`, float (B,): 0 gives black, 1 the unchanged image."""
    return (images * factors[:, None, None, None]).clamp_(0, 1)


def adjust_contrast(images: Tensor, factors: Tensor) -> Tensor:
    """Blend images with their mean gray by `factors`, float (B,): 0 gives the gray, 1 the unchanged image."""
    return _blend(images, _rgb_to_grayscale(images.mean((2, 3), keepdim=True)), factors)


def adjust_saturation(images: Tensor, factors: Tensor) -> Tensor:
    """Blend images with their grayscale version by `factors`, float (B,): 0 gives grayscale, 1 the unchanged image."""
    return _blend(images, _rgb_to_grayscale(images), factors)


def adjust_hue(images: Tensor, shifts: Tensor) -> Tensor:
    """Shift the hue by `shifts`, float (B,), in turns of the color wheel: -0.5 and 0.5 give complementary colors.

    Closed form of the HSV hexcone (Smith, "Color Gamut Transform Pairs", 1978): a channel is the value minus the
    chroma times a piecewise linear function of the distance between the hue and the channel's sextants.
    """
    red, green, blue = images.unbind(1)
    lowest = images.amin(1)
    chroma = images.amax(1) - lowest
    base = lowest - chroma
    # 6 * chroma * hue in turns, between -1/2 and 1/2: with value = lowest + chroma, the distance from red is
    # value - red + green - lowest + blue - lowest, towards green or blue, whichever is larger.
    hue = torch.copysign((base + red).sub_(green).sub_(blue), green - blue)
    turns = shifts[:, None, None, None] + constant((1 / 2, 1 / 6, -1 / 6), images.device)[:, None, None]
    turns = torch.addcdiv(turns, hue[:, None], chroma.clamp(min=1e-12)[:, None], value=1 / 6)
    turns -= turns.round()
    return torch.addcmul(base[:, None], chroma[:, None], turns.abs_().clamp_(1 / 6, 1 / 3), value=6)


def adjust_sharpness(images: Tensor, factors: Tensor) -> Tensor:
    """Blend images with a smoothed version by `factors`, float (B,): 0 gives the smoothed one, 1 the unchanged image.

    The outermost pixels are not smoothed.
    """
    edge, middle = (1 / 13, 1 / 13, 1 / 13), (1 / 13, 5 / 13, 1 / 13)
    kernel = constant(3 * (((edge, middle, edge),),), images.device)
    smoothed = images.clone()
    smoothed[..., 1:-1, 1:-1] = F.conv2d(images, kernel, groups=3)
    return _blend(images, smoothed, factors)


def _rgb_to_grayscale(images: Tensor) -> Tensor:
    """Return luma (B, 1, H, W) with ITU-R 601-2 weights."""
    weights = constant(((0.2989, 0.587, 0.114),), images.device)
    return (weights @ images.flatten(2)).unflatten(2, images.shape[2:])


def _blend(images: Tensor, others: Tensor, factors: Tensor) -> Tensor:
    """Return factors * images + (1 - factors) * others, clamped to [0, 1]."""
    return torch.lerp(others, images, factors[:, None, None, None]).clamp_(0, 1)
