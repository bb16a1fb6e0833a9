"""Residual networks for 32x32 images: one class, its variants as data.

Deep Residual Learning (He et al., 2015, arXiv:1512.03385), Squeeze-and-Excitation (Hu et al., 2017, arXiv:1709.01507),
Stochastic Depth (Huang et al., 2016, arXiv:1603.09382).
"""

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import SqueezeExcitation, StochasticDepth

from cifar_ignite.models.registry import register_model

BLOCKS = (2, 2, 2, 2)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut: (B, in_channels, H, W) to (B, channels, H / stride, W / stride)."""

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int,
        se_reduction: int | None,
        drop_prob: float,
        zero_init: bool = False,
    ) -> None:
        """
        Args:
            in_channels: of the input.
            channels: of the output.
            stride: of the first convolution.
            se_reduction: channels are squeezed by this factor; None leaves Squeeze-and-Excitation out.
            drop_prob: how often training drops the residual branch of an image.
            zero_init: the residual branch begins as zero: its last BatchNorm's weight does (Goyal et al., 2017,
                arXiv:1706.02677, section 5.1).
        """
        super().__init__()
        last_norm = nn.BatchNorm2d(channels)
        if zero_init:
            nn.init.zeros_(last_norm.weight)
        self.residual = nn.Sequential(
            nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 3, 1, 1, bias=False),
            last_norm,
        )
        if se_reduction:
            self.residual.append(SqueezeExcitation(channels, max(1, channels // se_reduction)))
        if drop_prob:
            self.residual.append(StochasticDepth(drop_prob, mode="row"))
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != channels:
            self.shortcut.append(nn.Conv2d(in_channels, channels, 1, stride, bias=False))
            self.shortcut.append(nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.residual(x) + self.shortcut(x))


class ResNet(nn.Module):
    """Stem, four stages of two blocks, global average pool, dropout, head: (B, 3, 32, 32) to (B, num_classes)."""

    def __init__(
        self,
        *,
        num_classes: int,
        width: int,
        dropout: float,
        zero_init_residual: bool,
        se_reduction: int | None,
        drop_path_rate: float,
    ) -> None:
        """
        Args:
            num_classes: logits an image.
            width: channels of the stem and the first stage; each later stage doubles them.
            dropout: probability of dropping a feature before the head.
            zero_init_residual: blocks begin as their shortcuts.
            se_reduction: of the Squeeze-and-Excitation in each block; None for none.
            drop_path_rate: drop probability of the last block; it rises linearly with depth, from rate / blocks.
        """
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        )
        drop_probs = iter(drop_path_rate * (depth + 1) / sum(BLOCKS) for depth in range(sum(BLOCKS)))
        self.stages = nn.Sequential()
        in_channels = width
        for stage, blocks in enumerate(BLOCKS):
            channels = width * 2**stage
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                self.stages.append(
                    BasicBlock(in_channels, channels, stride, se_reduction, next(drop_probs), zero_init_residual)
                )
                in_channels = channels
        self.head = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(dropout), nn.Linear(in_channels, num_classes)
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.stages(self.stem(images)))


@register_model
def se_resnet(
    *,
    num_classes: int,
    width: int = 32,
    dropout: float = 0.3,
    zero_init_residual: bool = False,
    se_reduction: int = 16,
) -> ResNet:
    """ResNet with Squeeze-and-Excitation in each block."""
    return ResNet(
        num_classes=num_classes,
        width=width,
        dropout=dropout,
        zero_init_residual=zero_init_residual,
        se_reduction=se_reduction,
        drop_path_rate=0.0,
    )


@register_model
def stochastic_resnet(
    *,
    num_classes: int,
    width: int = 32,
    dropout: float = 0.3,
    zero_init_residual: bool = False,
    drop_path_rate: float = 0.2,
) -> ResNet:
    """ResNet with stochastic depth."""
    return ResNet(
        num_classes=num_classes,
        width=width,
        dropout=dropout,
        zero_init_residual=zero_init_residual,
        se_reduction=None,
        drop_path_rate=drop_path_rate,
    )


@register_model
def hybrid_resnet(
    *,
    num_classes: int,
    width: int = 32,
    dropout: float = 0.3,
    zero_init_residual: bool = False,
    se_reduction: int = 16,
    drop_path_rate: float = 0.2,
) -> ResNet:
    """ResNet with both."""
    return ResNet(
        num_classes=num_classes,
        width=width,
        dropout=dropout,
        zero_init_residual=zero_init_residual,
        se_reduction=se_reduction,
        drop_path_rate=drop_path_rate,
    )
