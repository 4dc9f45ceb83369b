"""A Vision Transformer's block without gradients, in one loop: its operations do not wait for Python's lock.

`linear` and `attention` are chosen by the type of the weights, which are those of a precision.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import numpy as np
from numba import float32, int32, int64, types
from numba.extending import overload

from tinyvit.backend.arrays import VJP, Array
from tinyvit.kernels import jit, reference
from tinyvit.kernels.jit import layers, loops
from tinyvit.kernels.jit.compiling import aligned, compiled, read, written
from tinyvit.kernels.jit.loops import GELU, NOTHING, TANH_GELU, layer_norm

# mypy: disable-error-code="no-untyped-def, no-untyped-call, call-arg"

# Tokens that are computed at a time: with packed weights as many as stay in the second cache, if the block is so narrow
# that reading the weights as often costs less; else many, so that little memory is taken. Measured.
_FEW_TOKENS, _NARROW, _MANY_TOKENS = (1024 if jit.dot_instructions() == "amx" else 512), 512, 4096
FLOAT32, BFLOAT16 = read(2), types.Array(int32, 3, "C")


def linear(residual, x, weight, bias, y, then, sgemm):
    """residual + x W^T + b, or GELU of x W^T + b; `residual` is (R, O), or (0, O) for none."""


def mlp(residual, x, fc1, fc1_bias, fc2, fc2_bias, hidden, y, then, sgemm):
    """residual + GELU(x W1^T + b1) W2^T + b2; `hidden` has room for what is between the layers."""


def attention(weight, qkv, y, scores, heads, tile, sgemm):
    """`jit.loops.attention` in the precision of `weight`."""


@overload(linear)
def _linear(residual, x, weight, bias, y, then, sgemm):
    if weight != FLOAT32:
        return None

    def run(residual, x, weight, bias, y, then, sgemm):
        if then == NOTHING:
            loops.linear(residual, x, weight, bias, y, sgemm)
        else:
            loops.linear_gelu(x, weight, bias, y, y[:0], then == TANH_GELU, sgemm)

    return run


@overload(mlp)
def _mlp(residual, x, fc1, fc1_bias, fc2, fc2_bias, hidden, y, then, sgemm):
    if fc1 == BFLOAT16:
        return None

    def run(residual, x, fc1, fc1_bias, fc2, fc2_bias, hidden, y, then, sgemm):
        linear(hidden[:0], x, fc1, fc1_bias, hidden, then, sgemm)
        linear(residual, hidden, fc2, fc2_bias, y, NOTHING, sgemm)

    return run


@overload(attention)
def _attention(weight, qkv, y, scores, heads, tile, sgemm):
    if weight == BFLOAT16:
        return None

    def run(weight, qkv, y, scores, heads, tile, sgemm):
        loops.attention(qkv, y, scores, heads, tile, sgemm)

    return run


def _block(
    x, y, norm1, shift1, qkv, qkv_bias, proj, proj_bias, norm2, shift2, fc1, fc1_bias, fc2, fc2_bias,
    eps1, eps2, heads, then, images, tile, sgemm,
):  # fmt: skip
    """x (B, N, D) -> y, so many images at a time."""
    batch, n, dim = x.shape
    rows, before, after = images * n, x.reshape(-1, dim), y.reshape(-1, dim)
    normal, middle = aligned(rows * dim).reshape(rows, dim), aligned(rows * dim).reshape(rows, dim)
    wide, hidden = (
        aligned(rows * 3 * dim).reshape(rows, 3 * dim),
        aligned(rows * len(fc1_bias)).reshape(rows, len(fc1_bias)),
    )
    moments, scores = np.empty((rows, 2), np.float32), np.empty(tile * n, np.float32)
    for start in range(0, batch, images):
        count = min(images, batch - start)
        m = count * n
        here = slice(start * n, start * n + m)
        layer_norm(before[here], norm1, shift1, eps1, normal[:m], moments[:m])
        linear(wide[:0], normal[:m], qkv, qkv_bias, wide[:m], NOTHING, sgemm)
        packed, attended = wide[:m].reshape(count, n, 3 * dim), normal[:m].reshape(count, n, dim)
        attention(qkv, packed, attended, scores, heads, tile, sgemm)
        linear(before[here], normal[:m], proj, proj_bias, middle[:m], NOTHING, sgemm)
        layer_norm(middle[:m], norm2, shift2, eps2, normal[:m], moments[:m])
        mlp(middle[:m], normal[:m], fc1, fc1_bias, fc2, fc2_bias, hidden[:m], after[here], then, sgemm)


def kernel(precision: str, weight: types.Type, prepared: Callable[[Array], Any]) -> Callable[..., Any]:
    """The kernel of `reference.encoder_block` in a precision: `prepared` makes a weight of this type of its array."""
    named = FunctionType(_block.__code__, globals(), f"_block_{precision}")
    named.__qualname__ = named.__name__  # numba keeps code by name: processes could overwrite that of other precisions
    branches = [read(1), read(1), weight, read(1), weight, read(1)]
    loop = compiled(read(3), written(3), *branches, *branches, float32, float32, *(int64,) * 5)(named)
    packed = weight != FLOAT32

    def encoder_block(
        xp: Any, x: Array, *weights: Array, num_heads: int, eps: tuple[float, float], approximate: str, **_: Any
    ) -> tuple[Array, VJP]:
        y = np.empty_like(x := layers.contiguous(x))
        batch, n, dim = x.shape
        tokens = _FEW_TOKENS if packed and dim <= _NARROW else _MANY_TOKENS
        images, then = min(batch, max(1, tokens // n)), TANH_GELU if approximate == "tanh" else GELU
        arguments = [layers.contiguous(w) if w.ndim == 1 else prepared(w) for w in weights]
        loop(x, y, *arguments, *eps, num_heads, then, images, layers.tile_of(n, n), layers.SGEMM)
        return y, reference.no_gradient

    return encoder_block
