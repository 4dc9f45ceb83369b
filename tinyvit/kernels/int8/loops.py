"""Linear layers in bytes: both matrices are rounded to 255 steps, band by band of rows, and multiplied exactly."""

from __future__ import annotations

import numpy as np
from numba import float32, int32, int64, types, uint8

from tinyvit.kernels.jit.compiling import bits_of_float, compiled, maximum, read, widest, written
from tinyvit.kernels.jit.dot_blocks import PANEL
from tinyvit.kernels.jit.dot_products import BAND, groups, multiply
from tinyvit.kernels.jit.loops import NOTHING, ROUND, TANH_GELU, bias_gelu

# mypy: disable-error-code="no-untyped-def, call-arg"

_LARGEST, _SMALLEST = np.float32(127), np.float32(3.8e-37)  # whose ratio is finite
_SIGNS = -0x7F7F7F80  # 0x80808080
_bytes = types.Array(uint8, 2, "C")


@compiled(float32, float32, result=float32, inline=True)
def _divided(x, y):
    """x / y, out of reach of `reorder`: x (127 / h) would become 127 x / h, and 127 x can be infinite."""
    return x / y


@compiled(read(2), _bytes, written(1), reorder=True)
def quantise_rows(x, out, scales):
    """Each row of x (R, K) is a scale times (a row of `out` - 128), rounded to nearest."""
    widest()
    rows, columns = x.shape
    for i in range(rows):
        highest = np.float32(0)
        for j in range(columns):
            highest = maximum(highest, abs(x[i, j]))
        highest = maximum(highest, _SMALLEST)
        scales[i], steps = _divided(highest, _LARGEST), _divided(_LARGEST, highest)
        for j in range(columns):
            out[i, j] = bits_of_float(x[i, j] * steps + ROUND) + int32(128)


@compiled(groups(2), groups(3), types.Array(int32, 1, "C"))
def pack(x, out, sums):
    """Rows (N, groups) of bytes, less 128, in panels (P, groups, PANEL), and 128 times the sum of each in `sums`."""
    rows, depth = x.shape
    for i in range(rows):
        panel, place, total = i // PANEL, i % PANEL, int32(0)
        for k in range(depth):
            group = x[i, k]
            out[panel, k, place] = group ^ int32(_SIGNS)
            for shift in range(0, 32, 8):
                total += ((group >> shift) & 255) - 128
        sums[i] = 128 * total


@compiled(read(2), read(2), groups(3), read(1), types.Array(int32, 1, "C", readonly=True), read(1), written(2), int64)
def linear(residual, x, weight, scales, sums, bias, y, then):
    """residual + x W^T + b, or GELU of x W^T + b; `residual` is (R, O), or (0, O) for none."""
    rows, columns = y.shape
    depth = weight.shape[1]
    activations, row_scales = np.zeros((BAND, 4 * depth), np.uint8), np.empty(BAND, np.float32)
    zeros, no_slope = np.zeros(len(weight) * PANEL, np.float32), np.empty((0, columns), np.float32)
    for top in range(0, rows, BAND):
        out = y[top : min(rows, top + BAND)]
        quantise_rows(x[top : top + len(out)], activations, row_scales)
        multiply(activations.view(np.int32), weight, zeros, out, True)
        for i in range(len(out)):
            scale = row_scales[i]
            for j in range(columns):
                out[i, j] = float32(bits_of_float(out[i, j]) - sums[j]) * scale * scales[j] + bias[j]
        if then != NOTHING:
            bias_gelu(out, zeros[:columns], no_slope, then == TANH_GELU)
        elif len(residual):
            for i in range(len(out)):
                for j in range(columns):
                    out[i, j] += residual[top + i, j]
