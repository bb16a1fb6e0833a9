"""TrivialAugment (Mueller and Hutter, 2021, arXiv:2103.10158): one random operation per image.

Every operation is applied to the batch, with parameters that leave unselected images unchanged, so nothing synchronizes
with the device to find out which operations were drawn. Images are float (B, 3, H, W) in [0, 1].
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional

from cifar_ignite.augment.color import adjust_brightness, adjust_contrast, adjust_saturation, adjust_sharpness
from cifar_ignite.augment.elementwise import arange, blend_where, constant
from cifar_ignite.augment.geometry import rotation_matrices, warp_perspective

OPS = (
    "identity",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
    "rotate",
    "brightness",
    "saturation",
    "contrast",
    "sharpness",
    "posterize",
    "solarize",
    "autocontrast",
    "equalize",
)
NUM_MAGNITUDE_BINS = 31
# Largest magnitudes: slope of the shear, translation as a fraction of the image's size, degrees, distance of a color
# factor from 1, removed bits. "wide" is the paper's space and torchvision's TrivialAugmentWide; "standard" is the
# weaker one of torchvision's RandAugment.
MAX_MAGNITUDES = {
    "wide": {"shear": 0.99, "translate": 1.0, "rotate": 135.0, "factor": 0.99, "bits": 6},
    "standard": {"shear": 0.3, "translate": 150 / 331, "rotate": 30.0, "factor": 0.9, "bits": 4},
}


@dataclass(frozen=True)
class TrivialAugmentParams:
    """The operation of every image and its strength.

    Attributes:
        ops: Int64 (B,), indices of `OPS`.
        fractions: Float (B,) in [0, 1], magnitudes as fractions of the operation's largest one.
        signs: Float (B,), -1 or 1.
    """

    ops: Tensor
    fractions: Tensor
    signs: Tensor


def random_trivial_augment(batch: int, device: torch.device) -> TrivialAugmentParams:
    """Draw an operation, one of `NUM_MAGNITUDE_BINS` magnitudes and a sign for every image, all uniformly."""
    ops = torch.randint(len(OPS), (batch,), device=device)
    bins = torch.randint(NUM_MAGNITUDE_BINS, (batch,), device=device)
    signs = torch.randint(2, (batch,), device=device) * 2.0 - 1
    return TrivialAugmentParams(ops, bins / (NUM_MAGNITUDE_BINS - 1), signs)


def trivial_augment(images: Tensor, params: TrivialAugmentParams, largest: dict[str, float]) -> Tensor:
    """Apply one operation to every image.

    Geometric operations resample bilinearly; pixels from outside the image are black.

    Args:
        images: Float (B, 3, H, W) in [0, 1].
        params: Operations and magnitudes of B images.
        largest: Largest magnitudes, a value of `MAX_MAGNITUDES`.
    """
    size, device = images.shape[-1], images.device
    mask = (params.ops[:, None] == arange(len(OPS), device)).to(images.dtype)
    is_selected = dict(zip(OPS, mask.unbind(1), strict=True))
    signed = (mask * (params.fractions * params.signs)[:, None]).mul_(constant(_largest_by_op(largest, size), device))
    magnitude = dict(zip(OPS, signed.unbind(1), strict=True))
    images = warp_perspective(images, _affine_matrices(signed, size))
    images = adjust_brightness(images, 1 + magnitude["brightness"])
    images = adjust_saturation(images, 1 + magnitude["saturation"])
    images = adjust_contrast(images, 1 + magnitude["contrast"])
    images = adjust_sharpness(images, 1 + magnitude["sharpness"])
    images = posterize(images, 8 - magnitude["posterize"].abs().round_())
    images = solarize(images, blend_where(is_selected["solarize"], 1 - params.fractions, constant((2,), device)))
    images = blend_where(is_selected["autocontrast"][:, None, None, None], functional.autocontrast(images), images)
    return blend_where(is_selected["equalize"][:, None, None, None], functional.equalize(images), images)


def _largest_by_op(largest: dict[str, float], size: int) -> tuple[float, ...]:
    """Return the largest magnitude of each of `OPS`, translations in pixels; 0 for operations without one."""
    shear, translate, factor = largest["shear"], largest["translate"] * size, largest["factor"]
    geometry = (shear, shear, translate, translate, largest["rotate"])
    return (0, *geometry, factor, factor, factor, factor, largest["bits"], 0, 0, 0)


def _affine_matrices(magnitudes: Tensor, size: int) -> Tensor:
    """Return the homographies, float (B, 3, 3), of shear, translation and rotation; see geometry.py.

    Args:
        magnitudes: Signed magnitudes, float (B, len(OPS)), 0 where the operation is not selected.
        size: Height and width of the images in pixels.
    """
    first = OPS.index("shear_x")
    shears, shifts = magnitudes[:, first : first + 2], magnitudes[:, first + 2 : first + 4].trunc()
    matrices = rotation_matrices(magnitudes[:, OPS.index("rotate")])
    matrices[:, 0, 1].add_(shears[:, 0])
    matrices[:, 1, 0].add_(shears[:, 1])
    # The center of the shear is the corner (-size / 2, -size / 2), as in AutoAugment.
    matrices[:, :2, 2] = shears * (size / 2) - shifts
    return matrices


def posterize(images: Tensor, bits: Tensor) -> Tensor:
    """Keep the most significant `bits`, float (B,) of integers in [0, 8], of the 8-bit values; 8 changes nothing."""
    step = torch.exp2(8 - bits)[:, None, None, None]
    # 255 * (k / 255) may be slightly less than k, so half of the smallest step is added before rounding down.
    kept = images.mul(255).add_(0.5).div_(step).floor_().mul_(step).div_(255)
    return blend_where(step > 1, kept, images)


def solarize(images: Tensor, thresholds: Tensor) -> Tensor:
    """Invert values at or above `thresholds`, float (B,); a threshold above 1 changes nothing."""
    return blend_where(images >= thresholds[:, None, None, None], 1 - images, images)
