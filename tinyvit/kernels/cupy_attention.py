"""Fused attention for CuPy arrays: how `cuda/attention_*.cu` are cut into blocks and launched."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from tinyvit.kernels import cuda, reference

Array = Any
VJP = Callable[..., tuple[Array | None, ...]]

WARPS = 8  # of a block, at most: the kernels' launch bounds
QUERIES = 32  # of a step backward


def qkv_attention(
    xp: Any,
    qkv: Array,
    *,
    num_heads: int,
    queries: int | None = None,
    mask: Array | None = None,
    keep: Array | None = None,
    needs: tuple[bool, ...],
) -> tuple[Array, VJP]:
    batch, n, width = qkv.shape
    dim = width // (3 * num_heads)
    scalar, size = cuda.scalar(qkv.dtype), qkv.dtype.itemsize
    covered = queries is None and mask is None and keep is None and scalar and qkv.size and dim % 8 == 0 and dim <= 128
    if not covered or backward_plan(n, dim, size)[1] == 0:
        return reference.qkv_attention(
            xp, qkv, num_heads=num_heads, queries=queries, mask=mask, keep=keep, needs=needs
        )
    qkv = cuda.ready(qkv)
    y = xp.empty((batch, n, width // 3), dtype=qkv.dtype)
    row_log = xp.empty((batch, num_heads, n), dtype=xp.float32) if needs[0] else cuda.NULL
    shape = (np.int32(num_heads), np.int32(n))
    scale = np.float32(1.0 / math.sqrt(dim))

    tiles, keys, blocks, warps, shared = forward_plan(n, dim, size)
    forward = cuda.kernel("attention_forward", "attention_forward", SCALAR=scalar, HEAD_DIM=dim, TILES=tiles, KEYS=keys)
    arguments = (qkv, y, row_log, *shape, np.int32(blocks), scale)
    forward((batch * num_heads * blocks,), (32 * warps,), arguments, shared_mem=shared)

    def vjp(dy: Array) -> tuple[Array]:
        dqkv = xp.empty(qkv.shape, dtype=qkv.dtype)
        tiles, warps, shared = backward_plan(n, dim, size)
        several = n > 16 * tiles * warps
        dq_sum = xp.empty((batch, num_heads, n, dim), dtype=xp.float32) if several else cuda.NULL
        backward = cuda.kernel("attention_backward", "attention_backward", SCALAR=scalar, HEAD_DIM=dim, TILES=tiles)
        arguments = (qkv, y, cuda.ready(dy), row_log, dqkv, dq_sum, *shape, scale)
        backward((batch * num_heads,), (32 * warps,), arguments, shared_mem=shared)
        return (dqkv,)

    return y, vjp


def forward_plan(n: int, dim: int, itemsize: int) -> tuple[int, int, int, int, int]:
    """TILES, KEYS, blocks for a head, warps of a block and bytes of its shared memory.

    Two tiles of queries a warp halve the reading of keys from shared memory, where there are rows enough to fill them
    and registers to hold them. Short rows pass in one step.
    """
    tiles = 2 if n > 112 and dim <= 80 and itemsize == 2 else 1
    keys = 32 if dim > 80 else 16 * min(_tiles(n), 5 if n <= 80 else 4)
    stages = 2 if n > keys else 1
    groups = math.ceil(_tiles(n) / tiles)  # a warp each
    blocks = math.ceil(groups / WARPS)
    warps = math.ceil(groups / blocks)
    while True:
        shared = (16 * tiles * warps + 2 * stages * keys) * _stride(dim) * itemsize
        if shared <= cuda.shared_limit():
            return tiles, keys, blocks, warps, shared
        blocks += 1
        warps = math.ceil(groups / blocks)


def backward_plan(n: int, dim: int, itemsize: int) -> tuple[int, int, int]:
    """TILES, warps of a block and bytes of its shared memory; no warps if a head's statistics alone are too much."""
    tiles = 2 if n > 112 and dim <= 64 and itemsize == 2 else 1
    groups = math.ceil(_tiles(n) / tiles)
    portions = math.ceil(groups / WARPS)
    while True:
        warps = math.ceil(groups / portions)
        rows = 16 * tiles * warps
        numbers = (2 * rows + 4 * QUERIES) * _stride(dim) + rows * (QUERIES + 8)
        shared = numbers * itemsize + 8 * 16 * _tiles(n)
        if shared <= cuda.shared_limit():
            return tiles, warps, shared
        if warps == 1:
            return tiles, 0, shared
        portions += 1


def _tiles(rows: int) -> int:
    return math.ceil(rows / 16)


def _stride(dim: int) -> int:
    """Numbers between rows in shared memory, as in attention.cuh."""
    return 16 * _tiles(dim) + 8
