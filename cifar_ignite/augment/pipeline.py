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
from dataclasses import dataclass

import torch
from torch import Tensor

from cifar_ignite.augment.color import color_jitter, random_color_factors
from cifar_ignite.augment.elementwise import memory_format, normalize, to_float
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
from cifar_ignite.augment.mixing import create_cutmix_or_mixup
from cifar_ignite.augment.sampling import bernoulli_mask, random_uniform
from cifar_ignite.augment.trivial_augment import (
    MAX_MAGNITUDES,
    TrivialAugmentParams,
    random_trivial_augment,
    trivial_augment,
)
from cifar_ignite.config import STRONG_AUGMENT_OFF, AugmentConfig
from cifar_ignite.cuda_graphs import TensorFunction, record_cuda_graph
from cifar_ignite.errors import TrainingError, first_line

BatchTransform = Callable[[Tensor, Tensor, int, Tensor], tuple[Tensor, Tensor]]
Pipeline = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
AugmentImages = Callable[[Tensor, "AugmentParams", AugmentConfig], Tensor]


def create_train_transform(
    config: AugmentConfig,
    num_classes: int,
    epochs: int,
    compile_for: Tensor | None = None,
    graph_batch: int = 0,
) -> BatchTransform:
    """Create the augmentation of training batches.

    Args:
        config: Augmentations and their strengths.
        num_classes: Number of columns of the targets.
        epochs: Number of epochs of the run; the last `strong_off_fraction` of them get flip and crop only.
        compile_for: Uint8 images (B, 3, H, W) on the device: batches of this shape go through torch.compile, smaller
            ones do not. None compiles nothing.
        graph_batch: Size of the batches that go through a CUDA graph, see `record_cuda_graph`; 0 records nothing.

    Returns:
        A function of images, uint8 (B, 3, H, W), labels, int64 (B,), the epoch (from 0) and a mask, bool (B,), of the
        images to flip if `flip_mode` is "alternating". It returns normalized float images (B, 3, H, W) in the device's
        `memory_format` and targets, float (B, num_classes), each row a distribution over the classes.

    Raises:
        TrainingError: If compilation fails.
    """
    strong = create_pipeline(config, num_classes, compile_for, graph_batch)
    weak_config = config.model_copy(update=STRONG_AUGMENT_OFF)
    weak = create_pipeline(weak_config, num_classes, compile_for if config.strong_off_fraction else None, graph_batch)

    def transform(images: Tensor, labels: Tensor, epoch: int, flip_mask: Tensor) -> tuple[Tensor, Tensor]:
        is_weak = config.strong_off_fraction and epoch >= round(epochs * (1 - config.strong_off_fraction))
        return (weak if is_weak else strong)(images, labels, flip_mask)

    return transform


def create_pipeline(
    config: AugmentConfig, num_classes: int, compile_for: Tensor | None = None, graph_batch: int = 0
) -> Pipeline:
    """Create the augmentation of one epoch: as `create_train_transform`, without the argument for the epoch."""
    mix = create_cutmix_or_mixup(config, num_classes)
    compiled = augment_images if compile_for is None else _compile_augment_images(compile_for, config)
    compiled_batch = 0 if compile_for is None else len(compile_for)

    @torch.no_grad()
    def augment(images: Tensor, flip_mask: Tensor) -> Tensor:
        params = random_augment_params(images, flip_mask, config)
        images = (compiled if len(images) == compiled_batch else augment_images)(images, params, config)
        return images.contiguous(memory_format=memory_format(images.device))

    graph: TensorFunction | None = None

    def pipeline(images: Tensor, labels: Tensor, flip_mask: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal graph
        if len(images) == graph_batch:
            graph = graph or record_cuda_graph(augment, images, flip_mask)
            images = graph(images, flip_mask)
        else:
            images = augment(images, flip_mask)
        images, targets = mix(images, labels)
        return images.contiguous(memory_format=memory_format(images.device)), targets

    return pipeline


@torch.no_grad()
def _compile_augment_images(images: Tensor, config: AugmentConfig) -> AugmentImages:
    """Return `augment_images` through torch.compile, compiled for batches like `images`; draws random parameters."""
    params = random_augment_params(images, torch.zeros(len(images), dtype=torch.bool, device=images.device), config)
    # The eager call creates the cached constants, so that the compiled function has them among its inputs.
    augment_images(images, params, config)
    try:
        compiled = torch.compile(augment_images, dynamic=False)
        compiled(images, params, config)
    except Exception as error:  # the compilers, of torch and of the system, raise nearly anything
        raise TrainingError(f"torch.compile failed ({first_line(error)}); use compile=off") from None
    return compiled


@dataclass(frozen=True)
class AugmentParams:
    """Random parameters of a batch; None for what is not applied.

    Attributes:
        crop_offsets: See `random_crop_offsets`.
        flip_mask: Bool (B,), true for the images to flip.
        degrees: Float (B,), rotation.
        perspective_offsets: See `random_perspective_offsets`; given with `degrees`.
        color_factors: See `random_color_factors`.
        trivial_augment: See `random_trivial_augment`.
        boxes: Boxes to erase, int64 (B, 4) each; see `erase`.
    """

    crop_offsets: Tensor | None
    flip_mask: Tensor
    degrees: Tensor | None
    perspective_offsets: Tensor | None
    color_factors: dict[str, Tensor]
    trivial_augment: TrivialAugmentParams | None
    boxes: tuple[Tensor, ...]


def random_augment_params(images: Tensor, flip_mask: Tensor, config: AugmentConfig) -> AugmentParams:
    """Draw the parameters of `augment_images` for a batch.

    Args:
        images: Batch (B, 3, H, W), for its size and device.
        flip_mask: Bool (B,), images to flip if `flip_mode` is "alternating".
        config: Augmentations and their strengths.
    """
    batch, size, device = len(images), images.shape[-1], images.device
    crop_offsets = random_crop_offsets(batch, config.crop_padding, device) if config.crop_padding else None
    # Alternating flip (Jordan, 2024, arXiv:2404.00498): images flipped in one epoch are not flipped in the next.
    if config.flip_mode != "alternating":
        flip_mask = bernoulli_mask(batch, config.flip_p, device)
    degrees, perspective_offsets = None, None
    if config.rotation_degrees or config.perspective_p:
        degrees = random_uniform(batch, -config.rotation_degrees, config.rotation_degrees, device)
        perspective_offsets = random_perspective_offsets(batch, config, size, device)
    color_factors = random_color_factors(batch, config, device)
    trivial = random_trivial_augment(batch, device) if config.trivial_augment != "off" else None
    boxes = []
    if config.erasing_p:
        boxes.append(random_erasing_boxes(batch, config, size, device))
    if config.cutout_size:
        boxes.append(random_cutout_boxes(batch, config.cutout_size, size, device))
    return AugmentParams(crop_offsets, flip_mask, degrees, perspective_offsets, color_factors, trivial, tuple(boxes))


def augment_images(images: Tensor, params: AugmentParams, config: AugmentConfig) -> Tensor:
    """Apply the augmentations with drawn parameters, and normalize: a pure function.

    Args:
        images: Uint8 (B, 3, H, W).
        params: Parameters of B images.
        config: Section with the padding mode, the space of TrivialAugment, and the mean and standard deviation.

    Returns:
        Normalized float images (B, 3, H, W).
    """
    images = to_float(images)
    if params.crop_offsets is not None:
        images = crop(images, params.crop_offsets, config.crop_padding, config.padding_mode)
    images = flip(images, params.flip_mask)
    if params.degrees is not None and params.perspective_offsets is not None:
        rotation = rotation_matrices(params.degrees)
        # Rotation is applied first; the matrices map output to input, so their order is reversed.
        matrices = rotation @ perspective_matrices(params.perspective_offsets, images.shape[-1])
        images = warp_perspective(images, matrices)
    images = color_jitter(images, params.color_factors)
    if params.trivial_augment is not None:
        images = trivial_augment(images, params.trivial_augment, MAX_MAGNITUDES[config.trivial_augment])
    images = normalize(images, *config.normalization)
    for boxes in params.boxes:
        images = erase(images, boxes)
    return images
