"""Kernels for NumPy arrays of the operations on images: channels come last in memory, whatever the shape says.

Results are (B, C, H, W) views of (B, H, W, C) arrays. So a row of a window is one run of memory, its patches make one
product of matrices, and feature maps become tokens without a copy. A few samples are worked on at a time, in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

from tinyvit.backend.arrays import VJP, Array
from tinyvit.kernels.reference.convolution import Padding, Pair, output_size

BLOCK = 1 << 18  # elements of the patches, or of the images to be pooled, at a time: measured


def conv2d(
    xp: Any, x: Array, weight: Array, *, stride: Pair, padding: Padding, needs: tuple[bool, ...]
) -> tuple[Array, VJP]:
    batch, channels, *size = x.shape
    outputs, _, h, w = weight.shape
    images = x.transpose(0, 2, 3, 1)
    (top, bottom), (left, right) = padding
    padded_size = size[0] + top + bottom, size[1] + left + right
    inside = slice(None), slice(top, top + size[0]), slice(left, left + size[1])
    rows, columns = output_size((size[0], size[1]), (h, w), stride, padding)
    kernel = np.ascontiguousarray(weight.transpose(2, 3, 1, 0)).reshape(-1, outputs)  # (h w C, O)
    step = max(1, BLOCK // (len(kernel) * rows * columns))
    parts = [slice(start, min(start + step, batch)) for start in range(0, batch, step)]

    def patches() -> Iterator[tuple[slice, Array]]:
        """Samples and their patches (samples R S, h w C), in memory that is used again."""
        padded = np.zeros((min(step, batch), *padded_size, channels), x.dtype)
        space = np.empty((len(padded), rows, columns, h, w * channels), x.dtype)
        one, down, right, item = padded.strides
        strides = one, stride[0] * down, stride[1] * right, down, item
        for part in parts:
            count = part.stop - part.start
            padded[:count][inside] = images[part]
            space[:count] = as_strided(padded, (count, *space.shape[1:]), strides)
            yield part, space[:count].reshape(-1, len(kernel))

    y = np.empty((batch, rows, columns, outputs), x.dtype)
    for part, windows in patches():
        np.matmul(windows, kernel, out=y[part].reshape(-1, outputs))

    def vjp(dy: Array) -> tuple[Array | None, Array | None]:
        dy = np.ascontiguousarray(dy.transpose(0, 2, 3, 1))
        dkernel = np.zeros_like(kernel) if needs[1] else None
        dx: Array = np.empty(images.shape, x.dtype) if needs[0] else None
        if needs[1]:
            for part, windows in patches():
                dkernel += windows.T @ dy[part].reshape(-1, outputs)
        if needs[0]:
            down, right = ((n - 1) * s + 1 for n, s in zip((rows, columns), stride, strict=True))
            for part in parts:
                dwindows = (dy[part].reshape(-1, outputs) @ kernel.T).reshape(-1, rows, columns, h, w, channels)
                dpadded = np.zeros((len(dwindows), *padded_size, channels), x.dtype)
                for i in range(h):
                    for j in range(w):
                        dpadded[:, i : i + down : stride[0], j : j + right : stride[1]] += dwindows[:, :, :, i, j]
                dx[part] = dpadded[inside]
        return (
            None if dx is None else dx.transpose(0, 3, 1, 2),
            None if dkernel is None else dkernel.reshape(h, w, channels, outputs).transpose(3, 2, 0, 1),
        )

    return y.transpose(0, 3, 1, 2), vjp


def max_pool2d(
    xp: Any, x: Array, *, kernel: Pair, stride: Pair, padding: Padding, needs: tuple[bool, ...]
) -> tuple[Array, VJP]:
    """The largest of each row of a window, then of these: as many comparisons as the sides' sum, not their product."""
    images = np.ascontiguousarray(x.transpose(0, 2, 3, 1))
    batch, *size, channels = images.shape
    rows, columns = output_size((size[0], size[1]), kernel, stride, padding)
    across = _taps(size[1], columns, kernel[1], stride[1], padding[1][0], axis=2)
    down = _taps(size[0], rows, kernel[0], stride[0], padding[0][0], axis=1)
    middle = np.empty((batch, size[0], columns, channels), x.dtype)
    y = np.empty((batch, rows, columns, channels), x.dtype)
    step = max(1, BLOCK // images[0].size)
    parts = [slice(start, start + step) for start in range(0, batch, step)]
    for part in parts:
        _largest(images[part], middle[part], across)
        _largest(middle[part], y[part], down)

    def vjp(dy: Array) -> tuple[Array]:
        dy = dy.transpose(0, 2, 3, 1)
        dx = np.zeros_like(images)
        for part in parts:
            dmiddle = np.zeros_like(middle[part])
            _to_largest(dy[part], middle[part], y[part], dmiddle, down)
            _to_largest(dmiddle, images[part], middle[part], dx[part], across)
        return (dx.transpose(0, 3, 1, 2),)

    return y.transpose(0, 3, 1, 2), vjp


Taps = list[tuple[tuple[slice, ...], tuple[slice, ...]]]


def _taps(size: int, windows: int, kernel: int, stride: int, before: int, axis: int) -> Taps:
    """For each place of a window, the keys of the inputs that stand there, and of the outputs whose windows these are.

    Windows whose place lies in the padding are left out.
    """
    taps = []
    for i in range(kernel):
        first = max(0, -((i - before) // stride))
        last = min(windows - 1, (size - 1 - i + before) // stride)
        if first <= last:
            start = first * stride + i - before
            inputs = slice(start, start + (last - first) * stride + 1, stride)
            taps.append((axis * (slice(None),) + (inputs,), axis * (slice(None),) + (slice(first, last + 1),)))
    return taps


def _largest(x: Array, y: Array, taps: Taps) -> None:
    """Write the largest entry of each window along one axis of x into y."""
    y[...] = -np.inf
    for inputs, outputs in taps:
        np.maximum(y[outputs], x[inputs], out=y[outputs])


def _to_largest(dy: Array, x: Array, y: Array, dx: Array, taps: Taps) -> None:
    """Add the gradient dy of `_largest` to dx where x is the largest: of equal entries where the first one is."""
    free = np.ones(y.shape, bool)
    for inputs, outputs in taps:
        first = (x[inputs] == y[outputs]) & free[outputs]
        free[outputs] &= ~first
        dx[inputs] += dy[outputs] * first
