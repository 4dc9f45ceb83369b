"""The optimizers' updates for CuPy arrays: AdamW in one launch, for one parameter or for all of a model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tinyvit.kernels import cuda, reference_optim

Array = Any

PIECE = 4096  # numbers of a parameter that a block takes, as in adamw.cu
TABLE = np.dtype(
    [(name, np.uint64) for name in ("p", "m", "v", "g", "copy")]
    + [("size", np.int64), ("first_piece", np.int64), ("lr_scale", np.float32), ("weight_decay", np.float32)]
)


def adamw(
    xp: Any, p: Array, g: Array, m: Array, v: Array,
    *, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, step: int,
) -> tuple[Array, Array, Array]:  # fmt: skip
    in_place = all(x.flags.c_contiguous for x in (p, m, v))
    if cuda.scalar(p.dtype) != "float" or not in_place or not p.size:
        return reference_optim.adamw(
            xp, p, g, m, v, lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay, step=step
        )
    correction = math.sqrt(1 - beta2**step)
    rate = lr * correction / (1 - beta1**step)
    numbers = (1 - beta1, beta2, 1 - beta2, eps * correction, rate, 1 - lr * weight_decay)
    arguments = (p, cuda.ready(g), m, v, np.int64(p.size), *(np.float32(x) for x in numbers))
    cuda.kernel("adamw", "adamw", SCALAR="float")((_blocks(p.size),), (256,), arguments)
    return p, m, v


def sum_of_squares(xp: Any, x: Array) -> Array:
    scalar = cuda.scalar(x.dtype)
    if not scalar or not x.size:
        return reference_optim.sum_of_squares(xp, x)
    blocks = _blocks(x.size)
    partial, total = xp.empty(blocks, dtype=xp.float64), xp.empty((), dtype=xp.float64)
    squares = cuda.kernel("adamw", "squares", SCALAR=scalar)
    squares((blocks,), (256,), (cuda.ready(x), np.int64(x.size), partial), shared_mem=8 * 256)
    _sum_squares(scalar, partial, total)
    return total


def _blocks(size: int) -> int:
    return min(math.ceil(size / 256), 8 * cuda.multiprocessors())


def _sum_squares(scalar: str, partial: Array, total: Array) -> None:
    kernel = cuda.kernel("adamw", "sum_squares", SCALAR=scalar)
    kernel((1,), (256,), (partial, np.int32(partial.size), total), shared_mem=8 * 256)


class ManyAdamW:
    """AdamW for all parameters of a model in two launches, all of whose changing numbers lie on the device.

    Args:
        xp: the array namespace.
        parameters, m, v: fp32 arrays in C order, updated in place.
        dtype: of the gradients, and of `copies`.
        copies: None, or for each parameter an array of its shape that follows it in the low precision (or None).
        lr_scales, weight_decays: for each parameter.
        beta1, beta2, eps: as in `reference_optim.adamw`.

    Attributes:
        control: float64 (6,) on the device: learning rate, steps done, two corrections, factor of the gradients, norm.
    """

    def __init__(
        self,
        xp: Any,
        parameters: Sequence[Array],
        m: Sequence[Array],
        v: Sequence[Array],
        *,
        dtype: Any,
        copies: Sequence[Array | None] | None = None,
        lr_scales: Sequence[float],
        weight_decays: Sequence[float],
        beta1: float,
        beta2: float,
        eps: float,
    ) -> None:
        self._xp, self._scalar = xp, cuda.scalar(dtype)
        self._kept = (parameters, m, v, copies)  # the table holds their addresses
        self._betas, self._eps = (beta1, beta2), eps
        table = np.zeros(len(parameters), TABLE)
        for name, arrays in (("p", parameters), ("m", m), ("v", v), ("copy", copies or [None] * len(parameters))):
            table[name] = [0 if x is None else cuda.address(x) for x in arrays]
        table["size"] = [x.size for x in parameters]
        pieces = -(-table["size"] // PIECE)
        table["first_piece"] = np.cumsum(pieces) - pieces
        table["lr_scale"], table["weight_decay"] = lr_scales, weight_decays
        self._pieces = int(pieces.sum())
        self._table, self._on_device = table, None
        self._partial, self._total = xp.empty(self._pieces, dtype=xp.float64), xp.empty((), dtype=xp.float64)
        self.control = xp.asarray(np.array([0.0, 0.0, 0.0, 0.0, 1.0, 0.0]))

    def set_gradients(self, gradients: Sequence[Array]) -> None:
        """Take these arrays as the gradients; nothing goes to the device if they lie where the last ones did."""
        gradients = [cuda.ready(g) for g in gradients]
        addresses = np.array([cuda.address(g) for g in gradients], np.uint64)
        if self._on_device is None or not np.array_equal(addresses, self._table["g"]):
            self._table["g"] = addresses
            self._on_device = self._xp.asarray(self._table.view(np.uint8).copy())
        self._gradients = gradients

    def clip(self, largest_norm: float) -> None:
        """Measure the gradients' norm (`control[5]`) and set the factor (`control[4]`) that limits it."""
        count = np.int32(len(self._table))
        squares = self._kernel("squares_many")
        squares((self._pieces,), (256,), (self._on_device, count, self._partial), shared_mem=8 * 256)
        _sum_squares(self._scalar, self._partial, self._total)
        self._kernel("clip_gradient")((1,), (32,), (self._total, np.float64(largest_norm), self.control))

    def step(self) -> None:
        """Update all parameters with the learning rate in `control[0]`."""
        beta1, beta2 = self._betas
        self._kernel("prepare_adamw")((1,), (32,), (self.control, np.float64(beta1), np.float64(beta2)))
        numbers = (np.float32(x) for x in (1 - beta1, beta2, 1 - beta2, self._eps))
        arguments = (self._on_device, np.int32(len(self._table)), self.control, *numbers)
        self._kernel("adamw_many")((self._pieces,), (256,), arguments)

    def _kernel(self, name: str) -> Callable:
        return cuda.kernel("adamw", name, SCALAR=self._scalar)


KERNELS: dict[str, Callable] = {f.__name__: f for f in (adamw, sum_of_squares)}
