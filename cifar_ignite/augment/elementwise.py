"""Elementwise operations: conversion to float, normalization, selection by a mask."""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor


def to_float(images: Tensor) -> Tensor:
    """Convert uint8 in [0, 255] to float32 in [0, 1]."""
    return images / 255


def normalize(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Return (images - mean) / std per channel, for float images (B, C, H, W)."""
    shift, scale = constant(mean, images.device), constant(std, images.device)
    return images.sub(shift[:, None, None]).div_(scale[:, None, None])


@lru_cache
def constant(values: tuple[Any, ...], device: torch.device) -> Tensor:
    """Return a float32 tensor of the values, copied to the device only once because each copy synchronizes with it."""
    return torch.tensor(values, dtype=torch.float32, device=device)


@lru_cache
def arange(size: int, device: torch.device) -> Tensor:
    """Return int64 (size,), 0 to size - 1, created only once."""
    return torch.arange(size, device=device)


def blend_where(mask: Tensor, selected: Tensor, other: Tensor) -> Tensor:
    """Return `selected` where the mask is true, otherwise `other`, for finite floats.

    The result equals torch.where exactly; lerp is vectorized on a CPU and five times as fast.
    """
    return torch.lerp(other, selected, mask.to(other.dtype))
