"""Elementwise operations: conversion to float, normalization, selection by a mask."""

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


def memory_format(device: torch.device) -> torch.memory_format:
    """Return the memory format of images and weights of convolutions: channels_last, but not on MPS.

    On MPS, the backward pass of BatchNorm is wrong or raises in channels_last before torch's pull requests 181411 and
    188371 of 2026.
    """
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


# Tensors on their device. A dictionary rather than functools.lru_cache, because torch.compile makes tensors that it
# finds in a dictionary inputs of the compiled function, but creates those of a cached function again in each call.
CACHED_TENSORS: dict[Any, Tensor] = {}


def constant(values: tuple[Any, ...], device: torch.device) -> Tensor:
    """Return a float32 tensor of the values, copied to the device only once because each copy synchronizes with it."""
    key = ("float32", values, str(device))
    if key not in CACHED_TENSORS:
        CACHED_TENSORS[key] = torch.tensor(values, dtype=torch.float32, device=device)
    return CACHED_TENSORS[key]


def arange(size: int, device: torch.device) -> Tensor:
    """Return int64 (size,), 0 to size - 1, created only once."""
    key = ("arange", size, str(device))
    if key not in CACHED_TENSORS:
        CACHED_TENSORS[key] = torch.arange(size, device=device)
    return CACHED_TENSORS[key]


def blend_where(mask: Tensor, selected: Tensor, other: Tensor) -> Tensor:
    """Return `selected` where the mask is true, otherwise `other`, for finite floats.

    The result equals torch.where exactly; lerp is vectorized on a CPU and five times as fast.
    """
    return torch.lerp(other, selected, mask.to(other.dtype))
