"""Residual networks for 32x32 images: one class whose variants differ in their options.

Deep Residual Learning (He et al., 2015, arXiv:1512.03385), Squeeze-and-Excitation (Hu et al., 2017, arXiv:1709.01507),
Stochastic Depth (Huang et al., 2016, arXiv:1603.09382).
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import SqueezeExcitation, StochasticDepth
from typing_extensions import TypedDict, Unpack

from cifar_ignite.models.registry import register_model

BLOCKS_PER_STAGE = (2, 2, 2, 2)


class ResNetOptions(TypedDict, total=False):
    """Options that all registered ResNets have; see `ResNetConfig` for their meaning and defaults."""

    width: int
    dropout: float
    zero_init_residual: bool


@dataclass(frozen=True)
class ResNetConfig:
    """Options of a ResNet.

    Attributes:
        width: Channels of the stem and the first stage; each later stage doubles them.
        dropout: Dropout probability before the head's linear layer.
        zero_init_residual: Whether the last BatchNorm weight of each residual branch starts at zero, so that blocks
            start as their shortcuts (Goyal et al., 2017, arXiv:1706.02677, section 5.1).
        se_reduction: Squeeze-and-Excitation reduction of the channels; None leaves Squeeze-and-Excitation out.
        drop_path_rate: Drop probability of the last block; the probability rises linearly with depth.
    """

    width: int = 32
    dropout: float = 0.3
    zero_init_residual: bool = False
    se_reduction: int | None = None
    drop_path_rate: float = 0.0


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: (B, in_channels, H, W) to (B, channels, H / stride, W / stride)."""

    def __init__(self, in_channels: int, channels: int, stride: int, *, drop_prob: float, config: ResNetConfig) -> None:
        """
        Args:
            in_channels: Channels of the input.
            channels: Channels of the output.
            stride: Stride of the first convolution.
            drop_prob: Probability of dropping the residual branch of an image in training.
            config: Options of the network.
        """
        super().__init__()
        last_norm = nn.BatchNorm2d(channels)
        if config.zero_init_residual:
            nn.init.zeros_(last_norm.weight)
        self.residual = nn.Sequential(
            nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 3, 1, 1, bias=False),
            last_norm,
        )
        if config.se_reduction:
            self.residual.append(SqueezeExcitation(channels, max(1, channels // config.se_reduction)))
        if drop_prob:
            self.residual.append(StochasticDepth(drop_prob, mode="row"))
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != channels:
            self.shortcut.append(nn.Conv2d(in_channels, channels, 1, stride, bias=False))
            self.shortcut.append(nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.residual(x) + self.shortcut(x))


class ResNet(nn.Module):
    """Stem, four stages of two blocks, global average pooling, dropout, linear: (B, 3, H, W) to (B, num_classes)."""

    def __init__(self, num_classes: int, config: ResNetConfig) -> None:
        """
        Args:
            num_classes: Number of logits per image.
            config: Options of the network.
        """
        super().__init__()
        width = config.width
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        )
        self.stages = _create_stages(config)
        channels = width * 2 ** (len(BLOCKS_PER_STAGE) - 1)
        self.head = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(config.dropout), nn.Linear(channels, num_classes)
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.stages(self.stem(images)))


def _create_stages(config: ResNetConfig) -> nn.Sequential:
    """Create the blocks of all stages, with drop probabilities from drop_path_rate / depth to drop_path_rate."""
    depth = sum(BLOCKS_PER_STAGE)
    blocks = nn.Sequential()
    in_channels = config.width
    for stage, num_blocks in enumerate(BLOCKS_PER_STAGE):
        channels = config.width * 2**stage
        for index in range(num_blocks):
            stride = 2 if stage > 0 and index == 0 else 1
            drop_prob = config.drop_path_rate * (len(blocks) + 1) / depth
            blocks.append(BasicBlock(in_channels, channels, stride, drop_prob=drop_prob, config=config))
            in_channels = channels
    return blocks


@register_model
def se_resnet(*, num_classes: int, se_reduction: int = 16, **options: Unpack[ResNetOptions]) -> ResNet:
    """ResNet with Squeeze-and-Excitation in each block."""
    return ResNet(num_classes, ResNetConfig(se_reduction=se_reduction, **options))


@register_model
def stochastic_resnet(*, num_classes: int, drop_path_rate: float = 0.2, **options: Unpack[ResNetOptions]) -> ResNet:
    """ResNet with stochastic depth."""
    return ResNet(num_classes, ResNetConfig(drop_path_rate=drop_path_rate, **options))


@register_model
def hybrid_resnet(
    *, num_classes: int, se_reduction: int = 16, drop_path_rate: float = 0.2, **options: Unpack[ResNetOptions]
) -> ResNet:
    """ResNet with Squeeze-and-Excitation and stochastic depth."""
    return ResNet(num_classes, ResNetConfig(se_reduction=se_reduction, drop_path_rate=drop_path_rate, **options))
