"""What LLVM does not vectorise by itself: tiles of images, held in registers of 8 numbers."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from llvmlite import ir
from numba import int64, void
from numba.core import cgutils
from numba.extending import intrinsic

# mypy: disable-error-code="no-untyped-def, no-untyped-call, call-arg"

REAL, SIZE = ir.FloatType(), ir.IntType(64)
_VECTOR = ir.VectorType(REAL, 8)
CONTRACT = ["contract"]  # a multiplication and an addition may be one instruction


def at(builder, matrix, number, kind=REAL):
    """A pointer to what is `number` floats behind the pointer `matrix`."""
    return builder.bitcast(builder.gep(matrix, [number]), kind.as_pointer())


def repeated(builder, x, kind=_VECTOR):
    if kind is REAL:
        return x
    first = builder.insert_element(ir.Constant(kind, ir.Undefined), x, SIZE(0))
    return builder.shuffle_vector(
        first, first, ir.Constant(ir.VectorType(ir.IntType(32), kind.count), [0] * kind.count)
    )


def transform(factors: np.ndarray) -> Any:
    """A function that makes F X F^T, F (R, N) constant, of each channel of N x N pixels X.

    It takes the address of the pixels' addresses, that of the R x R results' addresses, and the number of channels.
    """
    outputs, inputs = factors.shape

    @intrinsic
    def function(typing, pixels, results, channels):
        def generate(context, builder, signature, args):
            tables = [builder.inttoptr(table, SIZE.as_pointer()) for table in args[:2]]

            def pixel(table, number, channel, kind):
                address = builder.load(builder.gep(table, [SIZE(number)]))
                return at(builder, builder.inttoptr(address, REAL.as_pointer()), channel, kind)

            def multiplied(xs: Iterable[Any], kind) -> Iterator[Any]:
                for row in factors:
                    terms = [
                        builder.fmul(x, repeated(builder, REAL(factor), kind), flags=CONTRACT)
                        for factor, x in zip(row, xs, strict=True)
                        if factor
                    ]
                    yield functools.reduce(lambda a, b: builder.fadd(a, b, flags=CONTRACT), terms)

            def of_channels(channel, kind):
                columns = []
                for j in range(inputs):
                    places = [pixel(tables[0], inputs * i + j, channel, kind) for i in range(inputs)]
                    columns.append(list(multiplied([builder.load(place, align=4) for place in places], kind)))
                for i, row in enumerate(zip(*columns, strict=True)):
                    for j, y in enumerate(multiplied(row, kind)):
                        builder.store(y, pixel(tables[1], outputs * i + j, channel, kind), align=4)

            whole = builder.and_(args[2], SIZE(-8))
            with cgutils.for_range_slice(builder, SIZE(0), whole, SIZE(8)) as (channel, _):
                of_channels(channel, _VECTOR)
            with cgutils.for_range_slice(builder, whole, args[2], SIZE(1)) as (channel, _):
                of_channels(channel, REAL)
            return context.get_dummy_value()

        return void(int64, int64, int64), generate

    return function
