"""Products of matrices whose operands have 16 or 8 bits, with sums of 32.

A group is 32 bits of neighbours along the inner dimension: a pair of bfloat16 numbers or four bytes. The left matrix
(M, K) is an array of rows of groups, as many as whole blocks of TILE rows have. The right one (N, K) is packed, a list
of panels of PANEL rows: (panels, groups, PANEL). Zeros fill the last group, and lead to a multiple of STEP groups. In
rows that only fill the last block or panel there may be any number: results that are dropped depend on it.
"""

from __future__ import annotations

import numpy as np
from numba import boolean, float32, int32, types

from tinyvit.kernels.jit.compiling import compiled, read
from tinyvit.kernels.jit.dot_blocks import CONFIGURATION, PANEL, TILE, block_of, release_tiles, use_tiles

# mypy: disable-error-code="no-untyped-def, call-arg"

BAND = 96  # rows of a layer that are computed at a time, whole blocks: what follows finds them in a cache
_DEPTH, _ROWS = 768, 384  # groups and rows at a time: A and a panel of B fill the L2 cache, or a little more


def groups(ndim: int) -> types.Array:
    """An array of groups."""
    return types.Array(int32, ndim, "C")


_of_bytes, _narrow_of_bytes = block_of(True, PANEL), block_of(True, PANEL // 2)
_of_pairs, _narrow_of_pairs = block_of(False, PANEL), block_of(False, PANEL // 2)


@compiled(groups(2), groups(3), read(1), types.Array(float32, 2, "A"), boolean)
def multiply(a, b, bias, c, of_bytes):
    """C = bias + A B^T, with B packed, of bfloat16 or of bytes (A's without a sign). Rows of C may lie apart.

    `bias` has a number for each row of the panels of B, or none: then C is added to. The sums of bytes are whole
    numbers in the bits of C.
    """
    rows, columns = c.shape
    depth, added, a_row, c_row = b.shape[1], len(bias) == 0, a.shape[1], c.strides[0] // 4
    rest = np.empty((TILE, PANEL), np.float32)
    use_tiles(CONFIGURATION.ctypes.data)
    for top in range(0, rows, _ROWS):
        bottom = min(rows, top + _ROWS)
        for left in range(0, columns, PANEL):
            for near in range(0, depth, _DEPTH):
                steps = min(_DEPTH, depth - near)
                panel = b.ctypes.data + 4 * PANEL * (left // PANEL * depth + near)
                for i in range(top, bottom, TILE):
                    at = a.ctypes.data + 4 * (i * a_row + near)
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
                        _of_bytes(at, a_row, panel, start, start_row, to, to_row, steps)
                    elif of_bytes:
                        _narrow_of_bytes(at, a_row, panel, start, start_row, to, to_row, steps)
                    elif wide > PANEL // 2:
                        _of_pairs(at, a_row, panel, start, start_row, to, to_row, steps)
                    else:
                        _narrow_of_pairs(at, a_row, panel, start, start_row, to, to_row, steps)
                    if not whole:
                        for k in range(high):
                            for j in range(wide):
                                c[i + k, left + j] = rest[k, j]
    release_tiles()
