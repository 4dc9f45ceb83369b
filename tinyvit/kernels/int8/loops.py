"""Linear layers in 8 bits: both matrices are rounded to 255 steps, band by band of rows, and multiplied exactly."""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import float32, from_dtype, int32, int64, types, void
from numba.extending import intrinsic

from tinyvit.kernels.jit.compiling import aligned, bits_of_float, compiled, maximum, read, widest, written
from tinyvit.kernels.jit.dot_blocks import (
    GROUPS,
    OFFSET,
    PANEL,
    REALS,
    SIZE,
    WHOLE,
    load,
    release_tiles,
    shuffled,
    store,
    use_tiles,
)
from tinyvit.kernels.jit.dot_products import (
    BAND,
    STRIP,
    SUMS,
    WIDTH,
    gelu,
    groups,
    in_panels,
    multiply_panels,
    prefetch_rows,
    put,
)
from tinyvit.kernels.jit.loops import NOTHING, ROUND, TANH_GELU
from tinyvit.kernels.jit.vectors import CONTRACT

# mypy: disable-error-code="no-untyped-def, no-untyped-call, call-arg"

_LARGEST, _SMALLEST = np.float32(127), np.float32(3.8e-37)  # whose ratio is finite
_SIGNS = -0x7F7F7F80 if OFFSET else 0  # 0x80808080: its exclusive or subtracts the offset
_whole = types.Array(from_dtype(np.dtype(WHOLE)), 2, "C")


@compiled(float32, float32, result=float32, inline=True)
def _divided(x, y):
    """x / y, out of reach of `reorder`: x (127 / h) would become 127 x / h, and 127 x can be infinite."""
    return x / y


@compiled(read(2), _whole, written(1), reorder=True)
def quantise_rows(x, out, scales):
    """Each row of x (R, K) is a scale times (a row of `out` - OFFSET), rounded to nearest."""
    widest()
    rows, columns = x.shape
    for i in range(rows):
        highest = np.float32(0)
        for j in range(columns):
            highest = maximum(highest, abs(x[i, j]))
        highest = maximum(highest, _SMALLEST)
        scales[i], steps = _divided(highest, _LARGEST), _divided(_LARGEST, highest)
        for j in range(columns):
            out[i, j] = bits_of_float(x[i, j] * steps + ROUND) + int32(OFFSET)


@compiled(groups(2), groups(3), types.Array(int32, 1, "C"))
def pack(x, out, sums):
    """Rows (N, groups), less the offset, in panels (P, groups, PANEL), and OFFSET times the sum of each in `sums`.

    The sum is that of bytes: whole numbers of 16 bits have no offset.
    """
    rows, depth = x.shape
    for i in range(rows):
        panel, place, total = i // PANEL, i % PANEL, int32(0)
        for k in range(depth):
            group = x[i, k]
            out[panel, k, place] = group ^ int32(_SIGNS)
            for shift in range(0, 32, 8):
                total += ((group >> shift) & 255) - 128
        sums[i] = OFFSET * total


@intrinsic
def _scale_row(typing, row, scale, sums, scales, bias):
    """PANEL sums of products become what they stand for: (x - sums) scales scale + bias."""

    def generate(context, builder, signature, args):
        row, scale, sums, scales, bias = args
        first = builder.insert_element(ir.Constant(REALS, ir.Undefined), scale, SIZE(0))
        one = shuffled(builder, first, first, [0] * 16)
        for j in range(0, PANEL, 16):
            whole = builder.sub(load(builder, row, SIZE(j), GROUPS), load(builder, sums, SIZE(j), GROUPS))
            other = load(builder, scales, SIZE(j))
            less = builder.fcmp_ordered("<", one, other)
            x = builder.fmul(builder.sitofp(whole, REALS), builder.select(less, one, other))
            x = builder.fmul(x, builder.select(less, other, one), flags=CONTRACT)  # the larger one last: x stays finite
            store(builder, builder.fadd(x, load(builder, bias, SIZE(j)), flags=CONTRACT), row, SIZE(j))
        return context.get_dummy_value()

    return void(int64, float32, int64, int64, int64), generate


@compiled(read(2), read(2), groups(3), read(1), types.Array(int32, 1, "C", readonly=True), read(1), written(2), int64)
def linear(residual, x, weight, scales, sums, bias, y, then):
    """residual + x W^T + b, or GELU of x W^T + b; `residual` is (R, O), or (0, O) for none.

    `scales` and `sums` have numbers for whole panels of the packed weight.
    """
    rows, columns = y.shape
    depth, shift, zeros = weight.shape[1], np.zeros(len(scales), np.float32), np.zeros(len(scales), np.float32)
    for j in range(columns):
        shift[j] = bias[j]
    rounded, row_scales = aligned(BAND * depth).view(np.int32).reshape(BAND, depth), np.zeros(BAND, np.float32)
    rounded[:] = 0
    part, whole = aligned(SUMS), rounded.view(WHOLE)
    products = in_panels(part)
    use_tiles()
    for top in range(0, rows, BAND):
        last = min(rows, top + BAND)
        quantise_rows(x[top:last], whole, row_scales)
        for left in range(0, columns, WIDTH * PANEL):
            for i in range(top, last, STRIP):
                bottom = min(last, i + STRIP)
                prefetch_rows(y, i, bottom, left)
                multiply_panels(rounded, i - top, bottom - top, weight, 0, depth, left, columns, zeros, products, True)
                for column in range(left, min(columns, left + WIDTH * PANEL), PANEL):
                    for k in range(bottom - i):
                        _scale_row(
                            part.ctypes.data + 4 * (k * WIDTH * PANEL + column - left), row_scales[i - top + k],
                            sums.ctypes.data + 4 * column, scales.ctypes.data + 4 * column,
                            shift.ctypes.data + 4 * column,
                        )  # fmt: skip
                if then != NOTHING:
                    gelu(part, bottom - i, part[:0], then == TANH_GELU)
                put(products, residual, y, i, bottom, left)
    release_tiles()
