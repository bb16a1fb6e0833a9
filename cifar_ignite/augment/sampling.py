"""Random parameters for a batch, drawn from torch's global generators."""

import torch
from torch import Tensor


def random_uniform(batch: int, low: float, high: float, device: torch.device) -> Tensor:
    """Return float (B,), uniform in [low, high)."""
    return torch.empty(batch, device=device).uniform_(low, high)


def bernoulli_mask(batch: int, p: float, device: torch.device) -> Tensor:
    """Return bool (B,), true with probability p: never for 0, always for 1."""
    return torch.rand(batch, device=device) < p
