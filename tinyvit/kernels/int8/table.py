"""The linear layers: what surrounds the loops."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from tinyvit.backend.arrays import VJP, Array
from tinyvit.kernels import Kernel, reference
from tinyvit.kernels.int8 import loops
from tinyvit.kernels.jit.dot_products import GELU, NOTHING, PANEL, TANH_GELU
from tinyvit.kernels.jit.layers import contiguous, rows_of
from tinyvit.kernels.packed_weights import packed


class _Packed(NamedTuple):
    panels: Array
    scales: Array
    sums: Array


def _pack(weight: Array) -> _Packed:
    outputs, depth = len(weight), -(-weight.shape[1] // 4)
    rounded = np.full((outputs, 4 * depth), 128, np.uint8)
    panels, scales = np.zeros((-(-outputs // PANEL), depth, PANEL), np.int32), np.empty(outputs, np.float32)
    sums = np.empty(outputs, np.int32)
    loops.quantise_rows(contiguous(weight), rounded, scales)
    loops.pack(rounded.view(np.int32), panels, sums)
    return _Packed(panels, scales, sums)


def _product(residual: Array, x: Array, weight: Array, bias: Array | None, then: int = NOTHING) -> Array:
    panels, scales, sums = packed(weight, _pack)
    rows = rows_of(x)
    y = np.empty((len(rows), len(weight)), np.float32)
    bias = np.zeros(len(weight), np.float32) if bias is None else contiguous(bias)
    loops.linear(residual, rows, panels, scales, sums, bias, y, then)
    return y.reshape(*x.shape[:-1], len(weight))


def _none(weight: Array) -> Array:
    return np.empty((0, len(weight)), np.float32)


def linear(xp: Any, x: Array, weight: Array, bias: Array | None, *, needs: tuple[bool, ...]) -> tuple[Array, VJP]:
    return _product(_none(weight), x, weight, bias), _no_vjp


def add_linear(
    xp: Any, residual: Array, x: Array, weight: Array, bias: Array | None, *, needs: tuple[bool, ...]
) -> tuple[Array, VJP]:
    return _product(rows_of(residual), x, weight, bias), _no_vjp


def linear_gelu(
    xp: Any, x: Array, weight: Array, bias: Array, *, approximate: str, needs: tuple[bool, ...]
) -> tuple[Array, VJP]:
    then = TANH_GELU if approximate == "tanh" else GELU
    return _product(_none(weight), x, weight, bias, then), _no_vjp


def _no_vjp(dy: Array) -> tuple[None, ...]:
    raise AssertionError("linear layers in 8 bits have no gradient")


def _covers(x: Array, weight: Array, *_: Any, needs: tuple[bool, ...], **__: Any) -> bool:
    """Without gradients, with outputs enough for a panel (a head for few classes stays in float32), sums below 2^31."""
    fits = len(weight) >= PANEL and 0 < weight.shape[1] <= 1 << 16
    return fits and not any(needs) and x.dtype == weight.dtype == np.float32 and x.size > 0


KERNELS = {
    reference.linear: Kernel(linear, _covers),
    reference.add_linear: Kernel(add_linear, lambda residual, *inputs, **more: _covers(*inputs, **more)),
    reference.linear_gelu: Kernel(linear_gelu, _covers),
}
