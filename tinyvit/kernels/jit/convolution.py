"""Convolution and pooling: what surrounds the loops. As in `cpu/convolution.py`, channels come last in memory."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import Any

import numpy as np

from tinyvit.backend.arrays import VJP, Array
from tinyvit.kernels.jit.layers import SGEMM
from tinyvit.kernels.reference.convolution import Padding, Pair, output_size

BLOCK = 1 << 18  # elements of the sums and the products of tiles at a time: measured

# The factors of Winograd's sums, by evaluating polynomials at points that keep errors small (Barabasz et al. 2018,
# arXiv:1803.10986): twice those of a plain sum, where the usual 1 and 2 make six times as much of them.
_POINTS = np.array([0.0, 0.75, -0.75, 1.5, -1.5])  # and infinity


def _factors() -> tuple[Array, Array, Array]:
    """Of a kernel (36, 9), and along one axis an image's (6, 6) and the outputs' (4, 6).

    Toom-Cook: the kernel's polynomial and the outputs' one at each point, and by the transposed of the interpolation
    the image's, whose coefficients are those of a polynomial that is 0 at all other points.
    """
    others = [np.delete(_POINTS, i) for i in range(5)]
    scale = np.array([np.prod(p - q) for p, q in zip(_POINTS, others, strict=True)])
    kernel = np.vstack([np.vander(_POINTS, 3, increasing=True) / scale[:, None], [0, 0, 1]])
    image = np.vstack([np.append(np.poly(q)[::-1], 0) for q in others] + [np.poly(_POINTS)[::-1]])
    outputs = np.hstack([np.vander(_POINTS, 4, increasing=True).T, [[0], [0], [0], [1]]])
    return np.kron(kernel, kernel).astype(np.float32), image, outputs


_OF_KERNEL, OF_IMAGE, OF_OUTPUTS = _factors()


@functools.cache
def _loops() -> ModuleType:
    """Imported when the first images come: to compile them takes as long as all the other loops."""
    return importlib.import_module("tinyvit.kernels.jit.image_loops")


def _images(x: Array) -> Array:
    """(B, C, H, W) -> contiguous (B, H, W, C)."""
    return np.ascontiguousarray(x.transpose(0, 2, 3, 1))


def _transformed(kernel: Array) -> Array:
    """(3, 3, C, O) -> (36, C, O)."""
    return (_OF_KERNEL @ np.ascontiguousarray(kernel).reshape(9, -1)).reshape(36, *kernel.shape[2:])


def conv2d(
    xp: Any, x: Array, weight: Array, *, stride: Pair, padding: Padding, needs: tuple[bool, ...]
) -> tuple[Array, VJP]:
    if by_tiles(weight, stride, padding):
        return _conv2d_by_tiles(x, weight, padding, needs)
    return _conv2d_of_data(x, weight, stride, padding)


def by_tiles(weight: Array, stride: Pair, padding: Padding) -> bool:
    """Whether a convolution can go Winograd's way, and has enough channels for products of matrices."""
    small = stride == (1, 1) and weight.shape[2:] == (3, 3) and max(map(max, padding)) <= 2
    return small and min(weight.shape[:2]) >= 8


def _conv2d_by_tiles(x: Array, weight: Array, padding: Padding, needs: tuple[bool, ...]) -> tuple[Array, VJP]:
    images, kernel = _images(x), weight.transpose(2, 3, 1, 0)  # (3, 3, C, O)
    batch, height, width, channels = images.shape
    outputs = len(weight)
    (top, _), (left, _) = padding
    rows, columns = output_size((height, width), (3, 3), (1, 1), padding)
    tiles = -(-rows // 4) * -(-columns // 4)
    block = max(1, BLOCK // (36 * tiles * (channels + outputs)))
    y = np.empty((batch, rows, columns, outputs), np.float32)
    _loops().winograd(images, _transformed(kernel), y, top, left, block, SGEMM)

    def vjp(dy: Array) -> tuple[Array | None, Array | None]:
        dy, dx, dweight = _images(dy), None, None
        if needs[0]:  # a convolution with the kernel turned round
            turned = _transformed(kernel[::-1, ::-1].swapaxes(2, 3))
            dx = np.empty(images.shape, np.float32)
            _loops().winograd(dy, turned, dx, 2 - top, 2 - left, block, SGEMM)
            dx = dx.transpose(0, 3, 1, 2)
        if needs[1]:
            sums = np.zeros((36, channels, outputs), np.float32)
            _loops().winograd_of_kernel(images, dy, sums, top, left, block, SGEMM)
            dkernel = (_OF_KERNEL.T @ sums.reshape(36, -1)).reshape(3, 3, channels, outputs)
            dweight = dkernel.transpose(3, 2, 0, 1)
        return dx, dweight

    return y.transpose(0, 3, 1, 2), vjp


def _conv2d_of_data(x: Array, weight: Array, stride: Pair, padding: Padding) -> tuple[Array, VJP]:
    """Of images that need no gradient and whose channels come first."""
    outputs, _, *size = weight.shape
    (top, _), (left, _) = padding
    rows, columns = output_size((x.shape[2], x.shape[3]), (size[0], size[1]), stride, padding)
    x, kernel = np.ascontiguousarray(x), np.ascontiguousarray(weight.reshape(outputs, -1).T)
    windows = (*size, *stride, top, left, SGEMM)
    y = np.empty((len(x), rows, columns, outputs), np.float32)
    _loops().convolve(x, kernel, y, *windows)

    def vjp(dy: Array) -> tuple[None, Array | None]:
        dkernel = np.zeros_like(kernel)
        _loops().convolve_of_kernel(x, _images(dy), dkernel, *windows)
        return None, dkernel.T.reshape(weight.shape)

    return y.transpose(0, 3, 1, 2), vjp


def max_pool2d(
    xp: Any, x: Array, *, kernel: Pair, stride: Pair, padding: Padding, needs: tuple[bool, ...]
) -> tuple[Array, VJP]:
    images = _images(x)
    batch, height, width, channels = shape = images.shape
    rows, columns = output_size((height, width), kernel, stride, padding)
    y, places = (np.empty((batch, rows, columns, channels), dtype) for dtype in (np.float32, np.uint8))
    windows = (*kernel, *stride, padding[0][0], padding[1][0])
    _loops().max_pool(images, y, places, *windows)

    def vjp(dy: Array) -> tuple[Array]:
        dx = np.empty(shape, np.float32)
        _loops().max_pool_vjp(_images(dy), places, dx, *windows)
        return (dx.transpose(0, 3, 1, 2),)

    return y.transpose(0, 3, 1, 2), vjp


def relu(xp: Any, x: Array, *, needs: tuple[bool, ...]) -> tuple[Array, VJP]:
    y = np.maximum(x, np.float32(0))

    def vjp(dy: Array) -> tuple[Array]:
        dx = np.empty_like(y)  # in memory like y, whose axes may be in any order
        order = sorted(range(y.ndim), key=lambda i: -y.strides[i])
        flat = (np.ascontiguousarray(a.transpose(order)).reshape(-1) for a in (dy, y, dx))
        _loops().relu_vjp(*flat)
        return (dx,)

    return y, vjp
