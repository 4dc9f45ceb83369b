"""Every kernel for NumPy arrays."""

from __future__ import annotations

from typing import Any

import numpy as np

from tinyvit.backend import arrays
from tinyvit.kernels import Kernel, reference
from tinyvit.kernels.cpu import convolution, layers, optimizers
from tinyvit.kernels.half_precision import in_fp32


def _not_float64(x: np.ndarray, *_: Any, **__: Any) -> bool:
    """GELU's polynomial has the accuracy of float32."""
    return x.dtype != np.float64


def _plain_attention(_: Any, *, mask: Any = None, dropout_mask: Any = None, **__: Any) -> bool:
    return mask is None and dropout_mask is None


def _valid_labels(logits: np.ndarray, *, labels: np.ndarray, **_: Any) -> bool:
    """Probabilities, or numbers of classes that exist."""
    return labels.ndim == 2 or bool(((labels >= 0) & (labels < logits.shape[1])).all())


def sum_at(xp: Any, values: np.ndarray, positions: np.ndarray, size: int) -> np.ndarray:
    sums = np.zeros(size, np.float32 if arrays.is_half(values) else values.dtype)
    np.add.at(sums, positions, values.astype(sums.dtype, copy=False))
    return sums.astype(values.dtype, copy=False)


KERNELS = {
    reference.linear: Kernel(in_fp32(layers.linear)),
    reference.linear_gelu: Kernel(in_fp32(layers.linear_gelu), _not_float64),
    reference.gelu: Kernel(in_fp32(layers.gelu), _not_float64),
    reference.layer_norm: Kernel(in_fp32(layers.layer_norm)),
    reference.qkv_attention: Kernel(in_fp32(layers.qkv_attention), _plain_attention),
    reference.cross_entropy: Kernel(in_fp32(layers.cross_entropy), _valid_labels),
    reference.conv2d: Kernel(in_fp32(convolution.conv2d)),
    reference.max_pool2d: Kernel(convolution.max_pool2d),
    reference.sum_at: Kernel(sum_at),
    reference.sgd: Kernel(optimizers.sgd),
    reference.adamw: Kernel(optimizers.adamw),
    reference.lerp: Kernel(optimizers.lerp),
    reference.sum_of_squares: Kernel(optimizers.sum_of_squares),
}
