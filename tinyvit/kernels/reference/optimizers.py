"""The arithmetic of the optimizers for one parameter's arrays, in the array API standard alone.

Unlike an operation of the model, an update writes into what it changes (parameter, momentum, average) where
the array library allows it, and returns it.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

from tinyvit.backend.arrays import Array


def sgd(
    xp: ModuleType, p: Array, g: Array, m: Array | None,
    *, lr: float, momentum: float, nesterov: bool, weight_decay: float,
) -> tuple[Array, Array | None]:  # fmt: skip
    """One step of stochastic gradient descent for one parameter; `m` is the momentum, None without.

    g' = g + weight_decay p;  m = momentum m + g';  p = p - lr m, or with Nesterov p - lr (g' + momentum m).
    Sutskever et al. 2013, in torch's form (the rate multiplies the momentum when it is used).
    """
    if weight_decay:
        g = g + weight_decay * p
    if m is None:
        p -= lr * g
        return p, None
    m *= momentum
    m += g
    p -= lr * (g + momentum * m if nesterov else m)
    return p, m


def adamw(
    xp: ModuleType, p: Array, g: Array, m: Array, v: Array,
    *, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, step: int,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """One step of AdamW for one parameter; `step` counts from 1 (Loshchilov & Hutter 2019, algorithm 2).

    m and v are the running means of g and g²; p = (1 - lr weight_decay) p - lr m̂ / (√v̂ + eps), where
    m̂ = m / (1 - beta1^step) and v̂ = v / (1 - beta2^step). The corrections are folded into the scalars
    (Kingma & Ba 2015, end of section 2).
    """
    correction = math.sqrt(1 - beta2**step)
    rate = lr * correction / (1 - beta1**step)
    m += (1 - beta1) * (g - m)
    v *= beta2
    v += (1 - beta2) * g * g
    if weight_decay:
        p *= 1 - lr * weight_decay
    p -= rate * (m / (xp.sqrt(v) + eps * correction))
    return p, m, v


def lerp(xp: ModuleType, a: Array, b: Array, *, weight: float) -> Array:
    """a + weight (b - a)."""
    a += weight * (b - a)
    return a


def sum_of_squares(xp: ModuleType, x: Array) -> Any:
    """The sum of x² in float64: float32 squares overflow beyond 1.8e19 and lose digits over many elements."""
    return xp.sum(xp.astype(x, xp.float64) ** 2)
