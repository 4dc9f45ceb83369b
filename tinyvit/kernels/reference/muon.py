"""Muon: updates of matrices that are made orthogonal (Jordan et al. 2024), in the array API standard alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from tinyvit import kernels
from tinyvit.backend.arrays import Array
from tinyvit.kernels.reference.optimizers import Arrays, UpdateState, adamw, each, lerp, update_each

ITERATIONS = 5
X, X3, X5 = 3.4445, -4.7750, 2.0315  # of x, (x x^T) x and (x x^T)^2 x


def update_scale(shape: tuple[int, ...]) -> float:
    """What an orthogonal update of a parameter is multiplied by: sqrt(max(1, rows / columns)), of the last two axes."""
    return math.sqrt(max(1.0, shape[-2] / shape[-1]))


def orthogonalise(xp: ModuleType, x: Array) -> Array:
    """Matrices (B, R, C) with their singular values brought near 1, to within 0.7 ... 1.2.

    Five steps of a Newton-Schulz iteration, x <- 3.4445 x - 4.7750 (x x^T) x + 2.0315 (x x^T)^2 x, after a division by
    the Frobenius norm (Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks").
    """
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = xp.matrix_transpose(x)
    x = x / (xp.sqrt(xp.sum(x * x, axis=(1, 2), keepdims=True)) + 1e-7)
    for _ in range(ITERATIONS):
        square = x @ xp.matrix_transpose(x)
        x = X * x + (X5 * (square @ square) + X3 * square) @ x
    return xp.matrix_transpose(x) if tall else x


def update_muon(
    xp: ModuleType,
    parameters: Arrays,
    gradients: Arrays,
    m: Arrays,
    v: Sequence[Array | None],
    *,
    state: UpdateState,
    steps: Sequence[int],
    lr_scales: Sequence[float],
    weight_decays: Sequence[float],
    momentum: float,
    beta1: float,
    beta2: float,
    eps: float,
    max_norm: float,
    loss_scale: Any = None,
    rounded: Sequence[Array | None] | None = None,
) -> tuple[Array | float, list[tuple[Array, ...]] | None]:
    """One step of Muon for the parameters without a `v`, of `adamw` for the others; the rest is as in `update_adamw`.

    m = momentum m + (1 - momentum) g;  p = (1 - lr weight_decay) p - lr sqrt(max(1, rows / columns)) O, where O is
    g + momentum (m - g) made orthogonal, with all axes but the first as columns. Those of one shape are done together.
    """
    directions: dict[int, Array] = {}

    def update(i: int, gradient: Array) -> tuple[Array, ...]:
        if v[i] is not None:
            return kernels.best(adamw, xp)(
                xp, parameters[i], gradient, m[i], v[i], lr=state.lr * lr_scales[i],
                beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decays[i], step=steps[i],
            )  # fmt: skip
        average = kernels.best(lerp, xp)(xp, m[i], gradient, weight=1 - momentum)
        directions[i] = xp.reshape(gradient + momentum * (average - gradient), (gradient.shape[0], -1))
        return parameters[i], average

    norm, results = update_each(xp, update, parameters, gradients, state, max_norm, loss_scale, rounded)
    if results is None:
        return norm, None
    alike: dict[tuple[int, ...], list[int]] = {}
    for i in sorted(directions):
        alike.setdefault(tuple(directions[i].shape), []).append(i)

    def apply(group: list[int]) -> list[Array]:
        updates = orthogonalise(xp, xp.stack([directions[i] for i in group]))
        new = []
        for number, i in enumerate(group):
            p, lr = parameters[i], state.lr * lr_scales[i]
            p *= 1 - lr * weight_decays[i]
            p -= (lr * update_scale(p.shape)) * xp.reshape(updates[number, ...], p.shape)
            if rounded is not None and (copy := rounded[i]) is not None:
                copy[...] = xp.astype(p, copy.dtype)
            new.append(p)
        return new

    groups = list(alike.values())
    sizes = [len(group) * math.prod(shape) for shape, group in alike.items()]
    for group, new in zip(groups, each(apply, groups, [parameters[group[0]] for group in groups], sizes), strict=True):
        for i, p in zip(group, new, strict=True):
            results[i] = (p, *results[i][1:])
    return norm, results
