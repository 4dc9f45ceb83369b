"""The operations that later Vision Transformers put in the place of the first one's, as in `layers`."""

from __future__ import annotations

from typing import Any

from tinyvit.backend.arrays import VJP, Array
from tinyvit.kernels.half_precision import in_fp32


@in_fp32
def silu(xp: Any, x: Array, *, beta: float, needs: tuple[bool, ...]) -> tuple[Array, VJP]:
    """x sigmoid(beta x) (Ramachandran et al. 2017, arXiv:1710.05941); with beta 1.702 CLIP's approximation of GELU."""
    gate = _sigmoid(xp, beta * x)

    def vjp(dy: Array) -> tuple[Array]:
        return (dy * gate * (1.0 + beta * x * (1.0 - gate)),)

    return x * gate, vjp


@in_fp32
def swiglu(xp: Any, x: Array, *, needs: tuple[bool, ...]) -> tuple[Array, VJP]:
    """silu(a) b of the halves a and b of the last axis (Shazeer 2020, arXiv:2002.05202): (..., 2 H) -> (..., H)."""
    a, b = _halves(x)
    activated, silu_vjp = silu(xp, a, beta=1.0, needs=needs)

    def vjp(dy: Array) -> tuple[Array]:
        return (xp.concat([*silu_vjp(dy * b), dy * activated], axis=-1),)

    return activated * b, vjp


@in_fp32
def rms_norm(xp: Any, x: Array, weight: Array, *, eps: float, needs: tuple[bool, ...]) -> tuple[Array, VJP]:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis (Zhang & Sennrich 2019, arXiv:1910.07467)."""
    scale = 1.0 / xp.sqrt(xp.mean(x * x, axis=-1, keepdims=True) + eps)
    normal = x * scale

    def vjp(dy: Array) -> tuple[Array, Array]:
        g = dy * weight
        dx = scale * (g - normal * xp.mean(g * normal, axis=-1, keepdims=True))
        return dx, xp.sum(dy * normal, axis=tuple(range(dy.ndim - 1)))

    return normal * weight, vjp


@in_fp32
def rotary(
    xp: Any, x: Array, cos: Array, sin: Array, *, interleaved: bool, needs: tuple[bool, ...]
) -> tuple[Array, VJP]:
    """Turn pairs of x's entries by angles (Su et al. 2021, arXiv:2104.09864, section 3.2).

    x (B, H, N, D), cos and sin (H or 1, N, D / 2). Pair i is (2 i, 2 i + 1) if `interleaved`, else (i, i + D / 2).
    """

    def pairs(x: Array) -> tuple[Array, Array]:
        return (x[..., ::2], x[..., 1::2]) if interleaved else _halves(x)

    def joined(a: Array, b: Array) -> Array:
        return xp.reshape(xp.stack([a, b], axis=-1), x.shape) if interleaved else xp.concat([a, b], axis=-1)

    def to_angles(dangle: Array) -> Array:
        return xp.sum(dangle, axis=(0, 1), keepdims=True)[0, ...] if cos.shape[0] == 1 else xp.sum(dangle, axis=0)

    a, b = pairs(x)

    def vjp(dy: Array) -> tuple[Array | None, ...]:
        da, db = pairs(dy)
        return (
            joined(da * cos + db * sin, db * cos - da * sin) if needs[0] else None,
            to_angles(da * a + db * b) if needs[1] else None,
            to_angles(db * a - da * b) if needs[2] else None,
        )

    return joined(a * cos - b * sin, b * cos + a * sin), vjp


def _sigmoid(xp: Any, x: Array) -> Array:
    """1 / (1 + exp(-x)), without overflow."""
    return 0.5 * (1.0 + xp.tanh(0.5 * x))


def _halves(x: Array) -> tuple[Array, Array]:
    """The two halves of the last axis."""
    middle = x.shape[-1] // 2
    return x[..., :middle], x[..., middle:]
