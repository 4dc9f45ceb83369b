"""The optimizers' updates for CuPy arrays: AdamW and Adam of all parameters in one launch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tinyvit.backend import cuda_graph
from tinyvit.backend.arrays import Array
from tinyvit.kernels import Kernel, cuda, reference

CONTROL = ("lr", "step", "correction", "rate_over_lr", "gradient_scale", "norm", "skip")  # struct Control in adamw.cu
PIECE = 4096  # numbers of a parameter that a block takes, as in adamw.cu
TABLE = np.dtype(
    [(name, np.uint64) for name in ("p", "m", "v", "g", "copy")]
    + [("size", np.int64), ("first_piece", np.int64), ("lr_scale", np.float32), ("weight_decay", np.float32)]
)
Filled = tuple[Array, np.int32, int]  # what Table.fill gives


def _sum_of_squares(xp: Any, scalar: str | None, filled: Filled) -> Array:
    """Of the gradients in a table."""
    table, count, pieces = filled
    partial, total = xp.empty(pieces, dtype=xp.float64), xp.empty((), dtype=xp.float64)
    squares = cuda.kernel("adamw", "squares_many", SCALAR=scalar)
    squares((pieces,), (256,), (table, count, partial), shared_mem=8 * 256)
    kernel = cuda.kernel("adamw", "sum_squares", SCALAR=scalar)
    kernel((1,), (256,), (partial, np.int32(pieces), total), shared_mem=8 * 256)
    return total


class Table:
    """Where the arrays of a model's parameters lie, on the device, for kernels that go over all of them."""

    def __init__(self, xp: Any) -> None:
        self._xp = xp
        self._rows, self._on_device = np.zeros(0, TABLE), None

    def fill(self, sizes: Sequence[int], **columns: Sequence) -> Filled:
        """The table's address, rows, and pieces of all; nothing is copied there if nothing has changed.

        A graph that is being captured gets a table of its own, which nothing writes over.
        """
        rows = np.zeros(len(sizes), TABLE)
        rows["size"] = sizes
        pieces = -(-rows["size"] // PIECE)
        rows["first_piece"] = np.cumsum(pieces) - pieces
        for name, values in columns.items():
            rows[name] = values
        table = self._on_device
        if table is None or cuda_graph.capturing() or not np.array_equal(rows, self._rows):
            table = cuda.lasting(self._xp, rows.nbytes)
            cuda.upload(table, rows.view(np.uint8))
        if not cuda_graph.capturing():  # what a capture that fails leaves is never filled
            self._rows, self._on_device = rows, table
        return table, np.int32(len(rows)), int(pieces.sum())


def writable(parameters: Sequence[Array], others: Sequence[Array]) -> bool:
    """Whether `others` are like the parameters, and kernels can change them in place as fp32 in vectors of 16 bytes."""
    return all(
        type(x) is type(p) and x.shape == p.shape and cuda.scalar(x.dtype) == "float" and cuda.is_ready(x)
        for x, p in zip(others, parameters, strict=True)
    )


def addresses(arrays: Sequence[Array | None]) -> list[int]:
    return [0 if x is None else cuda.address(x) for x in arrays]


class UpdateState(reference.UpdateState):
    """The numbers of an update in the device's memory, named by `CONTROL`, and the tables of its kernels."""

    def __init__(self, xp: Any) -> None:
        super().__init__(xp)
        self.table = Table(xp)
        self.control = xp.zeros(len(CONTROL), dtype=xp.float64)
        self._on_device: tuple[float, int] | None = (
            None  # the learning rate and the steps done, as far as they are known
        )
        i = CONTROL.index("skip")
        self.skip = self.control[i : i + 1].reshape(())

    def begin(self, lr: float, steps_done: int) -> None:
        """Bring the learning rate and the number of steps to the device, without waiting for it, if they changed."""
        self.lr = lr
        if self._on_device is None or self._on_device[0] != lr:
            self.set("lr", lr)
        if self._on_device is None or self._on_device[1] != steps_done:
            self.set("step", steps_done)
        self._on_device = lr, steps_done + 1

    def steps_done(self) -> int | None:
        """The number of updates, without those of gradients that overflowed; read from the device."""
        if self._on_device is None:
            return None
        self._on_device = None
        return int(self.get("step"))

    def updated_on_host(self) -> None:
        self._on_device = None

    def set(self, name: str, value: float) -> None:
        """Give one of the numbers a value, without waiting for the device."""
        i = CONTROL.index(name)
        cuda.upload(self.control[i : i + 1], np.array([value], np.float64))

    def get(self, name: str) -> Array:
        """A copy of one of the numbers, an array without dimensions."""
        return self.control[CONTROL.index(name)].copy()


def covers_update(
    parameters: Sequence[Array], gradients: Sequence[Array], m: Sequence[Array], v: Sequence[Array],
    *, steps: Sequence[int], **_: Any,
) -> bool:  # fmt: skip
    """fp32 parameters in C order, all at the same step, with gradients of one dtype."""
    return (
        len(set(steps)) == 1
        and len({g.dtype for g in gradients}) == 1
        and cuda.scalar(gradients[0].dtype) is not None
        and all(writable(parameters, others) for others in (parameters, m, v))
        and all(type(g) is type(p) and g.shape == p.shape for g, p in zip(gradients, parameters, strict=True))
    )


def update_adamw(
    xp: Any, parameters: Sequence[Array], gradients: Sequence[Array], m: Sequence[Array], v: Sequence[Array],
    *, state: UpdateState, steps: Sequence[int], lr_scales: Sequence[float], weight_decays: Sequence[float],
    beta1: float, beta2: float, eps: float, decoupled: bool, max_norm: float, loss_scale: Any = None,
    rounded: Sequence[Array | None] | None = None,
) -> tuple[Array, list[tuple[Array, ...]]]:  # fmt: skip
    """A few launches for all parameters, which change in place. The host reads nothing and counts nothing."""
    gradients = [cuda.ready(g) for g in gradients]
    table, count, pieces = state.table.fill(
        [x.size for x in parameters],
        p=addresses(parameters), m=addresses(m), v=addresses(v), g=addresses(gradients),
        copy=addresses(rounded or [None] * len(parameters)), lr_scale=lr_scales, weight_decay=weight_decays,
    )  # fmt: skip
    types = kernel_types(gradients, rounded)
    limit_norm(xp, state, types, (table, count, pieces), max_norm, loss_scale)
    step_adamw(state, types, (table, count, pieces), beta1, beta2, eps, decoupled)
    return state.get("norm"), list(zip(parameters, m, v, strict=True))


def kernel_types(gradients: Sequence[Array], rounded: Sequence[Array | None] | None) -> dict[str, Any]:
    """What adamw.cu is compiled with."""
    following = [x for x in rounded or () if x is not None]
    copy = {"COPY": cuda.scalar(following[0].dtype)} if following else {}
    return {"SCALAR": cuda.scalar(gradients[0].dtype)} | copy


def limit_norm(xp: Any, state: UpdateState, types: dict, filled: Filled, max_norm: float, loss_scale: Any) -> None:
    """Find the gradients' norm, and from it what they are multiplied by and whether the step is skipped."""
    total = _sum_of_squares(xp, types["SCALAR"], filled)
    clip = cuda.kernel("adamw", "clip_gradient", SCALAR=types["SCALAR"])
    scaling = (cuda.NULL, cuda.NULL, np.int32(0), np.float32(0))
    if loss_scale is not None:
        limits = np.int32(loss_scale.GROW_AFTER), np.float32(loss_scale.LARGEST)
        scaling = (loss_scale.value, loss_scale.good, *limits)
    clip((1,), (32,), (total, np.float64(max_norm), *scaling, state.control))
    state.skipped = state.skip


def step_adamw(
    state: UpdateState, types: dict, filled: Filled, beta1: float, beta2: float, eps: float, decoupled: bool
) -> None:
    """Count the step, and update the parameters of a table."""
    table, count, pieces = filled
    prepare = cuda.kernel("adamw", "prepare_adamw", SCALAR=types["SCALAR"])
    prepare((1,), (32,), (state.control, np.float64(beta1), np.float64(beta2)))
    if pieces:
        numbers = (np.float32(x) for x in (1 - beta1, beta2, 1 - beta2, eps))
        adamw = cuda.kernel("adamw", "adamw_many", **types)
        adamw((pieces,), (256,), (table, count, state.control, *numbers, np.int32(decoupled)))


def covers_average(averages: Sequence[Array], targets: Sequence[Array], **_: Any) -> bool:
    return bool(averages) and writable(targets, averages) and writable(targets, targets)


def update_average(
    xp: Any, averages: Sequence[Array], targets: Sequence[Array],
    *, state: UpdateState, weight: float, skipped: Any = None,
) -> list[Array]:  # fmt: skip
    """One launch for all averages, which change in place."""
    sizes = [x.size for x in averages]
    table, count, pieces = state.table.fill(sizes, p=addresses(averages), m=addresses(targets))
    lerp = cuda.kernel("adamw", "lerp_many", SCALAR="float")
    lerp((pieces,), (256,), (table, count, np.float32(weight), cuda.NULL if skipped is None else skipped))
    return list(averages)


KERNELS = {
    reference.UpdateState: Kernel(UpdateState),
    reference.update_adamw: Kernel(update_adamw, covers_update),
    reference.update_average: Kernel(update_average, covers_average),
}
