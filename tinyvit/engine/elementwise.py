"""Elementwise operations: arithmetic, functions of one number, choices and comparisons.

A formula gives its result and, for each array, the partial derivative times dy. Array inputs must share one dtype
(numbers go with any) and broadcast as in NumPy.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from tinyvit.backend import arrays
from tinyvit.backend.arrays import Array
from tinyvit.engine.operation import elementwise
from tinyvit.engine.tensor import Tensor, array_of
from tinyvit.kernels import reference

Gradient = Callable[[Array], Array]
unrounded = functools.partial(elementwise, upcast=False)


@unrounded
def add(xp: Any, a: Array, b: Array) -> tuple[Array, Gradient, Gradient]:
    """a + b."""
    return a + b, lambda dy: dy, lambda dy: dy


@unrounded
def subtract(xp: Any, a: Array, b: Array) -> tuple[Array, Gradient, Gradient]:
    """a - b."""
    return a - b, lambda dy: dy, lambda dy: -dy


@unrounded
def multiply(xp: Any, a: Array, b: Array) -> tuple[Array, Gradient, Gradient]:
    """a * b."""
    return a * b, lambda dy: dy * b, lambda dy: dy * a


@elementwise
def divide(xp: Any, a: Array, b: Array) -> tuple[Array, Gradient, Gradient]:
    """a / b of floating arrays."""
    y = a / b
    return y, lambda dy: dy / b, lambda dy: -dy * y / b


@elementwise
def power(xp: Any, a: Array, b: Array) -> tuple[Array, Gradient, Gradient]:
    """a ** b. As in torch, a ** 0 has gradient 0 whatever a is, and so has 0 ** b with respect to b for b >= 0."""
    y = _power(xp, a, b)

    def da(dy: Array) -> Array:
        if isinstance(b, (int, float)):
            return xp.zeros_like(dy) if b == 0 else dy * (b * _power(xp, a, b - 1))
        return xp.where(b == 0, xp.zeros_like(dy), dy * (b * a ** (b - 1)))

    def db(dy: Array) -> Array:
        base = a if not isinstance(a, (int, float)) else xp.ones_like(b) * a
        return xp.where((base == 0) & (b >= 0), xp.zeros_like(dy), dy * (y * xp.log(base)))

    return y, da, db


def _power(xp: Any, a: Array, b: Array) -> Array:
    """a ** b, where the numbers 1/2 and -1/2 mean square roots, as in torch: they differ at -0.0 and -inf."""
    if isinstance(b, float) and b in (0.5, -0.5):
        return xp.sqrt(a) if b > 0 else 1.0 / xp.sqrt(a)
    return a**b


@elementwise
def maximum(xp: Any, a: Array, b: Array) -> tuple[Array, Gradient, Gradient]:
    """The larger of a and b, elementwise; equal entries share the gradient."""
    return xp.maximum(a, b), _share(xp, lambda: a < b, lambda: a == b), _share(xp, lambda: b < a, lambda: a == b)


@elementwise
def minimum(xp: Any, a: Array, b: Array) -> tuple[Array, Gradient, Gradient]:
    """The smaller of a and b, elementwise; equal entries share the gradient."""
    return xp.minimum(a, b), _share(xp, lambda: a > b, lambda: a == b), _share(xp, lambda: b > a, lambda: a == b)


def _share(xp: Any, loses: Callable[[], Array], ties: Callable[[], Array]) -> Gradient:
    """dy, half of it where two entries tie, and 0 where this one loses."""
    return lambda dy: xp.where(loses(), xp.zeros_like(dy), xp.where(ties(), 0.5 * dy, dy))


@unrounded
def negative(xp: Any, x: Array) -> tuple[Array, Gradient]:
    """-x."""
    return -x, lambda dy: -dy


@unrounded
def abs(xp: Any, x: Array) -> tuple[Array, Gradient]:
    """|x|; its gradient at 0 is 0."""
    return xp.abs(x), lambda dy: dy * xp.sign(x)


@elementwise
def exp(xp: Any, x: Array) -> tuple[Array, Gradient]:
    """e ** x."""
    y = xp.exp(x)
    return y, lambda dy: dy * y


@elementwise
def log(xp: Any, x: Array) -> tuple[Array, Gradient]:
    """The natural logarithm."""
    return xp.log(x), lambda dy: dy / x


@elementwise
def sqrt(xp: Any, x: Array) -> tuple[Array, Gradient]:
    """The square root."""
    y = xp.sqrt(x)
    return y, lambda dy: dy / (2.0 * y)


@elementwise
def tanh(xp: Any, x: Array) -> tuple[Array, Gradient]:
    """The hyperbolic tangent."""
    y = xp.tanh(x)
    return y, lambda dy: dy * (1.0 - y * y)


@elementwise
def cos(xp: Any, x: Array) -> tuple[Array, Gradient]:
    """The cosine."""
    return xp.cos(x), lambda dy: -dy * xp.sin(x)


@elementwise
def sin(xp: Any, x: Array) -> tuple[Array, Gradient]:
    """The sine."""
    return xp.sin(x), lambda dy: dy * xp.cos(x)


@elementwise
def sigmoid(xp: Any, x: Array) -> tuple[Array, Gradient]:
    """1 / (1 + e ** -x)."""
    y = 1.0 / (1.0 + xp.exp(-x))
    return y, lambda dy: dy * (1.0 - y) * y


@elementwise
def erf(xp: Any, x: Array) -> tuple[Array, Gradient]:
    """The error function 2/sqrt(pi) * integral of exp(-t^2) from 0 to x."""
    return reference.erf(xp, x), lambda dy: dy * (2.0 / math.sqrt(math.pi) * xp.exp(-x * x))


@elementwise
def clip(xp: Any, x: Array, *, min: float | None = None, max: float | None = None) -> tuple[Array, Gradient]:
    """x limited to the numbers min ... max; the gradient passes where x lies within, the ends included."""
    inside = xp.ones_like(x, dtype=xp.bool)
    y = x
    if min is not None:
        inside = inside & (x >= min)
        y = xp.where(y < min, xp.ones_like(y) * min, y)
    if max is not None:
        inside = inside & (x <= max)
        y = xp.where(y > max, xp.ones_like(y) * max, y)
    return y, lambda dy: xp.where(inside, dy, xp.zeros_like(dy))


def where(condition: Tensor | Array, a: Tensor | Array | float, b: Tensor | Array | float) -> Tensor:
    """a where `condition` (booleans) holds, else b."""
    return _where(a, b, condition=array_of(condition))


@unrounded
def _where(xp: Any, a: Array, b: Array, *, condition: Array) -> tuple[Array, Gradient, Gradient]:
    dtype = b.dtype if isinstance(a, (int, float)) else a.dtype
    choices = (xp.asarray(x, dtype=dtype) if isinstance(x, (int, float)) else x for x in (a, b))
    return (
        xp.where(condition, *choices),
        lambda dy: xp.where(condition, dy, xp.zeros_like(dy)),
        lambda dy: xp.where(condition, xp.zeros_like(dy), dy),
    )


def compare(relation: Callable[[Any, Any], Any], a: Tensor, b: Any) -> Any:
    """`relation(a, b)` (operator.eq, operator.lt, ...) elementwise: a Tensor of booleans, without a gradient.

    NotImplemented if `b` is no tensor, array or number, so that `tensor == None` is False.

    Raises:
        TypeError: a list or tuple, or an array of another library.
    """
    other = array_of(b)
    if isinstance(other, np.generic):
        other = other.item()
    if isinstance(other, (list, tuple)):
        raise TypeError(f"a tensor is compared with tensors, arrays and numbers, got a {type(b).__name__}")
    if isinstance(other, (bool, int, float)):
        return Tensor(relation(a.data, other))
    if not arrays.is_array(other):
        return NotImplemented
    if arrays.namespace(other) is not arrays.namespace(a.data):
        libraries = " and ".join(type(x).__module__.partition(".")[0] for x in (a.data, other))
        raise TypeError(f"comparisons expect arrays of one library, got {libraries}")
    return Tensor(relation(a.data, other))
