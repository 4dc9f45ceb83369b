"""The ViT's operations as the field's papers define them, in the array API standard alone.

This is the specification: it runs on any compliant library, and every faster kernel is held to the same
tests. Each function takes the namespace `xp`, arrays of one dtype, and `needs` (for which arrays a gradient
is wanted); it returns the result and its vector-Jacobian product.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from tinyvit import kernels
from tinyvit.backend import arrays, random
from tinyvit.backend.arrays import VJP, Array
from tinyvit.kernels.half_precision import in_fp32

# Rational approximations of erf(x)/x on |x| <= 0.46875 and of erfc(x) exp(x^2) above it:
# W. J. Cody, "Rational Chebyshev approximations for the error function", Math. Comp. 23 (1969).
_ERF_P = (
    1.85777706184603153e-1, 3.16112374387056560e0, 1.13864154151050156e2, 3.77485237685302021e2, 3.20937758913846947e3,
)  # fmt: skip
_ERF_Q = (1.0, 2.36012909523441209e1, 2.44024637934444173e2, 1.28261652607737228e3, 2.84423683343917062e3)
_ERF_P_MINUS_Q = tuple(p - q for p, q in zip(_ERF_P, _ERF_Q, strict=True))
_ERFC_P = (
    2.15311535474403846e-8, 5.64188496988670089e-1, 8.88314979438837594e0, 6.61191906371416295e1,
    2.98635138197400131e2, 8.81952221241769090e2, 1.71204761263407058e3, 2.05107837782607147e3, 1.23033935479799725e3,
)  # fmt: skip
_ERFC_Q = (
    1.0, 1.57449261107098347e1, 1.17693950891312499e2, 5.37181101862009858e2, 1.62138957456669019e3,
    3.29079923573345963e3, 4.36261909014324716e3, 3.43936767414372164e3, 1.23033935480374942e3,
)  # fmt: skip


def _polynomial(coefficients: tuple[float, ...], x: Array) -> Array:
    """Horner's scheme, highest power first."""
    y = x * coefficients[0] + coefficients[1]
    for c in coefficients[2:]:
        y = y * x + c
    return y


def erf(xp: Any, x: Array) -> Array:
    """The error function, elementwise: absolute error below 1e-7 in float32 and 1e-15 in float64."""
    near_limit = 0.46875 if x.dtype == xp.float64 else 1.0  # beyond Cody's interval the first form stays below 1e-9
    size = xp.abs(x)
    is_near = size <= near_limit
    small = xp.where(is_near, x, xp.zeros_like(x))
    square = small * small
    near = small + small * (
        _polynomial(_ERF_P_MINUS_Q, square) / _polynomial(_ERF_Q, square)
    )  # one rounding at the end
    t = xp.where(size > 6.0, xp.ones_like(x) * 6.0, size)  # erf(6) is 1 in float64
    far = 1.0 - xp.exp(-(t * t)) * (_polynomial(_ERFC_P, t) / _polynomial(_ERFC_Q, t))
    return xp.where(is_near, near, far * xp.sign(x))


@in_fp32
def linear(xp: Any, x: Array, weight: Array, bias: Array | None, *, needs: tuple[bool, ...]) -> tuple[Array, VJP]:
    """y = x W^T + b on the last axis. x (..., I), weight (O, I), bias (O,) -> (..., O)."""
    rows = xp.reshape(x, (-1, x.shape[-1]))  # one product of two matrices, however many axes x has
    y = rows @ weight.T
    if bias is not None:
        y = y + bias
    saved_rows: Array = rows if needs[1] else None
    shape = x.shape

    def vjp(dy: Array) -> tuple[Array | None, ...]:
        dy = xp.reshape(dy, (-1, dy.shape[-1]))
        return (
            xp.reshape(dy @ weight, shape) if needs[0] else None,
            dy.T @ saved_rows if needs[1] else None,
            xp.sum(dy, axis=0) if needs[2] else None,
        )

    return xp.reshape(y, (*shape[:-1], weight.shape[0])), vjp


@in_fp32
def add_linear(
    xp: Any, residual: Array, x: Array, weight: Array, bias: Array | None, *, needs: tuple[bool, ...]
) -> tuple[Array, VJP]:
    """residual + x W^T + b: the end of a residual branch. residual (..., O), x (..., I) -> (..., O)."""
    y, linear_vjp = kernels.best(linear, xp)(xp, x, weight, bias, needs=needs[1:])
    return residual + y, lambda dy: (dy, *linear_vjp(dy))


@in_fp32
def add_scaled(xp: Any, residual: Array, x: Array, *, scale: Array, needs: tuple[bool, ...]) -> tuple[Array, VJP]:
    """residual + scale x: the end of a residual branch with drop path. residual and x (B, ...), scale (B, 1, ...)."""
    return residual + scale * x, lambda dy: (dy, scale * dy)


@in_fp32
def layer_norm(
    xp: Any, x: Array, weight: Array, bias: Array, *, eps: float, needs: tuple[bool, ...]
) -> tuple[Array, VJP]:
    """y = (x - mean) / sqrt(var + eps) * weight + bias over the last axis (Ba et al. 2016, arXiv:1607.06450)."""
    normal, normal_vjp = normalise(xp, x, eps)

    def vjp(dy: Array) -> tuple[Array, Array, Array]:
        rows = tuple(range(dy.ndim - 1))
        return normal_vjp(dy * weight), xp.sum(dy * normal, axis=rows), xp.sum(dy, axis=rows)

    return normal * weight + bias, vjp


def normalise(xp: Any, rows: Array, eps: float) -> tuple[Array, Callable[[Array], Array]]:
    """(rows - mean) / sqrt(var + eps) over the last axis, and the function from its gradient to that of the rows."""
    centred = rows - xp.mean(rows, axis=-1, keepdims=True)
    rstd = 1.0 / xp.sqrt(xp.mean(centred * centred, axis=-1, keepdims=True) + eps)
    normal = centred * rstd

    def vjp(g: Array) -> Array:
        return rstd * (g - xp.mean(g, axis=-1, keepdims=True) - normal * xp.mean(g * normal, axis=-1, keepdims=True))

    return normal, vjp


@in_fp32
def gelu(xp: Any, x: Array, *, approximate: str, needs: tuple[bool, ...]) -> tuple[Array, VJP]:
    """x Phi(x), or its tanh approximation (Hendrycks & Gimpel 2016, arXiv:1606.08415)."""
    if approximate == "tanh":
        a, b = math.sqrt(2.0 / math.pi), 0.044715
        t = xp.tanh(a * (x + b * x * x * x))
        phi = 0.5 * (1.0 + t)

        def vjp(dy: Array) -> tuple[Array]:
            return (dy * (phi + 0.5 * x * (1.0 - t * t) * a * (1.0 + 3.0 * b * x * x)),)

    else:
        phi = 0.5 * (1.0 + erf(xp, x * math.sqrt(0.5)))

        def vjp(dy: Array) -> tuple[Array]:
            return (dy * (phi + x * xp.exp(-0.5 * x * x) * (1.0 / math.sqrt(2.0 * math.pi))),)

    return x * phi, vjp


@in_fp32
def linear_gelu(
    xp: Any, x: Array, weight: Array, bias: Array, *, approximate: str, needs: tuple[bool, ...]
) -> tuple[Array, VJP]:
    """gelu(x W^T + b): the first half of an MLP. x (..., I), weight (O, I), bias (O,) -> (..., O)."""
    hidden, linear_vjp = linear(xp, x, weight, bias, needs=needs)
    y, gelu_vjp = gelu(xp, hidden, approximate=approximate, needs=(True in needs,))
    return y, lambda dy: linear_vjp(*gelu_vjp(dy))


def mlp(
    xp: Any, residual: Array | None, x: Array, *weights: Array, approximate: str, needs: tuple[bool, ...]
) -> tuple[Array, VJP]:
    """residual + gelu(x W1^T + b1) W2^T + b2, by the fastest kernels for its layers; None for no residual.

    residual (..., O), x (..., I); `weights` are weight (H, I), bias (H,), weight (O, H) and bias (O,) -> (..., O).
    """
    first, second = needs[1:4], (needs[0], True in needs[1:4], *needs[4:])
    hidden, first_vjp = kernels.best(linear_gelu, xp)(xp, x, *weights[:2], approximate=approximate, needs=first)
    if residual is None:
        y, second_vjp = kernels.best(linear, xp)(xp, hidden, *weights[2:], needs=second[1:])
    else:
        y, second_vjp = kernels.best(add_linear, xp)(xp, residual, hidden, *weights[2:], needs=second)

    def vjp(dy: Array) -> tuple[Array | None, ...]:
        dhidden, *dsecond = second_vjp(dy)[-3:]
        dfirst = first_vjp(dhidden) if True in first else (None,) * 3
        return dy, *dfirst, *dsecond

    return y, vjp


@in_fp32
def softmax(xp: Any, x: Array, *, axis: int, needs: tuple[bool, ...]) -> tuple[Array, VJP]:
    """exp(x) / sum(exp(x)) along one axis, with the largest entry subtracted first."""
    e = xp.exp(x - xp.max(x, axis=axis, keepdims=True))
    y = e / xp.sum(e, axis=axis, keepdims=True)

    def vjp(dy: Array) -> tuple[Array]:
        return (y * (dy - xp.sum(dy * y, axis=axis, keepdims=True)),)

    return y, vjp


@in_fp32
def log_softmax(xp: Any, x: Array, *, axis: int, needs: tuple[bool, ...]) -> tuple[Array, VJP]:
    """x - log(sum(exp(x))) along one axis."""
    y = x - xp.max(x, axis=axis, keepdims=True)
    y = y - xp.log(xp.sum(xp.exp(y), axis=axis, keepdims=True))

    def vjp(dy: Array) -> tuple[Array]:
        return (dy - xp.exp(y) * xp.sum(dy, axis=axis, keepdims=True),)

    return y, vjp


@in_fp32
def attention(
    xp: Any,
    q: Array,
    k: Array,
    v: Array,
    *,
    mask: Array | None = None,
    dropout_mask: Array | None = None,
    needs: tuple[bool, ...],
) -> tuple[Array, VJP]:
    """softmax(q k^T / sqrt(D) + mask) v (Vaswani et al. 2017, arXiv:1706.03762, section 3.2.1).

    q (B, H, N, D), k (B, H, M, D), v (B, H, M, E) -> (B, H, N, E). `mask` broadcasts to (B, H, N, M): True or 0
    where a query may look, False or -inf where it may not; a query that may look nowhere gives zeros. `dropout_mask`
    (B, H, N, M) multiplies the weights: 0 or 1 / (1 - probability).
    """
    scale = 1.0 / math.sqrt(q.shape[-1])
    scores = (q @ xp.matrix_transpose(k)) * scale  # (B, H, N, M)
    if mask is not None:
        if xp.isdtype(mask.dtype, "bool"):
            mask = xp.where(mask, xp.zeros_like(scores), xp.ones_like(scores) * -math.inf)
        scores = scores + mask
        highest = xp.max(scores, axis=-1, keepdims=True)
        scores = scores - xp.where(highest == -math.inf, xp.zeros_like(highest), highest)
    else:
        scores = scores - xp.max(scores, axis=-1, keepdims=True)
    e = xp.exp(scores)
    total = xp.sum(e, axis=-1, keepdims=True)
    p = e / (xp.where(total == 0, xp.ones_like(total), total) if mask is not None else total)
    weights = p if dropout_mask is None else p * dropout_mask

    def vjp(dy: Array) -> tuple[Array, Array, Array]:  # (B, H, N, E)
        dp = dy @ xp.matrix_transpose(v)  # (B, H, N, M)
        if dropout_mask is not None:
            dp = dp * dropout_mask
        ds = p * (dp - xp.sum(dp * p, axis=-1, keepdims=True)) * scale
        return ds @ k, xp.matrix_transpose(ds) @ q, xp.matrix_transpose(weights) @ dy

    return weights @ v, vjp


@in_fp32
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
    """Multi-head self-attention on the packed output of one linear layer: (B, N, 3 H D) -> (B, Q, H D).

    The queries are those of the first Q = `queries` tokens, of all if None.
    """
    batch, n, width = qkv.shape
    queries = n if queries is None else queries
    dim = width // (3 * num_heads)
    heads = xp.permute_dims(xp.reshape(qkv, (batch, n, 3, num_heads, dim)), (2, 0, 3, 1, 4))
    y, attention_vjp = attention(
        xp,
        heads[0, :, :, :queries, :],
        heads[1, ...],
        heads[2, ...],
        mask=mask,
        dropout_mask=dropout_mask,
        needs=needs * 3,
    )  # (B, H, Q, D)

    def vjp(dy: Array) -> tuple[Array]:
        dy = xp.permute_dims(xp.reshape(dy, (batch, queries, num_heads, dim)), (0, 2, 1, 3))
        dq: Array
        dk: Array
        dq, dk, dv = attention_vjp(dy)
        if queries < n:
            dq = xp.concat([dq, xp.zeros_like(dk[:, :, queries:, :])], axis=2)
        packed = xp.stack([dq, dk, dv])  # (3, B, H, N, D)
        return (xp.reshape(xp.permute_dims(packed, (1, 3, 0, 2, 4)), (batch, n, width)),)

    return xp.reshape(xp.permute_dims(y, (0, 2, 1, 3)), (batch, queries, width // 3)), vjp


def dropout_mask(xp: Any, like: Array, *, drop: float, shape: tuple[int, ...], draw: random.Draw) -> Array:
    """For each sample of `like` an array of `shape` and its dtype: 0 with probability `drop`, else 1 / (1 - drop)."""
    mask = arrays.convert(random.keep_mask(drop, like.shape[0], shape, draw), like)
    wide = xp.float32 if arrays.is_half(like) else like.dtype
    return xp.astype(xp.astype(mask, wide) * dropout_scale(drop), like.dtype, copy=False)


def dropout_scale(drop: float) -> float:
    """The factor of the entries that dropout leaves: 1 / (1 - drop)."""
    return float(1.0 / (1.0 - drop) if drop < 1.0 else 0.0)


def patchify(xp: Any, images: Array, *, patch_size: tuple[int, int], needs: tuple[bool, ...]) -> tuple[Array, VJP]:
    """Cut images into rows of patches: (B, C, H, W) -> (B, N, C h w), N = (H / h)(W / w), row by row."""
    batch, channels, height, width = images.shape
    h, w = patch_size
    rows, columns = height // h, width // w
    x = xp.reshape(images, (batch, channels, rows, h, columns, w))
    x = xp.permute_dims(x, (0, 2, 4, 1, 3, 5))  # (B, rows, columns, C, h, w)

    def vjp(dy: Array) -> tuple[Array]:
        dy = xp.reshape(dy, (batch, rows, columns, channels, h, w))
        return (xp.reshape(xp.permute_dims(dy, (0, 3, 1, 4, 2, 5)), (batch, channels, height, width)),)

    return xp.reshape(x, (batch, rows * columns, channels * h * w)), vjp


@in_fp32
def cross_entropy(
    xp: Any, logits: Array, *, labels: Array, label_smoothing: float, needs: tuple[bool, ...]
) -> tuple[Array, VJP]:
    """Mean of -sum(target * log softmax(logits)) over the batch, with the target mixed with a uniform one
    (Szegedy et al. 2016, arXiv:1512.00567, section 7). logits (B, C), labels integers (B,) or probabilities (B, C).
    A number that is no class makes the loss NaN, as a device does not check labels. So does a probability of 0 beside
    a logit of -inf, as in torch."""
    batch, classes = logits.shape
    are_numbers = labels.ndim == 1
    if are_numbers:
        index = xp.arange(classes, dtype=labels.dtype, device=arrays.device(labels))
        chosen = xp.astype(labels[:, None] == index[None, :], logits.dtype)
        is_class = (labels >= 0) & (labels < classes)
        labels = xp.where(is_class[:, None], chosen, chosen * math.nan)
    target = labels * (1.0 - label_smoothing) + label_smoothing / classes if label_smoothing else labels
    shifted = logits - xp.max(logits, axis=-1, keepdims=True)
    log_p = shifted - xp.log(xp.sum(xp.exp(shifted), axis=-1, keepdims=True))
    terms = target * log_p
    if are_numbers:  # the log probabilities of other classes do not count, not even -inf
        terms = xp.where(target == 0, xp.zeros_like(terms), terms)

    def vjp(dy: Array) -> tuple[Array]:
        return ((xp.exp(log_p) * xp.sum(target, axis=-1, keepdims=True) - target) * (dy / batch),)

    return -xp.sum(terms) / batch, vjp
