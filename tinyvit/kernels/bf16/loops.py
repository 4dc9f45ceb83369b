"""Products of matrices whose entries are rounded to bfloat16, with sums in float32: AVX512-BF16's VDPBF16PS.

It adds to each of 16 sums the products of two pairs, so two neighbours along the inner dimension, a pair, lie side by
side in 32 bits. A packed matrix (N, K) is a list of panels of PANEL rows: (panels, pairs, PANEL) pairs, with zeros
where a panel or a pair is not full. The block of results that fills the registers takes TILE rows of one matrix, whose
pairs it repeats in a register, and one panel of the other.
"""

from __future__ import annotations

import numpy as np
from llvmlite import binding, ir
from numba import int32, int64, types, void
from numba.core import cgutils
from numba.extending import intrinsic

from tinyvit.kernels.jit.compiling import compiled, read, written

# mypy: disable-error-code="no-untyped-def, no-untyped-call, call-arg"

binding.initialize_native_asmparser()  # the instructions below have no name in llvmlite

PANEL, TILE = 32, 8
_DEPTH, _ROWS = 256, 384  # pairs and rows at a time: a panel of 32 KiB in the first cache, 384 KiB in the second
_REAL, _INT, _SIZE = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_REALS, _PAIRS = ir.VectorType(_REAL, 16), ir.VectorType(_INT, 16)
_HALVES = ir.VectorType(ir.IntType(16), 32)


def _at(builder, address, place, kind):
    """A pointer to `kind`, so many units of 4 bytes behind the address."""
    return builder.inttoptr(builder.add(address, builder.mul(place, _SIZE(4))), kind.as_pointer())


def _load(builder, address, place, kind=_REALS):
    return builder.load(_at(builder, address, place, kind), align=4)


def _store(builder, x, address, place):
    builder.store(x, _at(builder, address, place, x.type), align=4)


def _shuffled(builder, a, b, places):
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_INT, len(places)), list(places)))


def _rounded(builder, low, high):
    """32 numbers in bfloat16, to nearest and even."""
    code = ir.InlineAsm(ir.FunctionType(_HALVES, [_REALS, _REALS]), "vcvtne2ps2bf16 $2, $1, $0", "=v,v,v")
    return builder.call(code, [high, low])


@intrinsic
def _tile(typing, a, a_row, a_step, b, start, start_row, c, c_row, depth):
    """C = start + A B for TILE rows of A and a panel of B; places are counted in units of 4 bytes."""

    def generate(context, builder, signature, args):
        a, a_row, a_step, b, start, start_row, c, c_row, depth = args
        add = ir.InlineAsm(ir.FunctionType(_REALS, [_REALS, _PAIRS, _PAIRS]), "vdpbf16ps $3, $2, $0", "=v,0,v,v")
        rows, columns = range(TILE), range(0, PANEL, 16)
        sums = [[cgutils.alloca_once(builder, _REALS) for _ in columns] for _ in rows]
        for i in rows:
            for j, total in zip(columns, sums[i], strict=True):
                place = builder.add(builder.mul(start_row, _SIZE(i)), _SIZE(j))
                builder.store(_load(builder, start, place), total)
        offsets = [builder.mul(a_row, _SIZE(i)) for i in rows]
        with cgutils.for_range(builder, depth) as loop:
            line, column = builder.mul(loop.index, _SIZE(PANEL)), builder.mul(loop.index, a_step)
            ys = [_load(builder, b, builder.add(line, _SIZE(j)), _PAIRS) for j in columns]
            for i in rows:
                pair = _load(builder, a, builder.add(column, offsets[i]), _INT)
                first = builder.insert_element(ir.Constant(_PAIRS, ir.Undefined), pair, _SIZE(0))
                x = _shuffled(builder, first, first, [0] * 16)
                for y, total in zip(ys, sums[i], strict=True):
                    builder.store(builder.call(add, [builder.load(total), x, y]), total)
        for i in rows:
            for j, total in zip(columns, sums[i], strict=True):
                _store(builder, builder.load(total), c, builder.add(builder.mul(c_row, _SIZE(i)), _SIZE(j)))
        return context.get_dummy_value()

    return void(*(int64,) * 9), generate


@intrinsic
def _round_row(typing, x, out):
    """32 numbers into 16 pairs."""

    def generate(context, builder, signature, args):
        low, high = (_load(builder, args[0], _SIZE(i)) for i in (0, 16))
        _store(builder, _rounded(builder, low, high), args[1], _SIZE(0))
        return context.get_dummy_value()

    return void(int64, int64), generate


@intrinsic
def _pair_rows(typing, first, second, out):
    """Pairs of the numbers of two rows, 32 of each."""

    def generate(context, builder, signature, args):
        places = [place for i in range(16) for place in (i, i + 16)]
        for j in range(0, PANEL, 16):
            both = _rounded(builder, *(_load(builder, row, _SIZE(j)) for row in args[:2]))
            _store(builder, _shuffled(builder, both, both, places), args[2], _SIZE(j))
        return context.get_dummy_value()

    return void(int64, int64, int64), generate


@intrinsic
def _pair_columns(typing, x, x_row, out):
    """The 16 pairs along each of 16 rows, side by side: (16, 32) numbers -> (16, PANEL) pairs, of which half."""

    def generate(context, builder, signature, args):
        x, x_row, out = args
        rows = []
        for i in range(16):
            place = builder.mul(x_row, _SIZE(i))
            halves = _rounded(builder, *(_load(builder, x, builder.add(place, _SIZE(j))) for j in (0, 16)))
            rows.append(builder.bitcast(halves, _PAIRS))
        for step in (1, 2, 4, 8):  # transposes blocks of twice the step
            for i in (i for i in range(16) if not i & step):
                a, b = rows[i], rows[i + step]
                rows[i] = _shuffled(builder, a, b, [16 + j - step if j & step else j for j in range(16)])
                rows[i + step] = _shuffled(builder, a, b, [16 + j if j & step else j + step for j in range(16)])
        for i, row in enumerate(rows):
            _store(builder, row, out, _SIZE(PANEL * i))
        return context.get_dummy_value()

    return void(int64, int64, int64), generate


def _pairs(ndim: int) -> types.Array:
    return types.Array(int32, ndim, "C")


@compiled(read(2), _pairs(2))
def round_rows(x, out):
    """x (M, K) -> its pairs along each row, (M, at least K / 2)."""
    rows, columns = x.shape
    rest = np.zeros(32, np.float32)
    for i in range(rows):
        at, to = x.ctypes.data + 4 * i * columns, out.ctypes.data + 4 * i * out.shape[1]
        whole = columns - columns % 32
        for j in range(0, whole, 32):
            _round_row(at + 4 * j, to + 2 * j)
        if whole < columns:
            for j in range(whole, columns):
                rest[j - whole] = x[i, j]
            _round_row(rest.ctypes.data, to + 2 * whole)


@compiled(read(2), _pairs(3))
def pack_rows(x, out):
    """x (K, N) -> the packed x^T, pairs of neighbours in a column."""
    depth, columns = x.shape
    rest = np.zeros((2, PANEL), np.float32)
    at, row = x.ctypes.data, 4 * columns
    for panel in range(out.shape[0]):
        first = PANEL * panel
        for pair in range(out.shape[1]):
            to = out.ctypes.data + 4 * PANEL * (panel * out.shape[1] + pair)
            if first + PANEL <= columns and 2 * pair + 1 < depth:
                place = at + 2 * pair * row + 4 * first
                _pair_rows(place, place + row, to)
            else:
                rest[:] = 0
                for i in range(min(2, depth - 2 * pair)):
                    for j in range(min(PANEL, columns - first)):
                        rest[i, j] = x[2 * pair + i, first + j]
                _pair_rows(rest.ctypes.data, rest.ctypes.data + 4 * PANEL, to)


@compiled(read(2), _pairs(3))
def pack_columns(x, out):
    """x (N, K) -> the packed x, pairs of neighbours in a row."""
    rows, depth = x.shape
    rest, block = np.zeros((16, 32), np.float32), np.empty((16, PANEL), np.int32)
    for panel in range(out.shape[0]):
        for half in range(0, PANEL, 16):
            first = PANEL * panel + half
            for pair in range(0, out.shape[1], 16):
                start, pairs = 2 * pair, min(16, out.shape[1] - pair)
                to = out.ctypes.data + 4 * (PANEL * (panel * out.shape[1] + pair) + half)
                if first + 16 <= rows and start + 32 <= depth:
                    _pair_columns(x.ctypes.data + 4 * (first * depth + start), depth, to)
                    continue
                rest[:] = 0
                for i in range(min(16, rows - first)):
                    for j in range(min(32, depth - start)):
                        rest[i, j] = x[first + i, start + j]
                _pair_columns(rest.ctypes.data, 32, block.ctypes.data)
                for i in range(pairs):
                    for j in range(16):
                        out[panel, pair + i, half + j] = block[i, j]


@compiled(int64, int64, int64, int64, _pairs(3), read(1), written(2))
def multiply(a, a_row, a_panel, a_step, b, bias, c):
    """C = bias + A B^T, with B packed.

    The pair p of A's row i lies at `a`, in units of 4 bytes at (i / PANEL) a_panel + (i % PANEL) a_row + p a_step.
    `bias` has a number for each row of the panels of B.
    """
    rows, columns = c.shape
    depth = b.shape[1]
    rest = np.empty((TILE, PANEL), np.float32)
    for top in range(0, rows, _ROWS):
        bottom = min(rows, top + _ROWS)
        for near in range(0, depth, _DEPTH):
            steps = min(_DEPTH, depth - near)
            for left in range(0, columns, PANEL):
                panel = b.ctypes.data + 4 * PANEL * (left // PANEL * depth + near)
                for i in range(top, bottom, TILE):
                    at = a + 4 * (i // PANEL * a_panel + i % PANEL * a_row + near * a_step)
                    to, to_row = c.ctypes.data + 4 * (i * columns + left), columns
                    high, wide = min(TILE, rows - i), min(PANEL, columns - left)
                    whole = high == TILE and wide == PANEL
                    if not whole:
                        to, to_row = rest.ctypes.data, PANEL
                        if near:
                            for k in range(high):
                                for j in range(wide):
                                    rest[k, j] = c[i + k, left + j]
                    start, start_row = (to, to_row) if near else (bias.ctypes.data + 4 * left, 0)
                    _tile(at, a_row, a_step, panel, start, start_row, to, to_row, steps)
                    if not whole:
                        for k in range(high):
                            for j in range(wide):
                                c[i + k, left + j] = rest[k, j]
