"""A plain ResNet of the hybrid models in torch with timm's parameter names, which the tests compare ours with."""

from __future__ import annotations

import torch
import torch.nn.functional as TF
from torch import nn


def same(x: torch.Tensor, kernel: int, stride: int, value: float = 0.0) -> torch.Tensor:
    """TensorFlow's padding SAME, as its documentation words it."""
    pads = []
    for n in (x.shape[3], x.shape[2]):
        total = max(kernel - (stride if n % stride == 0 else n % stride), 0)
        pads += [total // 2, total - total // 2]
    return TF.pad(x, pads, value=value)


class Conv(nn.Module):
    """timm's StdConv2dSame with its epsilon of 1e-8, or with `original` Google's: divided by the deviation + 1e-5."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, original: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, kernel, kernel))
        self.stride, self.original = stride, original

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        var, mean = torch.var_mean(self.weight, dim=(1, 2, 3), keepdim=True, correction=0)
        scale = torch.sqrt(var) + 1e-5 if self.original else torch.sqrt(var + 1e-8)
        return TF.conv2d(same(x, self.weight.shape[2], self.stride), (self.weight - mean) / scale, stride=self.stride)


class Stem(nn.Module):
    def __init__(self, in_chans: int, original: bool = False) -> None:
        super().__init__()
        self.conv = Conv(in_chans, 64, 7, 2, original)
        self.norm = nn.GroupNorm(32, 64, eps=1e-6 if original else 1e-5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.conv(x)))
        return TF.max_pool2d(same(x, 3, 2, -torch.inf), 3, 2)


class Unit(nn.Module):
    """A bottleneck block."""

    def __init__(self, inputs: int, inner: int, stride: int, first: bool, original: bool = False) -> None:
        super().__init__()
        outputs, eps = 4 * inner, 1e-6 if original else 1e-5
        if first:
            self.downsample = nn.Module()
            self.downsample.conv = Conv(inputs, outputs, 1, stride, original)
            self.downsample.norm = nn.GroupNorm(32, outputs, eps)
        self.first = first
        self.conv1, self.norm1 = Conv(inputs, inner, 1, 1, original), nn.GroupNorm(32, inner, eps)
        self.conv2, self.norm2 = Conv(inner, inner, 3, stride, original), nn.GroupNorm(32, inner, eps)
        self.conv3, self.norm3 = Conv(inner, outputs, 1, 1, original), nn.GroupNorm(32, outputs, eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = self.downsample.norm(self.downsample.conv(x)) if self.first else x
        x = torch.relu(self.norm1(self.conv1(x)))
        x = torch.relu(self.norm2(self.conv2(x)))
        return torch.relu(shortcut + self.norm3(self.conv3(x)))


class ResNet(nn.Module):
    def __init__(self, in_chans: int, layers: tuple[int, ...], original: bool = False) -> None:
        super().__init__()
        self.stem, self.stages = Stem(in_chans, original), nn.ModuleList()
        inputs = 64
        for i, depth in enumerate(layers):
            stage, inner = nn.Module(), 64 * 2**i
            stage.blocks = nn.ModuleList(
                Unit(4 * inner if j else inputs, inner, 2 if i and not j else 1, j == 0, original) for j in range(depth)
            )
            self.stages.append(stage)
            inputs = 4 * inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for stage in self.stages:
            for block in stage.blocks:
                x = block(x)
        return x


def torch_backbone(in_chans: int, layers: tuple[int, ...], original: bool = False) -> nn.Module:
    return ResNet(in_chans, layers, original) if layers else Stem(in_chans, original)
