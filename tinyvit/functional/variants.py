"""The operations of later Vision Transformers: SiLU, SwiGLU, RMS norm, rotary positions."""

from __future__ import annotations

from tinyvit.engine.tensor import Tensor, apply
from tinyvit.functional import checks
from tinyvit.functional.checks import Input
from tinyvit.kernels import reference


def silu(x: Input, beta: float = 1.0) -> Tensor:
    """x sigmoid(beta x), elementwise (Ramachandran et al. 2017, arXiv:1710.05941).

    Args:
        x: any shape.
        beta: 1 for torch's SiLU, 1.702 for the GELU of OpenAI's CLIP.
    """
    return apply(reference.silu, x, beta=beta)


def swiglu(x: Input) -> Tensor:
    """silu(a) b of the halves a and b of the last axis (Shazeer 2020, arXiv:2002.05202): (..., 2 H) -> (..., H)."""
    given = checks.shape(x)
    if not given or given[-1] % 2:
        raise ValueError(f"swiglu expects x (..., 2 H), got {given}")
    return apply(reference.swiglu, x)


def rms_norm(x: Input, weight: Input, eps: float = 1e-6) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis (Zhang & Sennrich 2019, arXiv:1910.07467).

    Unlike torch's it takes no normalized_shape.

    Args:
        x: (..., D).
        weight: (D,).
        eps: keeps the divisor above 0.
    """
    checks.no_normalized_shape("rms_norm(x, weight)", weight)
    if not checks.shape(x) or checks.shape(weight) != checks.shape(x)[-1:]:
        raise ValueError(
            f"rms_norm expects x (..., D) and weight (D,), got {checks.shape(x)} and {checks.shape(weight)}"
        )
    return apply(reference.rms_norm, x, weight, eps=eps)


def rotary(x: Input, cos: Input, sin: Input, interleaved: bool = True) -> Tensor:
    """Turn pairs of entries by angles that say where a token is (Su et al. 2021, arXiv:2104.09864).

    Args:
        x: queries or keys (B, H, N, D).
        cos, sin: of the angles, (H, N, D / 2), or (1, N, D / 2) for all heads alike.
        interleaved: pair i is (2 i, 2 i + 1), as in the paper; otherwise (i, i + D / 2).

    Returns:
        (B, H, N, D).
    """
    given, a, b = checks.shape(x), checks.shape(cos), checks.shape(sin)
    if (
        len(given) != 4
        or given[3] % 2
        or a != b
        or a not in [(heads, given[2], given[3] // 2) for heads in (1, given[1])]
    ):
        raise ValueError(f"rotary expects x (B, H, N, D), cos and sin (H or 1, N, D / 2), got {given}, {a} and {b}")
    return apply(reference.rotary, x, cos, sin, interleaved=interleaved)
