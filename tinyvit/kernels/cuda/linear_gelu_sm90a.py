"""A linear layer with GELU in one kernel on Hopper, the way back, and for predictions a whole MLP.

How `cuda/linear_gelu_sm90a.cu` and `cuda/mlp_sm90a.cu` are launched. Where the inner dimension is short, the products
are bound by the wide activation's way to memory and back, which GELU's own kernels would read and write once more. As
attention's kernels for Hopper these run only after a trial: they must agree with the kernels for every GPU, and take
less time. TINYVIT_WGMMA=0 leaves them out.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from tinyvit.backend import cuda_graph
from tinyvit.backend.arrays import Array
from tinyvit.kernels import cuda, jit
from tinyvit.kernels.cuda import trial

LONGEST = 384  # inner dimension whose rows fit into a warpgroup's registers
LEAST_ROWS = 1 << 14  # with fewer it saves 5 us a layer at most, by count, and loading the weights takes 2 to 3
WIDEST = 192  # rows of an MLP whose inputs and results fit there
NAMES = "forward", "backward", "mlp"

_verdicts: dict[tuple, trial.Verdicts] = {}  # of each shape of a layer on each device


class Plan(NamedTuple):
    """Columns of a block, its warpgroups, blocks that share the rows of the same columns, bytes of shared memory."""

    columns: int
    warpgroups: int
    workers: int
    shared: int


def takes(rows: Array, columns: int, approximate: str, name: str = "forward") -> bool:
    """Whether the function of this name runs here for rows (R, inner), and (R, columns) before or after GELU."""
    count, inner = rows.shape
    if cuda.capability() != 90 or rows.dtype.itemsize != 2 or jit.refused("TINYVIT_WGMMA"):
        return False
    if inner % 64 or columns % 64 or inner > (WIDEST if name == "mlp" else LONGEST) or count < LEAST_ROWS:
        return False
    if (count + 127) * max(inner, columns) >= 1 << 31:  # places are numbers of 32 bits
        return False
    kind = cuda.device(), cuda.scalar(rows.dtype), inner, columns, approximate
    if kind not in _verdicts and not cuda_graph.capturing():  # a graph's function has run before it is captured
        _verdicts[kind] = _try(*kind[1:])
    return kind in _verdicts and _verdicts[kind][name] is None


def _try(scalar: str | None, inner: int, columns: int, approximate: str) -> trial.Verdicts:
    request = {"scalar": scalar, "inner": inner, "columns": columns, "approximate": approximate}
    sources = [cuda.source(name) for name in ("columns", "linear_gelu_sm90a", "mlp_sm90a")]
    sources += [
        (cuda.FOLDER / f"{name}.py").read_text() for name in ("linear", "linear_gelu_sm90a", "linear_gelu_trial")
    ]
    case = f"layers of {inner} to {columns}"
    return trial.hopper_verdicts("linear_gelu", case, "tinyvit.kernels.cuda.linear_gelu_trial", NAMES, request, sources)


def forward(
    xp: Any, rows: Array, weight: Array, bias: Array, approximate: str, recording: bool
) -> tuple[Array, Array | None]:
    """gelu(rows W^T + bias), W (columns, inner); and rows W^T, if `recording`."""
    y = xp.empty((rows.shape[0], weight.shape[0]), dtype=rows.dtype)
    hidden = xp.empty(y.shape, dtype=y.dtype) if recording else None
    _launch(rows, weight, bias, hidden if recording else cuda.NULL, y, None, approximate)
    return y, hidden


def backward(xp: Any, dy: Array, weight: Array, hidden: Array, bias: Array, approximate: str) -> tuple[Array, Array]:
    """(dy W) gelu'(hidden + bias), W (inner, columns); and partial sums of its columns, in rows."""
    dx = xp.empty(hidden.shape, dtype=dy.dtype)
    workers = plan(dy.shape[0], dy.shape[1], hidden.shape[1], True).workers
    partial = xp.empty((workers, hidden.shape[1]), dtype=xp.float32)
    _launch(dy, weight, bias, hidden, dx, partial, approximate)
    return dx, partial


def mlp(
    xp: Any, residual: Array, rows: Array, weight1: Array, bias1: Array, weight2: Array, bias2: Array, approximate: str
) -> Array:
    """residual + gelu(rows W1^T + b1) W2^T + b2, W1 (hidden, width), W2 (width, hidden)."""
    y, (count, width) = xp.empty(rows.shape, dtype=rows.dtype), rows.shape
    stages = mlp_stages(width)
    kernel = cuda.kernel(
        "mlp_sm90a", "mlp_sm90a", SCALAR=cuda.scalar(rows.dtype), WIDTH=width, HIDDEN=len(bias1), STAGES=stages,
        APPROXIMATE=int(approximate == "tanh"),
    )  # fmt: skip
    grid = (min(cuda.multiprocessors(), math.ceil(count / 128)),)
    arguments = (residual, rows, weight1, bias1, weight2, bias2, y, np.int32(count))
    kernel(grid, (256,), arguments, shared_mem=stages * 256 * width)
    return y


def mlp_stages(width: int) -> int:
    """How many chunks of the weights, 256 width bytes each, are there or on their way: all that fit, but at most 8."""
    return min(8, cuda.shared_limit() // (256 * width))


def _launch(
    rows: Array, weight: Array, bias: Array, hidden: Any, y: Array, partial: Array | None, approximate: str
) -> None:
    count, inner = rows.shape
    columns, is_backward = y.shape[1], partial is not None
    cut = plan(count, inner, columns, is_backward)
    kernel = cuda.kernel(
        "linear_gelu_sm90a", "linear_gelu_sm90a", SCALAR=cuda.scalar(rows.dtype), INNER=inner, COLUMNS=cut.columns,
        WARPGROUPS=cut.warpgroups, APPROXIMATE=int(approximate == "tanh"), BACKWARD=int(is_backward),
    )  # fmt: skip
    sums = partial if is_backward else cuda.NULL
    arguments = (rows, weight, bias, hidden, y, sums, np.int32(count), np.int32(columns))
    grid = (columns // cut.columns * cut.workers,)
    kernel(grid, (128 * cut.warpgroups,), arguments, shared_mem=cut.shared)


def plan(rows: int, inner: int, columns: int, is_backward: bool) -> Plan:
    """As many columns as fit, as each block reads all the rows that it takes; as many warpgroups as registers allow."""
    warpgroups = 4 if inner <= 192 else 3 if inner <= 256 else 2
    column = 2 * inner + (4 * 4 * warpgroups if is_backward else 0)  # bytes
    fitting = max(c for c in range(64, columns + 1, 64) if columns % c == 0 and c * column <= cuda.shared_limit())
    workers = max(1, cuda.multiprocessors() // (columns // fitting))
    return Plan(fitting, warpgroups, min(workers, math.ceil(rows / (64 * warpgroups))), fitting * column)
