"""Operations on arrays of 16 bits (float16, bfloat16): computed in float32, rounded once.

Sixteen bits are enough to store and to multiply numbers, not to add many of them up. An operation under `in_fp32`
receives float32, and its results and gradients are rounded to the inputs' dtype at the end. Kernels that do this
themselves, and operations that only move numbers or round once, need no decorator.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from tinyvit.backend import arrays
from tinyvit.backend.arrays import Array

F = TypeVar("F", bound=Callable)


def in_fp32(op: F) -> F:
    """`op(xp, *arrays, needs=…, **parameters)`, which computes arrays of 16 bits in float32."""

    @functools.wraps(op)
    def wide(xp: Any, *inputs: Any, needs: tuple[bool, ...], **params: Any) -> tuple[Any, Callable]:
        dtype = half_dtype(inputs)
        if dtype is None:
            return op(xp, *inputs, needs=needs, **params)
        params = {name: _widened(xp, x) for name, x in params.items()}
        result, vjp = op(xp, *(_widened(xp, x) for x in inputs), needs=needs, **params)

        def rounded(x: Array | None) -> Array | None:
            return None if x is None else xp.astype(arrays.as_array(x), dtype)

        def rounded_vjp(*dys: Array | None) -> tuple[Array | None, ...]:
            return tuple(rounded(g) for g in vjp(*(_widened(xp, dy) for dy in dys)))

        return tuple(map(rounded, result)) if isinstance(result, tuple) else rounded(result), rounded_vjp

    return wide  # type: ignore[return-value]


def sum_in_fp32(xp: Any, x: Array, axis: tuple[int, ...]) -> Array:
    """The sum over some axes in the dtype of `x`, added up in float32 if that has 16 bits."""
    if not arrays.is_half(x):
        return xp.sum(x, axis=axis)
    return xp.astype(arrays.as_array(xp.sum(x, axis=axis, dtype=xp.float32)), x.dtype)


def half_dtype(inputs: tuple[Any, ...]) -> Any:
    """The dtype of the first array of 16 bits among `inputs`, None if there is none."""
    for x in inputs:
        if hasattr(x, "dtype") and arrays.is_half(x):
            return x.dtype
    return None


def _widened(xp: Any, x: Any) -> Any:
    return xp.astype(x, xp.float32) if hasattr(x, "dtype") and arrays.is_half(x) else x
