"""Comparison with torchvision's functional transforms, which are applied to each image with the same parameters."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional

CPU = torch.device("cpu")
SIZE = 32


def apply_per_image(function: Callable[[Tensor, Any], Tensor], images: Tensor, parameters: Iterable[Any]) -> Tensor:
    """Return the batch of function(image, parameter)."""
    return torch.stack([function(image, parameter) for image, parameter in zip(images, parameters, strict=True)])


def max_abs(difference: Tensor, border: int = 0) -> float:
    """Return the largest absolute value, without `border` pixels on each side."""
    return difference[..., border : SIZE - border, border : SIZE - border].abs().max().item()


def erase_box(image: Tensor, box: list[int]) -> Tensor:
    """Return the image with a box (top, left, bottom, right) set to 0 by torchvision."""
    top, left, bottom, right = box
    return functional.erase(image, top, left, bottom - top, right - left, torch.zeros(1))
