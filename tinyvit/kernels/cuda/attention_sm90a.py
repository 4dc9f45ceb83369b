"""Attention on Hopper: how `cuda/attention_*_sm90a.cu` are cut into blocks and launched, and whether they may be.

Each runs only after it has agreed with the kernel for every GPU on random numbers (`attention_trial.py`), for each
dtype, number of tokens and of queries and head dimension: no GPU has run them yet. TINYVIT_WGMMA=0 leaves them out.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from tinyvit.backend import cuda_graph
from tinyvit.backend.arrays import Array
from tinyvit.kernels import cuda, jit
from tinyvit.kernels.cuda import trial

LEAST_TOKENS, LEAST_QUERIES = 128, 64  # with fewer most of a warpgroup's 64 rows are empty
KEYS = 64  # of a chunk: more take registers from a fourth warpgroup
MANY = 1 << 20  # heads: each has one block
# What a block's keys and values take, in tiles of 64 queries: 4 N D bytes at a multiprocessor's share of 4.3 TB/s,
# beside 256 N D FLOPs at its share of 790 / 1.4 TFLOP/s. Predicted, like those 1.4 (bench/README.md).
LOADING_COST = 2

_verdicts: dict[tuple, trial.Verdicts] = {}  # of each shape of a head on each device


class Plan(NamedTuple):
    """What the kernel is compiled with, its blocks a head, and their shared memory."""

    constants: dict[str, int]
    parts: int
    shared: int


def takes(qkv: Array, factors: Any, num_heads: int, queries: int, backward: bool = False) -> bool:
    """Whether `forward`, or `backward`, computes attention of qkv (B, N, 3 H D) here."""
    n, dim = qkv.shape[1], qkv.shape[2] // (3 * num_heads)
    if cuda.capability() != 90 or qkv.dtype.itemsize != 2 or jit.refused("TINYVIT_WGMMA"):
        return False
    if n < LEAST_TOKENS or queries < LEAST_QUERIES or dim % 16 or factors is not cuda.NULL:
        return False
    if backward and not _has_backward(queries, dim):
        return False
    kind = cuda.device(), cuda.scalar(qkv.dtype), n, queries, dim
    if kind not in _verdicts and not cuda_graph.capturing():  # a graph's function has run before it is captured
        _verdicts[kind] = _try(*kind[1:])
    return kind in _verdicts and _verdicts[kind]["backward" if backward else "forward"] is None


def _has_backward(queries: int, dim: int) -> bool:
    return dim <= 64 and _backward_shared(queries, dim) <= cuda.shared_limit()


def _try(scalar: str | None, n: int, queries: int, dim: int) -> trial.Verdicts:
    names = ("forward", "backward")[: 1 + _has_backward(queries, dim)]
    request = {"scalar": scalar, "n": n, "queries": queries, "dim": dim, "backward": len(names) == 2}
    sources = [cuda.source(f"attention_{name}{which}") for name in ("forward", "backward") for which in ("", "_sm90a")]
    sources += [(cuda.FOLDER / f"attention{which}.py").read_text() for which in ("", "_sm90a", "_trial")]
    case = f"{n} tokens and heads of {dim}"
    return trial.hopper_verdicts("attention", case, "tinyvit.kernels.cuda.attention_trial", names, request, sources)


def forward(
    xp: Any, qkv: Array, factors: Any, num_heads: int, queries: int, scale: np.float32, with_log: bool, heads: int = 0
) -> tuple[Array, Any]:
    """What `attention.mma_forward` gives; `heads`, if not 0, stands in for the number of heads in the plan."""
    batch, n, width = qkv.shape
    dim = width // (3 * num_heads)
    y = xp.empty((batch, queries, num_heads * dim), dtype=qkv.dtype)
    row_log = xp.empty((batch, num_heads, queries), dtype=xp.float32) if with_log else cuda.NULL
    constants, parts, shared = forward_plan(n, queries, dim, heads or batch * num_heads)
    name = "attention_forward_sm90a"
    kernel = cuda.kernel(name, name, SCALAR=cuda.scalar(qkv.dtype), HEAD_DIM=dim, TOKENS=n, **constants)
    arguments = (qkv, y, row_log, np.int32(num_heads), np.int32(queries), np.int32(parts), scale)
    kernel((batch * num_heads * parts,), (128 * constants["WARPGROUPS"],), arguments, shared_mem=shared)
    return y, row_log


def backward(
    xp: Any, qkv: Array, factors: Any, num_heads: int, queries: int, scale: np.float32, *saved: Any
) -> tuple[Array, Any]:
    """What `attention.mma_backward` gives."""
    y, dy, row_log, with_sums = saved
    batch, n, width = qkv.shape
    dim = width // (3 * num_heads)
    dqkv = xp.empty(qkv.shape, dtype=qkv.dtype)
    heads = batch * num_heads
    blocks = min(heads, cuda.multiprocessors())  # each takes a multiprocessor, and many heads
    dq_sum = xp.empty((blocks, 64 * math.ceil(queries / 64), dim), dtype=xp.float32)
    name, warps = "attention_backward_sm90a", 8
    last = 16 * math.ceil(((queries - 1) % 64 + 1) / 16)  # queries of the last step
    variant = {"SCALAR": cuda.scalar(qkv.dtype), "HEAD_DIM": dim, "WARPS": warps, "LAST": last}
    sums = xp.empty((batch, width), dtype=xp.float32) if with_sums else cuda.NULL
    arguments = (qkv, y, dy, row_log, dqkv, dq_sum, sums, *map(np.int32, (heads, num_heads, n, queries)), scale)
    kernel = cuda.kernel(name, name, **variant)
    kernel((blocks,), (32 * warps,), arguments, shared_mem=_backward_shared(queries, dim))
    return dqkv, sums


def _backward_shared(queries: int, dim: int) -> int:
    """Panels of 128 keys, values and four of dS; of two stages of 64 queries and dy; two numbers a query; sums."""
    return 128 * (6 * 128 + 4 * 64) + 4 * (2 * 64 * math.ceil(queries / 64) + 3 * 64 * (dim + 8))


def forward_plan(n: int, queries: int, dim: int, heads: int) -> Plan:
    """The plan for n tokens, of which the first `queries` ask, and so many heads of all samples.

    As many warpgroups as registers allow share a multiprocessor: in blocks of their own, if it has shared memory for so
    many heads, else several in a block. A head is divided among several blocks where that takes less time.
    """
    warpgroups = 4 if dim <= 64 else 3 if dim <= 96 else 2
    row = 2 * 128 * math.ceil(dim / 64)  # bytes of a key and a value
    chunks = math.ceil(n / KEYS)
    limit, shared = cuda.shared_limit(), 16 * math.ceil(n / 16) * row
    tiles = math.ceil(queries / 64)
    if shared <= limit:
        fitting = (limit + 1024) // (shared + 1024)  # each block takes another 1024 bytes
        blocks = max(count for count in range(1, warpgroups + 1) if warpgroups % count == 0 and count <= fitting)
        stages, groups = chunks, min(tiles, warpgroups // blocks)
        parts = _parts(tiles, groups, heads, cuda.multiprocessors() * blocks)
    else:
        blocks, stages, groups = 1, limit // (KEYS * row), min(tiles, warpgroups)
        shared, parts = stages * KEYS * row, math.ceil(tiles / groups)
    return Plan({"KEYS": KEYS, "STAGES": stages, "WARPGROUPS": groups, "RESIDENT": blocks}, parts, shared)


def _parts(tiles: int, groups: int, heads: int, resident: int) -> int:
    """Blocks a head: rounds of `resident` blocks, times what each takes, are to be least."""

    def time(parts: int) -> int:
        return math.ceil(heads * parts / resident) * (groups * math.ceil(tiles / (groups * parts)) + LOADING_COST)

    return min(range(1, math.ceil(tiles / groups) + 1), key=time)
