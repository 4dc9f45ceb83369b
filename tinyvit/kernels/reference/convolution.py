"""The operations of the convolutional stem of hybrid models, in the array API standard alone.

Images and feature maps are (B, C, H, W). A window is what a kernel sees of them at one place; all windows' entries at
one place of the kernel make a strided view, so that h x w views hold everything (im2col).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tinyvit.backend import arrays
from tinyvit.backend.arrays import VJP, Array
from tinyvit.kernels.half_precision import in_fp32
from tinyvit.kernels.reference.layers import normalise

Pair = tuple[int, int]
Padding = tuple[Pair, Pair]  # (top, bottom), (left, right)


@in_fp32
def conv2d(
    xp: Any, x: Array, weight: Array, *, stride: Pair, padding: Padding, needs: tuple[bool, ...]
) -> tuple[Array, VJP]:
    """Cross-correlation as one product of matrices: x (B, C, H, W), weight (O, C, h, w) -> (B, O, R, S).

    The image is surrounded by zeros as `padding` says; R = (H + top + bottom - h) // stride + 1, S likewise.
    """
    batch, channels, height, width = x.shape
    outputs, _, h, w = weight.shape
    places = views((height, width), (h, w), stride, padding)
    rows, columns = output_size((height, width), (h, w), stride, padding)
    kernel = xp.reshape(weight, (outputs, channels * h * w))

    def patches() -> Array:
        padded = pad(xp, x, padding, 0.0)
        stacked = xp.stack([padded[place] for place in places], axis=2)  # (B, C, h w, R, S)
        return xp.reshape(stacked, (batch, channels * h * w, rows * columns))

    y = kernel @ patches()  # (B, O, R S)

    def vjp(dy: Array) -> tuple[Array | None, Array | None]:
        dy = xp.reshape(dy, (batch, outputs, rows * columns))
        dx = dweight = None
        if needs[0]:
            dpatches = xp.reshape(kernel.T @ dy, (batch, channels, h * w, rows, columns))
            dx = _gather(xp, x, padding, places, lambda i: dpatches[:, :, i, :, :])
        if needs[1]:  # the patches are made anew: they would take h w times the memory of x
            dweight = xp.reshape(xp.tensordot(dy, patches(), axes=((0, 2), (0, 2))), weight.shape)
        return dx, dweight

    return xp.reshape(y, (batch, outputs, rows, columns)), vjp


def max_pool2d(
    xp: Any, x: Array, *, kernel: Pair, stride: Pair, padding: Padding, needs: tuple[bool, ...]
) -> tuple[Array, VJP]:
    """The largest entry of each window; the padding is never it. Of equal entries the first one gets the gradient."""
    size = x.shape[2], x.shape[3]
    places = views(size, kernel, stride, padding)
    padded = pad(xp, x, padding, -float("inf"))
    y = padded[places[0]]
    for place in places[1:]:
        y = xp.maximum(y, padded[place])

    def vjp(dy: Array) -> tuple[Array]:
        padded = pad(xp, x, padding, -float("inf"))
        zeros, free, shares = xp.zeros_like(dy), xp.ones_like(dy, dtype=xp.bool), []
        for place in places:
            first = (padded[place] == y) & free
            free = free & ~first
            shares.append(xp.where(first, dy, zeros))
        return (_gather(xp, x, padding, places, lambda i: shares[i]),)

    return xp.asarray(y, copy=True) if len(places) == 1 else y, vjp


@in_fp32
def group_norm(
    xp: Any, x: Array, weight: Array, bias: Array, *, num_groups: int, eps: float, needs: tuple[bool, ...]
) -> tuple[Array, VJP]:
    """Each sample's channels in groups, normalised over group, height and width (Wu & He 2018, arXiv:1803.08494).

    x (B, C, H, W), weight and bias (C,) -> (B, C, H, W).
    """
    batch, channels, height, width = x.shape
    rows = (batch, num_groups, channels // num_groups * height * width)
    normal, normal_vjp = normalise(xp, xp.reshape(x, rows), eps)
    normal = xp.reshape(normal, x.shape)
    scale = weight[:, None, None]

    def vjp(dy: Array) -> tuple[Array | None, ...]:
        return (
            xp.reshape(normal_vjp(xp.reshape(dy * scale, rows)), x.shape) if needs[0] else None,
            xp.sum(dy * normal, axis=(0, 2, 3)) if needs[1] else None,
            xp.sum(dy, axis=(0, 2, 3)) if needs[2] else None,
        )

    return normal * scale + bias[:, None, None], vjp


@in_fp32
def weight_standardize(xp: Any, weight: Array, *, eps: float, needs: tuple[bool, ...]) -> tuple[Array, VJP]:
    """Each output's weights with mean 0 and variance 1 (Qiao et al. 2019, arXiv:1903.10520). weight (O, C, h, w)."""
    outputs, channels, h, w = weight.shape
    rows = (outputs, channels * h * w)
    normal, normal_vjp = normalise(xp, xp.reshape(weight, rows), eps)

    def vjp(dy: Array) -> tuple[Array]:
        return (xp.reshape(normal_vjp(xp.reshape(dy, rows)), weight.shape),)

    return xp.reshape(normal, weight.shape), vjp


def relu(xp: Any, x: Array, *, needs: tuple[bool, ...]) -> tuple[Array, VJP]:
    """x where it is positive, else 0; the gradient at 0 is 0."""
    zero = xp.zeros((), dtype=x.dtype, device=arrays.device(x))
    y = xp.maximum(x, zero)

    def vjp(dy: Array) -> tuple[Array]:
        return (xp.where(y > 0, dy, zero),)

    return y, vjp


def output_size(size: Pair, kernel: Pair, stride: Pair, padding: Padding) -> Pair:
    """Rows and columns of windows."""
    rows, columns = ((n + sum(pad) - k) // s + 1 for n, k, s, pad in zip(size, kernel, stride, padding, strict=True))
    return rows, columns


def views(size: Pair, kernel: Pair, stride: Pair, padding: Padding) -> list[tuple[Any, ...]]:
    """For each place of the kernel, row by row, the key of the view that holds what all windows see there."""
    rows, columns = output_size(size, kernel, stride, padding)

    def along(first: int, count: int, step: int) -> slice:
        return slice(first, first + (count - 1) * step + 1, step)

    return [
        (..., along(i, rows, stride[0]), along(j, columns, stride[1]))
        for i in range(kernel[0])
        for j in range(kernel[1])
    ]


def pad(xp: Any, x: Array, padding: Padding, value: float) -> Array:
    """x (B, C, H, W) surrounded by a value."""
    if padding == ((0, 0), (0, 0)):
        return x
    (top, bottom), (left, right) = padding
    batch, channels, height, width = x.shape
    shape = (batch, channels, top + height + bottom, left + width + right)
    padded = xp.full(shape, value, dtype=x.dtype, device=arrays.device(x))
    return arrays.assign(padded, (..., slice(top, top + height), slice(left, left + width)), x)


def _gather(xp: Any, x: Array, padding: Padding, places: list[Any], part: Callable[[int], Array]) -> Array:
    """The gradient of x from those of the views at `places` of x with its padding."""
    (top, _), (left, _) = padding
    padded = xp.zeros_like(pad(xp, x, padding, 0.0))
    for i, place in enumerate(places):
        padded = arrays.assign(padded, place, padded[place] + part(i))
    return padded[..., top : top + x.shape[2], left : left + x.shape[3]]
