"""How a function of arrays becomes an operation on Tensors."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from tinyvit import kernels
from tinyvit.backend.arrays import VJP, Array
from tinyvit.engine.tensor import Tensor, apply
from tinyvit.kernels.half_precision import half_dtype, in_fp32, sum_in_fp32

_TORCH_NAMES = {"dim": "axis", "keepdim": "keepdims"}


def operation(op: Callable[..., tuple[Array, VJP]]) -> Callable[..., Tensor]:
    """The function of Tensors that belongs to `op(xp, *arrays, needs, **parameters)`.

    Parameters that are keyword-only in `op` may be given by position after the arrays.
    """
    signature = inspect.signature(op)
    accepted = [p for p in signature.parameters.values() if p.name not in ("xp", "needs")]
    arrays = [p.name for p in accepted if p.kind is p.POSITIONAL_OR_KEYWORD]
    names = [p.name for p in accepted]

    @functools.wraps(op)
    def function(*args: Any, **parameters: Any) -> Tensor:
        if len(args) == len(arrays) and not parameters:
            return apply(op, *args)
        if len(args) > len(names):
            raise TypeError(f"{op.__name__} takes at most {len(names)} arguments, got {len(args)}")
        if parameters or len(args) < len(arrays):
            missing = [name for name in arrays[len(args) :] if name not in parameters]
            if missing:
                raise TypeError(f"{op.__name__} expects {', '.join(arrays)}; {missing[0]} is missing")
            args += tuple(parameters.pop(name) for name in arrays[len(args) :])
            parameters = standard_names(parameters) if "axis" in names else parameters
        by_position = dict(zip(names[len(arrays) :], args[len(arrays) :], strict=False))
        return apply(op, *args[: len(arrays)], **by_position, **parameters)

    public = [p.replace(kind=p.POSITIONAL_OR_KEYWORD) for p in accepted]
    function.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=public, return_annotation=Tensor
    )
    return function


def standard_names(parameters: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments with torch's `dim` and `keepdim` renamed to the array API standard's `axis` and `keepdims`."""
    return {_TORCH_NAMES.get(name, name): value for name, value in parameters.items()}


def elementwise(formula: Callable[..., tuple[Any, ...]], upcast: bool = True) -> Callable[..., Tensor]:
    """The elementwise operation of a formula: `formula(xp, *arrays, **parameters)` returns y and, for each array, the
    function from the gradient of y to the array's.

    The formula need not think of broadcasting or of 16-bit arrays. Of its functions, those that nobody needs are
    dropped at once, and with them the arrays that they alone keep alive.

    Args:
        formula: as above.
        upcast: compute 16-bit arrays in float32. Without it only where a fraction is among the inputs: for formulas
            that round once anyway.
    """

    @functools.wraps(formula)
    def op(xp: Any, *inputs: Any, needs: tuple[bool, ...], **parameters: Any) -> tuple[Array, VJP]:
        if (upcast or float in map(type, inputs)) and half_dtype(inputs) is not None:
            return op_in_fp32(xp, *inputs, needs=needs, **parameters)
        y, *partials = formula(xp, *inputs, **parameters)
        needed = [(d, shape_of(x)) if need else None for d, x, need in zip(partials, inputs, needs, strict=True)]

        def vjp(dy: Array) -> tuple[Array | None, ...]:
            return tuple([None if p is None else unbroadcast(xp, p[0](dy), p[1]) for p in needed])

        return y, vjp

    op_in_fp32 = in_fp32(op)
    return operation(op)


def shape_of(x: Array | float) -> tuple[int, ...]:
    return () if isinstance(x, (int, float)) else tuple(x.shape)


def unbroadcast(xp: Any, g: Array, shape: tuple[int, ...]) -> Array:
    """The gradient of broadcasting: sum `g` over the axes along which an array of `shape` was repeated."""
    if tuple(g.shape) == shape:
        return g
    extra = g.ndim - len(shape)
    repeated = tuple(range(extra)) + tuple(i + extra for i, n in enumerate(shape) if n == 1)
    return xp.reshape(kernels.best(sum_in_fp32, xp)(xp, g, repeated), shape)
