"""Linear layers, band by band of rows, and attention, whose operands are rounded to bfloat16.

Rounded matrices are packed for `dot_products`: a group is a pair.
"""

from __future__ import annotations

import math

import numpy as np
from llvmlite import ir
from numba import float32, int64, types, void
from numba.extending import intrinsic

from tinyvit.kernels.jit.compiling import compiled, read, written
from tinyvit.kernels.jit.dot_products import (
    BAND,
    GROUPS,
    PANEL,
    REALS,
    SIZE,
    TILE,
    groups,
    load,
    multiply,
    shuffled,
    store,
)  # fmt: skip
from tinyvit.kernels.jit.loops import NOTHING, TANH_GELU, add_rows, bias_gelu, multiply_and_sum, softmax

# mypy: disable-error-code="no-untyped-def, no-untyped-call, call-arg"

_HALVES = ir.VectorType(ir.IntType(16), 32)


def _rounded(builder, low, high):
    """32 numbers in bfloat16, to nearest and even."""
    code = ir.InlineAsm(ir.FunctionType(_HALVES, [REALS, REALS]), "vcvtne2ps2bf16 $2, $1, $0", "=v,v,v")
    return builder.call(code, [high, low])


@intrinsic
def _round_row(typing, x, out):
    """32 numbers into 16 pairs."""

    def generate(context, builder, signature, args):
        low, high = (load(builder, args[0], SIZE(i)) for i in (0, 16))
        store(builder, _rounded(builder, low, high), args[1], SIZE(0))
        return context.get_dummy_value()

    return void(int64, int64), generate


@intrinsic
def _pair_rows(typing, first, second, out):
    """Pairs of the numbers of two rows, 32 of each."""

    def generate(context, builder, signature, args):
        places = [place for i in range(16) for place in (i, i + 16)]
        for j in range(0, PANEL, 16):
            both = _rounded(builder, *(load(builder, row, SIZE(j)) for row in args[:2]))
            store(builder, shuffled(builder, both, both, places), args[2], SIZE(j))
        return context.get_dummy_value()

    return void(int64, int64, int64), generate


@intrinsic
def _pair_columns(typing, x, x_row, last, out):
    """The 16 pairs along each of 16 rows, side by side: (16, 32) numbers -> (16, PANEL) pairs, of which half.

    The row `last` stands for those behind it, too.
    """

    def generate(context, builder, signature, args):
        x, x_row, last, out = args
        rows = []
        for i in range(16):
            there = builder.icmp_signed("<", SIZE(i), last)
            place = builder.mul(x_row, builder.select(there, SIZE(i), last))
            halves = _rounded(builder, *(load(builder, x, builder.add(place, SIZE(j))) for j in (0, 16)))
            rows.append(builder.bitcast(halves, GROUPS))
        for step in (1, 2, 4, 8):  # transposes blocks of twice the step
            for i in (i for i in range(16) if not i & step):
                a, b = rows[i], rows[i + step]
                rows[i] = shuffled(builder, a, b, [16 + j - step if j & step else j for j in range(16)])
                rows[i + step] = shuffled(builder, a, b, [16 + j if j & step else j + step for j in range(16)])
        for i, row in enumerate(rows):
            store(builder, row, out, SIZE(PANEL * i))
        return context.get_dummy_value()

    return void(*(int64,) * 4), generate


_strided = types.Array(float32, 2, "A", readonly=True)  # whose rows may lie apart, each in one piece


@compiled(_strided, groups(2))
def round_rows(x, out):
    """x (M, K) -> its pairs along each row, (at least M, at least K / 2)."""
    rows, columns = x.shape
    rest = np.zeros(32, np.float32)
    whole = columns - columns % 32
    for i in range(rows):
        at, to = x.ctypes.data + i * x.strides[0], out.ctypes.data + 4 * i * out.shape[1]
        for j in range(0, whole, 32):
            _round_row(at + 4 * j, to + 2 * j)
        if whole < columns:
            for j in range(whole, columns):
                rest[j - whole] = x[i, j]
            _round_row(rest.ctypes.data, to + 2 * whole)


@compiled(_strided, groups(3), int64)
def pack_rows(x, out, start):
    """x (K, N) -> the packed x^T, pairs of neighbours in a column; the first is number `start` of `out`.

    What `out` has behind the last column may be any number.
    """
    depth, columns = x.shape
    rest, zeros = np.zeros((2, PANEL), np.float32), np.zeros(PANEL, np.float32)
    row = x.strides[0]
    for panel in range(len(out)):
        first = PANEL * panel
        for pair in range((depth + 1) // 2):
            at, to = x.ctypes.data + 2 * pair * row + 4 * first, PANEL * (panel * out.shape[1] + start + pair)
            single = 2 * pair + 1 == depth
            if first + PANEL > columns:
                for i in range(1 if single else 2):
                    for j in range(columns - first):
                        rest[i, j] = x[2 * pair + i, first + j]
                at, row_here = rest.ctypes.data, 4 * PANEL
            else:
                row_here = row
            _pair_rows(at, zeros.ctypes.data if single else at + row_here, out.ctypes.data + 4 * to)


@compiled(_strided, groups(3))
def pack_columns(x, out):
    """x (N, K) -> the packed x, pairs of neighbours in a row. What `out` has behind the last row may be any number."""
    rows, depth = x.shape
    row = x.strides[0] // 4
    rest, block = np.zeros((16, 32), np.float32), np.empty((16, PANEL), np.int32)
    for first in range(0, rows, 16):
        last = min(15, rows - 1 - first)
        panel, half = first // PANEL, first % PANEL
        for pair in range(0, out.shape[1], 16):
            start, pairs = 2 * pair, min(16, out.shape[1] - pair)
            if start + 32 <= depth:
                at, to = x.ctypes.data + 4 * (first * row + start), PANEL * (panel * out.shape[1] + pair) + half
                _pair_columns(at, row, last, out.ctypes.data + 4 * to)
                continue
            rest[:] = 0
            for i in range(last + 1):
                for j in range(depth - start):
                    rest[i, j] = x[first + i, start + j]
            _pair_columns(rest.ctypes.data, 32, 15, block.ctypes.data)
            for i in range(pairs):
                for j in range(16):
                    out[panel, pair + i, half + j] = block[i, j]


@compiled(groups(2), groups(3), read(1), types.Array(float32, 2, "A"))
def multiply_rows(pairs, b, bias, c):
    """`multiply` with the pairs along the rows of A."""
    multiply(pairs.reshape(-1), pairs.shape[1], PANEL * pairs.shape[1], 1, b, bias, c, False)


@compiled(read(2), read(2), groups(3), read(1), written(2), written(2), groups(3), int64)
def linear(residual, x, weight, bias, y, slope, saved, then):
    """residual + x W^T + b, or GELU of x W^T + b and its derivative in `slope` (R, O); `weight` is packed.

    `residual` and `slope` have no rows, and `saved`, for the packed x^T, no panels, where they are not wanted.
    """
    rows, columns = y.shape
    depth = x.shape[1]
    pairs = np.empty((BAND, (depth + 31) // 32 * 16), np.int32)
    start = np.zeros(0 if len(residual) else len(weight) * PANEL, np.float32)
    if len(start) and then == NOTHING:
        start[:columns] = bias
    for top in range(0, rows, BAND):
        bottom = min(rows, top + BAND)
        band, out = x[top:bottom], y[top:bottom]
        round_rows(band, pairs)
        pack_rows(band, saved, top // 2)
        if len(residual):
            for i in range(len(out)):
                for j in range(columns):
                    out[i, j] = residual[top + i, j] + bias[j]
        multiply_rows(pairs, weight, start, out)
        if then != NOTHING:
            bias_gelu(out, bias, slope[top:bottom], then == TANH_GELU)


@compiled(read(2), read(2), groups(3), groups(3), written(2), written(2), written(1))
def linear_vjp(dy, slope, weight, saved, dx, dweight, dbias):
    """The gradients of x W^T + b: in `dx` (R, I) and `dweight` (O, I), and added to `dbias` (O,), if they have rows.

    That of its result is `dy` (R, O), times `slope` if that has rows, and `dbias` then, too. `weight` is the packed
    W^T, `saved` the packed x^T.
    """
    rows, outputs = dy.shape
    none, zeros = np.zeros(len(weight) * PANEL, np.float32), np.zeros(len(saved) * PANEL, np.float32)
    pairs = np.empty((BAND, (outputs + 31) // 32 * 16), np.int32)
    columns = np.empty(((outputs + PANEL - 1) // PANEL if len(dweight) else 0, (rows + 1) // 2, PANEL), np.int32)
    room = np.empty((BAND if len(slope) else 0, outputs), np.float32)
    for top in range(0, rows, BAND):
        bottom = min(rows, top + BAND)
        dh = dy[top:bottom]
        if len(slope):
            multiply_and_sum(dh, slope[top:bottom], room[: bottom - top], dbias)
            dh = room[: bottom - top]
        else:
            add_rows(dh, dbias)
        if len(dx):
            round_rows(dh, pairs)
            multiply_rows(pairs, weight, none, dx[top:bottom])
        pack_rows(dh, columns, top // 2)
    if len(dweight):
        multiply(columns.reshape(-1), 1, columns.shape[1] * PANEL, PANEL, saved, zeros, dweight, False)


@compiled(read(3), written(3), written(1), int64, int64)
def attention(qkv, y, weights, heads, tile):
    """`jit.loops.attention` with the operands of both products rounded."""
    batch, n = qkv.shape[:2]
    queries, model = y.shape[1], y.shape[2]
    dim = model // heads
    scale = np.float32(1.0 / math.sqrt(dim))
    keys = np.empty(((n + PANEL - 1) // PANEL, (dim + 1) // 2, PANEL), np.int32)
    values = np.empty(((dim + PANEL - 1) // PANEL, (n + 1) // 2, PANEL), np.int32)
    zeros = np.zeros(PANEL * max(len(keys), len(values)), np.float32)
    high = (tile + TILE - 1) // TILE * TILE
    query, shares = np.empty((high, (dim + 31) // 32 * 16), np.int32), np.empty((high, (n + 31) // 32 * 16), np.int32)
    kept = len(weights) == batch * heads * queries * n
    for b in range(batch):
        for h in range(heads):
            q, k, v = h * dim, model + h * dim, 2 * model + h * dim
            pack_columns(qkv[b, :, k : k + dim], keys)
            pack_rows(qkv[b, :, v : v + dim], values, 0)
            for start in range(0, queries, tile):
                rows = min(tile, queries - start)
                first = ((b * heads + h) * queries + start) * n if kept else 0
                w, out = weights[first : first + rows * n], y[b, start : start + rows, q : q + dim]
                round_rows(qkv[b, start : start + rows, q : q + dim], query)
                multiply_rows(query, keys, zeros, w.reshape(rows, n))
                softmax(w, n, scale)
                round_rows(w.reshape(rows, n), shares)
                multiply_rows(shares, values, zeros, out)
