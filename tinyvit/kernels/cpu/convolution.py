"""Kernels for NumPy arrays of the convolutional stem's operations.

The reference makes the patches of the whole batch, h w times the memory of its images. Here a few samples have
theirs made at a time, in a layout that makes one product of matrices of them all.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from tinyvit.backend.arrays import VJP, Array
from tinyvit.kernels.reference.convolution import Padding, Pair, output_size, pad, views

BLOCK = 1 << 21  # elements of the patches made at a time: enough for a wide product, too few for the memory to show


def conv2d(
    xp: Any, x: Array, weight: Array, *, stride: Pair, padding: Padding, needs: tuple[bool, ...]
) -> tuple[Array, VJP]:
    batch, channels, *size = x.shape
    outputs, _, *sides = weight.shape
    places = views(size, sides, stride, padding)
    map_size = output_size(size, sides, stride, padding)
    kernel = weight.reshape(outputs, -1)  # (O, C h w)
    windows = map_size[0] * map_size[1]
    step = max(1, BLOCK // (kernel.shape[1] * windows))

    def patches() -> Iterator[tuple[slice, Array]]:
        """Samples and their patches (C h w, samples R S), in memory that is used again."""
        space = np.empty((channels, len(places), min(step, batch), *map_size), x.dtype)
        for start in range(0, batch, step):
            part = slice(start, min(start + step, batch))
            padded = pad(xp, x[part], padding, 0.0).swapaxes(0, 1)  # (C, samples, H, W)
            here = space if len(padded[0]) == space.shape[2] else np.empty_like(space[:, :, : len(padded[0])])
            for i, place in enumerate(places):
                here[:, i] = padded[place]
            yield part, here.reshape(kernel.shape[1], -1)

    y = np.empty((batch, outputs, windows), x.dtype)
    for part, columns in patches():
        y[part] = (kernel @ columns).reshape(outputs, -1, windows).swapaxes(0, 1)

    def vjp(dy: Array) -> tuple[Array | None, Array | None]:
        dy = dy.reshape(batch, outputs, windows)
        dweight = np.zeros_like(kernel) if needs[1] else None
        dx: Array = np.empty_like(x) if needs[0] else None
        if needs[1]:
            for part, columns in patches():
                dweight += dy[part].swapaxes(0, 1).reshape(outputs, -1) @ columns.T
        if needs[0]:
            (top, _), (left, _) = padding
            for start in range(0, batch, step):
                part = slice(start, min(start + step, batch))
                rows = dy[part].swapaxes(0, 1).reshape(outputs, -1)
                dpatches = (kernel.T @ rows).reshape(channels, len(places), -1, *map_size)
                dpadded = np.zeros_like(pad(xp, x[part], padding, 0.0))
                for i, place in enumerate(places):
                    dpadded[place] += dpatches[:, i].swapaxes(0, 1)
                dx[part] = dpadded[..., top : top + size[0], left : left + size[1]]
        return dx, None if dweight is None else dweight.reshape(weight.shape)

    return y.reshape(batch, outputs, *map_size), vjp


def relu(xp: Any, x: Array, *, needs: tuple[bool, ...]) -> tuple[Array, VJP]:
    y = np.maximum(x, 0)
    positive: Array = y > 0 if needs[0] else None

    def vjp(dy: Array) -> tuple[Array]:
        return (np.where(positive, dy, np.zeros((), dy.dtype)),)

    return y, vjp
