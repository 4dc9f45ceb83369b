"""Kernels for NumPy arrays: the reference's mathematics, arranged for a processor's caches.

NumPy reads and writes whole arrays in every elementary step. Here a chain of steps runs in place (`out=`) over a block
of rows that stays in the cache, so that only the first read and the last write go to memory. Sums over rows and
columns are products with vectors, which BLAS computes faster than reductions.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from tinyvit.backend.arrays import VJP, Array

# Elements of a block: measured. Smaller ones sit deeper in the cache, but cost more calls that hold the GIL.
BLOCK = 1 << 18

TILE = 6144  # elements of a row repeated: measured, shorter ones take up to twice the time an element

# Phi(x) = 1/2 + 1/2 tanh(x P(x^2)): P is a weighted least-maximum fit made for this file, of degree 6 and in a form of
# few passes, K ((((s + A)^2 + B)^2 + C) ((s + D)^2 + E) + F). Phi comes out within 3e-8 of the truth, 1.2e-7 with
# float32's rounding, and P stays positive however large x is. NumPy's tanh in float32 is as fast as three additions, so
# this takes fewer passes than any form of erf.
_A, _B, _C = -3.457507364685418, 77.3105055732494, -367630.6330514608
_D, _E, _F, _K = -30.614686386671348, 236.29100550678575, 873873529.0085139, 1.7660460837372297e-09
_PHI_TANH = (math.sqrt(2.0 / math.pi), 0.044715 * math.sqrt(2.0 / math.pi))  # the tanh approximation's own P
# _exp(_UNIT x) = e^x: with AVX-512 NumPy's exp2 takes little more than half of its exp's time, without it more.
_SIMD = np.show_config(mode="dicts").get("SIMD Extensions", {}).get("found", [])
_FAST_EXP2 = sys.platform == "linux" and not {"AVX512_SKX", "X86_V4"}.isdisjoint(_SIMD)
_exp, _UNIT = (np.exp2, 1.0 / math.log(2.0)) if _FAST_EXP2 else (np.exp, 1.0)
_SMALL_PRODUCT = 10**6  # multiplications: OpenBLAS's limit on processors with AVX-512
# Scores up to here need no maximum subtracted: neither their exponentials nor the sums overflow float32.
_EXP_LIMIT = 30.0


def linear(xp: Any, x: Array, weight: Array, bias: Array | None, *, needs: tuple[bool, ...]) -> tuple[Array, VJP]:
    rows = x.reshape(-1, x.shape[-1])
    y = rows @ weight.T
    if bias is not None:
        _by_row(np.add, y, _tiled(bias, len(y)), y)
    return y.reshape(*x.shape[:-1], len(weight)), linear_vjp(x.shape, rows, weight, needs)


def linear_vjp(shape: tuple[int, ...], rows: Array, weight: Array, needs: tuple[bool, ...]) -> VJP:
    saved_rows: Array = rows if needs[1] else None

    def vjp(dy: Array, dbias: Array | None = None) -> tuple[Array | None, ...]:
        dy = dy.reshape(-1, dy.shape[-1])
        if needs[2] and dbias is None:
            dbias = np.ones(len(dy), dy.dtype) @ dy
        return (
            (dy @ weight).reshape(shape) if needs[0] else None,
            dy.T @ saved_rows if needs[1] else None,
            dbias,
        )

    return vjp


def linear_gelu(
    xp: Any, x: Array, weight: Array, bias: Array, *, approximate: str, needs: tuple[bool, ...]
) -> tuple[Array, VJP]:
    rows = x.reshape(-1, x.shape[-1])
    y = rows @ weight.T
    slope: Array = np.empty_like(y) if True in needs else None
    shift = _tiled(bias, len(y))
    for part, scratch in _row_blocks(y, 2):
        _by_row(np.add, y[part], shift, y[part])
        _gelu(y[part], y[part], None if slope is None else slope[part], scratch, approximate)
    product_vjp = linear_vjp(x.shape, rows, weight, needs)

    def vjp(dy: Array) -> tuple[Array | None, ...]:
        dy = dy.reshape(slope.shape)
        dhidden = np.empty_like(slope)
        dbias = np.zeros(len(weight), dy.dtype)
        for part, _ in _row_blocks(slope):
            piece = np.multiply(dy[part], slope[part], dhidden[part])
            dbias += np.ones(len(piece), dy.dtype) @ piece
        return product_vjp(dhidden, dbias)

    return y.reshape(*x.shape[:-1], len(weight)), vjp


def gelu(xp: Any, x: Array, *, approximate: str, needs: tuple[bool, ...]) -> tuple[Array, VJP]:
    flat = np.ascontiguousarray(x).reshape(-1, x.shape[-1] if x.size and x.ndim else 1)
    y = np.empty_like(flat)
    slope: Array = np.empty_like(flat) if needs[0] else None
    for part, scratch in _row_blocks(flat, 2):
        _gelu(flat[part], y[part], None if slope is None else slope[part], scratch, approximate)

    def vjp(dy: Array) -> tuple[Array]:
        return (dy * slope.reshape(dy.shape),)

    return y.reshape(x.shape), vjp


def _gelu(x: Array, y: Array, slope: Array | None, scratch: Array, approximate: str) -> None:
    """gelu(x) into `y`, which may be `x`, and its derivative Phi(x) + x Phi'(x) into `slope` where wanted."""
    square, phi = scratch
    with np.errstate(over="ignore"):  # tanh of infinity is 1, as it should be where x is in the thousands
        np.multiply(x, x, square)
        if approximate == "tanh":
            np.multiply(square, _PHI_TANH[1], phi)
            np.add(phi, _PHI_TANH[0], phi)
        else:
            if slope is not None:  # the normal density's exponent, while the square is there
                np.multiply(square, -0.5 * _UNIT, slope)
            _exact(square, phi)
        np.multiply(phi, x, phi)
    np.tanh(phi, phi)
    if slope is not None and approximate == "tanh":  # Phi's own derivative: (1 - tanh^2) (x P)' / 2
        np.multiply(phi, phi, slope)
        np.subtract(0.5, np.multiply(slope, 0.5, slope), slope)
        np.multiply(square, 3.0 * _PHI_TANH[1], square)
        np.add(square, _PHI_TANH[0], square)
        np.multiply(slope, square, slope)
    elif slope is not None:
        np.add(slope, -0.5 * math.log(2.0 * math.pi) * _UNIT, slope)
        _exp(slope, slope)
    np.multiply(phi, 0.5, phi)
    np.add(phi, 0.5, phi)
    if slope is not None:
        np.multiply(slope, x, slope)
        np.add(slope, phi, slope)
    np.multiply(phi, x, y)


def _exact(square: Array, p: Array) -> None:
    """P(square) into `p`; `square` is overwritten."""
    np.add(square, _A, p)
    np.multiply(p, p, p)
    np.add(p, _B, p)
    np.multiply(p, p, p)
    np.add(p, _C, p)
    np.add(square, _D, square)
    np.multiply(square, square, square)
    np.add(square, _E, square)
    np.multiply(p, square, p)
    np.add(p, _F, p)
    np.multiply(p, _K, p)


def layer_norm(
    xp: Any, x: Array, weight: Array, bias: Array, *, eps: float, needs: tuple[bool, ...]
) -> tuple[Array, VJP]:
    shape, dim = x.shape, x.shape[-1]
    rows = np.ascontiguousarray(x).reshape(-1, dim)
    y = np.empty_like(rows)
    normal = np.empty_like(rows) if True in needs else y  # the vjp below keeps this, and not the input
    rstd = np.empty((len(rows), 1), x.dtype)
    share = np.full(dim, 1.0 / dim, x.dtype)
    scale, shift = _tiled(weight, len(rows)), _tiled(bias, len(rows))
    for part, _ in _row_blocks(rows):
        n, r, out = normal[part], rstd[part], y[part]
        np.subtract(rows[part], (rows[part] @ share)[:, None], n)
        np.vecdot(n, n, r[:, 0])
        np.multiply(r, 1.0 / dim, r)
        np.add(r, eps, r)
        np.sqrt(r, r)
        np.divide(1.0, r, r)
        np.multiply(n, r, n)
        _by_row(np.multiply, n, scale, out)
        _by_row(np.add, out, shift, out)

    def vjp(dy: Array) -> tuple[Array, Array, Array]:
        dy = np.ascontiguousarray(dy).reshape(-1, dim)
        dx = np.empty_like(dy)
        dweight, dbias = np.zeros((2, dim), dy.dtype)
        mean_weight = weight * share
        for part, (product,) in _row_blocks(dy, 1):
            g, n, out = dy[part], normal[part], dx[part]
            ones = np.ones(len(g), dy.dtype)
            np.multiply(g, n, product)
            dweight += ones @ product
            dbias += ones @ g
            along = product @ mean_weight  # mean of (dy * weight * normal)
            _by_row(np.multiply, g, scale, out)
            np.subtract(out, (g @ mean_weight)[:, None], out)
            np.multiply(n, along[:, None], product)
            np.subtract(out, product, out)
            np.multiply(out, rstd[part], out)
        return dx.reshape(shape), dweight, dbias

    return y.reshape(shape), vjp


def _row_blocks(rows: Array, scratch: int = 0) -> Iterator[tuple[slice, Array]]:
    """Slices of rows that hold about BLOCK elements, each with scratch space for so many such blocks."""
    step = max(1, BLOCK // max(1, rows.shape[1]))
    space = np.empty((scratch, min(step, len(rows)), rows.shape[1]), rows.dtype)
    for start in range(0, len(rows), step):
        stop = min(start + step, len(rows))
        yield slice(start, stop), space[:, : stop - start]


def _tiled(row: Array, rows: int) -> Array:
    """`row` (C,), as often as it takes to make one of about TILE elements, for `_by_row` on so many rows."""
    tiled = np.empty((max(1, min(-(-TILE // max(1, len(row))), rows // 8)), len(row)), row.dtype)
    tiled[...] = row
    return tiled.reshape(-1)


def _by_row(ufunc: np.ufunc, x: Array, tiled: Array, out: Array) -> None:
    """ufunc(row of x, row) into `out` for each row of `x` (R, C), with row (C,) given by `_tiled`.

    `x` and `out` are contiguous. Several rows are taken as one long one: on short rows NumPy spends half its time
    between them.
    """
    if not x.size:
        return
    rows, columns = x.shape
    whole = rows - rows % (len(tiled) // columns)
    if whole:
        ufunc(x[:whole].reshape(-1, len(tiled)), tiled, out[:whole].reshape(-1, len(tiled)))
    if whole < rows:
        ufunc(x[whole:], tiled[:columns], out[whole:])


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
    batch, n, width = qkv.shape
    queries = n if queries is None else queries
    dim = width // (3 * num_heads)
    scale = 1.0 / math.sqrt(dim)
    q, k, v = _heads(qkv, num_heads)  # views (B, H, N, D)
    q = q[:, :, :queries]  # (B, H, Q, D)
    y = np.empty((batch, queries, width // 3), qkv.dtype)
    (out,) = _heads(y, num_heads, 1)
    step = max(1, 2 * BLOCK // max(1, num_heads * queries * n))  # samples whose weights fit the cache
    samples = [slice(i, i + step) for i in range(0, batch, step)]
    p = np.empty((batch if needs[0] else min(step, batch), num_heads, queries, n), qkv.dtype)
    ones = np.ones(n, qkv.dtype)
    for part in samples:
        w = p[part] if needs[0] else p[: len(q[part])]
        np.matmul(q[part], _transposed(k[part], queries), w)
        np.multiply(w, scale * _UNIT, w)
        safe = w.size and w.min() > -_EXP_LIMIT * _UNIT and w.max() < _EXP_LIMIT * _UNIT
        if not safe:  # two quick passes often save two slow ones
            np.subtract(w, np.maximum.reduce(w, axis=3, keepdims=True), w)
        _exp(w, w)
        np.divide(w, (w @ ones)[..., None], w)
        np.matmul(w, v[part], out[part])

    def vjp(dy: Array) -> tuple[Array]:
        dqkv = np.empty(qkv.shape, qkv.dtype)
        dq, dk, dv = _heads(dqkv, num_heads)
        dq[:, :, queries:] = 0
        (dout,) = _heads(np.ascontiguousarray(dy), num_heads, 1)
        scratch = np.empty((2, min(step, batch), num_heads, queries, n), qkv.dtype)
        for part in samples:
            w = p[part]
            ds, product = scratch[:, : len(w)]
            np.matmul(dout[part], _transposed(v[part], queries), ds)
            np.multiply(ds, w, product)
            np.subtract(ds, (product @ ones)[..., None], ds)
            np.multiply(ds, w, ds)
            np.multiply(ds, scale, ds)
            np.matmul(ds, k[part], dq[part][:, :, :queries])
            np.matmul(ds.swapaxes(2, 3), q[part], dk[part])
            np.matmul(w.swapaxes(2, 3), dout[part], dv[part])
        return (dqkv,)

    return y, vjp


def _transposed(x: Array, queries: int) -> Array:
    """x^T of each head, (B, H, N, D) -> (B, H, D, N), to be multiplied with (B, H, queries, D) from the left.

    OpenBLAS has kernels of their own for small products, half as fast if the second matrix is transposed: there a copy.
    """
    view = x.swapaxes(2, 3)
    return np.ascontiguousarray(view) if queries * x.shape[2] * x.shape[3] <= _SMALL_PRODUCT else view


def _heads(packed: Array, num_heads: int, parts: int = 3) -> Array:
    """Views (parts, B, H, N, D) into (B, N, parts * H * D)."""
    batch, n, width = packed.shape
    return packed.reshape(batch, n, parts, num_heads, width // (parts * num_heads)).transpose(2, 0, 3, 1, 4)


def cross_entropy(
    xp: Any, logits: Array, *, labels: Array, label_smoothing: float, needs: tuple[bool, ...]
) -> tuple[Array, VJP]:
    batch, classes = logits.shape
    numbers = labels.ndim == 1  # of classes, not probabilities
    labels = labels.copy() if numbers else labels  # the caller may write over them before the vjp
    even, rest = label_smoothing / classes, 1.0 - label_smoothing  # what each class and the labels get of the target
    p, losses = np.empty_like(logits), np.empty(batch, logits.dtype)
    mass = np.ones(batch, logits.dtype) if numbers else labels.sum(axis=1) * rest + label_smoothing  # of a row's target
    ones = np.ones(classes, logits.dtype)
    for part, _ in _row_blocks(p):
        q, given = p[part], labels[part]
        np.subtract(logits[part], logits[part].max(axis=1, keepdims=True), q)
        if not numbers:  # the sum of target * shifted logit
            losses[part] = np.vecdot(q, given * rest + even if label_smoothing else given)
        else:
            losses[part] = rest * q[np.arange(len(q)), given]
            if label_smoothing:  # 0 * -inf would be NaN
                losses[part] += even * (q @ ones)
        np.exp(q, q)
        total = q @ ones
        np.divide(q, total[:, None], q)
        losses[part] -= mass[part] * np.log(total)

    def vjp(dy: Array) -> tuple[Array]:
        dlogits = np.empty_like(p)
        for part, _ in _row_blocks(p):
            out, given = dlogits[part], labels[part]
            np.multiply(p[part], mass[part][:, None], out)
            np.subtract(out, even, out)
            if numbers:
                out[np.arange(len(out)), given] -= rest
            else:
                np.subtract(out, given * rest, out)
            np.multiply(out, dy / batch, out)
        return (dlogits,)

    return -losses.sum() / batch, vjp
