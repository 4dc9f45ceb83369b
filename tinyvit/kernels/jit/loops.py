"""The layers' loops: each goes through memory once, and without Python's lock.

Only sums are reordered (`reorder`), so that infinities and NaN go where they go in NumPy; multiplying and adding may be
one instruction everywhere. Products of matrices are done in blocks of registers (see `products`), large ones by NumPy's
own BLAS, called by the address of its `cblas_sgemm`.
"""

from __future__ import annotations

import math

import numpy as np
from numba import boolean, float32, int32, int64, types

from tinyvit.kernels.cpu.layers import _PHI_TANH
from tinyvit.kernels.jit.compiling import (
    aligned,
    bits_of_float,
    compiled,
    copysign,
    float_of_bits,
    maximum,
    product,
    read,
    widest,
    written,
)  # fmt: skip
from tinyvit.kernels.jit.products import (
    ROWS,
    add_transposed,
    can_add,
    fits,
    multiply,
    panels_of_columns,
    panels_of_rows,
    small_product,
    small_product_of_transposed,
)  # fmt: skip

# mypy: disable-error-code="no-untyped-def, call-arg"

f = np.float32
ZERO, HALF, ONE, TWO, THREE = f(0.0), f(0.5), f(1.0), f(2.0), f(3.0)

# --- exponential and GELU ---------------------------------------------------------------------------------------------

# e^x = 2^n e^r, n = round(x / ln 2): adding 1.5 * 2^23 rounds, and leaves n in the lowest bits. ln 2 is split in two,
# so that n ln 2 is exact, and e^r is Cephes' polynomial (Moshier 1989). Within 1.2e-7 of the truth, relatively.
_LOG2_E, _LN2_HIGH, _LN2_LOW, ROUND = f(1.4426950408889634), f(0.693359375), f(-2.12194440e-4), f(12582912.0)
_E0, _E1, _E2 = f(1.9875691500e-4), f(1.3981999507e-3), f(8.3334519073e-3)
_E3, _E4, _E5 = f(4.1665795894e-2), f(1.6666665459e-1), f(5.0000001201e-1)
_LOWEST, _HIGHEST = f(-88.0), f(89.0)  # where n is -127 and 128: the bits of 0 and of infinity

# The normal distribution's upper tail is density(x) t (T0 + ... + T5 t^5) for x >= 0, t = 1 / (1 + T x): the form of
# Hastings 1955, a least-maximum fit made for this file, within 4e-9.
_T, _T0, _T1, _T2 = f(0.275997), f(0.29484163), f(0.11708208), f(0.80759466)
_T3, _T4, _T5 = f(-0.78684713), f(1.10503375), f(-0.28439086)
# Its Phi(x) is also 1/2 + x (P0 + ... + P14 v^14), v = 2 (x / 5.4)^2 - 1, within 3e-8 for |x| <= 5.4:
# another such fit. Farther out it is 0 or 1. With the roundings of float32 within 1.3e-7.
_EDGE, _STRETCH = f(5.4), f(2.0 / 5.4**2)
_P0, _P1, _P2, _P3, _P4 = f(0.130928114), f(-0.0653280541), f(0.0484995916), f(-0.039206814), f(0.0321165957)
_P5, _P6, _P7, _P8 = f(-0.0257464573), f(0.0196451414), f(-0.0139633194), f(0.00965120364)
_P9, _P10, _P11, _P12 = f(-0.00671534007), f(0.00365890935), f(-0.00118640857), f(0.000874944031)
_P13, _P14 = f(-0.00102836941), f(0.000392855582)
_DENSITY = f(1.0 / math.sqrt(2.0 * math.pi))
_TANH0, _TANH1 = map(f, _PHI_TANH)


@compiled(float32, result=float32, inline=True)
def exp(x):
    """e^x; 0 below -87.3 and infinity above 88.4."""
    x = _LOWEST if x < _LOWEST else x  # written so that NaN stays
    x = _HIGHEST if x > _HIGHEST else x
    shifted = x * _LOG2_E + ROUND
    n = shifted - ROUND
    r = x - n * _LN2_HIGH - n * _LN2_LOW
    p = ((((_E0 * r + _E1) * r + _E2) * r + _E3) * r + _E4) * r + _E5
    return (p * (r * r) + r + ONE) * float_of_bits((bits_of_float(shifted) << int32(23)) + int32(0x3F800000))


@compiled(float32, result=float32, inline=True)
def _phi(x):
    """The normal distribution's Phi(x)."""
    near = -_EDGE if x < -_EDGE else x  # written so that NaN stays
    near = _EDGE if near > _EDGE else near
    v = near * near * _STRETCH - ONE
    p = ((((_P14 * v + _P13) * v + _P12) * v + _P11) * v + _P10) * v + _P9
    p = (((((p * v + _P8) * v + _P7) * v + _P6) * v + _P5) * v + _P4) * v + _P3
    phi = HALF + near * (((p * v + _P2) * v + _P1) * v + _P0)
    return ZERO if x < -_EDGE else phi


@compiled(float32, result=types.UniTuple(float32, 2), inline=True)
def _phi_and_density(x):
    """Phi(x), and its derivative: with an exponential Phi is cheaper this way."""
    density = exp(-HALF * x * x) * _DENSITY
    t = ONE / (ONE + _T * abs(x))
    tail = density * t * (((((_T5 * t + _T4) * t + _T3) * t + _T2) * t + _T1) * t + _T0)
    return HALF + copysign(HALF - tail, x), density


@compiled(float32, result=types.UniTuple(float32, 2), inline=True)
def _tanh(x):
    """The tanh approximation of Phi(x), and its derivative."""
    square = x * x
    phi = ONE / (ONE + exp(-TWO * x * (_TANH1 * square + _TANH0)))
    return phi, TWO * phi * (ONE - phi) * (THREE * _TANH1 * square + _TANH0)


@compiled(written(2), read(1), written(2), boolean)
def bias_gelu(y, bias, slope, tanh):
    """gelu(y + bias) in the place of y (R, C), and its derivative in `slope` (R, C) if that has rows."""
    widest()
    rows, columns = y.shape
    wanted = len(slope) > 0
    for i in range(rows):  # a loop for each case, because LLVM vectorises none with cases in it
        if wanted and tanh:
            for j in range(columns):
                x = y[i, j] + bias[j]
                phi, density = _tanh(x)
                y[i, j], slope[i, j] = x * phi, phi + x * density
        elif wanted:
            for j in range(columns):
                x = y[i, j] + bias[j]
                phi, density = _phi_and_density(x)
                y[i, j], slope[i, j] = x * phi, phi + x * density
        elif tanh:
            for j in range(columns):
                x = y[i, j] + bias[j]
                y[i, j] = x * _tanh(x)[0]
        else:
            for j in range(columns):
                x = y[i, j] + bias[j]
                y[i, j] = x * _phi(x)


_PART = 128  # rows that are added up before their sum is added to others: float32 keeps more digits of it


@compiled(read(2), read(2), written(2), written(1))
def multiply_and_sum(a, b, product, total):
    """a * b (R, C), and the sum of its rows added to `total` (C,)."""
    widest()
    rows, columns = a.shape
    for start in range(0, rows, _PART):
        part = np.zeros(columns, np.float32)
        for i in range(start, min(rows, start + _PART)):
            for j in range(columns):
                x = a[i, j] * b[i, j]
                product[i, j] = x
                part[j] += x
        for j in range(columns):
            total[j] += part[j]


@compiled(read(2), written(1))
def add_rows(x, total):
    """The sum of the rows of x (R, C) added to `total` (C,), or nothing to (0,)."""
    rows, columns = len(x), len(total)
    for start in range(0, rows, _PART):
        part = np.zeros(columns, np.float32)
        for i in range(start, min(rows, start + _PART)):
            for j in range(columns):
                part[j] += x[i, j]
        for j in range(columns):
            total[j] += part[j]


# --- linear layers and layer norm -------------------------------------------------------------------------------------


NOTHING, GELU, TANH_GELU = range(3)  # what follows a product
_BAND = 8 * ROWS  # rows that are computed at a time: what follows finds them in a cache


@compiled(int64, int64, result=int64)
def _next_band(top, rows):
    """The end of the band from the row `top` on: at least ROWS rows."""
    return top + _BAND if rows - top >= _BAND + ROWS else rows


@compiled(read(2), read(2), read(2), read(1), written(2), int64)
def linear(residual, x, weight, bias, y, sgemm):
    """residual + x W^T + b; `residual` is (R, O), or (0, O) for none."""
    rows, columns = y.shape
    if fits(rows, columns, x.shape[1]):
        panels, top = panels_of_columns(weight), 0
        while top < rows:
            bottom = _next_band(top, rows)
            multiply(x, panels, bias, y, top, bottom)
            if len(residual):
                for i in range(top, bottom):
                    for j in range(columns):
                        y[i, j] += residual[i, j]
            top = bottom
        return
    # BLAS can add the product to what it finds in y, which costs no more than to write it there.
    if len(residual):
        for i in range(rows):
            for j in range(columns):
                y[i, j] = residual[i, j] + bias[j]
    else:
        for i in range(rows):
            for j in range(columns):
                y[i, j] = bias[j]
    product(
        sgemm, False, True, rows, columns, x.shape[1],
        ONE, x.ctypes.data, x.shape[1], weight.ctypes.data, x.shape[1], ONE, y.ctypes.data, columns,
    )  # fmt: skip


@compiled(read(2), read(2), read(1), written(2), written(2), boolean, int64)
def linear_gelu(x, weight, bias, y, slope, tanh, sgemm):
    """gelu(x W^T + b), and its derivative in `slope` (R, O) if that has rows."""
    rows, columns = y.shape
    if fits(rows, columns, x.shape[1]):
        panels, zeros, top = panels_of_columns(weight), np.zeros(columns, np.float32), 0
        while top < rows:
            bottom = _next_band(top, rows)
            multiply(x, panels, zeros, y, top, bottom)
            bias_gelu(y[top:bottom], bias, slope[top:bottom], tanh)
            top = bottom
        return
    product(
        sgemm, False, True, rows, columns, x.shape[1],
        ONE, x.ctypes.data, x.shape[1], weight.ctypes.data, x.shape[1], ZERO, y.ctypes.data, columns,
    )  # fmt: skip
    bias_gelu(y, bias, slope, tanh)


@compiled(read(2), read(2), read(2), written(2), written(2), int64)
def _large_products(dh, x, weight, dx, dweight, sgemm):
    """`linear_vjp` without a bias. numba frees an array after its last use, but for an argument as `dh` is here."""
    rows, outputs = dh.shape
    inputs = weight.shape[1]
    if len(dx):
        product(
            sgemm, False, False, rows, inputs, outputs,
            ONE, dh.ctypes.data, outputs, weight.ctypes.data, inputs, ZERO, dx.ctypes.data, inputs,
        )  # fmt: skip
    if len(dweight):
        product(
            sgemm, True, False, outputs, inputs, rows,
            ONE, dh.ctypes.data, outputs, x.ctypes.data, inputs, ONE, dweight.ctypes.data, inputs,
        )  # fmt: skip


@compiled(read(2), read(2), read(2), read(2), written(2), written(2), written(1), int64)
def linear_vjp(dy, slope, x, weight, dx, dweight, dbias, sgemm):
    """The gradients of x W^T + b: in `dx` (R, I), and added to `dweight` (O, I) and `dbias` (O,), if they have rows.

    That of its result is `dy` (R, O), times `slope` if that has rows, and `dbias` then, too.
    """
    rows, outputs = dy.shape
    inputs = weight.shape[1]
    in_bands = fits(rows, inputs, outputs)
    adds = in_bands and can_add(outputs, inputs)
    whole = not in_bands or (len(dweight) > 0 and not adds)  # BLAS does what remains
    panels, zeros = panels_of_rows(weight if in_bands and len(dx) else weight[:0]), np.zeros(inputs, np.float32)
    room = np.empty((0 if len(slope) == 0 else rows if whole else _BAND + ROWS, outputs), np.float32)
    top = 0
    while top < rows:
        bottom = _next_band(top, rows)
        dh = dy[top:bottom]
        if len(slope):
            first = top if whole else 0
            dh = room[first : first + bottom - top]
            multiply_and_sum(dy[top:bottom], slope[top:bottom], dh, dbias)
        else:
            add_rows(dh, dbias)
        if in_bands and len(dx):
            multiply(dh, panels, zeros, dx[top:bottom], 0, bottom - top)
        if adds and len(dweight):
            add_transposed(dh, x[top:bottom], dweight)
        top = bottom
    if whole:
        _large_products(room if len(slope) else dy, x, weight, dx[:0] if in_bands else dx, dweight, sgemm)


@compiled(read(2), read(1), read(1), float32, written(2), written(2), reorder=True)
def layer_norm(x, weight, bias, eps, y, moments):
    """Each row of x (R, D) normalised into y; its mean and 1 / standard deviation into `moments` (R, 2)."""
    rows, dim = x.shape
    for i in range(rows):
        total = ZERO
        for j in range(dim):
            total += x[i, j]
        mean = total / f(dim)
        total = ZERO
        for j in range(dim):
            total += (x[i, j] - mean) * (x[i, j] - mean)
        rstd = ONE / f(math.sqrt(total / f(dim) + eps))
        for j in range(dim):
            y[i, j] = (x[i, j] - mean) * rstd * weight[j] + bias[j]
        moments[i, 0], moments[i, 1] = mean, rstd


@compiled(read(2), read(2), read(1), read(2), written(2), written(1), written(1), reorder=True)
def layer_norm_vjp(dy, x, weight, moments, dx, dweight, dbias):
    """`dweight` and `dbias` are added to."""
    rows, dim = x.shape
    for start in range(0, rows, _PART):
        weight_part, bias_part = np.zeros(dim, np.float32), np.zeros(dim, np.float32)
        for i in range(start, min(rows, start + _PART)):
            mean, rstd = moments[i, 0], moments[i, 1]
            total, along = ZERO, ZERO
            for j in range(dim):
                g = dy[i, j] * weight[j]
                total += g
                along += g * ((x[i, j] - mean) * rstd)
            total, along = total / f(dim), along / f(dim)
            for j in range(dim):
                normal = (x[i, j] - mean) * rstd
                dx[i, j] = (dy[i, j] * weight[j] - total - normal * along) * rstd
                weight_part[j] += dy[i, j] * normal
                bias_part[j] += dy[i, j]
        for j in range(dim):
            dweight[j] += weight_part[j]
            dbias[j] += bias_part[j]


# --- attention --------------------------------------------------------------------------------------------------------


@compiled(written(1), int64, float32, reorder=True)
def softmax(scores, columns, scale):
    """The softmax of each row of scale * scores (R * columns,) in its place; `scale` is positive.

    The exponentials are one loop over all rows, as the end of a loop is not vectorised.
    """
    widest()
    for start in range(0, len(scores), columns):
        row = scores[start : start + columns]
        highest = row[0]
        for j in range(columns):
            highest = maximum(highest, row[j])
        for j in range(columns):
            row[j] = (row[j] - highest) * scale
    for j in range(len(scores)):
        scores[j] = exp(scores[j])
    for start in range(0, len(scores), columns):
        row, total = scores[start : start + columns], ZERO
        for j in range(columns):
            total += row[j]
        share = ONE / total
        for j in range(columns):
            row[j] *= share


@compiled(read(3), written(3), written(1), int64, int64, int64)
def attention(qkv, y, weights, heads, tile, sgemm):
    """qkv (B, N, 3 H D) -> y (B, Q, H D), so many queries at a time that their scores stay in the cache.

    `weights` has room for B H Q N numbers to keep them, or for tile N, which every tile uses.
    """
    batch, n, width = qkv.shape
    queries, model = y.shape[1], y.shape[2]
    dim = model // heads
    scale, turned = f(1.0 / math.sqrt(dim)), aligned(dim * n)
    kept = len(weights) == batch * heads * queries * n
    for b in range(batch):
        for h in range(heads):
            q = qkv.ctypes.data + 4 * (b * n * width + h * dim)
            k, v = q + 4 * model, q + 8 * model
            out = y.ctypes.data + 4 * (b * queries * model + h * dim)
            for start in range(0, queries, tile):
                rows = min(tile, queries - start)
                first = ((b * heads + h) * queries + start) * n if kept else 0
                w = weights[first : first + rows * n]
                query, at = q + 4 * start * width, w.ctypes.data
                small_product_of_transposed(sgemm, rows, n, dim, query, width, k, width, at, n, turned.ctypes.data)
                softmax(w, n, scale)
                small_product(sgemm, False, rows, dim, n, at, n, v, width, ZERO, out + 4 * start * model, model)


_part = types.Array(float32, 2, "A", readonly=True)  # whose rows may lie apart


@compiled(written(2), read(2), _part, _part, float32, reorder=True, inline=True)
def softmax_vjp(scores, weights, dout, out, scale):
    """The gradient of the weights (rows, N), in `scores`, becomes that of the scores; `out`, `dout` (rows, D)."""
    for i in range(len(scores)):
        along = ZERO  # the sum of weights times their gradients is that of outputs times theirs
        for j in range(out.shape[1]):
            along += dout[i, j] * out[i, j]
        for j in range(scores.shape[1]):
            scores[i, j] = weights[i, j] * (scores[i, j] - along) * scale


@compiled(read(3), read(3), read(3), read(4), written(3), int64, int64, int64, reorder=True)
def attention_vjp(dy, qkv, y, weights, dqkv, heads, tile, sgemm):
    """The gradient dqkv (B, N, 3 H D) of `attention` with all its weights, so many queries at a time."""
    batch, n, width = qkv.shape
    queries, model = y.shape[1], y.shape[2]
    dim, scratch = model // heads, aligned(tile * n).reshape(tile, n)
    ds = scratch.ctypes.data
    scale, turned = f(1.0 / math.sqrt(dim)), aligned(dim * n)
    for b in range(batch):
        for h in range(heads):
            here = 4 * (b * n * width + h * dim)
            q, dq = qkv.ctypes.data + here, dqkv.ctypes.data + here
            k, v, dk, dv = q + 4 * model, q + 8 * model, dq + 4 * model, dq + 8 * model
            for start in range(0, queries, tile):
                rows = min(tile, queries - start)
                w = weights[b, h, start : start + rows]
                dout = dy.ctypes.data + 4 * ((b * queries + start) * model + h * dim)
                small_product_of_transposed(sgemm, rows, n, dim, dout, model, v, width, ds, n, turned.ctypes.data)
                here, part = slice(start, start + rows), slice(h * dim, h * dim + dim)
                softmax_vjp(scratch[:rows], w, dy[b, here, part], y[b, here, part], scale)
                first, beta = 4 * start * width, ONE if start else ZERO
                small_product(sgemm, False, rows, dim, n, ds, n, k, width, ZERO, dq + first, width)
                small_product(sgemm, True, n, dim, rows, ds, n, q + first, width, beta, dk, width)
                small_product(sgemm, True, n, dim, rows, w.ctypes.data, n, dout, model, beta, dv, width)


# --- AdamW ------------------------------------------------------------------------------------------------------------


@compiled(written(1), read(1), written(1), written(1), *(float32,) * 5)
def adamw(p, g, m, v, beta1, beta2, eps, rate, kept):
    """p = kept p - rate m / (sqrt(v) + eps), with the running means m of g and v of g^2."""
    for i in range(len(p)):
        m[i] += (ONE - beta1) * (g[i] - m[i])
        v[i] = beta2 * v[i] + (ONE - beta2) * g[i] * g[i]
        p[i] = kept * p[i] - rate * (m[i] / (f(math.sqrt(v[i])) + eps))
