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
from tinyvit.kernels.jit.convolution import OF_IMAGE, OF_OUTPUTS
from tinyvit.kernels.jit.products import small_product
from tinyvit.kernels.jit.vectors import transform

# mypy: disable-error-code="no-untyped-def, call-arg"

f = np.float32
ZERO, ONE = f(0.0), f(1.0)
_bytes = types.Array(uint8, 4, "C")

sums_of_image, outputs_of_products = transform(OF_IMAGE), transform(OF_OUTPUTS)
sums_of_gradient = transform(OF_OUTPUTS.T)


@njit(error_model="numpy")
def _places(images, first, size, row, column, outside, places):
    """The addresses of size x size pixels of an image from (row, column) on into `places`: `outside` where it has none.

    The image's first pixel is at `first`; `images` (B, H, W, C).
    """
    height, width, channels = images.shape[1:]
    for i in range(size):
        for j in range(size):
            r, c = row + i, column + j
            inside = 0 <= r < height and 0 <= c < width
            places[size * i + j] = first + 4 * channels * (r * width + c) if inside else outside


@njit(error_model="numpy")
def _tile_sums(images, start, tiles, each, size, top, left, across, sums):
    """The 36 sums of each tile of some images into `sums` (36, tiles, C): of 6 x 6 pixels, of a gradient's 4 x 4."""
    channels, plane = images.shape[3], 4 * sums.shape[1]
    zeros, pixels, out = np.zeros(channels, np.float32), np.empty(36, np.int64), np.empty(36, np.int64)
    for tile in range(tiles):
        image, place = divmod(tile, each)
        first = images[start + image].ctypes.data
        row, column = 4 * (place // across) - top, 4 * (place % across) - left
        _places(images, first, size, row, column, zeros.ctypes.data, pixels)
        for k in range(36):
            out[k] = sums.ctypes.data + k * plane + 4 * channels * tile
        if size == 6:
            sums_of_image(pixels.ctypes.data, out.ctypes.data, channels)
        else:
            sums_of_gradient(pixels.ctypes.data, out.ctypes.data, channels)


@compiled(read(4), read(3), written(4), *(int64,) * 4)
def winograd(x, kernel, y, top, left, block, sgemm):
    """x (B, H, W, C) convolved with `kernel` (36, C, O) into y (B, R, S, O), so many images at once as `block` says."""
    batch, rows, columns, outputs = y.shape
    channels = x.shape[3]
    down, across = (rows + 3) // 4, (columns + 3) // 4
    nowhere, pixels, places = np.empty(outputs, np.float32), np.empty(16, np.int64), np.empty(36, np.int64)
    for start in range(0, batch, block):
        count = min(block, batch - start)
        tiles = count * down * across
        sums = np.empty((36, tiles * channels + 16), np.float32)  # by 16 more, so that 36 lines share the first cache
        products = np.empty((36, tiles * outputs + 16), np.float32)
        _tile_sums(x, start, tiles, down * across, 6, top, left, across, sums)
        for k in range(36):
            small_product(
                sgemm, False, tiles, outputs, channels, sums[k].ctypes.data, channels,
                kernel[k].ctypes.data, outputs, ZERO, products[k].ctypes.data, outputs,
            )  # fmt: skip
        for tile in range(tiles):
            image, place = divmod(tile, down * across)
            first = y[start + image].ctypes.data
            _places(y, first, 4, 4 * (place // across), 4 * (place % across), nowhere.ctypes.data, pixels)
            for k in range(36):
                places[k] = products[k].ctypes.data + 4 * outputs * tile
            outputs_of_products(places.ctypes.data, pixels.ctypes.data, outputs)


@compiled(read(4), read(4), written(3), *(int64,) * 4)
def winograd_of_kernel(x, dy, dkernel, top, left, block, sgemm):
    """Add the gradient of `winograd`'s kernel to `dkernel` (36, C, O)."""
    batch, rows, columns, outputs = dy.shape
    channels = x.shape[3]
    down, across = (rows + 3) // 4, (columns + 3) // 4
    for start in range(0, batch, block):
        count = min(block, batch - start)
        tiles = count * down * across
        sums = np.empty((36, tiles * channels + 16), np.float32)
        dsums = np.empty((36, tiles * outputs + 16), np.float32)
        _tile_sums(x, start, tiles, down * across, 6, top, left, across, sums)
        _tile_sums(dy, start, tiles, down * across, 4, 0, 0, across, dsums)
        for k in range(36):
            product(
                sgemm, True, False, channels, outputs, tiles, ONE, sums[k].ctypes.data, channels,
                dsums[k].ctypes.data, outputs, ONE, dkernel[k].ctypes.data, outputs,
            )  # fmt: skip


@compiled(read(3), written(2), *(int64,) * 8)
def _columns(planes, out, rows, columns, kernel_height, kernel_width, down, right, top, left):
    """What all windows see at each place of the kernel: planes (C, H, W) -> the first columns of out (C h w, R S)."""
    channels, height, width = planes.shape
    for channel in range(channels):
        for i in range(kernel_height):
            for j in range(kernel_width):
                places = out[(channel * kernel_height + i) * kernel_width + j]
                first = max(0, -((j - left) // right))  # the first window whose place is in the image
                stop = max(first, min(columns, (width - 1 - j + left) // right + 1))
                for r in range(rows):
                    row, line = r * down + i - top, places[r * columns : (r + 1) * columns]
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
    seen = np.empty((len(kernel), rows * columns + 16), np.float32)
    for b in range(batch):
        _columns(x[b], seen, rows, columns, height, width, down, right, top, left)
        small_product(
            sgemm, True, rows * columns, outputs, len(kernel), seen.ctypes.data, seen.shape[1],
            kernel.ctypes.data, outputs, ZERO, y[b].ctypes.data, outputs,
        )  # fmt: skip


@compiled(read(4), read(4), written(2), *(int64,) * 7)
def convolve_of_kernel(x, dy, dkernel, height, width, down, right, top, left, sgemm):
    """Add the gradient of `convolve`'s kernel to `dkernel`."""
    batch, rows, columns, outputs = dy.shape
    seen, part = np.empty((len(dkernel), rows * columns + 16), np.float32), np.empty_like(dkernel)
    for b in range(batch):
        _columns(x[b], seen, rows, columns, height, width, down, right, top, left)
        small_product(
            sgemm, False, len(dkernel), outputs, rows * columns, seen.ctypes.data, seen.shape[1],
            dy[b].ctypes.data, outputs, ZERO, part.ctypes.data, outputs,
        )  # fmt: skip
        dkernel += part


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
