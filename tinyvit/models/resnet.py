"""The ResNet before the patches of hybrid models, with the parameter names of timm's checkpoints.

He et al. 2015 (arXiv:1512.03385) with the changes of Kolesnikov et al. 2019 (BiT, arXiv:1912.11370): convolutions of
standardised weights, group norm in place of batch norm, the stride on the 3x3 convolution, padding "same" everywhere.
"""

from __future__ import annotations

import numpy as np

from tinyvit import functional as F
from tinyvit import nn
from tinyvit.engine.tensor import Tensor

STEM_CHANNELS, STEM_STRIDE = 64, 4
MOST_STAGES = 4
BOTTLENECK = 4  # channels of a block's output over those of its inner convolutions
GROUPS = 32
GROUP_EPS, WEIGHT_EPS = 1e-5, 1e-8  # timm's; Google's code has 1e-6, and divides by the standard deviation + 1e-5


def channels(layers: tuple[int, ...]) -> int:
    """Channels of the feature map after these stages, or after the stem alone if there are none."""
    return STEM_CHANNELS * BOTTLENECK * 2 ** (len(layers) - 1) if layers else STEM_CHANNELS


def stride(layers: tuple[int, ...]) -> int:
    """Pixels of the image, down and across, for each pixel of the feature map; all stages but the first halve it."""
    return STEM_STRIDE * 2 ** max(len(layers) - 1, 0)


def backbone(in_chans: int, layers: tuple[int, ...]) -> nn.Module:
    """Images (B, C, H, W) -> features (B, channels, H / stride, W / stride), rounded up."""
    return ResNet(in_chans, layers) if layers else Stem(in_chans)


class ResNet(nn.Module):
    """A stem, then stages; stage i has `layers[i]` blocks."""

    def __init__(self, in_chans: int, layers: tuple[int, ...]) -> None:
        self.stem = Stem(in_chans)
        self.stages = nn.Sequential(
            *(
                Stage(channels(layers[:i]), channels(layers[: i + 1]), depth, stride=1 if i == 0 else 2)
                for i, depth in enumerate(layers)
            )
        )

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W)
        return self.stages(self.stem(x))  # (B, channels, H / stride, W / stride)


class Stem(nn.Module):
    """A 7x7 convolution and max-pooling."""

    def __init__(self, in_chans: int) -> None:
        self.conv = StdConv(in_chans, STEM_CHANNELS, kernel_size=7, stride=2)
        self.norm = GroupNorm(STEM_CHANNELS)

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W)
        return F.max_pool2d(F.relu(self.norm(self.conv(x))), kernel_size=3, stride=2, padding="same")  # H / 4, W / 4


class Stage(nn.Module):
    """Blocks one after another; the first changes the number of channels and may halve height and width."""

    def __init__(self, inputs: int, outputs: int, depth: int, stride: int) -> None:
        first = Bottleneck(inputs, outputs, stride, Downsample(inputs, outputs, stride))
        self.blocks = nn.Sequential(first, *(Bottleneck(outputs, outputs) for _ in range(1, depth)))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


class Bottleneck(nn.Module):
    """relu(shortcut + three convolutions); the inner ones have a quarter of the channels."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, shortcut: nn.Module | None = None) -> None:
        inner = outputs // BOTTLENECK
        self.downsample = shortcut or nn.Identity()
        self.conv1, self.norm1 = StdConv(inputs, inner, kernel_size=1), GroupNorm(inner)
        self.conv2, self.norm2 = StdConv(inner, inner, kernel_size=3, stride=stride), GroupNorm(inner)
        self.conv3, self.norm3 = StdConv(inner, outputs, kernel_size=1), GroupNorm(outputs)
        self.norm3.weight.data = np.zeros(outputs, np.float32)  # a new block's output is its shortcut

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        y = F.relu(self.norm2(self.conv2(y)))
        return F.relu(self.downsample(x) + self.norm3(self.conv3(y)))


class Downsample(nn.Module):
    """The shortcut of a block whose output has another shape than its input."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        self.conv, self.norm = StdConv(inputs, outputs, kernel_size=1, stride=stride), GroupNorm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class StdConv(nn.Conv2d):
    """A convolution without bias whose weight (O, C, k, k) is standardised before use."""

    def __init__(self, inputs: int, outputs: int, kernel_size: int, stride: int = 1) -> None:
        super().__init__(inputs, outputs, kernel_size, stride, padding="same", bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, F.weight_standardize(self.weight, WEIGHT_EPS), None, self.stride, self.padding)


class GroupNorm(nn.Module):
    """Group normalisation of feature maps (B, dim, H, W)."""

    def __init__(self, dim: int) -> None:
        self.weight = nn.Parameter(np.ones(dim, np.float32))
        self.bias = nn.Parameter(np.zeros(dim, np.float32))

    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x, GROUPS, self.weight, self.bias, GROUP_EPS)
