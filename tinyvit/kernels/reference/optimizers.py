"""The arithmetic of the optimizers, in the array API standard alone: of one parameter, then of all of them.

Unlike an operation of the model, an update writes into the arrays that it changes (parameter, momentum, average)
where the array library allows it, and returns them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Real
from types import ModuleType
from typing import Any

import numpy as np

from tinyvit import kernels
from tinyvit.backend import arrays, cuda_graph, parallel
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


# --- updates of all parameters ----------------------------------------------------------------------------------------


class UpdateState:
    """The numbers of an update that change from step to step, and its results.

    A device has a version of its own, which keeps them in the device's memory, so that a captured graph can be repeated
    with other numbers.

    Attributes:
        lr: the learning rate.
        skipped: not 0 if the last update changed nothing, because a gradient that was scaled had overflowed.
    """

    def __init__(self, xp: ModuleType) -> None:
        self.lr, self.skipped = 0.0, 0.0

    def begin(self, lr: float, steps_done: int) -> None:
        """Take the learning rate of the next update; `steps_done` were made before it."""
        self.lr = lr

    def steps_done(self) -> int | None:
        """The number of updates that a device counted by itself; None if it did not count."""
        return None

    def updated_on_host(self) -> None:
        """Note that an update did not use the numbers on the device."""


Arrays = Sequence[Array]


def update_adamw(
    xp: ModuleType,
    parameters: Arrays,
    gradients: Arrays,
    m: Arrays,
    v: Arrays,
    *,
    state: UpdateState,
    steps: Sequence[int],
    lr_scales: Sequence[float],
    weight_decays: Sequence[float],
    beta1: float,
    beta2: float,
    eps: float,
    decoupled: bool,
    max_norm: float,
    loss_scale: Any = None,
    rounded: Sequence[Array | None] | None = None,
) -> tuple[Array | float, list[tuple[Array, ...]] | None]:
    """One step of AdamW or Adam for all parameters, with gradients whose common norm is limited.

    Args:
        parameters, gradients, m, v: as in `adamw`, one array for each parameter.
        state: has the learning rate, and takes the results.
        steps: the number of this step for each parameter, from 1.
        lr_scales, weight_decays: for each parameter.
        decoupled: True for AdamW; False for Adam, which adds weight_decay p to the gradient.
        max_norm: the largest norm of all gradients together; infinite for no limit.
        loss_scale: a `precision.LossScale`, by which the gradients are divided first. It is updated, and gradients
            that are not finite then change nothing else.
        rounded: arrays that are to hold the new parameters in another dtype, or None, for each parameter.

    Returns:
        the gradients' norm before clipping, and the new (parameter, m, v) of each; None if nothing was changed.
    """

    def update(i: int, gradient: Array) -> tuple[Array, ...]:
        decay = weight_decays[i]
        if decay and not decoupled:
            gradient, decay = gradient + decay * parameters[i], 0.0
        return kernels.best(adamw, xp)(
            xp, parameters[i], gradient, m[i], v[i],
            lr=state.lr * lr_scales[i], beta1=beta1, beta2=beta2, eps=eps, weight_decay=decay, step=steps[i],
        )  # fmt: skip

    return update_each(xp, update, parameters, gradients, state, max_norm, loss_scale, rounded)


def update_sgd(
    xp: ModuleType,
    parameters: Arrays,
    gradients: Arrays,
    m: Sequence[Array | None],
    *,
    state: UpdateState,
    lr_scales: Sequence[float],
    weight_decays: Sequence[float],
    momentum: float,
    nesterov: bool,
    max_norm: float,
    loss_scale: Any = None,
    rounded: Sequence[Array | None] | None = None,
) -> tuple[Array | float, list[tuple[Array, ...]] | None]:
    """One step of `sgd` for all parameters; the other arguments and the results are those of `update_adamw`."""

    def update(i: int, gradient: Array) -> tuple[Array, ...]:
        return kernels.best(sgd, xp)(
            xp, parameters[i], gradient, m[i],
            lr=state.lr * lr_scales[i], momentum=momentum, nesterov=nesterov, weight_decay=weight_decays[i],
        )  # fmt: skip

    return update_each(xp, update, parameters, gradients, state, max_norm, loss_scale, rounded)


def update_each(
    xp: ModuleType,
    update: Callable[[int, Array], tuple[Array, ...]],
    parameters: Arrays,
    gradients: Arrays,
    state: UpdateState,
    max_norm: float,
    loss_scale: Any,
    rounded: Sequence[Array | None] | None,
) -> tuple[Array | float, list[tuple[Array, ...]] | None]:
    """Update one parameter after the other, those on the host in threads; see `update_adamw`."""
    if cuda_graph.capturing():
        raise cuda_graph.NotCapturable("the optimizer updates one parameter after the other")
    state.updated_on_host()
    norm, scale = limited_norm(gradients, max_norm, None if loss_scale is None else loss_scale.value)
    state.skipped = 0.0 if loss_scale is None or loss_scale.update(norm) else 1.0
    if state.skipped:
        return norm, None

    def one(i: int) -> tuple[Array, ...]:
        gradient, p = gradients[i], parameters[i]
        if gradient.dtype != p.dtype:
            gradient = xp.astype(gradient, p.dtype)
        if scale is not None:
            gradient *= scale if isinstance(scale, float) else xp.astype(scale, gradient.dtype)
        new = update(i, gradient)
        if rounded is not None and (copy := rounded[i]) is not None:
            copy[...] = xp.astype(new[0], copy.dtype)
        return new

    return norm, each(one, range(len(parameters)), parameters)


def update_average(
    xp: ModuleType, averages: Arrays, targets: Arrays, *, state: UpdateState, weight: float, skipped: Any = None
) -> list[Array]:
    """`lerp` of all averages towards their targets, unless `skipped` (a number without dimensions) is not 0."""

    def one(i: int) -> Array:
        share = weight if skipped is None else weight * (1 - skipped)
        if not isinstance(share, float):
            share = xp.astype(share, targets[i].dtype)
        return kernels.best(lerp, xp)(xp, averages[i], targets[i], weight=share)

    return each(one, range(len(averages)), averages)


def limited_norm(gradients: Arrays, max_norm: float, divisor: Array | None = None) -> tuple[Array | float, Any]:
    """The norm of all gradients together, and the factor that limits it, as torch's `clip_grad_norm_` has it.

    Args:
        gradients: arrays of one library.
        max_norm: the largest norm; infinite for no limit.
        divisor: the gradients are to be divided by it before anything else; an array without dimensions.

    Returns:
        norm and factor in float64, numbers for arrays on the host, else arrays without dimensions, which are not read.
        The factor includes the division. It is None if nothing is to be multiplied, and 1 over the divisor for a norm
        that is not finite.
    """
    squares = sum(each(lambda g: kernels.best(sum_of_squares, arrays.namespace(g))(arrays.namespace(g), g), gradients))
    if isinstance(squares, (Real, np.ndarray)):
        unit = 1.0 if divisor is None else float(divisor)
        norm = math.sqrt(float(squares)) / unit
        factor = max_norm / (norm + 1e-6)
        factor = (factor if math.isfinite(norm) and factor < 1 else 1.0) / unit
        return norm, None if factor == 1 else factor
    xp = arrays.namespace(squares)
    unit = xp.ones_like(squares) if divisor is None else xp.astype(divisor, squares.dtype)
    norm = xp.sqrt(squares) / unit
    if max_norm == math.inf and divisor is None:
        return norm, None
    factor = max_norm / (norm + 1e-6)
    return norm, xp.where(xp.isfinite(norm) & (factor < 1), factor, xp.ones_like(factor)) / unit


def each(
    function: Callable[[Any], Any], items: Sequence[Any], data: Arrays | None = None, sizes: Sequence[int] | None = None
) -> list[Any]:
    """`function` of every item, in threads if the items' arrays `data` (the items if None) are on the host.

    `sizes` say how much work each item is, where that is not the size of its array.
    """
    data = items if data is None else data
    if data and arrays.on_host(data[0]):
        return parallel.each(function, items, [x.size for x in data] if sizes is None else sizes)
    return [function(item) for item in items]
