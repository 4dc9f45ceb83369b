"""Operations that take arrays apart and join them."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np

from tinyvit import kernels
from tinyvit.backend import arrays
from tinyvit.backend.arrays import VJP, Array
from tinyvit.engine.operation import operation, standard_names
from tinyvit.engine.tensor import Tensor, apply
from tinyvit.kernels import reference


@operation
def getitem(xp: Any, x: Array, *, key: Any, needs: tuple[bool, ...]) -> tuple[Array, VJP]:
    """x[key], as the array library indexes: integers, slices, None, ..., integer and boolean arrays, nested lists."""
    keys = tuple([_index(k, x) for k in (key if isinstance(key, tuple) else (key,))])
    shape, dtype, device = tuple(x.shape), x.dtype, arrays.device(x)  # of x itself the gradient needs nothing
    if any(isinstance(k, bool) or arrays.is_array(k) for k in keys):
        size, positions = math.prod(shape), None
        if needs[0]:  # in a copy, as the caller may change the arrays among the keys
            positions = xp.reshape(xp.reshape(xp.arange(size, device=device), shape)[keys], (-1,))

        def scatter(dy: Array) -> tuple[Array]:
            dx = kernels.best(reference.sum_at, xp)(xp, xp.reshape(dy, (-1,)), positions, size)
            return (xp.reshape(dx, shape),)

        return x[keys], scatter

    def vjp(dy: Array) -> tuple[Array]:
        dx = xp.zeros(shape, dtype=dtype, device=device)
        old_axes = tuple(k for k in keys if k is not None)  # the standard writes to no new ones
        return (arrays.assign(dx, old_axes, xp.reshape(dy, dx[old_axes].shape)),)

    return x[keys], vjp


def _index(key: Any, x: Array) -> Any:
    """One part of an index: as it is, or as an array if it is a tensor, a nested sequence or another buffer."""
    if isinstance(key, Tensor):
        return key.data
    if key is None or key is Ellipsis or isinstance(key, (bool, int, slice)) or arrays.is_array(key):
        return key
    if isinstance(key, np.generic):
        return key.item()
    if hasattr(key, "__index__"):
        return operator.index(key)
    values = np.asarray(key)
    return arrays.convert(values if values.size else values.astype(np.int64), x)


def concat(tensors: Sequence[Tensor | Array], axis: int = 0, **torch_names: int) -> Tensor:
    """Tensors joined along an axis that they have; `dim` is accepted as in torch."""
    _check_parts("concat", tensors, 1)
    return apply(_concat, *tensors, **{"axis": axis} | standard_names(torch_names))


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


def stack(tensors: Sequence[Tensor | Array], axis: int = 0, **torch_names: int) -> Tensor:
    """Tensors of one shape joined along a new axis; `dim` is accepted as in torch."""
    _check_parts("stack", tensors, 0)
    return apply(_stack, *tensors, **{"axis": axis} | standard_names(torch_names))


def _stack(xp: Any, *parts: Array, axis: int, needs: tuple[bool, ...]) -> tuple[Array, VJP]:
    y = xp.stack(parts, axis=axis)
    axis = axis % y.ndim
    before = (slice(None),) * axis

    def vjp(dy: Array) -> tuple[Array | None, ...]:
        return tuple(dy[(*before, i, ...)] if need else None for i, need in enumerate(needs))

    return y, vjp
