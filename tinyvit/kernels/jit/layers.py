"""The layers' kernels: what surrounds the loops."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from threadpoolctl import threadpool_info

from tinyvit.backend.arrays import VJP, Array
from tinyvit.kernels.cpu import layers as cpu_layers
from tinyvit.kernels.jit import loops

BLOCK = 1 << 16  # scores computed at a time: 256 KiB, half of the second cache of most processors


def _find_sgemm() -> int:
    """The address of the `cblas_sgemm` with 64-bit sizes in NumPy's BLAS; 0 if there is none of a known name."""
    for library in threadpool_info():
        for name in ("scipy_cblas_sgemm64_", "cblas_sgemm64_"):
            function = getattr(ctypes.CDLL(library["filepath"]), name, None)
            if function is not None:
                return ctypes.cast(function, ctypes.c_void_p).value or 0
    return 0


SGEMM = _find_sgemm()
contiguous = np.ascontiguousarray


def rows_of(x: Array) -> Array:
    return contiguous(x).reshape(-1, x.shape[-1])


def linear_layers(product: Callable[..., tuple[Array, VJP]]) -> list[Callable[..., tuple[Array, VJP]]]:
    """The kernels of `reference.linear`, `add_linear` and `linear_gelu` in a precision.

    `product(residual, x, weight, bias, needs, then)` gives residual + x W^T + b, or its GELU, and the vjp of x, weight
    and bias; the residual is (R, O), or (0, O) for none.
    """

    def linear(xp: Any, x: Array, weight: Array, bias: Array | None, *, needs: tuple[bool, ...]) -> tuple[Array, VJP]:
        return product(np.empty((0, len(weight)), x.dtype), x, weight, bias, needs, loops.NOTHING)

    def add_linear(
        xp: Any, residual: Array, x: Array, weight: Array, bias: Array | None, *, needs: tuple[bool, ...]
    ) -> tuple[Array, VJP]:
        y, vjp = product(rows_of(residual), x, weight, bias, needs[1:], loops.NOTHING)
        return y, lambda dy: (dy, *vjp(dy))

    def linear_gelu(
        xp: Any, x: Array, weight: Array, bias: Array, *, approximate: str, needs: tuple[bool, ...]
    ) -> tuple[Array, VJP]:
        then = loops.TANH_GELU if approximate == "tanh" else loops.GELU
        return product(np.empty((0, len(weight)), x.dtype), x, weight, bias, needs, then)

    return [linear, add_linear, linear_gelu]


def _product(
    residual: Array, x: Array, weight: Array, bias: Array, needs: tuple[bool, ...], then: int
) -> tuple[Array, VJP]:
    rows, shift, tanh = rows_of(x), contiguous(bias), then == loops.TANH_GELU
    if not SGEMM:  # only GELU comes here then
        return _gelu_of(
            x.shape, rows @ weight.T, cpu_layers.linear_vjp(x.shape, rows, weight, needs), shift, tanh, needs
        )
    y = np.empty((len(rows), len(weight)), x.dtype)
    slope = np.empty((len(rows) if then != loops.NOTHING and True in needs else 0, len(weight)), x.dtype)
    if then == loops.NOTHING:
        loops.linear(residual, rows, contiguous(weight), shift, y, SGEMM)
    else:
        loops.linear_gelu(rows, contiguous(weight), shift, y, slope, tanh, SGEMM)
    return y.reshape(*x.shape[:-1], len(weight)), _linear_vjp(x.shape, rows, weight, needs, slope)


linear, add_linear, linear_gelu = linear_layers(_product)


def _linear_vjp(shape: tuple[int, ...], rows: Array, weight: Array, needs: tuple[bool, ...], slope: Array) -> VJP:
    saved_rows = rows if needs[1] else np.empty((0, rows.shape[1]), rows.dtype)  # not a part, which would keep all

    def fill(dy: Array, dx: Array, dweight: Array, dbias: Array) -> None:
        loops.linear_vjp(dy, slope, saved_rows, contiguous(weight), dx, dweight, dbias, SGEMM)

    return linear_vjp(fill, shape, weight.shape, needs, len(slope) > 0)


def linear_vjp(
    fill: Callable[..., None], shape: tuple[int, ...], weight: tuple[int, int], needs: tuple[bool, ...], summed: bool
) -> VJP:
    """The vjp of a layer of x and a weight of these shapes: `fill(dy, dx, dweight, dbias)` adds to the last two.

    What is not wanted has no rows; the bias's gradient comes anyway where it is `summed` on the way.
    """
    outputs, inputs = weight

    def vjp(dy: Array) -> tuple[Array | None, ...]:
        dy = rows_of(dy)
        dx = np.empty((len(dy) if needs[0] else 0, inputs), dy.dtype)
        dweight = np.zeros((outputs if needs[1] else 0, inputs), dy.dtype)
        dbias = np.zeros(outputs if needs[2] or summed else 0, dy.dtype)
        fill(dy, dx, dweight, dbias)
        wanted = zip(needs, (dx.reshape(shape) if needs[0] else dx, dweight, dbias), strict=True)
        return tuple(gradient if needed else None for needed, gradient in wanted)

    return vjp


def _gelu_of(
    shape: tuple[int, ...], y: Array, product_vjp: VJP, bias: Array, tanh: bool, needs: tuple[bool, ...]
) -> tuple[Array, VJP]:
    """gelu(y + bias), in the place of y (R, O), for the product y of x of this shape."""
    slope = np.empty((len(y) if True in needs else 0, y.shape[1]), y.dtype)
    loops.bias_gelu(y, bias, slope, tanh)

    def vjp(dy: Array) -> tuple[Array | None, ...]:
        dhidden, dbias = np.empty_like(slope), np.zeros_like(bias)
        loops.multiply_and_sum(rows_of(dy), slope, dhidden, dbias)
        return product_vjp(dhidden, dbias)

    return y.reshape(*shape[:-1], y.shape[1]), vjp


def layer_norm(
    xp: Any, x: Array, weight: Array, bias: Array, *, eps: float, needs: tuple[bool, ...]
) -> tuple[Array, VJP]:
    rows, weight = rows_of(x), contiguous(weight)
    y, moments = np.empty_like(rows), np.empty((len(rows), 2), x.dtype)
    loops.layer_norm(rows, weight, contiguous(bias), eps, y, moments)

    def vjp(dy: Array) -> tuple[Array, Array, Array]:
        dx = np.empty_like(rows)
        dweight, dbias = np.zeros((2, len(weight)), dy.dtype)
        loops.layer_norm_vjp(rows_of(dy), rows, weight, moments, dx, dweight, dbias)
        return dx.reshape(x.shape), dweight, dbias

    return y.reshape(x.shape), vjp


def tile_of(queries: int, n: int) -> int:
    """How many queries are computed at a time: tiles of about one size."""
    return math.ceil(queries / math.ceil(queries * n / BLOCK))


def attention(forward: Callable[..., None], backward: Callable[..., None]) -> Callable[..., tuple[Array, VJP]]:
    """The kernel of `reference.qkv_attention` with these loops.

    `forward(qkv, y, weights, heads)` fills y (B, Q, H D), and weights (B, H, Q, N) unless they have room for none.
    """

    def qkv_attention(
        xp: Any,
        qkv: Array,
        *,
        num_heads: int,
        queries: int | None = None,
        mask: None = None,
        dropout_mask: None = None,
        needs: tuple[bool, ...],
    ) -> tuple[Array, VJP]:
        qkv = contiguous(qkv)
        batch, n, width = qkv.shape
        queries = n if queries is None else queries
        y = np.empty((batch, queries, width // 3), qkv.dtype)
        weights = np.empty((batch if needs[0] else 0, num_heads, queries, n), qkv.dtype)
        forward(qkv, y, weights, num_heads)

        def vjp(dy: Array) -> tuple[Array]:
            dqkv = np.empty_like(qkv)
            dqkv[:, queries:, : width // 3] = 0
            backward(contiguous(dy), qkv, y, weights, dqkv, num_heads)
            return (dqkv,)

        return y, vjp

    return qkv_attention
