"""Images for the comparisons with torchvision."""

import pytest
import torch

from tests.augment.oracle import SIZE


@pytest.fixture
def images() -> torch.Tensor:
    """Smooth color images like photographs; one gray, one black, one white (edge cases of hue and saturation)."""
    torch.manual_seed(1)
    smooth = torch.nn.functional.interpolate(torch.rand(16, 3, 6, 6), SIZE, mode="bicubic").clamp(0, 1)
    smooth[0] = smooth[0, :1]
    smooth[1], smooth[2] = 0, 1
    return smooth
