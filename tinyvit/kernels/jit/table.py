"""Every kernel that is compiled. What one does not cover is done by NumPy's."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tinyvit.kernels import Kernel, reference
from tinyvit.kernels.half_precision import in_fp32
from tinyvit.kernels.jit import block, convolution, layers, loops


def _narrow(x: np.ndarray, *_: Any, **__: Any) -> bool:
    """Whether it has numbers of 32 or 16 bits, in the processor's own byte order."""
    return x.dtype.itemsize <= 4 and x.dtype.isnative


def _weighted(x: np.ndarray, weight: np.ndarray, *_: Any, **__: Any) -> bool:
    return _narrow(x) and weight.size > 0


def _biased(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None, **_: Any) -> bool:
    return bias is not None and _narrow(x) and layers.SGEMM != 0 and weight.size > 0


def _added(residual: np.ndarray, *inputs: Any, **_: Any) -> bool:
    return _biased(*inputs)


def plain_attention(qkv: np.ndarray, *, mask: Any = None, dropout_mask: Any = None, **_: Any) -> bool:
    plain = mask is None and dropout_mask is None
    return plain and _narrow(qkv) and layers.SGEMM != 0 and qkv.size > 0


def whole_block(x: np.ndarray, *weights: np.ndarray, **_: Any) -> bool:
    return x.dtype == np.float32 and x.size > 0 and layers.SGEMM != 0


def _convolved(
    x: np.ndarray, weight: np.ndarray, *, stride: Any, padding: Any, needs: tuple[bool, ...] = (True, True)
) -> bool:
    plain = _narrow(x) and layers.SGEMM != 0 and x.size > 0 and weight.size > 0
    data = not needs[0] and x.flags.c_contiguous
    return plain and (data or convolution.by_tiles(weight, stride, padding))


def _float32(x: np.ndarray, *, kernel: tuple[int, int] = (1, 1), **_: Any) -> bool:
    """Places in a window of pooling are numbered in a byte."""
    return x.dtype == np.float32 and kernel[0] * kernel[1] <= 256


def _float32_in_rows(*arrays: np.ndarray, **_: Any) -> bool:
    return all(x.dtype == np.float32 and x.flags.c_contiguous for x in arrays)


def adamw(
    xp: Any, p: np.ndarray, g: np.ndarray, m: np.ndarray, v: np.ndarray,
    *, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, step: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    correction = math.sqrt(1 - beta2**step)
    rate = lr * correction / (1 - beta1**step)
    flat = [x.reshape(-1) for x in (p, g, m, v)]
    loops.adamw(*flat, beta1, beta2, eps * correction, rate, 1 - lr * weight_decay)
    return p, m, v


def _attention_forward(qkv: np.ndarray, y: np.ndarray, weights: np.ndarray, heads: int) -> None:
    tile = layers.tile_of(*weights.shape[2:])
    scores = weights if len(weights) else np.empty(tile * qkv.shape[1], np.float32)
    loops.attention(qkv, y, scores.reshape(-1), heads, tile, layers.SGEMM)


def _attention_vjp(
    dy: np.ndarray, qkv: np.ndarray, y: np.ndarray, weights: np.ndarray, dqkv: np.ndarray, heads: int
) -> None:
    loops.attention_vjp(dy, qkv, y, weights, dqkv, heads, layers.tile_of(*weights.shape[2:]), layers.SGEMM)


_attention = layers.attention(_attention_forward, _attention_vjp)

KERNELS = {
    reference.linear: Kernel(in_fp32(layers.linear), _biased),
    reference.add_linear: Kernel(in_fp32(layers.add_linear), _added),
    reference.linear_gelu: Kernel(in_fp32(layers.linear_gelu), _weighted),
    reference.layer_norm: Kernel(in_fp32(layers.layer_norm), _narrow),
    reference.qkv_attention: Kernel(in_fp32(_attention), plain_attention),
    reference.encoder_block: Kernel(block.kernel("fp32", block.FLOAT32, layers.contiguous), whole_block),
    reference.conv2d: Kernel(in_fp32(convolution.conv2d), _convolved),
    reference.max_pool2d: Kernel(convolution.max_pool2d, _float32),
    reference.relu: Kernel(convolution.relu, _float32),
    reference.adamw: Kernel(adamw, _float32_in_rows),
}
