"""CutMix and MixUp: every image is mixed with another image of its batch."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import v2

from cifar_ignite.config import AugmentConfig


def create_cutmix_or_mixup(
    config: AugmentConfig, num_classes: int
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Create CutMix (arXiv:1905.04899), MixUp (arXiv:1710.09412) or neither, with `cutmix_p` and `mixup_p`.

    One choice is drawn per batch, as in both papers. torchvision mixes each image with the previous one, which is
    random because the batch is, and draws on the CPU, so nothing synchronizes with the device.

    Args:
        config: Section with the probabilities and the parameters of the Beta distributions.
        num_classes: Number of columns of the targets.

    Returns:
        A function of images, float (B, C, H, W), and labels, int64 (B,), to images and targets, float (B, num_classes).
    """
    # Created once: validating a distribution takes longer on the host than sampling it.
    cutmix = v2.CutMix(num_classes=num_classes, alpha=config.cutmix_alpha)
    mixup = v2.MixUp(num_classes=num_classes, alpha=config.mixup_alpha)

    def cutmix_or_mixup(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        draw = torch.rand(()).item()
        if draw < config.cutmix_p:
            return cutmix(images, labels)
        if draw < config.cutmix_p + config.mixup_p:
            return mixup(images, labels)
        return images, F.one_hot(labels, num_classes).float()

    return cutmix_or_mixup
