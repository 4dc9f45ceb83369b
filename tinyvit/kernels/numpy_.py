"""Kernels for NumPy arrays: the reference's mathematics, arranged for a processor's caches.

NumPy reads and writes whole arrays for every elementary step. Here a chain of steps runs over a block of rows that
stays in the cache, in place (`out=`), so that only its first read and last write go to memory; sums over
rows and columns are products with vectors, which BLAS does faster than reductions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from tinyvit.kernels import numpy_optim, reference

Array = np.ndarray
VJP = Callable[..., tuple[Array | None, ...]]

BLOCK = 1 << 18  # elements of a block: measured. Smaller ones sit deeper in the cache, but cost more calls that hold the GIL

# Phi(x) = 1/2 + 1/2 tanh(x P(x^2)): P is a weighted least-maximum fit made for this file, lowest power first. Phi comes out
# within 3e-8 of the truth (1e-7 with float32's rounding), and P stays positive however large x is. NumPy's tanh in float32
# is as fast as three additions, so this takes fewer passes than any form of erf.
_PHI = (
    0.7978849414909825, 0.03633308440312559, -3.2594737610835285e-05, -5.530632001072468e-05,
    3.964773804837876e-06, -1.3226633536777985e-07, 1.7562791371999588e-09,
)  # fmt: skip
_PHI_TANH = (math.sqrt(2.0 / math.pi), 0.044715 * math.sqrt(2.0 / math.pi))  # the tanh approximation's own P
_EXP_LIMIT = 30.0  # scores up to here need no maximum subtracted: neither their exponentials nor the sums overflow float32


def linear(xp: Any, x: Array, weight: Array, bias: Array | None, *, needs: tuple[bool, ...]) -> tuple[Array, VJP]:
    rows = x.reshape(-1, x.shape[-1])
    y = rows @ weight.T
    if bias is not None:
        np.add(y, bias, out=y)
    return y.reshape(*x.shape[:-1], len(weight)), _linear_vjp(x.shape, rows, weight, needs)


def _linear_vjp(shape: tuple[int, ...], rows: Array, weight: Array, needs: tuple[bool, ...]) -> VJP:
    saved_rows = rows if needs[1] else None

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
    if x.dtype != np.float32:
        return reference.linear_gelu(xp, x, weight, bias, approximate=approximate, needs=needs)
    rows = x.reshape(-1, x.shape[-1])
    y = rows @ weight.T
    slope = np.empty_like(y) if True in needs else None
    for piece, slope_piece, scratch in _pieces(y, slope):
        np.add(piece, bias, out=piece)
        _gelu(piece, piece, slope_piece, scratch, approximate)
    linear_vjp = _linear_vjp(x.shape, rows, weight, needs)

    def vjp(dy: Array) -> tuple[Array | None, ...]:
        dy = dy.reshape(slope.shape)
        dhidden = np.empty_like(slope)
        dbias = np.zeros(len(weight), dy.dtype)
        for part in _row_blocks(slope):
            np.multiply(dy[part], slope[part], out=dhidden[part])
            dbias += np.ones(len(dhidden[part]), dy.dtype) @ dhidden[part]
        return linear_vjp(dhidden, dbias)

    return y.reshape(*x.shape[:-1], len(weight)), vjp


def gelu(xp: Any, x: Array, *, approximate: str, needs: tuple[bool, ...]) -> tuple[Array, VJP]:
    if x.dtype != np.float32:
        return reference.gelu(xp, x, approximate=approximate, needs=needs)
    flat = np.ascontiguousarray(x).reshape(-1, x.shape[-1] if x.size and x.ndim else 1)
    y = np.empty_like(flat)
    slope = np.empty_like(flat) if needs[0] else None
    first = 0
    for piece, slope_piece, scratch in _pieces(flat, slope):
        _gelu(piece, y[first : first + len(piece)], slope_piece, scratch, approximate)
        first += len(piece)

    def vjp(dy: Array) -> tuple[Array]:
        return (dy * slope.reshape(dy.shape),)

    return y.reshape(x.shape), vjp


def _pieces(x: Array, slope: Array | None) -> Iterator[tuple[Array, Array | None, Array]]:
    """Blocks of rows of `x` and of `slope`, each with scratch space for three such blocks."""
    rows = max(1, BLOCK // max(1, x.shape[1]))
    scratch = np.empty((3, min(rows, len(x)), x.shape[1]), x.dtype)
    for start in range(0, len(x), rows):
        stop = min(start + rows, len(x))
        yield x[start:stop], None if slope is None else slope[start:stop], scratch[:, : stop - start]


def _gelu(x: Array, y: Array, slope: Array | None, scratch: Array, approximate: str) -> None:
    """gelu(x) into `y`, which may be `x`, and its derivative into `slope` where wanted."""
    square, phi, rest = scratch
    coefficients = _PHI_TANH if approximate == "tanh" else _PHI
    with np.errstate(over="ignore"):  # tanh of infinity is 1, as it should be where x is in the thousands
        np.multiply(x, x, out=square)
        _polynomial(coefficients, square, phi)
        np.multiply(phi, x, out=phi)
    np.tanh(phi, out=phi)
    if slope is not None and approximate == "tanh":  # Phi's own derivative: (1 - tanh^2) (x P)' / 2
        np.multiply(phi, phi, out=rest)
        np.subtract(0.5, np.multiply(rest, 0.5, out=rest), out=rest)
        np.multiply(square, 3.0 * coefficients[1], out=square)
        np.add(square, coefficients[0], out=square)
        np.multiply(rest, square, out=rest)
    elif slope is not None:  # the normal density
        np.multiply(square, -0.5, out=rest)
        np.add(rest, -0.5 * math.log(2.0 * math.pi), out=rest)
        np.exp(rest, out=rest)
    np.multiply(phi, 0.5, out=phi)
    np.add(phi, 0.5, out=phi)
    if slope is not None:
        np.multiply(rest, x, out=rest)
        np.add(rest, phi, out=slope)
    np.multiply(phi, x, out=y)


def _polynomial(coefficients: tuple[float, ...], x: Array, out: Array) -> None:
    """Horner's scheme, lowest power first."""
    np.multiply(x, coefficients[-1], out=out)
    for c in coefficients[-2:0:-1]:
        np.add(out, c, out=out)
        np.multiply(out, x, out=out)
    np.add(out, coefficients[0], out=out)


def layer_norm(
    xp: Any, x: Array, weight: Array, bias: Array, *, eps: float, needs: tuple[bool, ...]
) -> tuple[Array, VJP]:
    dim = x.shape[-1]
    rows = np.ascontiguousarray(x).reshape(-1, dim)
    y = np.empty_like(rows)
    recording = True in needs
    normal = np.empty_like(rows) if recording else y
    rstd = np.empty((len(rows), 1), x.dtype)
    share = np.full(dim, 1.0 / dim, x.dtype)
    for part in _row_blocks(rows):
        n, r = normal[part], rstd[part]
        np.subtract(rows[part], (rows[part] @ share)[:, None], out=n)
        np.matmul(n * n, share, out=r[:, 0])
        np.add(r, eps, out=r)
        np.sqrt(r, out=r)
        np.divide(1.0, r, out=r)
        np.multiply(n, r, out=n)
        np.multiply(n, weight, out=y[part])
        np.add(y[part], bias, out=y[part])

    def vjp(dy: Array) -> tuple[Array, Array, Array]:
        dy = np.ascontiguousarray(dy).reshape(-1, dim)
        dx = np.empty_like(dy)
        dweight, dbias = np.zeros((2, dim), dy.dtype)
        mean_weight = weight * share
        for part in _row_blocks(dy):
            g, n = dy[part], normal[part]
            ones = np.ones(len(g), dy.dtype)
            product = g * n
            dweight += ones @ product
            dbias += ones @ g
            along = product @ mean_weight  # mean of (dy * weight * normal)
            out = np.multiply(g, weight, out=dx[part])
            np.subtract(out, (g @ mean_weight)[:, None], out=out)
            np.multiply(n, along[:, None], out=product)
            np.subtract(out, product, out=out)
            np.multiply(out, rstd[part], out=out)
        return dx.reshape(x.shape), dweight, dbias

    return y.reshape(x.shape), vjp


def _row_blocks(rows: Array) -> Iterator[slice]:
    """Slices of rows that hold about BLOCK elements."""
    step = max(1, BLOCK // max(1, rows.shape[1]))
    for start in range(0, len(rows), step):
        yield slice(start, start + step)


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
    if mask is not None or keep is not None:
        return reference.qkv_attention(
            xp, qkv, num_heads=num_heads, queries=queries, mask=mask, keep=keep, needs=needs
        )
    batch, n, width = qkv.shape
    asking = n if queries is None else queries
    dim = width // (3 * num_heads)
    scale = 1.0 / math.sqrt(dim)
    q, k, v = _heads(qkv, num_heads)  # views (B, H, N, D)
    q = q[:, :, :asking]  # (B, H, Q, D)
    y = np.empty((batch, asking, width // 3), qkv.dtype)
    (out,) = _heads(y, num_heads, 1)
    step = max(1, 2 * BLOCK // max(1, num_heads * asking * n))  # samples whose weights fit the cache
    samples = [slice(i, i + step) for i in range(0, batch, step)]
    p = np.empty((batch if needs[0] else min(step, batch), num_heads, asking, n), qkv.dtype)
    ones = np.ones(n, qkv.dtype)
    for part in samples:
        w = p[part] if needs[0] else p[: len(q[part])]
        np.matmul(q[part], k[part].swapaxes(2, 3), out=w)
        np.multiply(w, scale, out=w)
        safe = w.size and w.dtype != np.float16 and -_EXP_LIMIT < w.min() and w.max() < _EXP_LIMIT
        if not safe:  # two quick passes often save two slow ones
            np.subtract(w, np.maximum.reduce(w, axis=3, keepdims=True), out=w)
        np.exp(w, out=w)
        np.divide(w, (w @ ones)[..., None], out=w)
        np.matmul(w, v[part], out=out[part])

    def vjp(dy: Array) -> tuple[Array]:
        dqkv = np.empty(qkv.shape, qkv.dtype)
        dq, dk, dv = _heads(dqkv, num_heads)
        dq[:, :, asking:] = 0
        (dout,) = _heads(np.ascontiguousarray(dy), num_heads, 1)
        scratch = np.empty((2, min(step, batch), num_heads, asking, n), qkv.dtype)
        for part in samples:
            w = p[part]
            ds, product = scratch[:, : len(w)]
            np.matmul(dout[part], v[part].swapaxes(2, 3), out=ds)
            np.multiply(ds, w, out=product)
            np.subtract(ds, (product @ ones)[..., None], out=ds)
            np.multiply(ds, w, out=ds)
            np.multiply(ds, scale, out=ds)
            np.matmul(ds, k[part], out=dq[part][:, :, :asking])
            np.matmul(ds.swapaxes(2, 3), q[part], out=dk[part])
            np.matmul(w.swapaxes(2, 3), dout[part], out=dv[part])
        return (dqkv,)

    return y, vjp


def _heads(packed: Array, num_heads: int, parts: int = 3) -> Array:
    """Views (parts, B, H, N, D) into (B, N, parts * H * D)."""
    batch, n, width = packed.shape
    return packed.reshape(batch, n, parts, num_heads, width // (parts * num_heads)).transpose(2, 0, 3, 1, 4)


KERNELS: dict[str, Callable] = {
    f.__name__: f for f in (linear, linear_gelu, gelu, layer_norm, qkv_attention)
} | numpy_optim.KERNELS
