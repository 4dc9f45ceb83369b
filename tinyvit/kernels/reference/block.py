"""A Vision Transformer's block, for predictions."""

from __future__ import annotations

from typing import Any

from tinyvit import kernels
from tinyvit.backend.arrays import VJP, Array
from tinyvit.kernels.reference import layers


def encoder_block(
    xp: Any, x: Array, *weights: Array, num_heads: int, eps: tuple[float, float], approximate: str, **_: Any
) -> tuple[Array, VJP]:
    """A Vision Transformer's block, without gradients: fewer calls between the kernels than for its operations.

    x (B, N, D) + linear(attention(linear(norm(x)))), then that + linear(gelu(linear(norm(that)))). `weights` are
    weight and bias of the six in turn, `eps` those of the norms.
    """

    def run(op: Any, *arrays: Array, **parameters: Any) -> Array:
        return kernels.best(op, xp)(xp, *arrays, needs=(False,) * len(arrays), **parameters)[0]

    norm1, qkv, proj, norm2, fc1, fc2 = zip(weights[::2], weights[1::2], strict=True)
    y = run(layers.linear, run(layers.layer_norm, x, *norm1, eps=eps[0]), *qkv)
    y = run(layers.qkv_attention, y, num_heads=num_heads)
    x = run(layers.add_linear, x, y, *proj)
    y = run(layers.layer_norm, x, *norm2, eps=eps[1])
    return run(layers.mlp, x, y, *fc1, *fc2, approximate=approximate), no_gradient


def no_gradient(dy: Array) -> tuple[Array, ...]:
    raise AssertionError("nothing was asked for that a gradient needs")
