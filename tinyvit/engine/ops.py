"""Elementary differentiable operations on Tensors: arithmetic, reductions, shape.

Each is written once, forward and backward together, against the array API standard; `operation` turns the
function of arrays into a function of Tensors, and what adds up or has fractions in its formula is computed `in_fp32`.
Inputs must share one dtype (numbers go with any) and broadcast as in NumPy.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import array_api_compat

from tinyvit import kernels
from tinyvit.backend import arrays
from tinyvit.engine.tensor import Array, Tensor, apply
from tinyvit.kernels import reference
from tinyvit.kernels.half_precision import in_fp32, numbers_in_fp32, sum_in_fp32

VJP = Callable[..., tuple[Array | None, ...]]
Axis = int | tuple[int, ...] | None


def operation(op: Callable) -> Callable[..., Tensor]:
    """The function of Tensors that belongs to `op(xp, *arrays, needs, **parameters)`.

    Parameters that are keyword-only in `op` may be given by position after the arrays.
    """
    signature = inspect.signature(op)
    kinds = [p for p in signature.parameters.values() if p.name not in ("xp", "needs")]
    n_arrays = len([p for p in kinds if p.kind is p.POSITIONAL_OR_KEYWORD])
    public = [p.replace(kind=p.POSITIONAL_OR_KEYWORD) for p in kinds]
    names = [p.name for p in public]

    @functools.wraps(op)
    def function(*args: Any, **parameters: Any) -> Tensor:
        if len(args) > len(names):
            raise TypeError(f"{op.__name__} takes at most {len(names)} arguments, got {len(args)}")
        inputs = list(args[:n_arrays])
        for name in names[len(inputs) : n_arrays]:
            if name not in parameters:
                raise TypeError(f"{op.__name__} expects {', '.join(names[:n_arrays])}; {name} is missing")
            inputs.append(parameters.pop(name))
        return apply(op, *inputs, **dict(zip(names[n_arrays:], args[n_arrays:], strict=False)), **parameters)

    function.__signature__ = signature.replace(parameters=public, return_annotation=Tensor)  # type: ignore[attr-defined]
    return function


def _shape(x: Array | float) -> tuple[int, ...]:
    return () if isinstance(x, (int, float)) else tuple(x.shape)


def _unbroadcast(xp: Any, g: Array, shape: tuple[int, ...]) -> Array:
    """The gradient of broadcasting: sum `g` over the axes along which an array of `shape` was repeated."""
    if tuple(g.shape) == shape:
        return g
    extra = g.ndim - len(shape)
    repeated = tuple(range(extra)) + tuple(i + extra for i, n in enumerate(shape) if n == 1)
    return xp.reshape(kernels.best(sum_in_fp32, xp)(xp, g, repeated), shape)


def _binary(xp: Any, a: Array, b: Array, needs: tuple[bool, ...], da: Callable, db: Callable) -> VJP:
    """The vjp of a broadcasting operation on two arrays from its two partial derivatives times dy.

    A derivative that is not needed is dropped, and with it what it alone would keep alive.
    """
    partials = [(d, _shape(x)) if need else None for d, x, need in zip((da, db), (a, b), needs, strict=True)]

    def vjp(dy: Array) -> tuple[Array | None, ...]:
        return tuple(None if p is None else _unbroadcast(xp, p[0](dy), p[1]) for p in partials)

    return vjp


@operation
@numbers_in_fp32
def add(xp: Any, a: Array, b: Array, *, needs: tuple[bool, ...]) -> tuple[Array, VJP]:
    """a + b."""
    return a + b, _binary(xp, a, b, needs, lambda dy: dy, lambda dy: dy)


@operation
@numbers_in_fp32
def subtract(xp: Any, a: Array, b: Array, *, needs: tuple[bool, ...]) -> tuple[Array, VJP]:
    """a - b."""
    return a - b, _binary(xp, a, b, needs, lambda dy: dy, lambda dy: -dy)


@operation
@numbers_in_fp32
def multiply(xp: Any, a: Array, b: Array, *, needs: tuple[bool, ...]) -> tuple[Array, VJP]:
    """a * b."""
    return a * b, _binary(xp, a, b, needs, lambda dy: dy * b, lambda dy: dy * a)


@operation
@in_fp32
def divide(xp: Any, a: Array, b: Array, *, needs: tuple[bool, ...]) -> tuple[Array, VJP]:
    """a / b of floating arrays."""
    y = a / b
    return y, _binary(xp, a, b, needs, lambda dy: dy / b, lambda dy: -dy * y / b)


@operation
@in_fp32
def power(xp: Any, a: Array, b: Array, *, needs: tuple[bool, ...]) -> tuple[Array, VJP]:
    """a ** b, where the gradient of a ** 0 is 0 and that of 0 ** b with respect to b is 0 for b >= 0 (as PyTorch's)."""
    y = a**b

    def da(dy: Array) -> Array:
        if isinstance(b, (int, float)):
            return xp.zeros_like(dy) if b == 0 else dy * (b * a ** (b - 1))
        return dy * b * a ** xp.where(b == 0, xp.ones_like(b), b - 1)

    def db(dy: Array) -> Array:
        base = a if not isinstance(a, (int, float)) else xp.ones_like(b) * a
        zero = (base == 0) & (b >= 0)
        return xp.where(zero, xp.zeros_like(y), dy * y * xp.log(xp.where(zero, xp.ones_like(base), base)))

    return y, _binary(xp, a, b, needs, da, db)


@operation
@in_fp32
def maximum(xp: Any, a: Array, b: Array, *, needs: tuple[bool, ...]) -> tuple[Array, VJP]:
    """The larger of a and b, elementwise; equal entries share the gradient."""
    return xp.maximum(a, b), _binary(xp, a, b, needs, _share(xp, a, b), _share(xp, b, a))


@operation
@in_fp32
def minimum(xp: Any, a: Array, b: Array, *, needs: tuple[bool, ...]) -> tuple[Array, VJP]:
    """The smaller of a and b, elementwise; equal entries share the gradient."""
    return xp.minimum(a, b), _binary(xp, a, b, needs, _share(xp, b, a), _share(xp, a, b))


def _share(xp: Any, wins: Array, loses: Array) -> Callable[[Array], Array]:
    """dy where `wins` > `loses`, half of it where they are equal."""
    return lambda dy: dy * (xp.astype(wins > loses, dy.dtype) + 0.5 * xp.astype(wins == loses, dy.dtype))


@operation
def negative(xp: Any, x: Array, *, needs: tuple[bool, ...]) -> tuple[Array, VJP]:
    """-x."""
    return -x, lambda dy: (-dy,)


@operation
def abs(xp: Any, x: Array, *, needs: tuple[bool, ...]) -> tuple[Array, VJP]:
    """|x|; its gradient at 0 is 0."""
    return xp.abs(x), lambda dy: (dy * xp.sign(x),)


@operation
@in_fp32
def exp(xp: Any, x: Array, *, needs: tuple[bool, ...]) -> tuple[Array, VJP]:
    """e ** x."""
    y = xp.exp(x)
    return y, lambda dy: (dy * y,)


@operation
@in_fp32
def log(xp: Any, x: Array, *, needs: tuple[bool, ...]) -> tuple[Array, VJP]:
    """The natural logarithm."""
    return xp.log(x), lambda dy: (dy / x,)


@operation
@in_fp32
def sqrt(xp: Any, x: Array, *, needs: tuple[bool, ...]) -> tuple[Array, VJP]:
    """The square root."""
    y = xp.sqrt(x)
    return y, lambda dy: (dy / (2.0 * y),)


@operation
@in_fp32
def tanh(xp: Any, x: Array, *, needs: tuple[bool, ...]) -> tuple[Array, VJP]:
    """The hyperbolic tangent."""
    y = xp.tanh(x)
    return y, lambda dy: (dy * (1.0 - y * y),)


@operation
@in_fp32
def erf(xp: Any, x: Array, *, needs: tuple[bool, ...]) -> tuple[Array, VJP]:
    """The error function 2/sqrt(pi) * integral of exp(-t^2) from 0 to x."""
    return reference.erf(xp, x), lambda dy: (dy * (1.1283791670955126 * xp.exp(-x * x)),)


@operation
@in_fp32
def clip(
    xp: Any, x: Array, *, low: float | None = None, high: float | None = None, needs: tuple[bool, ...]
) -> tuple[Array, VJP]:
    """x limited to low ... high (numbers); the gradient passes where x lies within, the ends included."""
    inside = xp.ones_like(x, dtype=xp.bool)
    y = x
    if low is not None:
        inside = inside & (x >= low)
        y = xp.where(y < low, xp.ones_like(y) * low, y)
    if high is not None:
        inside = inside & (x <= high)
        y = xp.where(y > high, xp.ones_like(y) * high, y)
    return y, lambda dy: (xp.where(inside, dy, xp.zeros_like(dy)),)


def where(condition: Tensor | Array, a: Tensor | Array | float, b: Tensor | Array | float) -> Tensor:
    """a where `condition` (booleans) holds, else b."""
    condition = condition.data if isinstance(condition, Tensor) else condition
    return apply(_where, a, b, condition=condition)


def _where(xp: Any, a: Array, b: Array, *, condition: Array, needs: tuple[bool, ...]) -> tuple[Array, VJP]:
    template = b if isinstance(a, (int, float)) else a
    y = xp.where(
        condition, *(xp.asarray(v, dtype=template.dtype) if isinstance(v, (int, float)) else v for v in (a, b))
    )
    return y, _binary(
        xp, a, b, needs,
        lambda dy: xp.where(condition, dy, xp.zeros_like(dy)),
        lambda dy: xp.where(condition, xp.zeros_like(dy), dy),
    )  # fmt: skip


@operation
@in_fp32
def matmul(xp: Any, a: Array, b: Array, *, needs: tuple[bool, ...]) -> tuple[Array, VJP]:
    """The matrix product over the last two axes, the others broadcast; a vector is a row as `a`, a column as `b`."""
    if not _shape(a) or not _shape(b):
        raise ValueError(f"matmul expects arrays with at least one axis, got shapes {_shape(a)} and {_shape(b)}")
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
        da = _unbroadcast(xp, dy @ xp.matrix_transpose(b2), tuple(a2.shape)) if needs[0] else None
        db = _unbroadcast(xp, xp.matrix_transpose(a2) @ dy, tuple(b2.shape)) if needs[1] else None
        return (
            None if da is None else xp.reshape(da, a.shape),
            None if db is None else xp.reshape(db, b.shape),
        )

    return y, vjp


def _axes(axis: Axis, ndim: int) -> tuple[int, ...]:
    axes = range(ndim) if axis is None else (axis,) if isinstance(axis, int) else axis
    return tuple(i % ndim for i in axes) if ndim else ()


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
    xp: Any, x: Array, *, axis: Axis = None, correction: float = 0.0, keepdims: bool = False, needs: tuple[bool, ...]
) -> tuple[Array, VJP]:
    """The variance over some axes: the sum of squared distances from the mean over (count - correction)."""
    shape = tuple(x.shape)
    y = xp.var(x, axis=axis, correction=correction, keepdims=keepdims)

    def vjp(dy: Array) -> tuple[Array]:
        freedom = _count(shape, axis) - correction
        factor = 2.0 / freedom if freedom else math.nan  # as the variance itself
        return ((x - xp.mean(x, axis=axis, keepdims=True)) * (factor * _keepdims(xp, dy, shape, axis)),)

    return y, vjp


@operation
@in_fp32
def max(xp: Any, x: Array, *, axis: Axis = None, keepdims: bool = False, needs: tuple[bool, ...]) -> tuple[Array, VJP]:
    """The largest entry over some axes, all if None; entries that tie share the gradient."""
    shape = tuple(x.shape)
    y = xp.max(x, axis=axis, keepdims=keepdims)

    def vjp(dy: Array) -> tuple[Array]:
        hit = xp.astype(x == _keepdims(xp, y, shape, axis), x.dtype)
        return (hit * (_keepdims(xp, dy, shape, axis) / xp.sum(hit, axis=axis, keepdims=True)),)

    return y, vjp


def _count(shape: tuple[int, ...], axis: Axis) -> int:
    count = 1
    for i in _axes(axis, len(shape)):
        count *= shape[i]
    return count


@operation
def reshape(xp: Any, x: Array, *, shape: tuple[int, ...], needs: tuple[bool, ...]) -> tuple[Array, VJP]:
    """The same entries in another shape; one length may be -1."""
    before = tuple(x.shape)
    return xp.reshape(x, shape), lambda dy: (xp.reshape(dy, before),)


@operation
def permute_dims(xp: Any, x: Array, *, axes: tuple[int, ...], needs: tuple[bool, ...]) -> tuple[Array, VJP]:
    """The axes in another order."""
    back = tuple(sorted(range(len(axes)), key=lambda i: axes[i] % len(axes)))
    return xp.permute_dims(x, axes), lambda dy: (xp.permute_dims(dy, back),)


def transpose(x: Tensor, axis1: int = -2, axis2: int = -1) -> Tensor:
    """Two axes exchanged, the last two if not said otherwise."""
    if x.ndim < 2:
        raise ValueError(f"transpose expects at least two axes, got shape {tuple(x.shape)}")
    axes = list(range(x.ndim))
    axes[axis1], axes[axis2] = axes[axis2], axes[axis1]
    return permute_dims(x, tuple(axes))


@operation
def broadcast_to(xp: Any, x: Array, *, shape: tuple[int, ...], needs: tuple[bool, ...]) -> tuple[Array, VJP]:
    """x repeated along axes of length 1 and new leading axes to `shape`."""
    before = tuple(x.shape)
    return xp.broadcast_to(x, shape), lambda dy: (_unbroadcast(xp, dy, before),)


@operation
def getitem(xp: Any, x: Array, *, key: Any, needs: tuple[bool, ...]) -> tuple[Array, VJP]:
    """x[key] for integers, slices, None and ...; and for integer and boolean arrays where the library has them."""
    key = tuple(map(_index, key if isinstance(key, tuple) else (key,)))
    shape, like = tuple(x.shape), dict(dtype=x.dtype, device=array_api_compat.device(x))  # not x, which nobody needs

    def vjp(dy: Array) -> tuple[Array]:
        dx = xp.zeros(shape, **like)
        if _has_array(key):
            _add_at(dx, key, dy)
        else:
            old_axes = tuple(k for k in key if k is not None)  # the standard writes to no new ones
            dx[old_axes] = xp.reshape(dy, dx[old_axes].shape)
        return (dx,)

    return x[key], vjp


def _index(key: Any) -> Any:
    return key.data if isinstance(key, Tensor) else key


def _has_array(key: tuple[Any, ...]) -> bool:
    return any(isinstance(k, list) or arrays.is_array(k) for k in key)


def _add_at(target: Array, key: Any, values: Array) -> None:
    """target[key] += values, where an entry that `key` names twice gets both."""
    if type(target).__module__.startswith("cupy"):
        import cupyx

        cupyx.scatter_add(target, key, values)
    elif type(target).__module__ == "numpy":
        import numpy as np

        np.add.at(target, key, values)
    else:
        raise TypeError(
            "the gradient of indexing with arrays is not defined by the array API standard "
            f"({type(target).__module__}); use slices, or a product with a one-hot matrix"
        )


def concat(tensors: Sequence[Tensor | Array], axis: int = 0) -> Tensor:
    """Tensors joined along an axis that they have."""
    _check_parts("concat", tensors, 1)
    return apply(_concat, *tensors, axis=axis)


def _check_parts(name: str, parts: Sequence[Tensor | Array], ndim: int) -> None:
    for p in parts:
        if not hasattr(p, "shape") or len(p.shape) < ndim:
            got = f"shape {tuple(p.shape)}" if hasattr(p, "shape") else type(p).__name__
            raise TypeError(f"{name} expects arrays of at least {ndim} dimensions, got {got}")


def _concat(xp: Any, *parts: Array, axis: int, needs: tuple[bool, ...]) -> tuple[Array, VJP]:
    y = xp.concat(parts, axis=axis)
    axis = axis % y.ndim
    lengths = [p.shape[axis] for p in parts]
    before = (slice(None),) * axis

    def vjp(dy: Array) -> tuple[Array | None, ...]:
        out, start = [], 0
        for n, need in zip(lengths, needs, strict=True):
            out.append(dy[(*before, slice(start, start + n), ...)] if need else None)
            start += n
        return tuple(out)

    return y, vjp


def stack(tensors: Sequence[Tensor | Array], axis: int = 0) -> Tensor:
    """Tensors of one shape joined along a new axis."""
    _check_parts("stack", tensors, 0)
    return apply(_stack, *tensors, axis=axis)


def _stack(xp: Any, *parts: Array, axis: int, needs: tuple[bool, ...]) -> tuple[Array, VJP]:
    y = xp.stack(parts, axis=axis)
    axis = axis % y.ndim
    before = (slice(None),) * axis

    def vjp(dy: Array) -> tuple[Array | None, ...]:
        return tuple(dy[(*before, i, ...)] if need else None for i, need in enumerate(needs))

    return y, vjp


@operation
def astype(xp: Any, x: Array, *, dtype: Any, needs: tuple[bool, ...]) -> tuple[Array, VJP]:
    """x with another dtype (a name, a NumPy dtype or the library's own); its gradient goes back in x's."""
    before = x.dtype
    return arrays.astype(x, dtype), lambda dy: (xp.astype(dy, before, copy=False),)


def _method(function: Callable, swap: bool = False) -> Callable:
    def method(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return function(*args, self) if swap else function(self, *args, **kwargs)

    method.__doc__ = function.__doc__
    return method


def _shape_method(function: Callable) -> Callable:
    """Lets x.reshape(2, 3) be written for x.reshape((2, 3))."""

    def method(self: Tensor, *shape: Any) -> Tensor:
        return function(self, tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape)

    method.__doc__ = function.__doc__
    return method


for _name, _function in {
    "add": add, "sub": subtract, "mul": multiply, "truediv": divide, "pow": power, "matmul": matmul,
}.items():  # fmt: skip
    setattr(Tensor, f"__{_name}__", _method(_function))
    setattr(Tensor, f"__r{_name}__", _method(_function, swap=True))
for _function in (abs, exp, log, sqrt, tanh, clip, sum, mean, var, max, transpose, astype):
    setattr(Tensor, _function.__name__, _method(_function))
for _function in (reshape, permute_dims, broadcast_to):
    setattr(Tensor, _function.__name__, _shape_method(_function))
Tensor.__neg__ = _method(negative)  # type: ignore[attr-defined]
Tensor.__getitem__ = _method(getitem)  # type: ignore[attr-defined]
Tensor.T = property(transpose)  # type: ignore[attr-defined]
