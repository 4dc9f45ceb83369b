"""Kernels for CuPy arrays: the CUDA sources in `cuda/`, behind the reference's signatures.

They compute in fp32 whatever the arrays' dtype is (float32, float16, bfloat16), and give the same bits every time.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tinyvit.backend import arrays, random
from tinyvit.backend.arrays import VJP, Array
from tinyvit.kernels import cuda, reference
from tinyvit.kernels.cuda.linear import note_sums, sum_partials

# --- layer normalisation --------------------------------------------------------------------------------------------


def layer_norm(
    xp: Any, x: Array, weight: Array, bias: Array, *, eps: float, needs: tuple[bool, ...]
) -> tuple[Array, VJP]:
    x, weight, bias = cuda.ready(x), cuda.ready(weight), cuda.ready(bias)
    dim = x.shape[-1]
    rows = x.size // dim
    constants = {"SCALAR": cuda.scalar(x.dtype), "DIM": dim}
    y = xp.empty(x.shape, dtype=x.dtype)
    mean, rstd = (xp.empty(rows, dtype=xp.float32) if True in needs else cuda.NULL for _ in range(2))
    arguments = (x, weight, bias, y, mean, rstd, np.int64(rows), np.float32(eps))
    cuda.kernel("layer_norm", "layer_norm_forward", **constants)((math.ceil(rows / 8),), (256,), arguments)

    def vjp(dy: Array, other: Array | None = None) -> tuple[Array, Array, Array]:
        """With `other` added to the gradient of x."""
        dx = xp.empty(x.shape, dtype=x.dtype)
        threads = 32 * _vectors(x)
        groups = max(1, 256 // threads)
        shared = (12 * _width(x) * x.dtype.itemsize + 1) * threads * groups
        resident = cuda.multiprocessors() * max(1, min(768 // (threads * groups), cuda.blocks_that_fit(shared)))
        blocks = min(math.ceil(rows / (2 * groups)), resident)
        partial = xp.empty((blocks, 3 * dim), dtype=xp.float32)
        more = cuda.NULL if other is None else cuda.ready(other)
        arguments = (cuda.ready(dy), x, weight, mean, rstd, more, dx, partial, np.int64(rows))
        kernel = cuda.kernel("layer_norm", "layer_norm_backward", **constants)
        kernel((blocks,), (threads, groups), arguments, shared_mem=shared)
        dweight, dbias, sums = sum_partials(xp, partial, x.dtype, parts=3)
        note_sums(dx, sums)
        return dx, dweight, dbias

    vjp.adds = True  # type: ignore[attr-defined]
    return y, vjp


def covers_layer_norm(x: Array, *_: Any, **__: Any) -> bool:
    return cuda.covers(x) and _vectors(x) <= 16


def _vectors(x: Array) -> int:
    """Vectors of a row for each lane of a warp, as in layer_norm.cu."""
    return math.ceil(x.shape[-1] / (32 * _width(x)))


def _width(x: Array) -> int:
    """Numbers of a vector, as in layer_norm.cu."""
    dim, full = x.shape[-1], 16 // x.dtype.itemsize
    return full if dim % full == 0 else 2 if dim % 2 == 0 else 1


# --- loss -----------------------------------------------------------------------------------------------------------


def covers_cross_entropy(logits: Array, *, labels: Array, **_: Any) -> bool:
    return cuda.covers(logits) and labels.dtype == (logits.dtype if labels.ndim == 2 else np.int64)


def cross_entropy(
    xp: Any, logits: Array, *, labels: Array, label_smoothing: float, needs: tuple[bool, ...]
) -> tuple[Array, VJP]:
    scalar, soft = cuda.scalar(logits.dtype), labels.ndim == 2
    batch, classes = logits.shape
    logits, labels = cuda.ready(logits), cuda.ready(labels)
    statistics, losses = xp.empty((batch, 3), dtype=xp.float32), xp.empty(batch, dtype=xp.float32)
    loss = xp.empty((), dtype=logits.dtype)
    sizes = (np.int32(classes), np.float32(label_smoothing))
    threads = min(256, 32 * math.ceil(classes / 32))
    constants = {"SCALAR": scalar, "SOFT": int(soft)}
    forward = cuda.kernel("cross_entropy", "cross_entropy_forward", **constants)
    forward((batch,), (threads,), (logits, labels, statistics, losses, *sizes), shared_mem=4 * 3 * 8)
    mean = cuda.kernel("cross_entropy", "cross_entropy_mean", **constants)
    mean((1,), (256,), (losses, loss, np.int32(batch)), shared_mem=4 * 8)

    def vjp(dy: Array) -> tuple[Array]:
        dlogits = xp.empty(logits.shape, dtype=logits.dtype)
        backward = cuda.kernel("cross_entropy", "cross_entropy_backward", **constants)
        arguments = (logits, labels, statistics, cuda.ready(dy), dlogits, np.int32(batch), *sizes)
        backward((batch,), (threads,), arguments)
        return (dlogits,)

    return loss, vjp


# --- dropout --------------------------------------------------------------------------------------------------------


def covers_dropout_mask(like: Array, *, shape: tuple[int, ...], draw: random.Draw, **_: Any) -> bool:
    numbers = (draw.seed, draw.step if isinstance(draw.step, int) else 0, draw.number)
    return bool(cuda.scalar(like.dtype) and like.shape[0] * math.prod(shape)) and max(numbers) < 2**32


def dropout_mask(xp: Any, like: Array, *, drop: float, shape: tuple[int, ...], draw: random.Draw) -> Array:
    scalar, samples, size = cuda.scalar(like.dtype), like.shape[0], math.prod(shape)
    on_device = not isinstance(draw.step, int)
    numbers = (draw.seed, 0 if on_device else draw.step, draw.number)
    mask = xp.empty((samples, *shape), dtype=like.dtype)
    seed, step, number = (np.uint32(n) for n in numbers)
    wide = math.ceil(size / 8)  # threads for a sample
    block = (width := min(256, 1 << (wide - 1).bit_length())), 256 // width
    across, most = math.ceil(wide / width), 8 * cuda.multiprocessors()
    grid = min(across, most), min(math.ceil(samples / block[1]), max(1, most // across))
    arguments = (
        mask, np.int64(samples), np.int64(size), seed, step, draw.step if on_device else cuda.NULL, number,
        np.int64(draw.first_sample), random.threshold(drop), np.float32(reference.dropout_scale(drop)),
    )  # fmt: skip
    cuda.kernel("dropout", "dropout_mask", SCALAR=scalar)(grid, block, arguments)
    return mask


# --- indexing -------------------------------------------------------------------------------------------------------


def sum_at(xp: Any, values: Array, positions: Array, size: int) -> Array:
    import cupyx

    sums = xp.zeros(size, dtype=xp.float32 if arrays.is_half(values) else values.dtype)
    cupyx.scatter_add(sums, positions, values.astype(sums.dtype, copy=False))
    return sums.astype(values.dtype, copy=False)
