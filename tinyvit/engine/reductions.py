"""Operations over axes: products of matrices, sums and other reductions, and changes of shape."""

from __future__ import annotations

import math
from typing import Any

from tinyvit.backend import arrays
from tinyvit.backend.arrays import VJP, Array
from tinyvit.engine.operation import operation, shape_of, standard_names, unbroadcast
from tinyvit.engine.tensor import Tensor, array_of
from tinyvit.kernels.half_precision import in_fp32

Axis = int | tuple[int, ...] | None


@operation
@in_fp32
def matmul(xp: Any, a: Array, b: Array, *, needs: tuple[bool, ...]) -> tuple[Array, VJP]:
    """The matrix product over the last two axes, the others broadcast; a vector is a row as `a`, a column as `b`."""
    _check_product(shape_of(a), shape_of(b))
    a2 = a[None, :] if a.ndim == 1 else a
    b2 = b[:, None] if b.ndim == 1 else b
    y = a2 @ b2
    full = y.shape
    if a.ndim == 1:
        y = y[..., 0, :]
    if b.ndim == 1:
        y = y[..., 0]

    def vjp(dy: Array) -> tuple[Array | None, ...]:
        dy = xp.reshape(dy, full)
        da = unbroadcast(xp, dy @ xp.matrix_transpose(b2), tuple(a2.shape)) if needs[0] else None
        db = unbroadcast(xp, xp.matrix_transpose(a2) @ dy, tuple(b2.shape)) if needs[1] else None
        return (
            None if da is None else xp.reshape(da, a.shape),
            None if db is None else xp.reshape(db, b.shape),
        )

    return y, vjp


def _check_product(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    if not a or not b:
        raise ValueError(f"matmul expects arrays with at least one axis, got shapes {a} and {b}")
    others = zip(reversed(a[:-2]), reversed(b[:-2]), strict=False)
    if a[-1] != b[-2:][0] or any(n != m and 1 not in (n, m) for n, m in others):
        raise ValueError(f"matmul expects shapes (..., N, K) and (..., K, M), got {a} and {b}")


def _axes(axis: Axis, ndim: int) -> tuple[int, ...]:
    axes = range(ndim) if axis is None else (axis,) if isinstance(axis, int) else axis
    return tuple(i % ndim for i in axes) if ndim else ()


def _count(shape: tuple[int, ...], axis: Axis) -> int:
    """How many entries each result of a reduction comes from."""
    return math.prod(shape[i] for i in _axes(axis, len(shape)))


def _keepdims(xp: Any, y: Array, shape: tuple[int, ...], axis: Axis) -> Array:
    """A reduction's result (or its gradient) with the reduced axes back at length 1."""
    axes = _axes(axis, len(shape))
    return xp.reshape(y, tuple(1 if i in axes else n for i, n in enumerate(shape)))


@operation
@in_fp32
def sum(xp: Any, x: Array, *, axis: Axis = None, keepdims: bool = False, needs: tuple[bool, ...]) -> tuple[Array, VJP]:
    """The sum over some axes, all if None."""
    shape = tuple(x.shape)
    y = xp.sum(x, axis=axis, keepdims=keepdims)
    return y, lambda dy: (xp.broadcast_to(_keepdims(xp, dy, shape, axis), shape),)


@operation
@in_fp32
def mean(xp: Any, x: Array, *, axis: Axis = None, keepdims: bool = False, needs: tuple[bool, ...]) -> tuple[Array, VJP]:
    """The mean over some axes, all if None."""
    shape = tuple(x.shape)
    y = xp.mean(x, axis=axis, keepdims=keepdims)
    count = _count(shape, axis)
    return y, lambda dy: (xp.broadcast_to(_keepdims(xp, dy / count, shape, axis), shape),)


@operation
@in_fp32
def var(
    xp: Any, x: Array, *, axis: Axis = None, correction: float = 1.0, keepdims: bool = False, needs: tuple[bool, ...]
) -> tuple[Array, VJP]:
    """The variance over some axes: the sum of squared distances from the mean over (count - correction).

    The default correction of 1 is torch's; NumPy's is 0.
    """
    y = xp.var(x, axis=axis, correction=correction, keepdims=keepdims)
    return y, lambda dy: (_var_gradient(xp, dy, x, axis, correction),)


@operation
@in_fp32
def std(
    xp: Any, x: Array, *, axis: Axis = None, correction: float = 1.0, keepdims: bool = False, needs: tuple[bool, ...]
) -> tuple[Array, VJP]:
    """The square root of `var`; where that is 0 its gradient is 0, as in torch."""
    y = xp.sqrt(xp.var(x, axis=axis, correction=correction, keepdims=keepdims))

    def vjp(dy: Array) -> tuple[Array]:
        dvar = xp.where(y == 0, xp.zeros_like(dy), dy / (2.0 * y))
        return (_var_gradient(xp, dvar, x, axis, correction),)

    return y, vjp


def _var_gradient(xp: Any, dy: Array, x: Array, axis: Axis, correction: float) -> Array:
    shape = tuple(x.shape)
    freedom = _count(shape, axis) - correction
    factor = 2.0 / freedom if freedom else math.nan  # as the variance itself
    return (x - xp.mean(x, axis=axis, keepdims=True)) * (factor * _keepdims(xp, dy, shape, axis))


@operation
@in_fp32
def max(xp: Any, x: Array, *, axis: Axis = None, keepdims: bool = False, needs: tuple[bool, ...]) -> tuple[Array, VJP]:
    """The largest entry over some axes, all if None; entries that tie share the gradient (torch.amax)."""
    y = xp.max(x, axis=axis, keepdims=keepdims)
    return y, lambda dy: (_extremum_gradient(xp, dy, x, y, axis),)


@operation
@in_fp32
def min(xp: Any, x: Array, *, axis: Axis = None, keepdims: bool = False, needs: tuple[bool, ...]) -> tuple[Array, VJP]:
    """The smallest entry over some axes, all if None; entries that tie share the gradient (torch.amin)."""
    y = xp.min(x, axis=axis, keepdims=keepdims)
    return y, lambda dy: (_extremum_gradient(xp, dy, x, y, axis),)


def _extremum_gradient(xp: Any, dy: Array, x: Array, y: Array, axis: Axis) -> Array:
    shape = tuple(x.shape)
    hit = xp.astype(x == _keepdims(xp, y, shape, axis), x.dtype)
    return hit * (_keepdims(xp, dy, shape, axis) / xp.sum(hit, axis=axis, keepdims=True))


def argmax(x: Tensor | Array, axis: int | None = None, keepdims: bool = False, **torch_names: Any) -> Tensor:
    """The position of the largest entry (the first of several) along an axis, among all entries if None.

    Whole numbers, without a gradient. `dim` and `keepdim` are accepted as in torch.
    """
    if torch_names:
        return argmax(x, **{"axis": axis, "keepdims": keepdims} | standard_names(torch_names))
    data = array_of(x)
    return Tensor(arrays.namespace(data).argmax(data, axis=axis, keepdims=keepdims))


@operation
def reshape(xp: Any, x: Array, *, shape: tuple[int, ...], needs: tuple[bool, ...]) -> tuple[Array, VJP]:
    """The same entries in another shape; one length may be -1."""
    before = tuple(x.shape)
    return xp.reshape(x, shape), lambda dy: (xp.reshape(dy, before),)


def flatten(x: Tensor, start_dim: int = 0, end_dim: int = -1) -> Tensor:
    """The axes from `start_dim` to `end_dim` as one."""
    if not x.shape:
        return reshape(x, (1,))
    start, end = range(x.ndim)[start_dim], range(x.ndim)[end_dim]
    if start > end:
        raise ValueError(f"flatten expects start_dim before end_dim, got {start_dim} and {end_dim} of {x.ndim} axes")
    shape = x.shape
    return reshape(x, (*shape[:start], math.prod(shape[start : end + 1]), *shape[end + 1 :]))


@operation
def permute_dims(xp: Any, x: Array, *, axes: tuple[int, ...], needs: tuple[bool, ...]) -> tuple[Array, VJP]:
    """The axes in another order."""
    back = tuple(sorted(range(len(axes)), key=lambda i: axes[i] % len(axes)))
    return xp.permute_dims(x, axes), lambda dy: (xp.permute_dims(dy, back),)


def transpose(x: Tensor, axis1: int = -2, axis2: int = -1) -> Tensor:
    """Two axes exchanged, by default the last two."""
    if x.ndim < 2:
        raise ValueError(f"transpose expects at least two axes, got shape {tuple(x.shape)}")
    axes = list(range(x.ndim))
    axes[axis1], axes[axis2] = axes[axis2], axes[axis1]
    return permute_dims(x, tuple(axes))


@operation
def broadcast_to(xp: Any, x: Array, *, shape: tuple[int, ...], needs: tuple[bool, ...]) -> tuple[Array, VJP]:
    """x repeated along axes of length 1 and new leading axes to `shape`."""
    before = tuple(x.shape)
    return xp.broadcast_to(x, shape), lambda dy: (unbroadcast(xp, dy, before),)


@operation
def astype(xp: Any, x: Array, *, dtype: Any, needs: tuple[bool, ...]) -> tuple[Array, VJP]:
    """x with another dtype (a name, a NumPy dtype or the library's own); its gradient goes back in x's."""
    before = x.dtype
    return arrays.astype(x, dtype), lambda dy: (xp.astype(dy, before, copy=False),)
