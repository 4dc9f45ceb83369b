"""Layers: modules around one operation of `functional`.

They have torch's names and arguments. Initial weights are those of the ViT's paper, not torch's.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tinyvit import functional as F
from tinyvit.backend import arrays
from tinyvit.engine.ops import multiply
from tinyvit.engine.tensor import Array, Tensor, array_of
from tinyvit.nn import init
from tinyvit.nn.module import Module, Parameter


class Identity(Module):
    """x -> x."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class Linear(Module):
    """y = x W^T + b: (..., in_features) -> (..., out_features).

    Args:
        in_features, out_features: sizes of the weight (out_features, in_features) and the bias (out_features,).
        bias: whether there is one; it starts as zeros.
        weight_init: gives the initial weight of that shape.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        weight_init: Callable[[init.Shape], np.ndarray] = init.xavier_uniform,
    ) -> None:
        self.weight = Parameter(weight_init((out_features, in_features)))
        self.bias = Parameter(np.zeros(out_features, np.float32)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


def is_plain(layer: Module, *classes: type[Module]) -> bool:
    """Whether a layer is of one of these very classes, with their forward: then a fused operation may replace it."""
    return type(layer) in classes and "forward" not in vars(layer)


def linear_gelu(layer: Module, x: Tensor, approximate: str = "none") -> Tensor:
    """functional.gelu(layer(x), approximate); for a `Linear` with a bias in one operation."""
    if isinstance(layer, Linear) and is_plain(layer, Linear) and layer.bias is not None:
        return F.linear_gelu(x, layer.weight, layer.bias, approximate)
    return F.gelu(layer(x), approximate)


def add_linear(residual: Tensor | None, layer: Module, x: Tensor, drop: Module) -> Tensor:
    """residual + drop(layer(x)), None for no residual; for a `Linear` without dropout in one operation."""
    if residual is None:
        return drop(layer(x))
    if isinstance(layer, Linear) and is_plain(layer, Linear) and is_idle(drop):
        return F.add_linear(residual, x, layer.weight, layer.bias)
    return residual + drop(layer(x))


def add_drop_path(residual: Tensor, layer: Module, x: Tensor) -> Tensor:
    """residual + layer(x); for a `DropPath` in one operation."""
    if isinstance(layer, DropPath) and is_plain(layer, DropPath):
        return F.add_drop_path(residual, x, layer.p, layer.training)
    return residual + layer(x)


def is_idle(layer: Module) -> bool:
    """Whether a layer gives what it gets: an identity, or dropout that is off."""
    off = isinstance(layer, (Dropout, DropPath)) and not (layer.training and layer.p)
    return is_plain(layer, Identity) or (off and is_plain(layer, Dropout, DropPath))


class Conv2d(Module):
    """A convolution: (B, in_channels, H, W) -> (B, out_channels, R, S).

    Args:
        in_channels, out_channels, kernel_size: sizes of the weight (out_channels, in_channels, h, w).
        stride, padding: as in `functional.conv2d`.
        bias: whether there is one; it starts as zeros.
        weight_init: gives the initial weight of that shape.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        *,
        bias: bool = True,
        weight_init: Callable[[init.Shape], np.ndarray] = init.lecun_normal,
    ) -> None:
        height, width = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
        self.stride, self.padding = stride, padding
        self.weight = Parameter(weight_init((out_channels, in_channels, height, width)))
        self.bias = Parameter(np.zeros(out_channels, np.float32)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding)


class Embedding(Module):
    """A table of vectors: whole numbers (...) -> (..., embedding_dim), the rows of weight (num_embeddings, dim).

    Raises:
        TypeError, IndexError: indices that are no whole numbers in 0 ... num_embeddings - 1.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int) -> None:
        self.weight = Parameter(init.normal((num_embeddings, embedding_dim), std=1.0))

    def forward(self, indices: Tensor | Array) -> Tensor:
        index = arrays.convert(array_of(indices), self.weight.data)
        if not arrays.namespace(index).isdtype(index.dtype, "integral"):
            raise TypeError(f"Embedding expects whole numbers, got {index.dtype}")
        rows = self.weight.shape[0]
        if arrays.on_host(index) and index.size and not 0 <= index.min() <= index.max() < rows:
            raise IndexError(f"Embedding expects indices in 0 ... {rows - 1}, got {index.min()} ... {index.max()}")
        return self.weight[index]


class LayerNorm(Module):
    """Layer normalisation over the last axis, of length `dim` (Ba et al. 2016, arXiv:1607.06450).

    `eps` is the ViT's 1e-6, where torch's default is 1e-5.
    """

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        self.eps = eps
        self.weight = Parameter(np.ones(dim, np.float32))
        self.bias = Parameter(np.zeros(dim, np.float32))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight, self.bias, self.eps)


class RMSNorm(Module):
    """Division by the root of the mean square over the last axis, of length `dim` (arXiv:1910.07467)."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        self.eps = eps
        self.weight = Parameter(np.ones(dim, np.float32))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight, self.eps)


class LayerScale(Module):
    """A learned factor for each channel (Touvron et al. 2021, arXiv:2103.17239): (..., dim) -> (..., dim)."""

    def __init__(self, dim: int, init_values: float = 1e-5) -> None:
        self.gamma = Parameter(np.full(dim, init_values, np.float32))

    def forward(self, x: Tensor) -> Tensor:
        return multiply(x, self.gamma)


class ReLU(Module):
    """`functional.relu`."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x)


class GELU(Module):
    """`functional.gelu`; `approximate` is "none" or "tanh"."""

    def __init__(self, approximate: str = "none") -> None:
        self.approximate = approximate

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x, self.approximate)


class Dropout(Module):
    """`functional.dropout` with probability `p` in training mode."""

    def __init__(self, p: float = 0.5) -> None:
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.p, self.training)


class DropPath(Module):
    """`functional.drop_path` with probability `p` in training mode."""

    def __init__(self, p: float = 0.0) -> None:
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return F.drop_path(x, self.p, self.training)
