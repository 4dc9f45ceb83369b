"""The linear layers: what surrounds the loops."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import int32, types
from numba.extending import overload

from tinyvit.backend.arrays import VJP, Array
from tinyvit.kernels import Kernel, reference
from tinyvit.kernels.int8 import loops
from tinyvit.kernels.jit import block
from tinyvit.kernels.jit.compiling import aligned, written
from tinyvit.kernels.jit.dot_blocks import IN_GROUP, OFFSET, PANEL, STEP, WHOLE
from tinyvit.kernels.jit.dot_products import groups
from tinyvit.kernels.jit.layers import contiguous, linear_layers, rows_of
from tinyvit.kernels.jit.table import whole_block
from tinyvit.kernels.packed_weights import packed

# A weight's panels, scales and sums.
_Packed = tuple[Array, Array, Array]
_WEIGHT = types.Tuple((groups(3), written(1), types.Array(int32, 1, "C")))


@overload(block.linear)
def _linear(residual, x, weight, bias, y, then, sgemm):  # type: ignore[no-untyped-def]
    def run(residual, x, weight, bias, y, then, sgemm):  # type: ignore[no-untyped-def]
        loops.linear(residual, x, weight[0], weight[1], weight[2], bias, y, then)

    return run if weight == _WEIGHT else None


def _packed(weight: Array) -> _Packed:
    return packed(weight, _pack)


def _pack(weight: Array) -> _Packed:
    outputs, depth = len(weight), -(-weight.shape[1] // (IN_GROUP * STEP)) * STEP
    rounded = np.full((outputs, IN_GROUP * depth), OFFSET, WHOLE)
    panels = aligned(-(-outputs // PANEL) * PANEL * depth).view(np.int32).reshape(-1, depth, PANEL)
    scales, sums = np.zeros(len(panels) * PANEL, np.float32), np.zeros(len(panels) * PANEL, np.int32)
    panels[:] = 0
    loops.quantise_rows(contiguous(weight), rounded, scales)
    loops.pack(rounded.view(np.int32), panels, sums)
    return panels, scales, sums


def _product(
    residual: Array, x: Array, weight: Array, bias: Array | None, needs: tuple[bool, ...], then: int
) -> tuple[Array, VJP]:
    panels, scales, sums = _packed(weight)
    rows = rows_of(x)
    y = np.empty((len(rows), len(weight)), np.float32)
    bias = np.zeros(len(weight), np.float32) if bias is None else contiguous(bias)
    loops.linear(residual, rows, panels, scales, sums, bias, y, then)
    return y.reshape(*x.shape[:-1], len(weight)), reference.no_gradient


linear, add_linear, linear_gelu = linear_layers(_product)


def _covers(x: Array, weight: Array, *_: Any, needs: tuple[bool, ...], **__: Any) -> bool:
    """Without gradients, with outputs enough for a panel (a head for few classes stays in float32), sums below 2^31."""
    fits = len(weight) >= PANEL and 0 < weight.shape[1] <= 1 << 16
    return fits and not any(needs) and x.dtype == weight.dtype == np.float32 and x.size > 0


_in_one_loop = block.kernel("int8", _WEIGHT, _packed)


def encoder_block(
    xp: Any, x: Array, *weights: Array, num_heads: int, eps: tuple[float, float], approximate: str, **_: Any
) -> tuple[Array, VJP]:
    """One loop if all layers can be in 8 bits, else one operation after the other: float32's would leave all out."""
    matrices = (weight for weight in weights if weight.ndim == 2)
    fits = whole_block(x) and all(_covers(x, weight, needs=()) for weight in matrices)
    version = _in_one_loop if fits else reference.encoder_block
    return version(xp, x, *weights, num_heads=num_heads, eps=eps, approximate=approximate)


KERNELS = {
    reference.encoder_block: Kernel(encoder_block),
    reference.linear: Kernel(linear, _covers),
    reference.add_linear: Kernel(add_linear, lambda residual, *inputs, **more: _covers(*inputs, **more)),
    reference.linear_gelu: Kernel(linear_gelu, _covers),
}
