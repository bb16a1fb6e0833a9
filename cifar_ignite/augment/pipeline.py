"""The augmentation pipeline: uint8 images and labels to normalized images and targets.

torchvision's v2 transforms draw one set of parameters per batch. Here each augmentation is two functions: `random_*`
draws parameters for B images from torch's global generators (whose state is a function of the seed and the iteration,
see data/loaders.py), and a pure function applies them. The oracle of the latter is
`torchvision.transforms.v2.functional`, applied to each image with the same parameters. CutMix and MixUp pair the images
of a batch and are torchvision's own.

Images are float (B, 3, H, W) in [0, 1] up to `normalize`, and zero-mean afterwards. Nothing synchronizes with the
device.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from cifar_ignite.augment.color import color_jitter
from cifar_ignite.augment.elementwise import normalize, to_float
from cifar_ignite.augment.erasing import erase, random_cutout_boxes, random_erasing_boxes
from cifar_ignite.augment.geometry import (
    crop,
    flip,
    perspective_matrices,
    random_crop_offsets,
    random_perspective_offsets,
    rotation_matrices,
    warp_perspective,
)
from cifar_ignite.augment.mixing import cutmix_or_mixup
from cifar_ignite.augment.sampling import bernoulli_mask, random_uniform
from cifar_ignite.augment.trivial_augment import MAX_MAGNITUDES, random_trivial_augment, trivial_augment
from cifar_ignite.config import STRONG_AUGMENT_OFF, AugmentConfig

BatchTransform = Callable[[Tensor, Tensor, int, Tensor], tuple[Tensor, Tensor]]
Pipeline = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def create_train_transform(config: AugmentConfig, num_classes: int, epochs: int) -> BatchTransform:
    """Create the augmentation of training batches.

    Args:
        config: Augmentations and their strengths.
        num_classes: Number of columns of the targets.
        epochs: Number of epochs of the run; the last `strong_off_fraction` of them get flip and crop only.

    Returns:
        A function of images, uint8 (B, 3, H, W), labels, int64 (B,), the epoch (from 0) and a mask, bool (B,), of the
        images to flip if `flip_mode` is "alternating". It returns normalized float images (B, 3, H, W) in channels_last
        and targets, float (B, num_classes), each row a distribution over the classes.
    """
    strong = create_pipeline(config, num_classes)
    weak = create_pipeline(config.model_copy(update=STRONG_AUGMENT_OFF), num_classes)

    def transform(images: Tensor, labels: Tensor, epoch: int, flip_mask: Tensor) -> tuple[Tensor, Tensor]:
        is_weak = config.strong_off_fraction and epoch >= round(epochs * (1 - config.strong_off_fraction))
        return (weak if is_weak else strong)(images, labels, flip_mask)

    return transform


def create_pipeline(config: AugmentConfig, num_classes: int) -> Pipeline:
    """Create the augmentation of one epoch: as `create_train_transform`, without the argument for the epoch."""

    def pipeline(images: Tensor, labels: Tensor, flip_mask: Tensor) -> tuple[Tensor, Tensor]:
        images = _augment_geometry(to_float(images), flip_mask, config)
        images = color_jitter(images, config)
        if config.trivial_augment != "off":
            params = random_trivial_augment(len(images), images.device)
            images = trivial_augment(images, params, MAX_MAGNITUDES[config.trivial_augment])
        images = _augment_erasing(normalize(images, config.mean, config.std), config)
        images, targets = cutmix_or_mixup(images, labels, config, num_classes)
        return images.contiguous(memory_format=torch.channels_last), targets

    return pipeline


def _augment_geometry(images: Tensor, flip_mask: Tensor, config: AugmentConfig) -> Tensor:
    """Apply crop, flip, rotation and perspective."""
    batch, size, device = len(images), images.shape[-1], images.device
    if config.crop_padding:
        offsets = random_crop_offsets(batch, config.crop_padding, device)
        images = crop(images, offsets, config.crop_padding, config.padding_mode)
    # Alternating flip (Jordan, 2024, arXiv:2404.00498): images flipped in one epoch are not flipped in the next.
    is_alternating = config.flip_mode == "alternating"
    images = flip(images, flip_mask if is_alternating else bernoulli_mask(batch, config.flip_p, device))
    if config.rotation_degrees or config.perspective_p:
        degrees = random_uniform(batch, -config.rotation_degrees, config.rotation_degrees, device)
        offsets = random_perspective_offsets(batch, config, size, device)
        # Rotation is applied first; the matrices map output to input, so their order is reversed.
        images = warp_perspective(images, rotation_matrices(degrees) @ perspective_matrices(offsets, size))
    return images


def _augment_erasing(images: Tensor, config: AugmentConfig) -> Tensor:
    """Apply random erasing and cutout to normalized images."""
    batch, size, device = len(images), images.shape[-1], images.device
    if config.erasing_p:
        images = erase(images, random_erasing_boxes(batch, config, size, device))
    if config.cutout_size:
        images = erase(images, random_cutout_boxes(batch, config.cutout_size, size, device))
    return images
