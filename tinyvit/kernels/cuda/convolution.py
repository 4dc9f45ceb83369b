"""Convolutions and max-pooling for CuPy arrays: cuBLASLt's products, and `cuda/images.cu` around them.

As on a CPU channels come last in memory: results are (B, C, H, W) views of (B, H, W, C) arrays, and become tokens
without a copy.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tinyvit.backend.arrays import VJP, Array
from tinyvit.kernels import cuda
from tinyvit.kernels.cuda import linear
from tinyvit.kernels.reference.convolution import Padding, Pair, output_size


class _Windows:
    """The windows of images (B, C, H, W), and the kernels of images.cu compiled for them."""

    def __init__(self, x: Array, kernel: Pair, stride: Pair, padding: Padding) -> None:
        self.batch, channels, height, width = x.shape
        rows, columns = output_size((height, width), kernel, stride, padding)
        full = 16 // x.dtype.itemsize
        vector = full if channels % full == 0 else 1
        self.places = kernel[0] * kernel[1] * channels  # of a patch
        self.inner = 8 * math.ceil(self.places / 8)  # products want rows of whole vectors
        self.image, self.out = (self.batch, height, width, channels), (self.batch, rows, columns, channels)
        self._constants = {
            "SCALAR": cuda.scalar(x.dtype), "VECTOR": vector, "HEIGHT": height, "WIDTH": width, "CHANNELS": channels,
            "ROWS": rows, "COLUMNS": columns, "KERNEL_H": kernel[0], "KERNEL_W": kernel[1], "STRIDE_H": stride[0],
            "STRIDE_W": stride[1], "TOP": padding[0][0], "LEFT": padding[1][0], "INNER": self.inner,
        }  # fmt: skip

    def launch(self, name: str, size: int, *arrays: Array) -> None:
        """The kernel `name`, a thread for each vector of `size` numbers."""
        blocks = min(math.ceil(size / self._constants["VECTOR"] / 256), 32 * cuda.multiprocessors())
        cuda.kernel("images", name, **self._constants)((blocks,), (256,), (*arrays, np.int64(self.batch)))


def conv2d(
    xp: Any, x: Array, weight: Array, *, stride: Pair, padding: Padding, needs: tuple[bool, ...]
) -> tuple[Array, VJP]:
    outputs, channels, h, w = weight.shape
    windows = _Windows(x, (h, w), stride, padding)
    last, (_, rows, columns, _) = _channels_last(xp, x), windows.out
    count, size = windows.batch * rows * columns, windows.inner
    kernel = xp.zeros((outputs, size), dtype=weight.dtype)
    kernel[:, : windows.places] = xp.reshape(xp.permute_dims(weight, (0, 2, 3, 1)), (outputs, -1))

    def patches() -> Array:
        to = xp.empty((count, size), dtype=x.dtype)
        windows.launch("patches", to.size, last, to)
        return to

    y = linear.product(xp, patches(), kernel)

    def vjp(dy: Array) -> tuple[Array | None, Array | None]:
        dy = xp.reshape(_channels_last(xp, dy), (count, outputs))
        dx = dweight = None
        if needs[0]:
            dx = xp.empty(windows.image, dtype=x.dtype)
            windows.launch("from_patches", dx.size, linear.input_gradient(xp, dy, kernel), dx)
            dx = xp.permute_dims(dx, (0, 3, 1, 2))
        if needs[1]:  # the patches are made anew: they would take h w times the memory of x
            dkernel = linear.weight_gradient(xp, dy, patches())[:, : windows.places]
            dweight = xp.permute_dims(xp.reshape(dkernel, (outputs, h, w, channels)), (0, 3, 1, 2))
        return dx, dweight

    return xp.permute_dims(xp.reshape(y, (windows.batch, rows, columns, outputs)), (0, 3, 1, 2)), vjp


def covers_max_pool2d(x: Array, *, kernel: Pair, **geometry: Any) -> bool:
    return cuda.covers(x) and kernel[0] * kernel[1] <= 256


def max_pool2d(
    xp: Any, x: Array, *, kernel: Pair, stride: Pair, padding: Padding, needs: tuple[bool, ...]
) -> tuple[Array, VJP]:
    windows = _Windows(x, kernel, stride, padding)
    y, places = xp.empty(windows.out, dtype=x.dtype), xp.empty(windows.out, dtype=xp.uint8)
    windows.launch("largest", y.size, _channels_last(xp, x), y, places)

    def vjp(dy: Array) -> tuple[Array]:
        dx = xp.empty(windows.image, dtype=x.dtype)
        windows.launch("to_largest", dx.size, _channels_last(xp, dy), places, dx)
        return (xp.permute_dims(dx, (0, 3, 1, 2)),)

    return xp.permute_dims(y, (0, 3, 1, 2)), vjp


def _channels_last(xp: Any, x: Array) -> Array:
    """x (B, C, H, W) as (B, H, W, C); a copy only if its memory is in another order."""
    return cuda.ready(xp.permute_dims(x, (0, 2, 3, 1)))
