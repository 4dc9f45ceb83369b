"""Linear layers, band by band of rows, and attention, whose operands are rounded to bfloat16.

Rounded matrices are those of `dot_products`: a group is a pair.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import float32, int64, types, void
from numba.extending import intrinsic

from tinyvit.kernels.jit.compiling import aligned, compiled, read, widest, written
from tinyvit.kernels.jit.dot_blocks import (
    GROUPS,
    KIND,
    PANEL,
    REALS,
    SIZE,
    allow_instructions,
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
    multiply,
    multiply_panels,
    prefetch_rows,
    put,
)
from tinyvit.kernels.jit.loops import (
    NOTHING,
    ONE,
    TANH_GELU,
    add_rows,
    exp,
    multiply_and_sum,
    softmax_vjp,
)

# mypy: disable-error-code="no-untyped-def, no-untyped-call, call-arg"

BATCH = 16  # pairs that are rounded, and rows and columns of pairs that are transposed, at a time


def _rounded(builder, low, high):
    """32 numbers in bfloat16, to nearest and even."""
    if KIND != "arm":
        kind = ir.FunctionType(GROUPS, [REALS, REALS])
        return builder.call(ir.InlineAsm(kind, "vcvtne2ps2bf16 $2, $1, $0", "=v,v,v"), [high, low])
    allow_instructions(builder)
    four, eight = ir.VectorType(ir.FloatType(), 4), ir.VectorType(ir.IntType(16), 8)
    first = ir.InlineAsm(ir.FunctionType(eight, [four]), "bfcvtn $0.4h, $1.4s", "=w,w")
    second = ir.InlineAsm(ir.FunctionType(eight, [eight, four]), "bfcvtn2 $0.8h, $2.4s", "=w,0,w")
    halves = []
    for x in (low, high):
        quads = [shuffled(builder, x, x, range(i, i + 4)) for i in range(0, 16, 4)]
        pairs = [builder.call(second, [builder.call(first, quads[i : i + 1]), quads[i + 1]]) for i in (0, 2)]
        halves.append(shuffled(builder, *pairs, range(16)))
    return builder.bitcast(shuffled(builder, *halves, range(32)), GROUPS)


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
        halves = ir.VectorType(ir.IntType(16), 32)
        places = [place for i in range(16) for place in (i, i + 16)]
        for j in range(0, PANEL, 16):
            both = builder.bitcast(_rounded(builder, *(load(builder, row, SIZE(j)) for row in args[:2])), halves)
            store(builder, shuffled(builder, both, both, places), args[2], SIZE(j))
        return context.get_dummy_value()

    return void(int64, int64, int64), generate


@intrinsic
def _transpose(typing, x, x_row, y, y_row):
    """Y = X^T for 16 x 16 groups, of which blocks of 1, 2, 4, 8 change places."""

    def generate(context, builder, signature, args):
        x, x_row, y, y_row = args
        rows = [load(builder, x, builder.mul(x_row, SIZE(i)), GROUPS) for i in range(16)]
        for step in (1, 2, 4, 8):
            for i in (i for i in range(16) if not i & step):
                a, b = rows[i], rows[i + step]
                rows[i] = shuffled(builder, a, b, [16 + j - step if j & step else j for j in range(16)])
                rows[i + step] = shuffled(builder, a, b, [16 + j if j & step else j + step for j in range(16)])
        for i, row in enumerate(rows):
            store(builder, row, y, builder.mul(y_row, SIZE(i)))
        return context.get_dummy_value()

    return void(*(int64,) * 4), generate


_sums = types.Array(float32, 3, "A", readonly=True)
_strided = types.Array(float32, 2, "A", readonly=True)  # whose rows may lie apart, each in one piece


@compiled(int64, int64, result=groups(2))
def rows_of_pairs(rows, columns):
    """Room for what `round_rows` and `round_columns` make: rows of an odd multiple of 64 bytes use all of a cache."""
    rows, pairs = (rows + PANEL - 1) // PANEL * PANEL, ((columns + 31) // 32 | 1) * BATCH
    return aligned(rows * pairs).view(np.int32).reshape(rows, pairs)


@compiled(int64, int64, result=groups(3))
def panels_of_pairs(rows, columns):
    """Room for what `pack_rows` and `pack_columns` make."""
    count, pairs = (rows + PANEL - 1) // PANEL, (columns + 31) // 32 * BATCH
    panels = aligned(count * pairs * PANEL).view(np.int32).reshape(count, pairs, PANEL)
    panels[:, (columns + 1) // 2 :] = 0
    return panels


@compiled(_strided, groups(2))
def round_rows(x, out):
    """x (M, K) -> its pairs along each row, (at least M, a multiple of BATCH)."""
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


@compiled(_sums, groups(2), int64, int64, int64, int64)
def _round_panels(sums, out, top, bottom, left, columns):
    """Sums (P, R, PANEL) -> the pairs of these rows of `out`, which has so many columns, from column `left` on."""
    for i in range(top, bottom):
        for column in range(left, min(columns, left + PANEL * len(sums)), PANEL):
            at = sums.ctypes.data + (column - left) // PANEL * sums.strides[0] + (i - top) * sums.strides[1]
            _round_row(at, out.ctypes.data + 4 * (i * out.shape[1] + column // 2))


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
    rows, pairs = len(x), np.empty((BATCH, out.shape[1]), np.int32)
    for first in range(0, rows, BATCH):
        round_rows(x[first : first + BATCH], pairs)
        panel, half = first // PANEL, first % PANEL
        for pair in range(0, out.shape[1], BATCH):
            to = PANEL * (panel * out.shape[1] + pair) + half
            _transpose(pairs.ctypes.data + 4 * pair, out.shape[1], out.ctypes.data + 4 * to, PANEL)


@compiled(_strided, groups(2), int64)
def round_columns(x, out, start):
    """x (M, N) -> its pairs along each column, of which the first is number `start` of a row of `out`.

    M is at most BAND. What `out` has behind the last row may be any number.
    """
    pairs = np.zeros((1, BAND // 2, PANEL), np.int32)
    for left in range(0, x.shape[1], PANEL):
        pack_rows(x[:, left : left + PANEL], pairs, 0)
        for pair in range(0, (len(x) + 1) // 2, BATCH):
            for half in range(0, PANEL, BATCH):
                to = (left + half) * out.shape[1] + start + pair
                _transpose(pairs.ctypes.data + 4 * (PANEL * pair + half), PANEL, out.ctypes.data + 4 * to, out.shape[1])


@compiled(read(2), read(2), groups(3), read(1), written(2), written(2), groups(3), int64)
def linear(residual, x, weight, bias, y, slope, saved, then):
    """residual + x W^T + b, or GELU of x W^T + b and its derivative in `slope` (R, O); `weight` is packed.

    `residual` and `slope` have no rows, and `saved`, for the packed x^T, no panels, where they are not wanted.
    """
    rows, columns = y.shape
    pairs, depth = rows_of_pairs(BAND, x.shape[1]), weight.shape[1]
    start = np.zeros(len(weight) * PANEL, np.float32)
    for j in range(columns):
        start[j] = bias[j]
    part, slopes = aligned(SUMS), aligned(SUMS if len(slope) else 0)
    sums, slope_sums, none = in_panels(part), in_panels(slopes), slope[:0]
    use_tiles()
    for top in range(0, rows, BAND):
        last = min(rows, top + BAND)
        round_rows(x[top:last], pairs)
        pack_rows(x[top:last], saved, top // 2)
        for left in range(0, columns, WIDTH * PANEL):
            for i in range(top, last, STRIP):
                bottom = min(last, i + STRIP)
                prefetch_rows(y, i, bottom, left)
                if len(slope):
                    prefetch_rows(slope, i, bottom, left)
                multiply_panels(pairs, i - top, bottom - top, weight, 0, depth, left, columns, start, sums, False)
                if then != NOTHING:
                    gelu(part, bottom - i, slopes, then == TANH_GELU)
                    if len(slope):
                        put(slope_sums, none, slope, i, bottom, left)
                put(sums, residual, y, i, bottom, left)
    release_tiles()


@compiled(read(2), read(2), groups(3), read(1), groups(3), read(1), written(2), int64)
def mlp(residual, x, weight1, bias1, weight2, bias2, y, then):
    """residual + GELU(x W1^T + b1) W2^T + b2: what is between the layers stays rounded in the cache."""
    rows, hidden, columns = len(x), len(bias1), len(bias2)
    pairs, middle = rows_of_pairs(BAND, x.shape[1]), rows_of_pairs(BAND, hidden)
    start1, start2 = np.zeros(len(weight1) * PANEL, np.float32), np.zeros(len(weight2) * PANEL, np.float32)
    for j in range(hidden):
        start1[j] = bias1[j]
    for j in range(columns):
        start2[j] = bias2[j]
    part = aligned(SUMS)
    sums, depth1, depth2 = in_panels(part), weight1.shape[1], weight2.shape[1]
    use_tiles()
    for top in range(0, rows, BAND):
        last = min(rows, top + BAND)
        round_rows(x[top:last], pairs)
        for left in range(0, hidden, WIDTH * PANEL):
            for i in range(0, last - top, STRIP):
                bottom = min(last - top, i + STRIP)
                multiply_panels(pairs, i, bottom, weight1, 0, depth1, left, hidden, start1, sums, False)
                gelu(part, bottom - i, part[:0], then == TANH_GELU)
                if left + WIDTH * PANEL > hidden:
                    part.reshape(STRIP, WIDTH * PANEL)[:, hidden - left :] = 0
                _round_panels(sums, middle, i, bottom, left, hidden)
        for left in range(0, columns, WIDTH * PANEL):
            for i in range(top, last, STRIP):
                bottom = min(last, i + STRIP)
                prefetch_rows(y, i, bottom, left)
                multiply_panels(middle, i - top, bottom - top, weight2, 0, depth2, left, columns, start2, sums, False)
                put(sums, residual, y, i, bottom, left)
    release_tiles()


@compiled(read(2), read(2), groups(3), groups(3), written(2), written(2), written(1))
def linear_vjp(dy, slope, weight, saved, dx, dweight, dbias):
    """The gradients of x W^T + b: in `dx` (R, I) and `dweight` (O, I), and added to `dbias` (O,), if they have rows.

    That of its result is `dy` (R, O), times `slope` if that has rows, and `dbias` then, too. `weight` is the packed
    W^T, `saved` the packed x^T.
    """
    rows, outputs = dy.shape
    pairs, columns = rows_of_pairs(BAND, outputs), rows_of_pairs(len(dweight), rows)
    room = np.empty((BAND if len(slope) else 0, outputs), np.float32)
    use_tiles()
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
            multiply(pairs, weight, dx[top:bottom])
        if len(dweight):
            round_columns(dh, columns, top // 2)
    if len(dweight):
        multiply(columns, saved, dweight)
    release_tiles()


def _over_row(combine: Callable[..., Any]) -> Any:
    """A function that combines the PANEL numbers at an address, and puts the result in the place of each."""

    @intrinsic
    def function(typing, row):
        def generate(context, builder, signature, args):
            x, y = (load(builder, args[0], SIZE(j)) for j in (0, 16))
            x = combine(builder, x, y)
            for step in (8, 4, 2, 1):
                x = combine(builder, x, shuffled(builder, x, x, [i ^ step for i in range(16)]))
            for j in (0, 16):
                store(builder, x, args[0], SIZE(j))
            return context.get_dummy_value()

        return void(int64), generate

    return function


_highest_of_row = _over_row(lambda builder, x, y: builder.select(builder.fcmp_ordered(">", x, y), x, y))
_sum_of_row = _over_row(lambda builder, x, y: builder.fadd(x, y))


@compiled(written(3), int64, float32, written(1), written(1), reorder=True)
def _softmax(scores, columns, scale, highest, shares):
    """The softmax of each row of scale * scores, in panels (P, R, PANEL), in their place; 0 behind the last column.

    `highest` and `shares` have room for R PANEL numbers.
    """
    widest()
    panels, rows = scores.shape[:2]
    for i in range(rows):
        for j in range(columns - (panels - 1) * PANEL, PANEL):
            scores[panels - 1, i, j] = -np.inf
    highest[:] = -np.inf
    flat = scores.reshape(panels, rows * PANEL)
    for panel in range(panels):
        part = flat[panel]
        for j in range(len(part)):
            highest[j] = part[j] if part[j] > highest[j] else highest[j]  # not NaN, whose exponential is NaN anyway
    for i in range(rows):
        _highest_of_row(highest.ctypes.data + 4 * PANEL * i)
    shares[:] = 0
    for panel in range(panels):
        part = flat[panel]
        for j in range(len(part)):
            x = exp((part[j] - highest[j]) * scale)
            part[j] = x
            shares[j] += x
    for i in range(rows):
        _sum_of_row(shares.ctypes.data + 4 * PANEL * i)
    for j in range(len(shares)):
        shares[j] = ONE / shares[j]
    for panel in range(panels):
        part = flat[panel]
        for j in range(len(part)):
            part[j] *= shares[j]


@compiled(read(3), written(3), written(4), int64)
def attention(qkv, y, weights, heads):
    """`jit.loops.attention` with the operands of both products rounded."""
    batch, n = qkv.shape[:2]
    queries, model = y.shape[1], y.shape[2]
    dim = model // heads
    scale = np.float32(1.0 / math.sqrt(dim))
    keys, values = panels_of_pairs(n, dim), panels_of_pairs(dim, n)
    query, shares = rows_of_pairs(STRIP, dim), rows_of_pairs(STRIP, n)
    scores = aligned(len(keys) * STRIP * PANEL).reshape(len(keys), STRIP, PANEL)
    sums = aligned(len(values) * STRIP * PANEL).reshape(len(values), STRIP, PANEL)
    zeros = np.zeros(PANEL * max(len(keys), len(values)), np.float32)
    highest, totals = np.empty(STRIP * PANEL, np.float32), np.empty(STRIP * PANEL, np.float32)
    use_tiles()
    for b in range(batch):
        for h in range(heads):
            q, k, v = h * dim, model + h * dim, 2 * model + h * dim
            pack_columns(qkv[b, :, k : k + dim], keys)
            pack_rows(qkv[b, :, v : v + dim], values, 0)
            out, none = y[b, :, q : q + dim], y[b, :0, :dim]
            for start in range(0, queries, STRIP):
                last = min(queries, start + STRIP)
                count = last - start
                round_rows(qkv[b, start:last, q : q + dim], query)
                multiply_panels(query, 0, count, keys, 0, keys.shape[1], 0, n, zeros, scores, False)
                _softmax(scores, n, scale, highest, totals)
                if len(weights):
                    put(scores, none, weights[b, h], start, last, 0)
                _round_panels(scores, shares, 0, count, 0, n)
                multiply_panels(shares, 0, count, values, 0, values.shape[1], 0, dim, zeros, sums, False)
                put(sums, none, out, start, last, 0)
    release_tiles()


@compiled(read(3), read(3), read(3), read(4), written(3), int64)
def attention_vjp(dy, qkv, y, weights, dqkv, heads):
    """`jit.loops.attention_vjp` with the operands of all products rounded."""
    batch, n = qkv.shape[:2]
    queries, model = y.shape[1], y.shape[2]
    dim = model // heads
    scale = np.float32(1.0 / math.sqrt(dim))
    keys, values = panels_of_pairs(dim, n), panels_of_pairs(n, dim)
    query, gradient = panels_of_pairs(dim, queries), panels_of_pairs(dim, queries)
    along_heads, along_keys = rows_of_pairs(BAND, dim), rows_of_pairs(BAND, n)
    transposed_scores, transposed_weights = rows_of_pairs(n, queries), rows_of_pairs(n, queries)
    scratch = np.empty((BAND, n), np.float32)
    use_tiles()
    for b in range(batch):
        for h in range(heads):
            q = slice(h * dim, h * dim + dim)
            k, v = slice(q.start + model, q.stop + model), slice(q.start + 2 * model, q.stop + 2 * model)
            pack_rows(qkv[b, :, k], keys, 0)
            pack_columns(qkv[b, :, v], values)
            for start in range(0, queries, BAND):
                here = slice(start, min(queries, start + BAND))
                dout, w, scores = dy[b, here, q], weights[b, h, here], scratch[: min(BAND, queries - start)]
                round_rows(dout, along_heads)
                multiply(along_heads, values, scores)
                softmax_vjp(scores, w, dout, y[b, here, q], scale)
                round_rows(scores, along_keys)
                multiply(along_keys, keys, dqkv[b, here, q])
                round_columns(scores, transposed_scores, start // 2)
                round_columns(w, transposed_weights, start // 2)
                pack_rows(qkv[b, here, q], query, start // 2)
                pack_rows(dout, gradient, start // 2)
            multiply(transposed_scores, query, dqkv[b, :, k])
            multiply(transposed_weights, gradient, dqkv[b, :, v])
    release_tiles()
