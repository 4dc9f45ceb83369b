"""The loops of convolution and pooling, over images (B, H, W, C).

A convolution of 3 x 3 in steps of 1 is done in Winograd's way (Lavin & Gray 2015, arXiv:1509.09308, F(2x2, 3x3)): of a
tile of 4 x 4 pixels and of the kernel 16 sums are made, channel by channel, whose products make 2 x 2 outputs. These
are 16 products of matrices with 4 multiplications an output in place of 9. Signs and halves cost no accuracy worth the
name, but what is not finite spreads over its tile.
"""

from __future__ import annotations

import numpy as np
from numba import int32, int64, types, uint8

from tinyvit.kernels.jit.compiling import compiled, maximum, product, read, written

# mypy: disable-error-code="no-untyped-def, call-arg"

f = np.float32
ZERO, ONE = f(0.0), f(1.0)
_bytes = types.Array(uint8, 4, "C")

# Each of the four sums along one axis is of two pixels: which ones, and times what.
_Table = types.Tuple([types.UniTuple(int64, 4)] * 2 + [types.UniTuple(types.float32, 4)] * 2)
_OF_IMAGE = ((0, 1, 2, 1), (2, 2, 1, 3), (ONE,) * 4, (-ONE, ONE, -ONE, -ONE))
_OF_GRADIENT = ((0,) * 4, (1,) * 4, (ONE, ONE, ONE, ZERO), (ZERO, ONE, -ONE, -ONE))


@compiled(read(3), int64, int64, written(3))
def _split(image, top, left, halves):
    """The image (H, W, C) with zeros around it; its even and its odd columns (2, rows, columns / 2 times C)."""
    height, width, channels = image.shape
    for row in range(halves.shape[1]):
        i = row - top
        for parity in range(2):
            out = halves[parity, row]
            for half in range(len(out) // channels):
                j = 2 * half + parity - left
                here = out[half * channels : (half + 1) * channels]
                if 0 <= i < height and 0 <= j < width:
                    pixel = image[i, j]
                    for c in range(channels):
                        here[c] = pixel[c]
                else:
                    here[:] = ZERO


@compiled(read(3), int64, _Table, written(2), int64)
def _sums(halves, channels, table, out, at):
    """The 16 sums of each tile of an image that was `_split`, into columns `at` and on of `out` (16, tiles times C)."""
    length = halves.shape[2] - channels
    first, second, times, plus = table
    for row in range(0, halves.shape[1] - 2, 2):
        for i in range(4):
            for j in range(4):
                start, stop = first[j] // 2 * channels, second[j] // 2 * channels
                a = halves[first[j] % 2, row + first[i], start:]
                b = halves[second[j] % 2, row + first[i], stop:]
                c = halves[first[j] % 2, row + second[i], start:]
                d = halves[second[j] % 2, row + second[i], stop:]
                y = out[4 * i + j, at : at + length]
                fi, si, fj, sj = times[i], plus[i], times[j], plus[j]
                for k in range(length):
                    y[k] = fi * (fj * a[k] + sj * b[k]) + si * (fj * c[k] + sj * d[k])
        at += length


@compiled(read(2), int64, written(2), written(3))
def _outputs(products, at, lines, y):
    """The image y (R, S, O) of each tile's 16 products, in columns `at` and on; `lines` (4, O times tiles in a row)."""
    rows, columns, outputs = y.shape
    length = lines.shape[1]
    for row in range(rows):
        i = row % 2
        sign = f(1 - 2 * i)
        for j in range(4):
            a = products[4 * i + j, at : at + length]
            b = products[4 * i + 4 + j, at : at + length]
            c = products[4 * i + 8 + j, at : at + length]
            line = lines[j]
            for k in range(length):
                line[k] = a[k] + sign * (b[k] + c[k])
        for column in range(columns):
            j, start = column % 2, column // 2 * outputs
            a, b, c = lines[j, start:], lines[j + 1, start:], lines[j + 2, start:]
            sign, pixel = f(1 - 2 * j), y[row, column]
            for k in range(outputs):
                pixel[k] = a[k] + sign * (b[k] + c[k])
        if i:
            at += length


@compiled(read(4), read(3), written(4), int64, int64, int64, int64)
def winograd(x, kernel, y, top, left, block, sgemm):
    """x (B, H, W, C) convolved with `kernel` (16, C, O) into y (B, R, S, O), so many images at once as `block` says."""
    batch, rows, columns, outputs = y.shape
    channels = x.shape[3]
    down, across = (rows + 1) // 2, (columns + 1) // 2
    tiles = down * across
    halves = np.empty((2, 2 * down + 2, (across + 1) * channels), np.float32)
    sums = np.empty((16, block * tiles * channels), np.float32)
    products = np.empty((16, block * tiles * outputs), np.float32)
    lines = np.empty((4, across * outputs), np.float32)
    for start in range(0, batch, block):
        count = min(block, batch - start)
        for i in range(count):
            _split(x[start + i], top, left, halves)
            _sums(halves, channels, _OF_IMAGE, sums, i * tiles * channels)
        for k in range(16):
            product(
                sgemm, False, False, count * tiles, outputs, channels, ONE, sums[k].ctypes.data, channels,
                kernel[k].ctypes.data, outputs, ZERO, products[k].ctypes.data, outputs,
            )  # fmt: skip
        for i in range(count):
            _outputs(products, i * tiles * outputs, lines, y[start + i])


@compiled(read(4), read(4), written(3), int64, int64, int64, int64)
def winograd_of_kernel(x, dy, dkernel, top, left, block, sgemm):
    """Add the gradient of `winograd`'s kernel to `dkernel` (16, C, O)."""
    batch, rows, columns, outputs = dy.shape
    channels = x.shape[3]
    down, across = (rows + 1) // 2, (columns + 1) // 2
    tiles = down * across
    halves = np.empty((2, 2 * down + 2, (across + 1) * channels), np.float32)
    dhalves = np.empty((2, 2 * down + 2, (across + 1) * outputs), np.float32)
    sums = np.empty((16, block * tiles * channels), np.float32)
    dsums = np.empty((16, block * tiles * outputs), np.float32)
    for start in range(0, batch, block):
        count = min(block, batch - start)
        for i in range(count):
            _split(x[start + i], top, left, halves)
            _sums(halves, channels, _OF_IMAGE, sums, i * tiles * channels)
            _split(dy[start + i], 0, 0, dhalves)
            _sums(dhalves, outputs, _OF_GRADIENT, dsums, i * tiles * outputs)
        for k in range(16):
            product(
                sgemm, True, False, channels, outputs, count * tiles, ONE, sums[k].ctypes.data, channels,
                dsums[k].ctypes.data, outputs, ONE, dkernel[k].ctypes.data, outputs,
            )  # fmt: skip


@compiled(read(4), written(4), _bytes, *(int64,) * 6)
def max_pool(x, y, places, height, width, down, right, top, left):
    """The largest entry y (B, R, S, C) of each window, and its number within the window: of equal ones the first."""
    batch, rows, columns, channels = y.shape
    place = np.empty(channels, np.int32)  # loops with bytes and floats are not vectorised
    for b in range(batch):
        for r in range(rows):
            for s in range(columns):
                best, last = y[b, r, s], places[b, r, s]
                best[:] = -np.inf
                place[:] = max(0, top - r * down) * width + max(0, left - s * right)  # the first one in the image
                for i in range(height):
                    row = r * down - top + i
                    if 0 <= row < x.shape[1]:
                        for j in range(width):
                            column = s * right - left + j
                            if 0 <= column < x.shape[2]:
                                pixel, number = x[b, row, column], int32(i * width + j)
                                for c in range(channels):
                                    place[c] = number if pixel[c] > best[c] else place[c]
                                for c in range(channels):
                                    best[c] = maximum(best[c], pixel[c])
                for c in range(channels):
                    last[c] = place[c]


@compiled(read(4), _bytes, written(4), *(int64,) * 6)
def max_pool_vjp(dy, places, dx, height, width, down, right, top, left):
    """The gradient dx (B, H, W, C) of `max_pool`."""
    batch, rows, columns, channels = dy.shape
    for b in range(batch):
        dx[b] = ZERO
        for r in range(rows):
            for s in range(columns):
                g, place = dy[b, r, s], places[b, r, s]
                for i in range(height):
                    row = r * down - top + i
                    if 0 <= row < dx.shape[1]:
                        for j in range(width):
                            column = s * right - left + j
                            if 0 <= column < dx.shape[2]:
                                pixel, number = dx[b, row, column], uint8(i * width + j)
                                for c in range(channels):
                                    pixel[c] += g[c] if place[c] == number else ZERO


@compiled(read(1), read(1), written(1))
def relu_vjp(dy, y, dx):
    for i in range(len(y)):
        dx[i] = dy[i] if y[i] > ZERO else ZERO
