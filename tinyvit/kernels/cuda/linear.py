"""Linear layers and GELU for CuPy arrays: cuBLASLt's products, and `cuda/columns.cu`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from tinyvit import kernels
from tinyvit.backend import cuda_graph
from tinyvit.backend.arrays import VJP, Array
from tinyvit.kernels import cuda
from tinyvit.kernels.cuda import cublas, linear_gelu_sm90a
from tinyvit.kernels.reference import no_gradient

WAVE = 4  # blocks of 256 threads that a multiprocessor holds of any kernel here
MANY = 64  # sums of one launch, as in columns.cu
_SUM = np.dtype([("partial", "u8"), ("to", "u8", 3), *((name, "i4") for name in ("rows", "columns", "split", "first"))])
_SUMS = np.dtype([("of", _SUM, MANY)])


def linear(xp: Any, x: Array, weight: Array, bias: Array | None, *, needs: tuple[bool, ...]) -> tuple[Array, VJP]:
    rows, weight = cuda.ready(xp.reshape(x, (-1, x.shape[-1]))), cuda.ready(weight)
    y = product(xp, rows, weight, None if bias is None else cuda.ready(bias))
    return xp.reshape(y, (*x.shape[:-1], weight.shape[0])), _linear_vjp(xp, x.shape, rows, weight, needs)


def add_linear(
    xp: Any, residual: Array, x: Array, weight: Array, bias: Array | None, *, needs: tuple[bool, ...]
) -> tuple[Array, VJP]:
    rows, weight = cuda.ready(xp.reshape(x, (-1, x.shape[-1]))), cuda.ready(weight)
    added = cuda.ready(xp.reshape(residual, (-1, residual.shape[-1])))
    y = product(xp, rows, weight, None if bias is None else cuda.ready(bias), added)
    linear_vjp = _linear_vjp(xp, x.shape, rows, weight, needs[1:])

    return xp.reshape(y, residual.shape), lambda dy: (dy, *linear_vjp(dy))


def product(xp: Any, rows: Array, weight: Array, bias: Array | None = None, added: Array | None = None) -> Array:
    """rows W^T + bias + added."""
    y = cublas.linear(xp, rows, weight, bias, added)
    if y is None and bias is not None:  # cuBLASLt may have the product without the epilogue
        y = product(xp, rows, weight, None, added)
        y += bias
    elif y is None:
        y = cupys_product(rows, weight.T)
        if added is not None:
            y += added
    return y


def cupys_product(a: Array, b: Array) -> Array:
    """a b, where cuBLASLt does not compute it. Raises NotCapturable: CuPy's binding refuses that while capturing."""
    if cuda_graph.capturing():
        lacking = cublas.missing() or f"it computes no product of {a.dtype} {a.shape} and {b.shape}"
        raise cuda_graph.NotCapturable(f"graphs need cuBLASLt's products: {lacking}")
    return a @ b


def _linear_vjp(xp: Any, shape: tuple[int, ...], rows: Array, weight: Array, needs: tuple[bool, ...]) -> VJP:
    saved_rows = rows if needs[1] else None

    def vjp(dy: Array, dbias: Array | None = None) -> tuple[Array | None, ...]:
        dbias = _noted_sums(dy) if dbias is None else dbias
        dy = cuda.ready(xp.reshape(dy, (-1, dy.shape[-1])))
        if needs[2] and dbias is None:
            dbias = _column_sums(xp, dy)
        dweight = weight_gradient(xp, dy, saved_rows) if needs[1] else None
        dx = xp.reshape(input_gradient(xp, dy, weight), shape) if needs[0] else None
        return dx, dweight, dbias

    return vjp


def input_gradient(xp: Any, dy: Array, weight: Array) -> Array:
    dx = cublas.input_gradient(xp, dy, weight)
    return cupys_product(dy, weight) if dx is None else dx


def weight_gradient(xp: Any, dy: Array, rows: Array) -> Array:
    dweight = cublas.weight_gradient(xp, dy, rows)
    return cupys_product(dy.T, rows) if dweight is None else dweight


def note_sums(x: Array, sums: Array) -> None:
    """Tell the next layers of this backward pass the sums of x's columns (over all axes but the last).

    A layer's gradient is mostly written by a kernel that finds them on its way, and they are its bias's gradient.
    """
    if (notes := kernels.notes.get()) is not None:
        notes.sums = x, sums


def _noted_sums(x: Array) -> Array | None:
    notes = kernels.notes.get()
    return notes.sums[1] if notes is not None and notes.sums is not None and notes.sums[0] is x else None


def _column_sums(xp: Any, dy: Array) -> Array:
    partial = partial_sums(xp, dy)
    columns("column_sums", dy, dy, partial)
    return sum_partials(xp, partial, dy.dtype)[0]


def covers_sum(x: Array, axis: tuple[int, ...]) -> bool:
    first_axes = axis == tuple(range(len(axis))) and len(axis) < x.ndim
    return first_axes and cuda.covers(x)


def sum_in_fp32(xp: Any, x: Array, axis: tuple[int, ...]) -> Array:
    """Over the first axes, as in gradients of position embeddings, tokens and layer scales, it is a sum of columns."""
    rest = x.shape[len(axis) :]
    sums = _column_sums(xp, cuda.ready(xp.reshape(x, (-1, math.prod(rest)))))
    if (notes := kernels.notes.get()) is not None:
        notes.finish(sums)  # which is told from others by its identity, and goes on in other shapes
    return xp.reshape(sums, rest)


def covers_add_scaled(residual: Array, x: Array, **_: Any) -> bool:
    return cuda.covers(x) and x.ndim > 1


def add_scaled(xp: Any, residual: Array, x: Array, *, scale: Array, needs: tuple[bool, ...]) -> tuple[Array, VJP]:
    rows, added = (cuda.ready(xp.reshape(a, (-1, a.shape[-1]))) for a in (x, residual))
    scale, share = cuda.ready(scale), np.int64(rows.shape[0] // x.shape[0])
    y = xp.empty(x.shape, dtype=x.dtype)
    columns("add_scaled", rows, added, rows, scale, y, share)

    def vjp(dy: Array) -> tuple[Array, Array]:
        dx, by_rows = xp.empty(dy.shape, dtype=dy.dtype), cuda.ready(xp.reshape(dy, (-1, dy.shape[-1])))
        partial = partial_sums(xp, by_rows)
        columns("scaled", by_rows, by_rows, scale, dx, partial, share)
        note_sums(dx, *sum_partials(xp, partial, dy.dtype))
        return dy, dx

    return y, vjp


def linear_gelu(
    xp: Any, x: Array, weight: Array, bias: Array, *, approximate: str, needs: tuple[bool, ...]
) -> tuple[Array, VJP]:
    rows, weight, bias = cuda.ready(xp.reshape(x, (-1, x.shape[-1]))), cuda.ready(weight), cuda.ready(bias)
    y, hidden, added = _linear_gelu(xp, rows, weight, bias, approximate, True in needs)
    linear_vjp = _linear_vjp(xp, x.shape, rows, weight, needs)

    def vjp(dy: Array) -> tuple[Array | None, ...]:
        return linear_vjp(*gelu_gradient(xp, hidden, added, dy, approximate))

    return xp.reshape(y, (*x.shape[:-1], weight.shape[0])), vjp


def covers_mlp(residual: Array | None, x: Array, *weights: Array, **_: Any) -> bool:
    return cuda.covers(x, weights[2])


def mlp(
    xp: Any, residual: Array | None, x: Array, *weights: Array, approximate: str, needs: tuple[bool, ...]
) -> tuple[Array, VJP]:
    weight1, bias1, weight2, bias2 = map(cuda.ready, weights)
    rows, outputs, first_needs = cuda.ready(xp.reshape(x, (-1, x.shape[-1]))), len(bias2), needs[1:4]
    more = None if residual is None else cuda.ready(xp.reshape(residual, (-1, outputs)))
    fits = more is not None and more.shape == rows.shape and True not in needs
    if fits and linear_gelu_sm90a.takes(rows, len(bias1), approximate, "mlp"):
        y = linear_gelu_sm90a.mlp(xp, more, rows, weight1, bias1, weight2, bias2, approximate)
        return xp.reshape(y, x.shape), no_gradient
    between, hidden, added = _linear_gelu(xp, rows, weight1, bias1, approximate, True in first_needs)
    y = product(xp, between, weight2, bias2, more)
    first_vjp = _linear_vjp(xp, x.shape, rows, weight1, first_needs)
    second_vjp = _linear_vjp(xp, between.shape, between, weight2, (False, *needs[4:]))

    def vjp(dy: Array) -> tuple[Array | None, ...]:
        _, *dsecond = second_vjp(dy)
        if True not in first_needs:
            return dy, None, None, None, *dsecond
        by_rows = cuda.ready(xp.reshape(dy, (-1, outputs)))
        if added is not cuda.NULL and linear_gelu_sm90a.takes(by_rows, len(bias1), approximate, "backward"):
            dhidden, partial = linear_gelu_sm90a.backward(xp, by_rows, weight2, hidden, added, approximate)
            dbias1 = sum_partials(xp, partial, dhidden.dtype)[0]
        else:
            dbetween = input_gradient(xp, by_rows, weight2)
            dhidden, dbias1 = gelu_gradient(xp, hidden, added, dbetween, approximate)
        return dy, *first_vjp(dhidden, dbias1), *dsecond

    return xp.reshape(y, (*x.shape[:-1], outputs)), vjp


def _linear_gelu(
    xp: Any, rows: Array, weight: Array, bias: Array, approximate: str, recording: bool
) -> tuple[Array, Array | None, Any]:
    """As `gelu_of_product`, in one kernel where that is faster."""
    if linear_gelu_sm90a.takes(rows, weight.shape[0], approximate):
        return *linear_gelu_sm90a.forward(xp, rows, weight, bias, approximate, recording), bias
    return gelu_of_product(xp, rows, weight, bias, approximate, recording)


def gelu_of_product(
    xp: Any, rows: Array, weight: Array, bias: Array, approximate: str, recording: bool
) -> tuple[Array, Array, Any]:
    """gelu(rows W^T + bias); and for the backward pass GELU's input as a sum of two arrays (the second may be NULL)."""
    if approximate == "tanh" and rows.dtype.itemsize == 2:  # cuBLASLt's tanh is not good enough for fp32
        fused = cublas.linear_gelu(xp, rows, weight, bias, recording)
        if fused is not None:
            return *fused, cuda.NULL
    hidden = product(xp, rows, weight, None)  # without the bias, which both kernels add
    y = xp.empty(hidden.shape, dtype=hidden.dtype) if recording else hidden
    columns("bias_gelu_forward", hidden, hidden, bias, y, approximate=approximate)
    return y, hidden, bias


def covers_gelu(x: Array, **_: Any) -> bool:
    return cuda.covers(x) and x.ndim > 1


def gelu(xp: Any, x: Array, *, approximate: str, needs: tuple[bool, ...]) -> tuple[Array, VJP]:
    rows = cuda.ready(xp.reshape(x, (-1, x.shape[-1])))
    y = xp.empty(rows.shape, dtype=x.dtype)
    columns("bias_gelu_forward", rows, rows, cuda.NULL, y, approximate=approximate)

    def vjp(dy: Array) -> tuple[Array]:
        dx, sums = gelu_gradient(xp, rows, cuda.NULL, dy, approximate)
        dx = xp.reshape(dx, x.shape)
        note_sums(dx, sums)
        return (dx,)

    return xp.reshape(y, x.shape), vjp


def gelu_gradient(xp: Any, x: Array, bias: Array, dy: Array, approximate: str) -> tuple[Array, Array]:
    """The gradient of gelu(x + bias) in x (rows, columns), and the sums of its columns; bias may be NULL."""
    dx, partial = xp.empty(x.shape, dtype=x.dtype), partial_sums(xp, x)
    dy = cuda.ready(xp.reshape(dy, x.shape))
    columns("bias_gelu_backward", x, x, bias, dy, dx, partial, approximate=approximate)
    return dx, *sum_partials(xp, partial, x.dtype)


# --- columns.cu -----------------------------------------------------------------------------------------------------


def columns(name: str, matrix: Array, *arguments: Array, approximate: str = "none") -> None:
    """Launch a kernel of columns.cu over `matrix` (rows, columns)."""
    rows, width = matrix.shape
    kernel = _columns_kernel(name, matrix.dtype, _vector(width, matrix.dtype.itemsize), approximate)
    across, down = _columns_grid(matrix)
    shared = 4 * 256 * _vector(width, matrix.dtype.itemsize)  # for those that add up
    kernel((across, down), (32, 8), (*arguments, np.int64(rows), np.int32(width)), shared_mem=shared)


def _columns_kernel(name: str, dtype: Any, vector: int, approximate: str = "none") -> Callable:
    constants = {"SCALAR": cuda.scalar(dtype), "VECTOR": vector, "APPROXIMATE": int(approximate == "tanh")}
    return cuda.kernel("columns", name, **constants)


def _columns_grid(matrix: Array) -> tuple[int, int]:
    """Blocks across the columns and down the rows: enough to fill the device once."""
    rows, width = matrix.shape
    across = math.ceil(width / (32 * _vector(width, matrix.dtype.itemsize)))
    return across, min(math.ceil(rows / 8), max(1, WAVE * cuda.multiprocessors() // across))


def _vector(width: int, itemsize: int) -> int:
    """Numbers that a thread takes at once."""
    return 16 // itemsize if width % (16 // itemsize) == 0 else 1


def partial_sums(xp: Any, matrix: Array) -> Array:
    """For a block's sums of columns, in each row."""
    return xp.empty((_columns_grid(matrix)[1], matrix.shape[1]), dtype=xp.float32)


def sum_partials(xp: Any, partial: Array, dtype: Any, parts: int = 1) -> list[Array]:
    """The sums over the rows of `partial` (rows, columns), as up to 3 arrays of columns / parts numbers.

    Within a backward pass the arrays are filled when it ends or the engine reads one, many in one launch: a step of a
    ViT of 12 blocks has 54 such sums, of a few microseconds each. Until then they must be handed on as they are.
    """
    out = [xp.empty(partial.shape[1] // parts, dtype=dtype) for _ in range(parts)]
    if (notes := kernels.notes.get()) is None:
        _sum_many([(partial, out)])
    else:
        notes.put_off(_sum_many, (partial, out), out)
    return out


def _sum_many(sums: list[tuple[Array, list[Array]]]) -> None:
    """Fill the arrays of each pair with the sums of its first."""
    for dtype in dict.fromkeys(out[0].dtype for _, out in sums):
        alike = [(partial, out) for partial, out in sums if out[0].dtype == dtype]
        kernel = _columns_kernel("sum_partials", dtype, 16 // np.dtype(dtype).itemsize)
        for some in (alike[i : i + MANY] for i in range(0, len(alike), MANY)):
            table, blocks = np.zeros((), _SUMS), 0
            for i, (partial, out) in enumerate(some):
                rows, width = partial.shape
                to = [cuda.address(x) for x in (out * 3)[:3]]
                table["of"][i] = cuda.address(partial), to, rows, width, width // len(out), blocks
                blocks += math.ceil(width / 32)
            kernel((blocks,), (32, 16), (table, np.int32(len(some))), shared_mem=4 * 32 * 16)
