"""Kernels for CuPy arrays: the CUDA sources in `cuda/`, behind the reference's signatures.

They compute in fp32 whatever the arrays' dtype is (float32, float16, bfloat16), and give the same bits every time. What
they do not cover (float64, empty arrays, masks, unusual sizes) runs through the reference.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from tinyvit.kernels import cuda, cupy_optim, reference
from tinyvit.kernels.cupy_attention import qkv_attention

Array = Any
VJP = Callable[..., tuple[Array | None, ...]]

WAVE = 4  # blocks of 256 threads that a multiprocessor holds of any kernel here


# --- linear layers and GELU -----------------------------------------------------------------------------------------


def linear(xp: Any, x: Array, weight: Array, bias: Array | None, *, needs: tuple[bool, ...]) -> tuple[Array, VJP]:
    if not (cuda.scalar(x.dtype) and x.size and weight.size):
        return reference.linear(xp, x, weight, bias, needs=needs)
    rows = xp.reshape(x, (-1, x.shape[-1]))
    y = rows @ weight.T
    if bias is not None:
        bias = cuda.ready(bias)
        _columns("add_bias", y, y, bias)
    return xp.reshape(y, (*x.shape[:-1], weight.shape[0])), _linear_vjp(xp, x.shape, rows, weight, needs)


def _linear_vjp(xp: Any, shape: tuple[int, ...], rows: Array, weight: Array, needs: tuple[bool, ...]) -> VJP:
    saved_rows = rows if needs[1] else None

    def vjp(dy: Array, dbias: Array | None = None) -> tuple[Array | None, ...]:
        dy = cuda.ready(xp.reshape(dy, (-1, dy.shape[-1])))
        if needs[2] and dbias is None:
            partial = _partial(xp, dy)
            _columns("column_sums", dy, dy, partial)
            (dbias,) = _sum_partials(xp, partial, dy.dtype)
        return (
            xp.reshape(dy @ weight, shape) if needs[0] else None,
            dy.T @ saved_rows if needs[1] else None,
            dbias,
        )

    return vjp


def linear_gelu(
    xp: Any, x: Array, weight: Array, bias: Array, *, approximate: str, needs: tuple[bool, ...]
) -> tuple[Array, VJP]:
    if not (cuda.scalar(x.dtype) and x.size and weight.size):
        return reference.linear_gelu(xp, x, weight, bias, approximate=approximate, needs=needs)
    rows = xp.reshape(x, (-1, x.shape[-1]))
    hidden = rows @ weight.T  # without the bias, which both kernels add
    bias = cuda.ready(bias)
    y = xp.empty(hidden.shape, dtype=x.dtype) if True in needs else hidden
    _columns("bias_gelu_forward", hidden, hidden, bias, y, approximate=approximate)
    linear_vjp = _linear_vjp(xp, x.shape, rows, weight, needs)

    def vjp(dy: Array) -> tuple[Array | None, ...]:
        dy = cuda.ready(xp.reshape(dy, hidden.shape))
        dhidden, partial = xp.empty(hidden.shape, dtype=hidden.dtype), _partial(xp, hidden)
        _columns("bias_gelu_backward", hidden, hidden, bias, dy, dhidden, partial, approximate=approximate)
        return linear_vjp(dhidden, *_sum_partials(xp, partial, hidden.dtype))

    return xp.reshape(y, (*x.shape[:-1], weight.shape[0])), vjp


def gelu(xp: Any, x: Array, *, approximate: str, needs: tuple[bool, ...]) -> tuple[Array, VJP]:
    scalar = cuda.scalar(x.dtype)
    if not (scalar and x.size):
        return reference.gelu(xp, x, approximate=approximate, needs=needs)
    x = cuda.ready(x)
    y = xp.empty(x.shape, dtype=x.dtype)
    blocks, size = math.ceil(x.size / (256 * (16 // x.dtype.itemsize))), np.int64(x.size)
    constants = {"SCALAR": scalar, "APPROXIMATE": int(approximate == "tanh")}
    cuda.kernel("gelu", "gelu_forward", **constants)((blocks,), (256,), (x, y, size))

    def vjp(dy: Array) -> tuple[Array]:
        dx = xp.empty(x.shape, dtype=x.dtype)
        cuda.kernel("gelu", "gelu_backward", **constants)((blocks,), (256,), (x, cuda.ready(dy), dx, size))
        return (dx,)

    return y, vjp


def _columns(name: str, matrix: Array, *arguments: Array, approximate: str = "none") -> None:
    """Launch a kernel of columns.cu over `matrix` (rows, columns)."""
    rows, columns = matrix.shape
    kernel = _columns_kernel(name, matrix.dtype, _vector(columns, matrix.dtype.itemsize), approximate)
    across, down = _columns_grid(matrix)
    shared = 0 if name in ("add_bias", "bias_gelu_forward") else 4 * 256 * _vector(columns, matrix.dtype.itemsize)
    kernel((across, down), (32, 8), (*arguments, np.int64(rows), np.int32(columns)), shared_mem=shared)


def _columns_kernel(name: str, dtype: Any, vector: int, approximate: str = "none") -> Callable:
    constants = {"SCALAR": cuda.scalar(dtype), "VECTOR": vector, "APPROXIMATE": int(approximate == "tanh")}
    return cuda.kernel("columns", name, **constants)


def _columns_grid(matrix: Array) -> tuple[int, int]:
    """Blocks across the columns and down the rows: enough to fill the device once."""
    rows, columns = matrix.shape
    across = math.ceil(columns / (32 * _vector(columns, matrix.dtype.itemsize)))
    return across, min(math.ceil(rows / 8), max(1, WAVE * cuda.multiprocessors() // across))


def _vector(columns: int, itemsize: int) -> int:
    """Numbers that a thread takes at once."""
    return 16 // itemsize if columns % (16 // itemsize) == 0 else 1


def _partial(xp: Any, matrix: Array) -> Array:
    """For a block's sums of columns, in each row."""
    return xp.empty((_columns_grid(matrix)[1], matrix.shape[1]), dtype=xp.float32)


def _sum_partials(xp: Any, partial: Array, dtype: Any, parts: int = 1) -> list[Array]:
    """The sums over the rows of `partial` (rows, columns), as 1 or 2 arrays of columns / parts numbers."""
    rows, columns = partial.shape
    out = [xp.empty(columns // parts, dtype=dtype) for _ in range(parts)]
    sizes = (np.int32(rows), np.int32(columns), np.int32(columns // parts))
    kernel = _columns_kernel("sum_partials", dtype, 16 // np.dtype(dtype).itemsize)
    kernel((math.ceil(columns / 32),), (32, 8), (partial, out[0], out[-1], *sizes), shared_mem=4 * 256)
    return out


# --- layer normalisation --------------------------------------------------------------------------------------------


def layer_norm(
    xp: Any, x: Array, weight: Array, bias: Array, *, eps: float, needs: tuple[bool, ...]
) -> tuple[Array, VJP]:
    if not _normalises(x):
        return reference.layer_norm(xp, x, weight, bias, eps=eps, needs=needs)
    _, y, vjp = _layer_norm(xp, x, None, weight, bias, eps, True in needs)

    def vjp_of_y(dy: Array) -> tuple[Array, Array, Array]:
        return vjp(dy, None)

    return y, vjp_of_y


def add_layer_norm(
    xp: Any, x: Array, residual: Array, weight: Array, bias: Array, *, eps: float, needs: tuple[bool, ...]
) -> tuple[tuple[Array, Array], VJP]:
    """x + residual, and its layer norm; for arrays that `layer_norm` here covers."""
    total, y, vjp = _layer_norm(xp, x, residual, weight, bias, eps, True in needs)

    def vjp_of_both(dtotal: Array | None, dy: Array | None) -> tuple[Array, Array, Array, Array]:
        dx, dweight, dbias = vjp(xp.zeros_like(total) if dy is None else dy, dtotal)
        return dx, dx, dweight, dbias

    return (total, y), vjp_of_both


def _normalises(x: Array) -> bool:
    return bool(cuda.scalar(x.dtype) and x.size) and _vectors(x) <= 16


def _vectors(x: Array) -> int:
    """Vectors of a row for each lane of a warp, as in layer_norm.cu."""
    dim, full = x.shape[-1], 16 // x.dtype.itemsize
    width = full if dim % full == 0 else 2 if dim % 2 == 0 else 1
    return math.ceil(dim / (32 * width))


def _layer_norm(
    xp: Any, x: Array, residual: Array | None, weight: Array, bias: Array, eps: float, recording: bool
) -> tuple[Array, Array, Callable]:
    x, weight, bias = cuda.ready(x), cuda.ready(weight), cuda.ready(bias)
    dim = x.shape[-1]
    rows = x.size // dim
    constants = {"SCALAR": cuda.scalar(x.dtype), "DIM": dim}
    y = xp.empty(x.shape, dtype=x.dtype)
    total = x if residual is None else xp.empty(x.shape, dtype=x.dtype)
    mean, rstd = (xp.empty(rows, dtype=xp.float32) if recording else cuda.NULL for _ in range(2))
    sources = (x, cuda.NULL, cuda.NULL) if residual is None else (x, cuda.ready(residual), total)
    arguments = (*sources, weight, bias, y, mean, rstd, np.int64(rows), np.float32(eps))
    cuda.kernel("layer_norm", "layer_norm_forward", **constants)((math.ceil(rows / 8),), (256,), arguments)

    def vjp(dy: Array, dtotal: Array | None) -> tuple[Array, Array, Array]:
        dx = xp.empty(x.shape, dtype=x.dtype)
        threads = 32 * _vectors(x)
        blocks = min(math.ceil(rows / 3), cuda.multiprocessors() * max(1, 512 // threads))
        partial = xp.empty((blocks, 2 * dim), dtype=xp.float32)
        dtotal = cuda.NULL if dtotal is None else cuda.ready(dtotal)
        arguments = (cuda.ready(dy), total, weight, mean, rstd, dtotal, dx, partial, np.int64(rows))
        kernel = cuda.kernel("layer_norm", "layer_norm_backward", **constants)
        kernel((blocks,), (threads,), arguments, shared_mem=4 * 12 * threads // 32)
        return dx, *_sum_partials(xp, partial, x.dtype, parts=2)

    return total, y, vjp


# --- loss -----------------------------------------------------------------------------------------------------------


def cross_entropy(
    xp: Any, logits: Array, *, labels: Array, label_smoothing: float, needs: tuple[bool, ...]
) -> tuple[Array, VJP]:
    scalar, soft = cuda.scalar(logits.dtype), labels.ndim == 2
    if not scalar or labels.dtype != (logits.dtype if soft else np.int64):
        return reference.cross_entropy(xp, logits, labels=labels, label_smoothing=label_smoothing, needs=needs)
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


KERNELS: dict[str, Callable] = {
    f.__name__: f for f in (linear, linear_gelu, gelu, layer_norm, qkv_attention, cross_entropy)
} | cupy_optim.KERNELS
