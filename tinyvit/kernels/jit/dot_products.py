"""Products of matrices by instructions that add up neighbouring products of 16 or 8 bits in sums of 32.

AVX512-BF16's VDPBF16PS adds to each of 16 sums the products of two pairs, AVX512-VNNI's VPDPBUSD those of four. Such
neighbours along the inner dimension, a group, lie side by side in 32 bits. A packed matrix (N, K) is a list of panels
of PANEL rows: (panels, groups, PANEL) groups, with zeros where a group is not full. Where a panel is not, there may be
any number: only results that are dropped depend on it. The block of results that fills the registers takes TILE rows
of one matrix, whose groups it repeats in a register, and one panel of the other.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba import boolean, float32, int32, int64, types, void
from numba.core import cgutils
from numba.extending import intrinsic

from tinyvit.kernels import jit
from tinyvit.kernels.jit.compiling import compiled, read

# mypy: disable-error-code="no-untyped-def, no-untyped-call, call-arg"

binding.initialize_native_asmparser()  # the instructions have no name in llvmlite

PANEL, TILE = 32, 8
BAND = 12 * TILE  # rows of a layer that are computed at a time: what follows finds them in a cache
_DEPTH, _ROWS = 256, 384  # groups and rows at a time: a panel of 32 KiB in the first cache, 384 KiB in the second
INT, SIZE = ir.IntType(32), ir.IntType(64)
REALS, GROUPS = ir.VectorType(ir.FloatType(), 16), ir.VectorType(INT, 16)


def groups(ndim: int) -> types.Array:
    """An array of groups."""
    return types.Array(int32, ndim, "C")


def _at(builder, address, place, kind):
    """A pointer to `kind`, so many units of 4 bytes behind the address."""
    return builder.inttoptr(builder.add(address, builder.mul(place, SIZE(4))), kind.as_pointer())


def load(builder, address, place, kind=REALS):
    return builder.load(_at(builder, address, place, kind), align=4)


def store(builder, x, address, place):
    builder.store(x, _at(builder, address, place, x.type), align=4)


def shuffled(builder, a, b, places):
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(INT, len(places)), list(places)))


def _tile_of(instruction: str, width: int) -> Any:
    """A function that makes C = start + A B for TILE rows of A and so many columns of a panel B.

    Places are in units of 4 bytes. Sums of whole numbers are moved as if they were real ones.
    """

    @intrinsic
    def function(typing, a, a_row, a_step, b, start, start_row, c, c_row, depth):
        def generate(context, builder, signature, args):
            a, a_row, a_step, b, start, start_row, c, c_row, depth = args
            add = ir.InlineAsm(ir.FunctionType(REALS, [REALS, GROUPS, GROUPS]), f"{instruction} $3, $2, $0", "=v,0,v,v")
            rows, columns = range(TILE), range(0, width, 16)
            sums = [[cgutils.alloca_once(builder, REALS) for _ in columns] for _ in rows]
            for i in rows:
                for j, total in zip(columns, sums[i], strict=True):
                    place = builder.add(builder.mul(start_row, SIZE(i)), SIZE(j))
                    builder.store(load(builder, start, place), total)
            offsets = [builder.mul(a_row, SIZE(i)) for i in rows]
            with cgutils.for_range(builder, depth) as loop:
                line, column = builder.mul(loop.index, SIZE(PANEL)), builder.mul(loop.index, a_step)
                ys = [load(builder, b, builder.add(line, SIZE(j)), GROUPS) for j in columns]
                for i in rows:
                    group = load(builder, a, builder.add(column, offsets[i]), INT)
                    first = builder.insert_element(ir.Constant(GROUPS, ir.Undefined), group, SIZE(0))
                    x = shuffled(builder, first, first, [0] * 16)
                    for y, total in zip(ys, sums[i], strict=True):
                        builder.store(builder.call(add, [builder.load(total), x, y]), total)
            for i in rows:
                for j, total in zip(columns, sums[i], strict=True):
                    store(builder, builder.load(total), c, builder.add(builder.mul(c_row, SIZE(i)), SIZE(j)))
            return context.get_dummy_value()

        return void(*(int64,) * 9), generate

    return function


_bytes_tile, _narrow_bytes_tile = (_tile_of("vpdpbusd", width) for width in (PANEL, PANEL // 2))
# LLVM ends the process at an instruction that the processor lacks. AVX512-BF16 is younger than AVX512-VNNI.
_pairs = "vdpbf16ps" if jit.has("avx512bf16") else "vpdpbusd"
_pairs_tile, _narrow_pairs_tile = (_tile_of(_pairs, width) for width in (PANEL, PANEL // 2))


@compiled(groups(1), int64, int64, int64, groups(3), read(1), types.Array(float32, 2, "A"), boolean)
def multiply(a, a_row, a_panel, a_step, b, bias, c, of_bytes):
    """C = bias + A B^T, with B packed, of bfloat16 or of bytes (A's without a sign). Rows of C may lie apart.

    The group p of A's row i is a[(i / PANEL) a_panel + (i % PANEL) a_row + p a_step], with TILE rows for the last.
    `bias` has a number for each row of the panels of B, or none: then C is added to. The sums of bytes are whole
    numbers in the bits of C.
    """
    rows, columns = c.shape
    depth, added, c_row = b.shape[1], len(bias) == 0, c.strides[0] // 4
    rest = np.empty((TILE, PANEL), np.float32)
    for top in range(0, rows, _ROWS):
        bottom = min(rows, top + _ROWS)
        for near in range(0, depth, _DEPTH):
            steps = min(_DEPTH, depth - near)
            for left in range(0, columns, PANEL):
                panel = b.ctypes.data + 4 * PANEL * (left // PANEL * depth + near)
                for i in range(top, bottom, TILE):
                    at = a.ctypes.data + 4 * (i // PANEL * a_panel + i % PANEL * a_row + near * a_step)
                    to, to_row = c.ctypes.data + 4 * (i * c_row + left), c_row
                    high, wide = min(TILE, rows - i), min(PANEL, columns - left)
                    whole = high == TILE and wide == PANEL
                    if not whole:
                        to, to_row = rest.ctypes.data, PANEL
                        if near or added:
                            for k in range(high):
                                for j in range(wide):
                                    rest[k, j] = c[i + k, left + j]
                    start, start_row = (to, to_row) if near or added else (bias.ctypes.data + 4 * left, 0)
                    if of_bytes and wide > PANEL // 2:
                        _bytes_tile(at, a_row, a_step, panel, start, start_row, to, to_row, steps)
                    elif of_bytes:
                        _narrow_bytes_tile(at, a_row, a_step, panel, start, start_row, to, to_row, steps)
                    elif wide > PANEL // 2:
                        _pairs_tile(at, a_row, a_step, panel, start, start_row, to, to_row, steps)
                    else:
                        _narrow_pairs_tile(at, a_row, a_step, panel, start, start_row, to, to_row, steps)
                    if not whole:
                        for k in range(high):
                            for j in range(wide):
                                c[i + k, left + j] = rest[k, j]
