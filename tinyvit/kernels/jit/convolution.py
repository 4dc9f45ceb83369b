"""Convolution and pooling: what surrounds the loops. As in `cpu/convolution.py`, channels come last in memory."""

from __future__ import annotations

from typing import Any

import numpy as np

from tinyvit.backend.arrays import VJP, Array
from tinyvit.kernels.jit import image_loops as loops
from tinyvit.kernels.jit.layers import SGEMM
from tinyvit.kernels.reference.convolution import Padding, Pair, output_size

BLOCK = 1 << 17  # elements of the sums and the products of tiles at a time: measured

# What a kernel's three weights along one axis add to each of the four sums (Lavin & Gray 2015).
_OF_KERNEL = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], np.float32)


def _images(x: Array) -> Array:
    """(B, C, H, W) -> contiguous (B, H, W, C)."""
    return np.ascontiguousarray(x.transpose(0, 2, 3, 1))


def _transformed(kernel: Array) -> Array:
    """(3, 3, C, O) -> (16, C, O)."""
    u = np.einsum("ia,jb,abco->ijco", _OF_KERNEL, _OF_KERNEL, kernel, optimize=True)
    return np.ascontiguousarray(u).reshape(16, *kernel.shape[2:])


def conv2d(
    xp: Any, x: Array, weight: Array, *, stride: Pair, padding: Padding, needs: tuple[bool, ...]
) -> tuple[Array, VJP]:
    images, kernel = _images(x), weight.transpose(2, 3, 1, 0)  # (3, 3, C, O)
    batch, height, width, channels = images.shape
    outputs = len(weight)
    (top, _), (left, _) = padding
    rows, columns = output_size((height, width), (3, 3), stride, padding)
    tiles = -(-rows // 2) * -(-columns // 2)
    block = max(1, BLOCK // (16 * tiles * (channels + outputs)))
    y = np.empty((batch, rows, columns, outputs), np.float32)
    loops.winograd(images, _transformed(kernel), y, top, left, block, SGEMM)

    def vjp(dy: Array) -> tuple[Array | None, Array | None]:
        dy, dx, dweight = _images(dy), None, None
        if needs[0]:  # a convolution with the kernel turned round
            turned = _transformed(kernel[::-1, ::-1].swapaxes(2, 3))
            dx = np.empty(images.shape, np.float32)
            loops.winograd(dy, turned, dx, 2 - top, 2 - left, block, SGEMM)
            dx = dx.transpose(0, 3, 1, 2)
        if needs[1]:
            sums = np.zeros((16, channels, outputs), np.float32)
            loops.winograd_of_kernel(images, dy, sums, top, left, block, SGEMM)
            sums = sums.reshape(4, 4, channels, outputs)
            dweight = np.einsum("ia,jb,ijco->ocab", _OF_KERNEL, _OF_KERNEL, sums, optimize=True)
        return dx, dweight

    return y.transpose(0, 3, 1, 2), vjp


def max_pool2d(
    xp: Any, x: Array, *, kernel: Pair, stride: Pair, padding: Padding, needs: tuple[bool, ...]
) -> tuple[Array, VJP]:
    images = _images(x)
    batch, height, width, channels = shape = images.shape
    rows, columns = output_size((height, width), kernel, stride, padding)
    y, places = (np.empty((batch, rows, columns, channels), dtype) for dtype in (np.float32, np.uint8))
    windows = (*kernel, *stride, padding[0][0], padding[1][0])
    loops.max_pool(images, y, places, *windows)

    def vjp(dy: Array) -> tuple[Array]:
        dx = np.empty(shape, np.float32)
        loops.max_pool_vjp(_images(dy), places, dx, *windows)
        return (dx.transpose(0, 3, 1, 2),)

    return y.transpose(0, 3, 1, 2), vjp


def relu(xp: Any, x: Array, *, needs: tuple[bool, ...]) -> tuple[Array, VJP]:
    y = np.maximum(x, np.float32(0))

    def vjp(dy: Array) -> tuple[Array]:
        dx = np.empty_like(y)  # in memory like y, whose axes may be in any order
        order = sorted(range(y.ndim), key=lambda i: -y.strides[i])
        flat = (np.ascontiguousarray(a.transpose(order)).reshape(-1) for a in (dy, y, dx))
        loops.relu_vjp(*flat)
        return (dx,)

    return y, vjp
