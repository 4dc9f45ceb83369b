"""The linear layers: what surrounds the loops."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from tinyvit.backend.arrays import VJP, Array
from tinyvit.kernels import Kernel, reference
from tinyvit.kernels.bf16 import loops
from tinyvit.kernels.jit import layers
from tinyvit.kernels.jit.dot_products import PANEL, TILE, multiply


class _Left(NamedTuple):
    """A rounded matrix as the left one of a product, with its places as `multiply` wants them."""

    pairs: Array
    row: int
    panel: int
    step: int


def _left(x: Array) -> _Left:
    pairs = np.empty((-(-len(x) // TILE) * TILE, -(-x.shape[1] // 32) * 16), np.int32)
    loops.round_rows(x, pairs)
    return _Left(pairs, pairs.shape[1], PANEL * pairs.shape[1], 1)


def _packed(x: Array) -> Array:
    """x (N, K), whose pairs are neighbours in a row."""
    pairs = np.empty((-(-len(x) // PANEL), -(-x.shape[1] // 2), PANEL), np.int32)
    loops.pack_columns(x, pairs)
    return pairs


def _packed_transposed(x: Array) -> Array:
    """x^T of x (K, N)."""
    pairs = np.empty((-(-x.shape[1] // PANEL), -(-len(x) // 2), PANEL), np.int32)
    loops.pack_rows(x, pairs)
    return pairs


def _left_transposed(x: Array) -> _Left:
    pairs = _packed_transposed(x)
    return _Left(pairs, 1, pairs[0].size, PANEL)


def _multiply(a: _Left, b: Array, shape: tuple[int, int], bias: Array | None = None) -> Array:
    """bias + A B^T, of this shape."""
    padded, c = np.zeros(len(b) * PANEL, np.float32), np.empty(shape, np.float32)
    if bias is not None:
        padded[: len(bias)] = bias
    multiply(a.pairs.ctypes.data, a.row, a.panel, a.step, b, padded, c, False)
    return c


def _product(x: Array, weight: Array, bias: Array | None, needs: tuple[bool, ...]) -> tuple[Array, VJP]:
    """x W^T + b of the rows of x (..., I), and the vjp as `cpu.layers.linear_vjp` makes it."""
    rows, weight = layers.rows_of(x), layers.contiguous(weight)
    y = _multiply(_left(rows), _packed(weight), (len(rows), len(weight)), bias)
    saved, shape, dx_shape = _packed_transposed(rows) if needs[1] else None, x.shape, rows.shape

    def vjp(dy: Array, dbias: Array | None = None) -> tuple[Array | None, ...]:
        dy = layers.rows_of(dy)
        if needs[2] and dbias is None:
            dbias = np.ones(len(dy), dy.dtype) @ dy
        return (
            _multiply(_left(dy), _packed_transposed(weight), dx_shape).reshape(shape) if needs[0] else None,
            _multiply(_left_transposed(dy), saved, weight.shape) if needs[1] else None,
            dbias,
        )

    return y, vjp


def linear(xp: Any, x: Array, weight: Array, bias: Array | None, *, needs: tuple[bool, ...]) -> tuple[Array, VJP]:
    y, vjp = _product(x, weight, bias, needs)
    return y.reshape(*x.shape[:-1], len(weight)), vjp


def add_linear(
    xp: Any, residual: Array, x: Array, weight: Array, bias: Array | None, *, needs: tuple[bool, ...]
) -> tuple[Array, VJP]:
    y, vjp = linear(xp, x, weight, bias, needs=needs[1:])
    return np.add(y, residual, out=y), lambda dy: (dy, *vjp(dy))


def linear_gelu(
    xp: Any, x: Array, weight: Array, bias: Array, *, approximate: str, needs: tuple[bool, ...]
) -> tuple[Array, VJP]:
    return layers.gelu_of(x.shape, *_product(x, weight, None, needs), bias, approximate, needs)


def _covers(x: Array, weight: Array, *_: Any, **__: Any) -> bool:
    return x.dtype == weight.dtype == np.float32 and x.size > 0 and weight.size > 0


KERNELS = {
    reference.linear: Kernel(linear, _covers),
    reference.add_linear: Kernel(add_linear, lambda residual, *inputs, **_: _covers(*inputs)),
    reference.linear_gelu: Kernel(linear_gelu, _covers),
}
