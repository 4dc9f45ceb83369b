"""Products of matrices in blocks of registers: those of layers, and small ones of attention and convolutions.

OpenBLAS copies both matrices first, which takes a tenth of the time where the inner dimension is small. Here the left
one stays where it is. The right one lies in panels of COLUMNS columns, one row of a panel behind the other, or stays
where it is, too. Numbers that a block of ROWS x COLUMNS has in common with the one before are computed twice.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from llvmlite import ir
from numba import boolean, float32, int64, void
from numba.core import cgutils
from numba.extending import intrinsic

from tinyvit.kernels import jit
from tinyvit.kernels.jit.compiling import aligned, compiled, product, read, written
from tinyvit.kernels.jit.vectors import CONTRACT, REAL, SIZE, at, repeated

# mypy: disable-error-code="no-untyped-def, no-untyped-call, call-arg"

_WIDE = jit.has("avx512f")
_WIDTH = 16 if _WIDE else 8
_VECTOR, _SQUARE = ir.VectorType(REAL, _WIDTH), ir.VectorType(REAL, 8)

ROWS, COLUMNS = (14, 2 * _WIDTH) if _WIDE else (6, 2 * _WIDTH)  # whose sums fill 28 of 32 registers, or 12 of 16
# Entries of a layer's weight from which on OpenBLAS is faster: measured. On Zen 4 it is that for the gradient of the
# weight alone, which leaves the caches between two bands of rows.
_LARGE = 1 << 18
_LARGEST = 1 << 62 if _WIDE and jit.processor_name() == "znver4" else _LARGE
_CHAIN = 512  # numbers that are added to one sum before it is added to the others: a longer chain loses digits
# Multiplications up to which small products are done here: measured, with AVX-512 of all sizes.
_SMALL = 1 << (62 if _WIDE else 20)
_ZEROS = np.zeros(COLUMNS, np.float32)


def _block_of(rows: int, columns: int) -> Any:
    """A function that makes C = start + A B for so many rows of A and columns of B.

    A step leads to the next entry of a row of A, the other strides to the next row.
    """

    @intrinsic
    def function(typing, a, a_row, a_step, b, b_row, start, start_row, c, c_row, depth):
        def generate(context, builder, signature, args):
            a, a_row, a_step, b, b_row, start, start_row, c, c_row, depth = args
            a, b, start, c = (builder.inttoptr(x, REAL.as_pointer()) for x in (a, b, start, c))
            places = [SIZE(j) for j in range(0, columns, _WIDTH)]
            sums = [[cgutils.alloca_once(builder, _VECTOR) for _ in places] for _ in range(rows)]
            for total in itertools.chain(*sums):
                builder.store(ir.Constant(_VECTOR, None), total)
            with cgutils.for_range(builder, depth) as loop:
                line = builder.gep(b, [builder.mul(loop.index, b_row)])
                ys = [builder.load(at(builder, line, j, _VECTOR), align=4) for j in places]
                left = builder.gep(a, [builder.mul(loop.index, a_step)])
                for i, totals in enumerate(sums):
                    x = repeated(builder, builder.load(at(builder, left, builder.mul(a_row, SIZE(i)))), _VECTOR)
                    for y, total in zip(ys, totals, strict=True):
                        term = builder.fmul(x, y, flags=CONTRACT)
                        builder.store(builder.fadd(builder.load(total), term, flags=CONTRACT), total)
            for i, totals in enumerate(sums):
                before, line = (
                    builder.gep(x, [builder.mul(row, SIZE(i))]) for x, row in ((start, start_row), (c, c_row))
                )
                for j, total in zip(places, totals, strict=True):
                    y = builder.fadd(builder.load(at(builder, before, j, _VECTOR), align=4), builder.load(total))
                    builder.store(y, at(builder, line, j, _VECTOR), align=4)
            return context.get_dummy_value()

        return void(*(int64,) * 10), generate

    return function


_block, _narrow_block = _block_of(ROWS, COLUMNS), _block_of(ROWS, COLUMNS // 2)
# Blocks that do not overlap have so many rows, and in the end fewer.
_TALL, _LOW = (12, 4) if _WIDE else (6, 2)
_tall_block, _low_block = _block_of(_TALL, COLUMNS), _block_of(_LOW, COLUMNS)


@intrinsic
def _square(typing, x, x_row, y, y_row):
    """Y = X^T for 8 x 8 numbers, whose quarters, then theirs, then theirs change places."""

    def generate(context, builder, signature, args):
        x, x_row, y, y_row = args
        x, y = (builder.inttoptr(each, REAL.as_pointer()) for each in (x, y))
        rows = [builder.load(at(builder, x, builder.mul(x_row, SIZE(i)), _SQUARE), align=4) for i in range(8)]
        for size in (4, 2, 1):
            low = [j if not j & size else 8 + j - size for j in range(8)]
            masks = [ir.Constant(ir.VectorType(ir.IntType(32), 8), [j + size * high for j in low]) for high in (0, 1)]
            for i in (i for i in range(8) if not i & size):
                pair = rows[i], rows[i + size]
                rows[i], rows[i + size] = (builder.shuffle_vector(*pair, mask) for mask in masks)
        for i, row in enumerate(rows):
            builder.store(row, at(builder, y, builder.mul(y_row, SIZE(i)), _SQUARE), align=4)
        return context.get_dummy_value()

    return void(*(int64,) * 4), generate


@intrinsic
def _copy(typing, x, y):
    """COLUMNS numbers."""

    def generate(context, builder, signature, args):
        x, y = (builder.inttoptr(each, ir.VectorType(REAL, COLUMNS).as_pointer()) for each in args)
        builder.store(builder.load(x, align=4), y, align=4)
        return context.get_dummy_value()

    return void(int64, int64), generate


@compiled(*(int64,) * 6)
def _transpose(x, x_row, rows, columns, y, y_row):
    """Y (columns, rows) = X^T, both at least 8, in squares that overlap at the ends."""
    for right in range(0, columns, 8):
        j = min(right, columns - 8)
        for down in range(0, rows, 8):
            i = min(down, rows - 8)
            _square(x + 4 * (i * x_row + j), x_row, y + 4 * (j * y_row + i), y_row)


# --- a layer's --------------------------------------------------------------------------------------------------------


@compiled(int64, int64, int64, result=boolean)
def fits(rows, columns, depth):
    """Whether `multiply` can do, and does well, a product (rows, depth) x (depth, columns)."""
    return rows >= ROWS and columns >= COLUMNS and depth >= 8 and columns * depth <= _LARGEST


@compiled(read(2), result=written(3))
def panels_of_rows(x):
    """x (K, N) in panels (P, K, COLUMNS), of which the last two may overlap."""
    depth, columns = x.shape
    count = (columns + COLUMNS - 1) // COLUMNS
    panels = aligned(count * depth * COLUMNS).reshape(count, depth, COLUMNS)
    for panel in range(len(panels)):
        row, to = x.ctypes.data + 4 * min(COLUMNS * panel, columns - COLUMNS), panels[panel].ctypes.data
        for k in range(depth):
            _copy(row + 4 * k * columns, to + 4 * k * COLUMNS)
    return panels


@compiled(read(2), result=written(3))
def panels_of_columns(x):
    """x^T of x (N, K), likewise."""
    columns, depth = x.shape
    count = (columns + COLUMNS - 1) // COLUMNS
    panels = aligned(count * depth * COLUMNS).reshape(count, depth, COLUMNS)
    for panel in range(len(panels)):
        left = min(COLUMNS * panel, columns - COLUMNS)
        _transpose(x[left:].ctypes.data, depth, COLUMNS, depth, panels[panel].ctypes.data, COLUMNS)
    return panels


@compiled(read(2), written(3), read(1), written(2), int64, int64)
def multiply(x, panels, start, y, top, bottom):
    """y = start + x B from the row `top` to before `bottom`, with B in panels; `fits` says which.

    Rows of x that lie a multiple of 4 KiB apart would fall into one set of the L1 cache: they are copied first.
    """
    depth, columns = x.shape[1], y.shape[1]
    copied = np.empty((bottom - top if depth % 1024 == 0 else 0, depth + _WIDTH), np.float32)
    for i in range(len(copied)):
        for k in range(depth):
            copied[i, k] = x[top + i, k]
    for panel in range(len(panels)):
        left = min(COLUMNS * panel, columns - COLUMNS)
        b, first = panels[panel].ctypes.data, start.ctypes.data + 4 * left
        for down in range(top, bottom, ROWS):
            i = min(down, bottom - ROWS)
            a, a_row, c = x.ctypes.data + 4 * i * depth, depth, y.ctypes.data + 4 * (i * columns + left)
            if len(copied):
                a, a_row = copied.ctypes.data + 4 * (i - top) * (depth + _WIDTH), depth + _WIDTH
            before, before_row = first, 0
            for near in range(0, depth, _CHAIN):
                steps = min(_CHAIN, depth - near)
                _block(a + 4 * near, a_row, 1, b + 4 * near * COLUMNS, COLUMNS, before, before_row, c, columns, steps)
                before, before_row = c, columns


@compiled(int64, int64, result=boolean)
def can_add(rows, columns):
    """Whether `add_transposed` can do, and does well, sums of this shape: blocks that overlap would be added twice."""
    return rows % _LOW == 0 and columns % COLUMNS == 0 and rows * columns <= _LARGE


@compiled(read(2), read(2), written(2))
def add_transposed(a, b, c):
    """C += A^T B for a few rows of A and B, which are in a cache."""
    depth, rows = a.shape
    columns, panel = b.shape[1], aligned(depth * COLUMNS).reshape(depth, COLUMNS)
    for j in range(0, columns, COLUMNS):
        for k in range(depth):
            _copy(b.ctypes.data + 4 * (k * columns + j), panel.ctypes.data + 4 * k * COLUMNS)
        i = 0
        while i < rows:
            left, place = a.ctypes.data + 4 * i, c.ctypes.data + 4 * (i * columns + j)
            if rows - i >= _TALL:
                _tall_block(left, 1, rows, panel.ctypes.data, COLUMNS, place, columns, place, columns, depth)
                i += _TALL
            else:
                _low_block(left, 1, rows, panel.ctypes.data, COLUMNS, place, columns, place, columns, depth)
                i += _LOW


# --- small ones -------------------------------------------------------------------------------------------------------


@compiled(int64, int64, int64, result=boolean)
def _is_small(m, n, k):
    """Whether `_in_blocks` does this product, and does it well: not where half of the rows are done twice."""
    blocks = (m + ROWS - 1) // ROWS
    return m >= ROWS and n >= COLUMNS and blocks * ROWS <= 1.5 * m and m * n * k <= _SMALL


@compiled(boolean, *(int64,) * 9)
def _in_blocks(transpose_a, m, n, k, a, lda, b, ldb, c, ldc):
    """C = A B or A^T B for m >= ROWS and n >= COLUMNS."""
    a_row, a_step = (1, lda) if transpose_a else (lda, 1)
    zeros = _ZEROS.ctypes.data
    for right in range(0, n, COLUMNS):
        narrow = n - right <= COLUMNS // 2
        j = min(right, n - (COLUMNS // 2 if narrow else COLUMNS))
        for down in range(0, m, ROWS):
            i = min(down, m - ROWS)
            rows, columns, place = a + 4 * i * a_row, b + 4 * j, c + 4 * (i * ldc + j)
            if narrow:
                _narrow_block(rows, a_row, a_step, columns, ldb, zeros, 0, place, ldc, k)
            else:
                _block(rows, a_row, a_step, columns, ldb, zeros, 0, place, ldc, k)


@compiled(int64, boolean, *(int64,) * 7, float32, *(int64,) * 2)
def small_product(sgemm, transpose_a, m, n, k, a, lda, b, ldb, beta, c, ldc):
    """C = A B + beta C or A^T B + beta C, as `product` does it; small ones without OpenBLAS."""
    if beta != 0 or not _is_small(m, n, k):
        product(sgemm, transpose_a, False, m, n, k, float32(1), a, lda, b, ldb, beta, c, ldc)
    else:
        _in_blocks(transpose_a, m, n, k, a, lda, b, ldb, c, ldc)


@compiled(*(int64,) * 11)
def small_product_of_transposed(sgemm, m, n, k, a, lda, b, ldb, c, ldc, scratch):
    """C = A B^T, with room for the k x n numbers of B^T at `scratch`."""
    if k < 8 or not _is_small(m, n, k):
        product(sgemm, False, True, m, n, k, float32(1), a, lda, b, ldb, float32(0), c, ldc)
    else:
        _transpose(b, ldb, n, k, scratch, n)
        _in_blocks(False, m, n, k, a, lda, scratch, n, c, ldc)
