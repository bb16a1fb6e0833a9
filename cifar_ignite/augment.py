"""Augmentation of whole batches on their device, with parameters of its own for every image.

torchvision's v2 transforms draw one set of parameters for a batch, so here each augmentation is two functions:
`random_*` draws parameters for B images from torch's global generators (see loader.py: those are a function of the
seed and the iteration), and a pure function applies them. `torchvision.transforms.v2.functional`, applied image by
image with the same parameters, is the oracle of the latter. CutMix and mixup pair the images of a batch and are
torchvision's own.

Images are float (B, 3, H, W) in [0, 1] up to `normalize`, and zero-mean after it. Nothing here waits for the device.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from cifar_ignite.config import AugmentConfig

Augment = Callable[[Tensor, Tensor, int, Tensor], tuple[Tensor, Tensor]]

# What `augment.off_fraction` leaves: flip and crop.
OFF = {
    "rotation_degrees": 0.0,
    "perspective_p": 0.0,
    "brightness": 0.0,
    "contrast": 0.0,
    "saturation": 0.0,
    "hue": 0.0,
    "trivial_augment": "off",
    "erasing_p": 0.0,
    "cutout_size": 0,
    "cutmix_p": 0.0,
    "mixup_p": 0.0,
}


def create_augment(config: AugmentConfig, num_classes: int, epochs: int) -> Augment:
    """The augmentation pipeline of the configuration.

    Args:
        config: what is done, and how strongly.
        num_classes: columns of the targets.
        epochs: of the whole training; in its last `off_fraction`, only flip and crop are done.

    Returns:
        A function of images, uint8 (B, 3, H, W), labels, int64 (B,), the epoch (from 0), and mirrored, bool (B,), which
        says whose turn it is to be mirrored by the alternating flip. It returns normalised float images (B, 3, H, W)
        in channels_last and targets, float (B, num_classes), each row a distribution over the classes.
    """
    strong, gentle = create_pipeline(config, num_classes), create_pipeline(config.model_copy(update=OFF), num_classes)

    def augment(images: Tensor, labels: Tensor, epoch: int, mirrored: Tensor) -> tuple[Tensor, Tensor]:
        is_last_part = config.off_fraction and epoch >= round(epochs * (1 - config.off_fraction))
        return (gentle if is_last_part else strong)(images, labels, mirrored)

    return augment


def create_pipeline(
    config: AugmentConfig, num_classes: int
) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """What `create_augment` returns, without the epochs."""

    def pipeline(images: Tensor, labels: Tensor, mirrored: Tensor) -> tuple[Tensor, Tensor]:
        batch, height, device = len(images), images.shape[-1], images.device
        images = to_float(images)
        if config.crop_padding:
            images = crop(
                images, random_offsets(batch, config.crop_padding, device), config.crop_padding, config.crop_mode
            )
        # Alternating flip (Jordan, 2024, arXiv:2404.00498): what is mirrored in one epoch is not in the next.
        alternating = config.flip_mode == "alternating"
        images = flip(images, mirrored if alternating else random_choice(batch, config.flip_p, device))
        if config.rotation_degrees or config.perspective_p:
            matrices = rotation_matrices(
                random_uniform(batch, -config.rotation_degrees, config.rotation_degrees, device)
            )
            corners = random_corners(batch, config.perspective_p, config.perspective_distortion, height, device)
            # The perspective is seen last, so going from the output back to the input it comes first.
            images = warp(images, matrices @ perspective_matrices(corners, height))
        images = random_color(images, config)
        if config.trivial_augment != "off":
            images = trivial_augment(images, *random_ops(batch, device), TRIVIAL_SPACES[config.trivial_augment])
        images = normalize(images, config.mean, config.std)
        if config.erasing_p:
            images = erase(
                images,
                random_boxes(batch, config.erasing_p, config.erasing_scale, config.erasing_ratio, height, device),
            )
        if config.cutout_size:
            images = erase(images, random_squares(batch, config.cutout_size, height, device))
        images, targets = random_mix(images, labels, config, num_classes)
        return images.contiguous(memory_format=torch.channels_last), targets

    return pipeline


def to_float(images: Tensor) -> Tensor:
    """uint8 in [0, 255] to float32 in [0, 1]."""
    return images.float().div_(255)


def normalize(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """(images - mean) / std, channel by channel."""
    shift, scale = constant(mean, images.device), constant(std, images.device)
    return images.sub(shift[:, None, None]).div_(scale[:, None, None])


@lru_cache
def constant(values: tuple[Any, ...], device: torch.device) -> Tensor:
    """A float tensor that is copied to the device once: each copy would wait for all that the device has to do."""
    return torch.tensor(values, dtype=torch.float32, device=device)


# --- Drawing ------------------------------------------------------------------------------------------------------


def random_uniform(batch: int, low: float, high: float, device: torch.device) -> Tensor:
    """Float (B,), uniform in [low, high)."""
    return torch.empty(batch, device=device).uniform_(low, high)


def random_choice(batch: int, p: float, device: torch.device) -> Tensor:
    """Bool (B,), true with probability p: never at 0, always at 1."""
    return torch.rand(batch, device=device) < p


def _choose(mask: Tensor, chosen: Tensor, other: Tensor) -> Tensor:
    """torch.where for finite floats, exactly: on a CPU lerp is vectorised and five times as fast."""
    return torch.lerp(other, chosen, mask.to(other.dtype))


# --- Exact geometry: whole pixels only ----------------------------------------------------------------------------


def flip(images: Tensor, flipped: Tensor) -> Tensor:
    """Mirror left and right where `flipped`, bool (B,)."""
    return _choose(flipped[:, None, None, None], images.flip(-1), images)


def random_offsets(batch: int, padding: int, device: torch.device) -> Tensor:
    """Where to cut from the padded image: int64 (B, 2), row and column, each uniform in [0, 2 * padding]."""
    return torch.randint(0, 2 * padding + 1, (batch, 2), device=device)


def crop(images: Tensor, offsets: Tensor, padding: int, mode: str) -> Tensor:
    """Pad each side by `padding` pixels and cut the original size out again at `offsets`.

    Args:
        offsets: int64 (B, 2), row and column of the top left corner in the padded image, in [0, 2 * padding].
        mode: "constant" pads with zeros, "reflect" mirrors without repeating the edge pixel.
    """
    batch, height, width = len(images), images.shape[-2], images.shape[-1]
    padded = F.pad(images, [padding] * 4, mode=mode)
    device = images.device
    rows = offsets[:, 0, None] + torch.arange(height, device=device)
    columns = offsets[:, 1, None] + torch.arange(width, device=device)
    cut = padded[torch.arange(batch, device=device)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return cut.permute(0, 3, 1, 2)


# --- Warps: one homography an image, one resampling ---------------------------------------------------------------
#
# A matrix (3, 3) takes the homogeneous place of an output pixel to the place in the input where its value is read.
# Places are pixel centres with the origin in the middle of the image, x to the right and y down.


def rotation_matrices(degrees: Tensor) -> Tensor:
    """Rotation by `degrees`, float (B,), counter-clockwise about the middle of the image: float (B, 3, 3)."""
    angle = torch.deg2rad(degrees)
    cos, sin, zero, one = angle.cos(), angle.sin(), torch.zeros_like(angle), torch.ones_like(angle)
    return torch.stack([cos, -sin, zero, sin, cos, zero, zero, zero, one], dim=-1).view(-1, 3, 3)


def random_corners(batch: int, p: float, distortion: float, size: int, device: torch.device) -> Tensor:
    """How far the corners move inwards, as torchvision's RandomPerspective draws it.

    Returns:
        Float (B, 4, 2), whole pixels in x and y for the corners top left, top right, bottom right, bottom left; each
        uniform in [0, distortion * size / 2], or all 0 with probability 1 - p.
    """
    inwards = torch.randint(0, int(distortion * (size // 2)) + 1, (batch, 4, 2), device=device)
    return (inwards * random_choice(batch, p, device)[:, None, None]).float()


def perspective_matrices(corners: Tensor, size: int) -> Tensor:
    """The homography that shows the whole image within a quadrilateral.

    The map from the unit square to a quadrilateral has a closed form (Heckbert, "Fundamentals of Texture Mapping and
    Image Warping", 1989, section 2.2.3); its inverse up to scale is the adjugate, whose rows are cross products.

    Args:
        corners: float (B, 4, 2), how far the corners move inwards (see `random_corners`).
        size: height and width of the image.

    Returns:
        Float (B, 3, 3).
    """
    square = constant(((0, 0), (1, 0), (1, 1), (0, 1)), corners.device)
    # torchvision's convention: corners are indices of pixels, 0 and size - 1, the middle is size / 2.
    edge, middle = size - 1, size / 2
    inwards = 1 - 2 * square
    x, y = (square * edge - middle + corners * inwards).unbind(-1)
    (x0, x1, x2, x3), (y0, y1, y2, y3) = x.unbind(-1), y.unbind(-1)
    sum_x, sum_y = x0 - x1 + x2 - x3, y0 - y1 + y2 - y3
    determinant = (x1 - x2) * (y3 - y2) - (x3 - x2) * (y1 - y2)
    g = (sum_x * (y3 - y2) - (x3 - x2) * sum_y) / determinant
    h = ((x1 - x2) * sum_y - sum_x * (y1 - y2)) / determinant
    first = torch.stack([x1 - x0 + g * x1, y1 - y0 + g * y1, g], dim=-1)
    second = torch.stack([x3 - x0 + h * x3, y3 - y0 + h * y3, h], dim=-1)
    third = torch.stack([x0, y0, torch.ones_like(x0)], dim=-1)
    quadrilateral_to_square = torch.stack(
        [torch.linalg.cross(second, third), torch.linalg.cross(third, first), torch.linalg.cross(first, second)], dim=-2
    )
    square_to_image = constant(((edge, 0, -middle), (0, edge, -middle), (0, 0, 1)), corners.device)
    return square_to_image @ quadrilateral_to_square


def warp(images: Tensor, matrices: Tensor) -> Tensor:
    """Resample bilinearly through `matrices`, float (B, 3, 3); what lies outside of the image is 0."""
    height, width = images.shape[-2:]
    x = torch.arange(width, device=images.device) - (width - 1) / 2
    y = torch.arange(height, device=images.device) - (height - 1) / 2
    # Each row of a matrix is an affine function of the place: (B, 3, H, W).
    of_x, of_y, shift = matrices.unbind(-1)
    seen_x, seen_y, scale = (of_x[..., None, None] * x + (of_y[..., None] * y + shift[..., None])[..., None]).unbind(1)
    # grid_sample wants the borders of the image at -1 and 1.
    grid = torch.stack([seen_x / (scale * (width / 2)), seen_y / (scale * (height / 2))], dim=-1)
    return F.grid_sample(images, grid, padding_mode="zeros", align_corners=False)


# --- Colour -------------------------------------------------------------------------------------------------------


def random_color(images: Tensor, config: AugmentConfig) -> Tensor:
    """Colour jitter: brightness, contrast, saturation, hue, each with a factor of its own for every image.

    torchvision's ColorJitter also shuffles the order of the four; here it is fixed.
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
    """Scale by `factors`, float (B,): 0 is black, 1 leaves the image as it is."""
    return (images * factors[:, None, None, None]).clamp_(0, 1)


def adjust_contrast(images: Tensor, factors: Tensor) -> Tensor:
    """Move away from the image's mean grey by `factors`, float (B,): 0 is that grey, 1 the image."""
    return _blend(images, _grey(images).mean((1, 2, 3), keepdim=True), factors)


def adjust_saturation(images: Tensor, factors: Tensor) -> Tensor:
    """Move away from each pixel's grey by `factors`, float (B,): 0 is a grey image, 1 the image."""
    return _blend(images, _grey(images), factors)


def adjust_hue(images: Tensor, shifts: Tensor) -> Tensor:
    """Turn the hue by `shifts`, float (B,), in turns of the colour circle: -0.5 and 0.5 give the complement.

    The HSV hexcone (Smith, "Color Gamut Transform Pairs", 1978) in its closed form: a channel is the value, less the
    chroma times how far the hue is from that channel's sextants.
    """
    red, green, blue = images.unbind(1)
    value = images.amax(1)
    chroma = value - images.amin(1)
    # Six times the chroma times the hue in turns: which formula holds depends on the brightest channel.
    hue = _choose(value == green, (blue - red).add_(chroma, alpha=2), (red - green).add_(chroma, alpha=4))
    hue = _choose(value == red, green - blue, hue).div_(chroma.mul(6).clamp_(min=1e-12))
    turns = (hue + shifts[:, None, None])[:, None] + constant((1 / 2, 1 / 6, -1 / 6), images.device)[:, None, None]
    turns -= turns.round()
    return torch.addcmul(value[:, None], chroma[:, None], turns.abs_().mul_(-6).add_(2).clamp_(0, 1), value=-1)


def adjust_sharpness(images: Tensor, factors: Tensor) -> Tensor:
    """Move away from a smoothed image by `factors`, float (B,): 0 is the smoothed, 1 the image; the rim stays."""
    kernel = constant(((1, 1, 1), (1, 5, 1), (1, 1, 1)), images.device).div(13).expand(3, 1, 3, 3)
    smoothed = images.clone()
    smoothed[..., 1:-1, 1:-1] = F.conv2d(images, kernel, groups=3)
    return _blend(images, smoothed, factors)


def _grey(images: Tensor) -> Tensor:
    """Luma (B, 1, H, W) with ITU-R 601-2 weights."""
    red, green, blue = images.unbind(1)
    return (0.2989 * red).add_(green, alpha=0.587).add_(blue, alpha=0.114)[:, None]


def _blend(images: Tensor, others: Tensor, factors: Tensor) -> Tensor:
    factors = factors[:, None, None, None]
    return (images * factors).add_(others * (1 - factors)).clamp_(0, 1)


# --- TrivialAugment -----------------------------------------------------------------------------------------------

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
STRENGTHS = 31
# The greatest magnitude of each operation that has one: slopes, shares of the image's size, degrees, distances of a
# factor from 1, bits that are lost. "wide" is the paper's own space and torchvision's TrivialAugmentWide; "standard" is
# that of torchvision's RandAugment, gentler.
TRIVIAL_SPACES = {
    "wide": {"shear": 0.99, "translate": 1.0, "rotate": 135.0, "factor": 0.99, "bits": 6},
    "standard": {"shear": 0.3, "translate": 150 / 331, "rotate": 30.0, "factor": 0.9, "bits": 4},
}


def random_ops(batch: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """One operation an image, each as likely: its index in `OPS`, int64 (B,), its strength, int64 (B,) in
    [0, STRENGTHS), and its sign, float (B,), -1 or 1.
    """
    ops = torch.randint(len(OPS), (batch,), device=device)
    strengths = torch.randint(STRENGTHS, (batch,), device=device)
    signs = torch.randint(2, (batch,), device=device) * 2.0 - 1
    return ops, strengths, signs


def trivial_augment(images: Tensor, ops: Tensor, strengths: Tensor, signs: Tensor, space: dict[str, float]) -> Tensor:
    """TrivialAugment (Mueller and Hutter, 2021, arXiv:2103.10158): one operation an image.

    Every operation is done to the whole batch, with parameters that leave the images alone that have not drawn it: so
    nothing waits for the device to tell which were drawn. Geometry resamples bilinearly, and what comes from outside
    of the image is black.

    Args:
        images: float (B, 3, H, W) in [0, 1].
        ops, strengths, signs: see `random_ops`.
        space: the greatest magnitudes, of `TRIVIAL_SPACES`.
    """
    size, share = images.shape[-1], strengths / (STRENGTHS - 1)

    def drawn(op: str) -> Tensor:
        return ops == OPS.index(op)

    def magnitude(op: str, greatest: float) -> Tensor:
        return drawn(op) * signs * share * greatest

    shear_x, shear_y = magnitude("shear_x", space["shear"]), magnitude("shear_y", space["shear"])
    move_x = magnitude("translate_x", space["translate"] * size).trunc()
    move_y = magnitude("translate_y", space["translate"] * size).trunc()
    matrices = rotation_matrices(magnitude("rotate", space["rotate"]))
    matrices[:, 0, 1] += shear_x
    matrices[:, 1, 0] += shear_y
    # Sheared about the corner at (-size / 2, -size / 2), as in AutoAugment.
    matrices[:, 0, 2] = shear_x * size / 2 - move_x
    matrices[:, 1, 2] = shear_y * size / 2 - move_y
    images = warp(images, matrices)
    for op, adjust in (
        ("brightness", adjust_brightness),
        ("saturation", adjust_saturation),
        ("contrast", adjust_contrast),
        ("sharpness", adjust_sharpness),
    ):
        images = adjust(images, 1 + magnitude(op, space["factor"]))
    images = posterize(images, 8 - (drawn("posterize") * share * space["bits"]).round())
    images = solarize(images, torch.where(drawn("solarize"), 1 - share, 2))
    images = _choose(drawn("autocontrast")[:, None, None, None], functional.autocontrast(images), images)
    return _choose(drawn("equalize")[:, None, None, None], functional.equalize(images), images)


def posterize(images: Tensor, bits: Tensor) -> Tensor:
    """Keep the upper `bits`, float (B,) of whole numbers in [0, 8], of the 8 that a value in [0, 1] stands for.

    With 8 bits kept, the image is left as it is.
    """
    step = torch.exp2(8 - bits)[:, None, None, None]
    # A value k / 255 may lie a rounding below: half of the least step puts it right.
    kept = images.mul(255).add_(0.5).div_(step).floor_().mul_(step).div_(255)
    return _choose(step > 1, kept, images)


def solarize(images: Tensor, thresholds: Tensor) -> Tensor:
    """Invert the values from `thresholds`, float (B,), upwards; above 1 the image is left as it is."""
    return _choose(images >= thresholds[:, None, None, None], 1 - images, images)


# --- Erasing ------------------------------------------------------------------------------------------------------


def random_boxes(
    batch: int, p: float, scale: tuple[float, float], ratio: tuple[float, float], size: int, device: torch.device
) -> Tensor:
    """Boxes of random erasing (Zhong et al., 2017, arXiv:1708.04896).

    Args:
        p: share of images that get a box; the others get an empty one.
        scale: range of the box's share of the area, uniform.
        ratio: range of height / width, log-uniform.
        size: height and width of the image. A box is at most size - 1 high and wide.

    Returns:
        Int64 (B, 4): top, left, bottom, right; bottom and right are exclusive.
    """
    area = random_uniform(batch, *scale, device) * size**2
    aspect = random_uniform(batch, math.log(ratio[0]), math.log(ratio[1]), device).exp()
    chosen = random_choice(batch, p, device)
    extent = torch.stack([area * aspect, area / aspect], dim=-1).sqrt().round().clamp(max=size - 1).long()
    extent = extent * chosen[:, None]
    corner = (torch.rand(batch, 2, device=device) * (size - extent + 1)).long()
    return torch.cat([corner, corner + extent], dim=-1)


def random_squares(batch: int, side: int, size: int, device: torch.device) -> Tensor:
    """Boxes of cutout (DeVries and Taylor, 2017, arXiv:1708.04552): squares whose centre is any pixel of the image.

    Returns:
        Int64 (B, 4): top, left, bottom, right; they may reach over the border.
    """
    corner = torch.randint(0, size, (batch, 2), device=device) - side // 2
    return torch.cat([corner, corner + side], dim=-1)


def erase(images: Tensor, boxes: Tensor) -> Tensor:
    """Set the inside of `boxes`, int64 (B, 4) as top, left, bottom, right, to 0 (the mean, once normalised)."""
    top, left, bottom, right = boxes[:, :, None].unbind(1)
    row = torch.arange(images.shape[-2], device=images.device)
    column = torch.arange(images.shape[-1], device=images.device)
    rows, columns = (row >= top) & (row < bottom), (column >= left) & (column < right)
    # A product with 0 and 1: on a CPU masked_fill is not vectorised.
    inside = rows[:, :, None].to(images.dtype) * columns[:, None, :].to(images.dtype)
    return images * (1 - inside)[:, None]


# --- Mixing -------------------------------------------------------------------------------------------------------


def random_mix(images: Tensor, labels: Tensor, config: AugmentConfig, num_classes: int) -> tuple[Tensor, Tensor]:
    """CutMix (arXiv:1905.04899) with probability `cutmix_p`, mixup (arXiv:1710.09412) with `mixup_p`, or neither.

    One draw for a batch, as in both papers. torchvision pairs each image with the one before it, which is random since
    the batch is, and draws on the CPU, so nothing waits for the device.

    Returns:
        Images and targets, float (B, num_classes).
    """
    draw = torch.rand(()).item()
    if draw < config.cutmix_p:
        return v2.CutMix(num_classes=num_classes, alpha=config.cutmix_alpha)(images, labels)
    if draw < config.cutmix_p + config.mixup_p:
        return v2.MixUp(num_classes=num_classes, alpha=config.mixup_alpha)(images, labels)
    return images, F.one_hot(labels, num_classes).float()
