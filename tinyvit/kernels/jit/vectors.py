"""What LLVM does not vectorise by itself: tiles of images and small products, held in registers of 8 numbers."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba import boolean, float32, int64, void
from numba.core import cgutils
from numba.extending import intrinsic

from tinyvit.kernels.jit.compiling import compiled, product

# mypy: disable-error-code="no-untyped-def, no-untyped-call, call-arg"

_REAL, _SIZE = ir.FloatType(), ir.IntType(64)
_VECTOR = ir.VectorType(_REAL, 8)
_CONTRACT = ["contract"]  # a multiplication and an addition may be one instruction


def _at(builder, matrix, number, kind=_REAL):
    """A pointer to what is `number` floats behind the pointer `matrix`."""
    return builder.bitcast(builder.gep(matrix, [number]), kind.as_pointer())


def _repeated(builder, x, kind=_VECTOR):
    if kind is _REAL:
        return x
    first = builder.insert_element(ir.Constant(kind, ir.Undefined), x, _SIZE(0))
    return builder.shuffle_vector(first, first, ir.Constant(ir.VectorType(ir.IntType(32), 8), [0] * 8))


# --- tiles of images --------------------------------------------------------------------------------------------------


def transform(factors: np.ndarray) -> Any:
    """A function that makes F X F^T, F (R, N) constant, of each channel of N x N pixels X.

    It takes the address of the pixels' addresses, that of the R x R results' addresses, and the number of channels.
    """
    outputs, inputs = factors.shape

    @intrinsic
    def function(typing, pixels, results, channels):
        def generate(context, builder, signature, args):
            tables = [builder.inttoptr(table, _SIZE.as_pointer()) for table in args[:2]]

            def pixel(table, number, channel, kind):
                address = builder.load(builder.gep(table, [_SIZE(number)]))
                return _at(builder, builder.inttoptr(address, _REAL.as_pointer()), channel, kind)

            def multiplied(xs: Iterable[Any], kind) -> Iterator[Any]:
                for row in factors:
                    terms = [
                        builder.fmul(x, _repeated(builder, _REAL(factor), kind), flags=_CONTRACT)
                        for factor, x in zip(row, xs, strict=True)
                        if factor
                    ]
                    yield functools.reduce(lambda a, b: builder.fadd(a, b, flags=_CONTRACT), terms)

            def of_channels(channel, kind):
                columns = []
                for j in range(inputs):
                    places = [pixel(tables[0], inputs * i + j, channel, kind) for i in range(inputs)]
                    columns.append(list(multiplied([builder.load(place, align=4) for place in places], kind)))
                for i, row in enumerate(zip(*columns, strict=True)):
                    for j, y in enumerate(multiplied(row, kind)):
                        builder.store(y, pixel(tables[1], outputs * i + j, channel, kind), align=4)

            whole = builder.and_(args[2], _SIZE(-8))
            with cgutils.for_range_slice(builder, _SIZE(0), whole, _SIZE(8)) as (channel, _):
                of_channels(channel, _VECTOR)
            with cgutils.for_range_slice(builder, whole, args[2], _SIZE(1)) as (channel, _):
                of_channels(channel, _REAL)
            return context.get_dummy_value()

        return void(int64, int64, int64), generate

    return function


# --- small products ---------------------------------------------------------------------------------------------------

# Up to so many multiplications: measured. With AVX-512 OpenBLAS has kernels of its own for small products.
_SMALL = 0 if binding.get_host_cpu_features().get("avx512f") else 1 << 20
_ROWS, _COLUMNS = 6, 16  # whose sums fill 12 of 16 registers


def _block_of(columns: int) -> Any:
    """A function that makes C = A B for _ROWS rows of A and so many columns of B.

    A step leads to the next entry of a row of A, the other strides to the next row.
    """

    @intrinsic
    def function(typing, a, a_row, a_step, b, b_row, c, c_row, depth):
        def generate(context, builder, signature, args):
            a, a_row, a_step, b, b_row, c, c_row, depth = args
            a, b, c = (builder.inttoptr(x, _REAL.as_pointer()) for x in (a, b, c))
            sums = [[cgutils.alloca_once(builder, _VECTOR) for _ in range(0, columns, 8)] for _ in range(_ROWS)]
            for total in itertools.chain(*sums):
                builder.store(ir.Constant(_VECTOR, [0.0] * 8), total)
            with cgutils.for_range(builder, depth) as loop:
                line = builder.gep(b, [builder.mul(loop.index, b_row)])
                ys = [builder.load(_at(builder, line, _SIZE(j), _VECTOR), align=4) for j in range(0, columns, 8)]
                column = builder.gep(a, [builder.mul(loop.index, a_step)])
                for i, totals in enumerate(sums):
                    x = _repeated(builder, builder.load(_at(builder, column, builder.mul(a_row, _SIZE(i)))))
                    for y, total in zip(ys, totals, strict=True):
                        term = builder.fmul(x, y, flags=_CONTRACT)
                        builder.store(builder.fadd(builder.load(total), term, flags=_CONTRACT), total)
            for i, totals in enumerate(sums):
                line = builder.gep(c, [builder.mul(c_row, _SIZE(i))])
                for j, total in enumerate(totals):
                    builder.store(builder.load(total), _at(builder, line, _SIZE(8 * j), _VECTOR), align=4)
            return context.get_dummy_value()

        return void(*(int64,) * 8), generate

    return function


_block, _narrow_block = _block_of(_COLUMNS), _block_of(_COLUMNS // 2)


@intrinsic
def _square(typing, x, x_row, y, y_row):
    """Y = X^T for 8 x 8 numbers, whose quarters, then theirs, then theirs change places."""

    def generate(context, builder, signature, args):
        x, x_row, y, y_row = args
        x, y = (builder.inttoptr(each, _REAL.as_pointer()) for each in (x, y))
        rows = [builder.load(_at(builder, x, builder.mul(x_row, _SIZE(i)), _VECTOR), align=4) for i in range(8)]
        for size in (4, 2, 1):
            low = [j if not j & size else 8 + j - size for j in range(8)]
            masks = [ir.Constant(ir.VectorType(ir.IntType(32), 8), [j + size * high for j in low]) for high in (0, 1)]
            for i in (i for i in range(8) if not i & size):
                pair = rows[i], rows[i + size]
                rows[i], rows[i + size] = (builder.shuffle_vector(*pair, mask) for mask in masks)
        for i, row in enumerate(rows):
            builder.store(row, _at(builder, y, builder.mul(y_row, _SIZE(i)), _VECTOR), align=4)
        return context.get_dummy_value()

    return void(*(int64,) * 4), generate


@compiled(*(int64,) * 5)
def _transpose(x, x_row, rows, columns, y):
    """Y (columns, rows) = X^T, both at least 8, in squares that overlap at the ends."""
    for down in range(0, rows, 8):
        i = min(down, rows - 8)
        for right in range(0, columns, 8):
            j = min(right, columns - 8)
            _square(x + 4 * (i * x_row + j), x_row, y + 4 * (j * rows + i), rows)


@compiled(boolean, *(int64,) * 9)
def _in_blocks(transpose_a, m, n, k, a, lda, b, ldb, c, ldc):
    """C = A B or A^T B for m >= _ROWS and n >= _COLUMNS, in blocks that overlap at the ends."""
    a_row, a_step = (1, lda) if transpose_a else (lda, 1)
    for right in range(0, n, _COLUMNS):
        narrow = n - right <= _COLUMNS // 2
        j = min(right, n - (_COLUMNS // 2 if narrow else _COLUMNS))
        for down in range(0, m, _ROWS):
            i = min(down, m - _ROWS)
            rows, columns, place = a + 4 * i * a_row, b + 4 * j, c + 4 * (i * ldc + j)
            if narrow:
                _narrow_block(rows, a_row, a_step, columns, ldb, place, ldc, k)
            else:
                _block(rows, a_row, a_step, columns, ldb, place, ldc, k)


@compiled(int64, boolean, *(int64,) * 7, float32, *(int64,) * 2)
def small_product(sgemm, transpose_a, m, n, k, a, lda, b, ldb, beta, c, ldc):
    """C = A B + beta C or A^T B + beta C, as `product` does it; small ones without OpenBLAS, which copies A and B."""
    if m < _ROWS or n < _COLUMNS or m * n * k > _SMALL or beta != 0:
        product(sgemm, transpose_a, False, m, n, k, float32(1), a, lda, b, ldb, beta, c, ldc)
    else:
        _in_blocks(transpose_a, m, n, k, a, lda, b, ldb, c, ldc)


@compiled(*(int64,) * 11)
def small_product_of_transposed(sgemm, m, n, k, a, lda, b, ldb, c, ldc, scratch):
    """C = A B^T, with room for the k x n numbers of B^T at `scratch`."""
    if m < _ROWS or n < _COLUMNS or k < 8 or m * n * k > _SMALL:
        product(sgemm, False, True, m, n, k, float32(1), a, lda, b, ldb, float32(0), c, ldc)
    else:
        _transpose(b, ldb, n, k, scratch)
        _in_blocks(False, m, n, k, a, lda, scratch, n, c, ldc)
