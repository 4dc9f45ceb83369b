"""Every elementary operation on Tensors, and the Tensor's methods.

Each is written once, forward and backward together, against the array API standard. What adds up or has fractions in
its formula computes 16-bit arrays in float32.
"""
# ruff: noqa: F401, I001

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from tinyvit.engine.elementwise import (
    abs, add, clip, compare, cos, divide, erf, exp, log, maximum, minimum, multiply, negative, power, sigmoid, sin,
    sqrt, subtract, tanh, where,
)  # fmt: skip
from tinyvit.engine.indexing import concat, getitem, stack
from tinyvit.engine.reductions import (
    argmax, astype, broadcast_to, flatten, matmul, max, mean, min, permute_dims, reshape, std, sum, transpose, var,
)  # fmt: skip
from tinyvit.engine.tensor import Tensor


def _swapped(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda self, other: function(other, self)


def _transposed(x: Tensor) -> Tensor:
    """The transpose of a matrix."""
    if x.ndim != 2:
        raise ValueError(f"T expects two axes, got shape {x.shape}; use transpose() for the last two")
    return transpose(x)


def _compared(relation: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    return lambda self, other: compare(relation, self, other)


def _with_shape(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Lets x.reshape(2, 3) be written for x.reshape((2, 3))."""

    def method(self: Tensor, *shape: Any) -> Tensor:
        return function(self, tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape)

    method.__doc__ = function.__doc__
    return method


def _values_only(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def method(self: Tensor, *args: Any, **parameters: Any) -> Tensor:
        if "dim" in parameters:
            raise TypeError(
                f"torch's {function.__name__}(dim=...) gives values and positions; write {function.__name__}(axis=...) "
                "for the values, argmax for positions of the largest"
            )
        return function(self, *args, **parameters)

    method.__doc__ = function.__doc__
    return method


for _name, _function in {
    "add": add, "sub": subtract, "mul": multiply, "truediv": divide, "pow": power, "matmul": matmul,
}.items():  # fmt: skip
    setattr(Tensor, f"__{_name}__", _function)
    setattr(Tensor, f"__r{_name}__", _swapped(_function))
for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    setattr(Tensor, f"__{_name}__", _compared(getattr(operator, _name)))
for _function in (
    abs, argmax, astype, clip, exp, flatten, log, mean, sigmoid, sqrt, std, sum, tanh, transpose, var,
):  # fmt: skip
    setattr(Tensor, _function.__name__, _function)
for _name, _function in {
    "reshape": reshape, "view": reshape, "permute": permute_dims, "permute_dims": permute_dims,
    "broadcast_to": broadcast_to,
}.items():  # fmt: skip
    setattr(Tensor, _name, _with_shape(_function))
for _function in (max, min):
    setattr(Tensor, _function.__name__, _values_only(_function))
Tensor.__neg__ = negative
Tensor.__pos__ = lambda self: self
Tensor.__getitem__ = getitem
setattr(Tensor, "T", property(_transposed))  # noqa: B010
