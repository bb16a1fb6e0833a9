"""TrivialAugment (Mueller and Hutter, 2021, arXiv:2103.10158): one random operation per image.

Every operation is applied to the batch, with parameters that leave unselected images unchanged, so nothing synchronizes
with the device to find out which operations were drawn. Images are float (B, 3, H, W) in [0, 1].
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional

from cifar_ignite.augment.color import adjust_brightness, adjust_contrast, adjust_saturation, adjust_sharpness
from cifar_ignite.augment.elementwise import blend_where
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

    def is_selected(self, op: str) -> Tensor:
        """Return bool (B,), true for the images that get this operation."""
        return self.ops == OPS.index(op)

    def magnitude(self, op: str, largest: float) -> Tensor:
        """Return float (B,), the signed magnitude of this operation; 0 where it is not selected."""
        return self.is_selected(op) * self.signs * self.fractions * largest


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
    images = warp_perspective(images, _affine_matrices(params, largest, images.shape[-1]))
    for op, adjust in (
        ("brightness", adjust_brightness),
        ("saturation", adjust_saturation),
        ("contrast", adjust_contrast),
        ("sharpness", adjust_sharpness),
    ):
        images = adjust(images, 1 + params.magnitude(op, largest["factor"]))
    images = posterize(images, 8 - (params.is_selected("posterize") * params.fractions * largest["bits"]).round())
    images = solarize(images, torch.where(params.is_selected("solarize"), 1 - params.fractions, 2))
    for op, adjust_all in (("autocontrast", functional.autocontrast), ("equalize", functional.equalize)):
        images = blend_where(params.is_selected(op)[:, None, None, None], adjust_all(images), images)
    return images


def _affine_matrices(params: TrivialAugmentParams, largest: dict[str, float], size: int) -> Tensor:
    """Return the homographies, float (B, 3, 3), of shear, translation and rotation; see geometry.py."""
    shear_x, shear_y = (params.magnitude(op, largest["shear"]) for op in ("shear_x", "shear_y"))
    shift_x, shift_y = (
        params.magnitude(op, largest["translate"] * size).trunc() for op in ("translate_x", "translate_y")
    )
    matrices = rotation_matrices(params.magnitude("rotate", largest["rotate"]))
    matrices[:, 0, 1] += shear_x
    matrices[:, 1, 0] += shear_y
    # The center of the shear is the corner (-size / 2, -size / 2), as in AutoAugment.
    matrices[:, 0, 2] = shear_x * size / 2 - shift_x
    matrices[:, 1, 2] = shear_y * size / 2 - shift_y
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
