"""Products of matrices whose operands have 16 or 8 bits, with sums of 32.

A group is 32 bits of neighbours along the inner dimension: a pair of bfloat16 numbers, four bytes, or with AVX2 two
whole numbers of 16 bits. The left matrix (M, K) is an array of rows of groups, as many as whole blocks of TILE rows
have. The right one (N, K) is packed, a list of panels of PANEL rows: (panels, groups, PANEL). Zeros fill the last
group, and lead to a multiple of STEP groups. In rows that only fill the last block or panel there may be any number:
results that are dropped depend on it.
"""

from __future__ import annotations

import numpy as np
from numba import boolean, float32, int32, int64, types
from numpy.lib.stride_tricks import as_strided

from tinyvit.kernels.jit.compiling import aligned, compiled, read
from tinyvit.kernels.jit.dot_blocks import KIND, PANEL, TILE, add_row, block_of, prefetch
from tinyvit.kernels.jit.loops import bias_gelu

# mypy: disable-error-code="no-untyped-def, call-arg"

# Rows of a layer that are rounded at a time, and the part of its result that is made at a time: STRIP rows of WIDTH
# panels, which stay in the L1 cache for what follows. Measured with AMX.
STRIP, WIDTH = 32 // TILE * TILE, 4
BAND = 3 * STRIP
SUMS = STRIP * WIDTH * PANEL
_DEPTH, _MOST = 128 if KIND == "amx" else 768, 768  # groups at a time, for the L1 and the L2 cache
_ZEROS = np.zeros(SUMS, np.float32)

_of_bytes, _narrow_of_bytes = block_of(True, PANEL), block_of(True, PANEL // 2)
_of_pairs, _narrow_of_pairs = block_of(False, PANEL), block_of(False, PANEL // 2)
_flat, _result = types.Array(float32, 1, "C"), types.Array(float32, 2, "A")
_sums, _residual = types.Array(float32, 3, "A"), types.Array(float32, 2, "A", readonly=True)


def groups(ndim: int) -> types.Array:
    """An array of groups."""
    return types.Array(int32, ndim, "C")


# numba counts the references to each array and slice, atomically, which takes as long as a small block's product. So
# these functions take the numbers of rows and columns instead of slices.


@compiled(groups(2), int64, int64, groups(3), int64, int64, int64, int64, read(1), _sums, boolean)
def multiply_panels(a, top, bottom, b, first, last, left, columns, bias, sums, of_bytes):
    """sums (P, R, PANEL) = bias + A B^T of these rows and groups of A, and of P panels of B from column `left` on.

    There is room for whole blocks of rows. `bias` has a number for each row of the panels of B, of which so many in all
    are wanted. The numbers are bfloat16 or bytes (A's without a sign), of which the sums are whole numbers in the bits
    of `sums`. The tiles are in use.
    """
    depth, a_row, row = b.shape[1], a.shape[1], sums.strides[1] // 4
    for near in range(first, last, _DEPTH):
        steps = min(_DEPTH, last - near)
        for column in range(left, min(columns, left + PANEL * len(sums)), PANEL):
            panel = b.ctypes.data + 4 * PANEL * (column // PANEL * depth + near)
            here, wide = sums.ctypes.data + (column - left) // PANEL * sums.strides[0], columns - column > PANEL // 2
            for i in range(0, bottom - top, TILE):
                at, to = a.ctypes.data + 4 * ((top + i) * a_row + near), here + 4 * i * row
                start, start_row = (to, row) if near > first else (bias.ctypes.data + 4 * column, 0)
                if of_bytes and wide:
                    _of_bytes(at, a_row, panel, start, start_row, to, row, steps)
                elif of_bytes:
                    _narrow_of_bytes(at, a_row, panel, start, start_row, to, row, steps)
                elif wide:
                    _of_pairs(at, a_row, panel, start, start_row, to, row, steps)
                else:
                    _narrow_of_pairs(at, a_row, panel, start, start_row, to, row, steps)


@compiled(_flat, result=_sums)
def in_panels(strip):
    """SUMS numbers, or none, row by row, as the sums (P, R, PANEL) of WIDTH panels."""
    rows, row = strip.size // (WIDTH * PANEL), 4 * WIDTH * PANEL
    return as_strided(strip, (WIDTH, rows, PANEL), (4 * PANEL, row, 4))  # `transpose` takes 6 s to compile


@compiled(_flat, int64, _flat, boolean)
def gelu(strip, rows, slopes, tanh):
    """GELU of the first rows of SUMS numbers, in their place, and its derivative in `slopes` if that has any."""
    size, wanted = rows * WIDTH * PANEL, min(1, len(slopes))
    bias_gelu(strip[:size].reshape(1, size), _ZEROS, slopes[: size * wanted].reshape(wanted, size), tanh)


@compiled(_result, int64, int64, int64)
def prefetch_rows(c, top, bottom, left):
    """Prefetch what `put` will write in these rows of C: WIDTH panels from column `left` on."""
    size = 4 * min(WIDTH * PANEL, c.shape[1] - left)
    for i in range(top, bottom):
        for j in range(0, size, 64):
            prefetch(c.ctypes.data + i * c.strides[0] + 4 * left + j)


@compiled(_sums, _residual, _result, int64, int64, int64)
def put(sums, residual, c, top, bottom, left):
    """These rows of C become sums + residual, from column `left` on; the residual has no rows if there is none."""
    none = len(residual) == 0
    for i in range(top, bottom):
        for panel in range(len(sums)):
            column, k = left + panel * PANEL, i - top
            if column + PANEL <= c.shape[1]:
                more = _ZEROS.ctypes.data if none else residual.ctypes.data + i * residual.strides[0] + 4 * column
                here = sums.ctypes.data + panel * sums.strides[0] + k * sums.strides[1]
                add_row(here, more, c.ctypes.data + i * c.strides[0] + 4 * column)
            else:
                for j in range(c.shape[1] - column):
                    x = sums[panel, k, j]
                    c[i, column + j] = x if none else x + residual[i, column + j]


@compiled(groups(2), groups(3), _result)
def multiply(a, b, c):
    """C = A B^T of bfloat16, with B packed. Rows of C may lie apart. The tiles are in use."""
    rows, columns = c.shape
    depth, none = b.shape[1], c[:0]
    sums, zeros = in_panels(aligned(SUMS)), np.zeros(len(b) * PANEL, np.float32)
    for near in range(0, depth, _MOST):
        far, before = min(depth, near + _MOST), c if near else none
        for top in range(0, rows, BAND):
            for left in range(0, columns, WIDTH * PANEL):
                for i in range(top, min(rows, top + BAND), STRIP):
                    bottom = min(rows, i + STRIP)
                    prefetch_rows(c, i, bottom, left)
                    multiply_panels(a, i, bottom, b, near, far, left, columns, zeros, sums, False)
                    put(sums, before, c, i, bottom, left)
