"""Muon for CuPy arrays: all parameters in a few launches, which a graph can repeat.

Updates of matrices of one shape lie behind one another in one of two arrays, and products of matrices (cuBLASLt's, many
at a time) carry them from one to the other and back.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from tinyvit.backend.arrays import Array
from tinyvit.kernels import cuda
from tinyvit.kernels.cuda import cublas, linear
from tinyvit.kernels.cuda.optimizers import (
    PIECE,
    UpdateState,
    addresses,
    covers_update,
    kernel_types,
    limit_norm,
    step_adamw,
    writable,
)  # fmt: skip
from tinyvit.kernels.reference.muon import ITERATIONS, X3, X5, X, update_scale


def covers_muon(
    parameters: Sequence[Array], gradients: Sequence[Array], m: Sequence[Array], v: Sequence[Array | None],
    *, steps: Sequence[int], **_: Any,
) -> bool:  # fmt: skip
    adam = [i for i, x in enumerate(v) if x is not None]
    return covers_update(parameters, gradients, m, m, steps=steps) and writable(
        [parameters[i] for i in adam], [x for x in v if x is not None]
    )


def update_muon(
    xp: Any, parameters: Sequence[Array], gradients: Sequence[Array], m: Sequence[Array], v: Sequence[Array | None],
    *, state: UpdateState, steps: Sequence[int], lr_scales: Sequence[float], weight_decays: Sequence[float],
    momentum: float, beta1: float, beta2: float, eps: float, max_norm: float, loss_scale: Any = None,
    rounded: Sequence[Array | None] | None = None,
) -> tuple[Array, list[tuple[Array, ...]]]:  # fmt: skip
    gradients = [cuda.ready(g) for g in gradients]
    # AdamW's parameters come first in the table, then the matrices, those of one shape together.
    order = sorted(range(len(parameters)), key=lambda i: (v[i] is None, v[i] is None and parameters[i].shape, i))
    adam = sum(x is not None for x in v)
    groups = [list(group) for _, group in itertools.groupby(order[adam:], lambda i: parameters[i].shape)]
    starts = np.cumsum([0, *(4 * math.ceil(len(g) * parameters[g[0]].size / 4) for g in groups)]).tolist()
    updates = xp.empty((2, starts[-1]), dtype=xp.float32)
    places = {
        i: cuda.address(updates) + 4 * (start + number * parameters[i].size)
        for start, group in zip(starts, groups, strict=False)
        for number, i in enumerate(group)
    }

    def ordered(values: Sequence) -> list:
        return [values[i] for i in order]

    table, count, pieces = state.table.fill(
        [parameters[i].size for i in order],
        p=ordered(addresses(parameters)), m=ordered(addresses(m)), g=ordered(addresses(gradients)),
        v=[places.get(i, 0) if (x := v[i]) is None else cuda.address(x) for i in order],
        copy=ordered(addresses(rounded or [None] * len(parameters))),
        lr_scale=ordered(lr_scales), weight_decay=ordered(weight_decays),
    )  # fmt: skip
    types = kernel_types(gradients, rounded)
    limit_norm(xp, state, types, (table, count, pieces), max_norm, loss_scale)
    before = sum(math.ceil(parameters[i].size / PIECE) for i in order[:adam])
    step_adamw(state, types, (table, np.int32(adam), before), beta1, beta2, eps, True)

    if groups:
        away, grid = np.int64(starts[-1]), ((pieces - before,), (256,))
        partial, rows = xp.empty(pieces - before, dtype=xp.float64), (table, count, np.int64(before))
        direction = cuda.kernel("adamw", "muon_direction", **types)
        direction(*grid, (*rows, state.control, np.float32(momentum), away, partial), shared_mem=8 * 256)
        cuda.kernel("adamw", "muon_normalise", **types)(*grid, (*rows, away, partial))
        token = cublas.tf32.set(cublas.tf32.get() or gradients[0].dtype.itemsize == 2)
        try:
            for start, group in zip(starts, groups, strict=False):
                p = parameters[group[0]]
                shape = (len(group), p.shape[0], p.size // p.shape[0])
                x, y = (xp.reshape(part[start : start + math.prod(shape)], shape) for part in updates)
                _orthogonalise(xp, x, y, update_scale(p.shape))
        finally:
            cublas.tf32.reset(token)
        cuda.kernel("adamw", "muon_apply", **types)(*grid, (*rows, state.control, away))
    arrays = zip(parameters, m, v, strict=True)
    return state.get("norm"), [row if row[2] is not None else row[:2] for row in arrays]


def _orthogonalise(xp: Any, x: Array, y: Array, scale: float) -> None:
    """y = scale times `reference.orthogonalise` of x (B, R, C), whose Frobenius norm is 1; x is overwritten."""
    tall = x.shape[1] > x.shape[2]
    for i in range(ITERATIONS):
        factor = scale if i == ITERATIONS - 1 else 1.0
        square = _product(xp, x, x, transposed=(tall, not tall))
        square = _product(xp, square, square, alpha=X5, beta=X3, added=square)
        left, right = (x, square) if tall else (square, x)
        _product(xp, left, right, alpha=factor, beta=X * factor, added=x, out=y)
        x, y = y, x


def _product(
    xp: Any, a: Array, b: Array, *, transposed: tuple[bool, bool] = (False, False),
    alpha: float = 1.0, beta: float = 0.0, added: Array | None = None, out: Array | None = None,
) -> Array:  # fmt: skip
    """alpha op(a) op(b) + beta added, of many matrices each."""
    y = cublas.products(xp, a, b, transposed, alpha, beta, added, out)
    if y is None:
        a, b = (xp.matrix_transpose(x) if flip else x for x, flip in zip((a, b), transposed, strict=True))
        y = xp.empty((len(a), a.shape[1], b.shape[2]), dtype=a.dtype) if out is None else out
        y[...] = alpha * linear.cupys_product(a, b) + (0.0 if added is None else beta * added)
    return y
