"""Fused attention for CuPy arrays: how `cuda/attention_forward.cu` and `_backward.cu` are cut into blocks and launched.

They copy 16 bytes at a time: heads whose dimension is no multiple of 8 are filled up with zeros, which alters nothing.
On Hopper `attention_sm90a.py` takes what it covers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from tinyvit import kernels
from tinyvit.backend.arrays import VJP, Array
from tinyvit.kernels import cuda
from tinyvit.kernels.cuda import attention_sm90a, cublas
from tinyvit.kernels.cuda.linear import note_sums, sum_partials


def covers_attention(
    qkv: Array,
    *,
    num_heads: int,
    queries: int | None = None,
    mask: Array | None = None,
    dropout_mask: Array | None = None,
    **_: Any,
) -> bool:
    _, n, width = qkv.shape
    dim = _padded_dim(width, num_heads)
    if mask is not None or not cuda.scalar(qkv.dtype) or not qkv.size or dim > 128 or n * 3 * num_heads * dim >= 2**31:
        return False
    return backward_tiling(n, queries or n, dim, qkv.dtype.itemsize, dropout=dropout_mask is not None) is not None


def _padded_dim(width: int, num_heads: int) -> int:
    """A head's dimension, rounded up to a multiple of 8."""
    return 8 * math.ceil(width // (3 * num_heads) / 8)


def qkv_attention(
    xp: Any,
    qkv: Array,
    *,
    num_heads: int,
    queries: int | None = None,
    mask: Array | None = None,
    dropout_mask: Array | None = None,
    needs: tuple[bool, ...],
) -> tuple[Array, VJP]:
    _, n, width = qkv.shape
    own_dim = width // (3 * num_heads)
    dim = _padded_dim(width, num_heads)
    queries = n if queries is None else queries
    qkv = cuda.ready(_with_dim(xp, qkv, own_dim, dim))
    factors = cuda.NULL if dropout_mask is None else cuda.ready(dropout_mask)
    settings = factors, num_heads, queries, np.float32(1.0 / math.sqrt(own_dim))
    hopper = attention_sm90a.takes(qkv, *settings[:3])
    y, row_log = (attention_sm90a.forward if hopper else mma_forward)(xp, qkv, *settings, needs[0])

    def vjp(dy: Array) -> tuple[Array]:
        dy = cuda.ready(_with_dim(xp, dy, own_dim, dim))
        hopper = attention_sm90a.takes(qkv, *settings[:3], backward=True)
        with_sums = dim == own_dim and kernels.notes.get() is not None  # for the bias of the layer that made qkv
        backward = attention_sm90a.backward if hopper else mma_backward
        dqkv, sums = backward(xp, qkv, *settings, y, dy, row_log, with_sums)
        if with_sums:
            note_sums(dqkv, *sum_partials(xp, sums, dqkv.dtype))
        return (_with_dim(xp, dqkv, dim, own_dim),)

    return _with_dim(xp, y, dim, own_dim), vjp


def mma_forward(
    xp: Any, qkv: Array, factors: Any, num_heads: int, queries: int, scale: np.float32, with_log: bool
) -> tuple[Array, Any]:
    """The result (B, Q, H D), and the logarithms (B, H, Q) that the backward pass needs, or NULL."""
    batch, n, width = qkv.shape
    dim = width // (3 * num_heads)
    y = xp.empty((batch, queries, num_heads * dim), dtype=qkv.dtype)
    row_log = xp.empty((batch, num_heads, queries), dtype=xp.float32) if with_log else cuda.NULL
    constants, blocks, shared = forward_tiling(n, queries, dim, qkv.dtype.itemsize)
    forward = cuda.kernel("attention_forward", "attention_forward", **_variant(qkv, factors, dim), **constants)
    shape = np.int32(num_heads), np.int32(n), np.int32(queries), np.int32(blocks)
    arguments = (qkv, factors, y, row_log, *shape, scale)
    forward((batch * num_heads * blocks,), (32 * constants["WARPS"],), arguments, shared_mem=shared)
    return y, row_log


def mma_backward(
    xp: Any,
    qkv: Array,
    factors: Any,
    num_heads: int,
    queries: int,
    scale: np.float32,
    y: Array,
    dy: Array,
    row_log: Array,
    with_sums: bool,
) -> tuple[Array, Any]:
    """The gradient of qkv, and the sums of its columns for each sample (B, 3 H D), or NULL."""
    batch, n, width = qkv.shape
    dim = width // (3 * num_heads)
    plan = backward_tiling(n, queries, dim, qkv.dtype.itemsize, dropout=factors is not cuda.NULL)
    assert plan is not None  # as `covers_attention` found
    constants, portions, shared = plan
    dqkv = xp.empty(qkv.shape, dtype=qkv.dtype)
    dq_sum = xp.empty((batch, num_heads, queries, dim), dtype=xp.float32) if portions > 1 else cuda.NULL
    sums = xp.empty((batch, width), dtype=xp.float32) if with_sums else cuda.NULL
    backward = cuda.kernel("attention_backward", "attention_backward", **_variant(qkv, factors, dim), **constants)
    arguments = (qkv, factors, y, dy, row_log, dqkv, dq_sum, sums, *map(np.int32, (num_heads, n, queries)), scale)
    backward((batch * num_heads,), (32 * constants["WARPS"],), arguments, shared_mem=shared)
    return dqkv, sums


def _variant(qkv: Array, factors: Any, dim: int) -> dict[str, Any]:
    tf32 = cublas.tf32.get() and qkv.dtype.itemsize == 4
    dropout = factors is not cuda.NULL
    return {"SCALAR": cuda.scalar(qkv.dtype), "HEAD_DIM": dim, "DROPOUT": int(dropout), "TF32": int(tf32)}


def _with_dim(xp: Any, x: Array, dim: int, wanted: int) -> Array:
    """x (..., heads * dim) with the wanted dimension of each head, by zeros behind or by leaving out the last ones."""
    if dim == wanted:
        return x
    heads = xp.reshape(x, (*x.shape[:-1], -1, dim))
    if wanted > dim:
        zeros = xp.zeros((*heads.shape[:-1], wanted - dim), dtype=x.dtype)
        heads = xp.concat([heads, zeros], axis=-1)
    return xp.reshape(heads[..., :wanted], (*x.shape[:-1], -1))


class Tiling(NamedTuple):
    """What a kernel is compiled with, blocks (forward) or portions of keys (backward) a head, and its shared memory."""

    constants: dict[str, int]
    parts: int
    shared: int


def forward_tiling(n: int, n_queries: int, dim: int, itemsize: int) -> Tiling:
    """The plan for n tokens, of which the first `n_queries` are queries.

    Two tiles of queries a warp halve the reading of keys from shared memory, where there are rows enough to fill them
    and registers to hold them; blocks are then of four warps, so that two fit on a multiprocessor. Short rows pass in
    one step, which takes fewer registers, so that more blocks wait for memory at once.
    """
    tiles = 2 if n_queries > 112 and dim <= 80 and itemsize == 2 else 1
    keys = 32 if itemsize == 4 and dim > 64 else 16 * min(_tiles(n), 5 if n <= 80 else 4)
    once = n <= keys
    resident = 8  # warps
    if dim <= 64 and itemsize == 2:
        resident = (24 if n <= 64 else 20) if once else 16 // tiles

    def shared(warps: int) -> int:
        return (16 * tiles * warps + (2 if once else 4) * keys) * _stride(dim) * itemsize

    parts, warps = _split(math.ceil(_tiles(n_queries) / tiles), 8 // tiles, shared)
    blocks = max(1, min(resident // warps, cuda.blocks_that_fit(shared(warps))))
    constants = {"TILES": tiles, "KEYS": keys, "ONCE": int(once), "WARPS": warps, "RESIDENT": blocks}
    return Tiling(constants, parts, shared(warps))


def backward_tiling(n: int, n_queries: int, dim: int, itemsize: int, *, dropout: bool = False) -> Tiling | None:
    """The plan for n tokens, of which the first `n_queries` are queries; None if shared memory is too small for them.

    With dropout a block fewer is resident: its mask takes registers.
    """
    tiles = 2 if n > 112 and dim <= 64 and itemsize == 2 else 1
    queries = 32
    resident = 16 // tiles if dim <= 64 and itemsize == 2 else 8  # warps

    def shared(warps: int) -> int:
        rows = 16 * tiles * warps
        return ((2 * rows + 4 * queries) * _stride(dim) + rows * (queries + 8)) * itemsize + 8 * 16 * _tiles(n_queries)

    if shared(1) > cuda.shared_limit():
        return None
    parts, warps = _split(math.ceil(_tiles(n) / tiles), 8, shared)
    blocks = max(1, resident // warps - int(dropout))
    constants = {"TILES": tiles, "QUERIES": queries, "WARPS": warps, "RESIDENT": blocks}
    return Tiling(constants, parts, shared(warps))


def _split(groups: int, most: int, shared: Callable[[int], int]) -> tuple[int, int]:
    """The fewest parts and their warps, at most `most` and as shared memory allows, so that a warp takes one group."""
    parts = math.ceil(groups / most)
    while shared(math.ceil(groups / parts)) > cuda.shared_limit():
        parts += 1
    return parts, math.ceil(groups / parts)


def _tiles(rows: int) -> int:
    return math.ceil(rows / 16)


def _stride(dim: int) -> int:
    """Numbers between rows in shared memory, as in attention.cuh."""
    return 16 * _tiles(dim) + 8
