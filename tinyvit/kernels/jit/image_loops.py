"""The loops of convolution and pooling.

A convolution of 3 x 3 in steps of 1 is done in Winograd's way (Lavin & Gray 2015, arXiv:1509.09308, F(4x4, 3x3)): of
each tile of 6 x 6 pixels and of the kernel 36 sums are made, channel by channel, whose products make 4 x 4 outputs.
These are 36 products of matrices, with 2.25 multiplications an output in place of 9. What is not finite spreads over
its tile.
"""

from __future__ import annotations

import numpy as np
from numba import int32, int64, njit, types, uint8

from tinyvit.kernels.jit.compiling import compiled, maximum, product, read, written

# mypy: disable-error-code="no-untyped-def, call-arg"

f = np.float32
ZERO, ONE = f(0.0), f(1.0)
_bytes = types.Array(uint8, 4, "C")


@njit(inline="always")  # a call passes eight arrays on the stack, which takes as long as a short row
def _combine(factors, a, b, c, d, e, f, out):
    """The sum of six rows, each times its factor."""
    fa, fb, fc, fd, fe, ff = factors[0], factors[1], factors[2], factors[3], factors[4], factors[5]
    for k in range(len(out)):
        out[k] = fa * a[k] + fb * b[k] + fc * c[k] + fd * d[k] + fe * e[k] + ff * f[k]


@compiled(read(3), int64, int64, written(3))
def _spread(image, top, left, spread):
    """The image (H, W, C) with zeros around it, every fourth column side by side: (4, rows, columns / 4 times C)."""
    height, width, channels = image.shape
    for row in range(spread.shape[1]):
        i = row - top
        for phase in range(4):
            out = spread[phase, row]
            for number in range(len(out) // channels):
                j = 4 * number + phase - left
                here = out[number * channels : (number + 1) * channels]
                if 0 <= i < height and 0 <= j < width:
                    pixel = image[i, j]
                    for c in range(channels):
                        here[c] = pixel[c]
                else:
                    here[:] = ZERO


@compiled(read(3), int64, read(2), written(2), written(2), int64)
def _sums(x, channels, factors, lines, out, at):
    """The 36 sums of each tile of an image that was `_spread`, into columns `at` and on of `out` (36, tiles times C).

    `factors` (6, 6) of the sums along an axis; `lines` (4, as long as the image's) is scratch space.
    """
    length = x.shape[2] - channels
    for row in range(0, x.shape[1] - 2, 4):
        for i in range(6):
            for j in range(4):
                y = x[j]
                _combine(
                    factors[i], y[row], y[row + 1], y[row + 2], y[row + 3], y[row + 4], y[row + 5], lines[j]
                )  # fmt: skip
            for j in range(6):
                _combine(
                    factors[j], lines[0], lines[1], lines[2], lines[3], lines[0, channels:], lines[1, channels:],
                    out[6 * i + j, at : at + length],
                )  # fmt: skip
        at += length


@compiled(read(2), int64, read(2), written(2), written(3))
def _outputs(products, at, factors, lines, y):
    """The image y (R, S, O) of each tile's 36 products, in columns `at` and on; `lines` (6, O times tiles in a row)."""
    rows, columns, outputs = y.shape
    length = lines.shape[1]
    for row in range(rows):
        for j in range(6):
            _combine(
                factors[row % 4], products[j, at:], products[6 + j, at:], products[12 + j, at:], products[18 + j, at:],
                products[24 + j, at:], products[30 + j, at:], lines[j],
            )  # fmt: skip
        for column in range(columns):
            o = column // 4 * outputs
            _combine(
                factors[column % 4], lines[0, o:], lines[1, o:], lines[2, o:], lines[3, o:], lines[4, o:], lines[5, o:],
                y[row, column],
            )  # fmt: skip
        if row % 4 == 3:
            at += length


@compiled(read(4), read(3), written(4), read(2), read(2), *(int64,) * 4)
def winograd(x, kernel, y, of_image, of_outputs, top, left, block, sgemm):
    """x (B, H, W, C) convolved with `kernel` (36, C, O) into y (B, R, S, O), so many images at once as `block` says."""
    batch, rows, columns, outputs = y.shape
    channels = x.shape[3]
    down, across = (rows + 3) // 4, (columns + 3) // 4
    tiles = down * across
    spread = np.empty((4, 4 * down + 2, (across + 1) * channels), np.float32)
    lines = np.empty((4, (across + 1) * channels), np.float32)
    sums = np.empty((36, block * tiles * channels), np.float32)
    products = np.empty((36, block * tiles * outputs), np.float32)
    product_lines = np.empty((6, across * outputs), np.float32)
    for start in range(0, batch, block):
        count = min(block, batch - start)
        for i in range(count):
            _spread(x[start + i], top, left, spread)
            _sums(spread, channels, of_image, lines, sums, i * tiles * channels)
        for k in range(36):
            product(
                sgemm, False, False, count * tiles, outputs, channels, ONE, sums[k].ctypes.data, channels,
                kernel[k].ctypes.data, outputs, ZERO, products[k].ctypes.data, outputs,
            )  # fmt: skip
        for i in range(count):
            _outputs(products, i * tiles * outputs, of_outputs, product_lines, y[start + i])


@compiled(read(4), read(4), written(3), read(2), read(2), *(int64,) * 4)
def winograd_of_kernel(x, dy, dkernel, of_image, of_gradient, top, left, block, sgemm):
    """Add the gradient of `winograd`'s kernel to `dkernel` (36, C, O)."""
    batch, rows, columns, outputs = dy.shape
    channels = x.shape[3]
    down, across = (rows + 3) // 4, (columns + 3) // 4
    tiles = down * across
    spread = np.empty((4, 4 * down + 2, (across + 1) * channels), np.float32)
    dspread = np.empty((4, 4 * down + 2, (across + 1) * outputs), np.float32)
    lines = np.empty((4, (across + 1) * channels), np.float32)
    dlines = np.empty((4, (across + 1) * outputs), np.float32)
    sums = np.empty((36, block * tiles * channels), np.float32)
    dsums = np.empty((36, block * tiles * outputs), np.float32)
    for start in range(0, batch, block):
        count = min(block, batch - start)
        for i in range(count):
            _spread(x[start + i], top, left, spread)
            _sums(spread, channels, of_image, lines, sums, i * tiles * channels)
            _spread(dy[start + i], 0, 0, dspread)
            _sums(dspread, outputs, of_gradient, dlines, dsums, i * tiles * outputs)
        for k in range(36):
            product(
                sgemm, True, False, channels, outputs, count * tiles, ONE, sums[k].ctypes.data, channels,
                dsums[k].ctypes.data, outputs, ONE, dkernel[k].ctypes.data, outputs,
            )  # fmt: skip


@compiled(read(3), written(5), *(int64,) * 4)
def _columns(planes, out, down, right, top, left):
    """What all windows see at each place of the kernel: planes (C, H, W) -> out (C, h, w, R, S)."""
    channels, height, width = planes.shape
    for channel in range(channels):
        for i in range(out.shape[1]):
            for j in range(out.shape[2]):
                first = max(0, -((j - left) // right))  # the first window whose place is in the image
                stop = max(first, min(out.shape[4], (width - 1 - j + left) // right + 1))
                for r in range(out.shape[3]):
                    row, line = r * down + i - top, out[channel, i, j, r]
                    if 0 <= row < height and first < stop:
                        source = planes[channel, row, first * right + j - left :]
                        line[:first] = ZERO
                        line[stop:] = ZERO
                        line = line[first:]
                        if right == 1:
                            for s in range(stop - first):
                                line[s] = source[s]
                        else:
                            for s in range(stop - first):
                                line[s] = source[s * right]
                    else:
                        line[:] = ZERO


@compiled(read(4), read(2), written(4), *(int64,) * 7)
def convolve(x, kernel, y, height, width, down, right, top, left, sgemm):
    """x (B, C, H, W) convolved with `kernel` (C h w, O) into y (B, R, S, O)."""
    batch, rows, columns, outputs = y.shape
    seen = np.empty((x.shape[1], height, width, rows, columns), np.float32)
    for b in range(batch):
        _columns(x[b], seen, down, right, top, left)
        product(
            sgemm, True, False, rows * columns, outputs, len(kernel), ONE, seen.ctypes.data, rows * columns,
            kernel.ctypes.data, outputs, ZERO, y[b].ctypes.data, outputs,
        )  # fmt: skip


@compiled(read(4), read(4), written(2), *(int64,) * 7)
def convolve_of_kernel(x, dy, dkernel, height, width, down, right, top, left, sgemm):
    """Add the gradient of `convolve`'s kernel to `dkernel`."""
    batch, rows, columns, outputs = dy.shape
    seen = np.empty((x.shape[1], height, width, rows, columns), np.float32)
    for b in range(batch):
        _columns(x[b], seen, down, right, top, left)
        product(
            sgemm, False, False, len(dkernel), outputs, rows * columns, ONE, seen.ctypes.data, rows * columns,
            dy[b].ctypes.data, outputs, ONE, dkernel.ctypes.data, outputs,
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
