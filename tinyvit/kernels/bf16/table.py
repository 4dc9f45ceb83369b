"""Linear layers, attention and blocks: what surrounds the loops."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba.extending import overload

from tinyvit.backend.arrays import VJP, Array
from tinyvit.kernels import Kernel, reference
from tinyvit.kernels.bf16 import loops
from tinyvit.kernels.jit import block, layers
from tinyvit.kernels.jit import loops as jit_loops
from tinyvit.kernels.jit.dot_blocks import PANEL
from tinyvit.kernels.jit.layers import contiguous, rows_of
from tinyvit.kernels.jit.loops import NOTHING
from tinyvit.kernels.jit.table import plain_attention, whole_block
from tinyvit.kernels.packed_weights import packed

_LEAST_TOKENS = 128  # from which on attention gains from bfloat16: measured


def _pack(weight: Array) -> Array:
    panels = loops.panels_of_pairs(*weight.shape)
    loops.pack_columns(contiguous(weight), panels)
    return panels


def _packed(weight: Array) -> Array:
    return packed(weight, _pack)


def _pack_transposed(weight: Array) -> Array:
    panels = loops.panels_of_pairs(*weight.T.shape)
    loops.pack_rows(contiguous(weight), panels, 0)
    return panels


@overload(block.linear)
def _linear(residual, x, weight, bias, y, then, sgemm):  # type: ignore[no-untyped-def]
    def run(residual, x, weight, bias, y, then, sgemm):  # type: ignore[no-untyped-def]
        loops.linear(residual, x, weight, bias, y, y[:0], weight[:0], then)

    return run if weight == block.BFLOAT16 else None


@overload(block.mlp)
def _mlp(residual, x, fc1, fc1_bias, fc2, fc2_bias, hidden, y, then, sgemm):  # type: ignore[no-untyped-def]
    def run(residual, x, fc1, fc1_bias, fc2, fc2_bias, hidden, y, then, sgemm):  # type: ignore[no-untyped-def]
        loops.mlp(residual, x, fc1, fc1_bias, fc2, fc2_bias, y, then)

    return run if fc1 == block.BFLOAT16 else None


@overload(block.attention)
def _attention(weight, qkv, y, scores, heads, tile, sgemm):  # type: ignore[no-untyped-def]
    def run(weight, qkv, y, scores, heads, tile, sgemm):  # type: ignore[no-untyped-def]
        if qkv.shape[1] < _LEAST_TOKENS:
            jit_loops.attention(qkv, y, scores, heads, tile, sgemm)
        else:
            loops.attention(qkv, y, scores[:0].reshape(0, 1, 1, 1), heads)

    return run if weight == block.BFLOAT16 else None


def _product(
    residual: Array, x: Array, weight: Array, bias: Array | None, needs: tuple[bool, ...], then: int
) -> tuple[Array, VJP]:
    rows, (outputs, inputs) = rows_of(x), weight.shape
    y = np.empty((len(rows), outputs), np.float32)
    slope = np.empty((len(rows) if then != NOTHING and True in needs else 0, outputs), np.float32)
    saved = loops.panels_of_pairs(inputs if needs[1] else 0, len(rows))
    shift = np.zeros(outputs, np.float32) if bias is None else contiguous(bias)
    loops.linear(residual, rows, _packed(weight), shift, y, slope, saved, then)

    def fill(dy: Array, dx: Array, dweight: Array, dbias: Array) -> None:
        panels = _pack_transposed(weight) if needs[0] else np.empty((0, 0, PANEL), np.int32)
        loops.linear_vjp(dy, slope, panels, saved, dx, dweight, dbias)

    vjp = layers.linear_vjp(fill, x.shape, weight.shape, needs, len(slope) > 0)
    return y.reshape(*x.shape[:-1], outputs), vjp


linear, add_linear, linear_gelu = layers.linear_layers(_product)


def _covers(x: Array, weight: Array, *_: Any, **__: Any) -> bool:
    return x.dtype == weight.dtype == np.float32 and x.size > 0 and weight.size > 0


def _attends(qkv: Array, **more: Any) -> bool:
    return qkv.dtype == np.float32 and qkv.shape[1] >= _LEAST_TOKENS and plain_attention(qkv, **more)


KERNELS = {
    reference.encoder_block: Kernel(block.kernel("bf16", block.BFLOAT16, _packed), whole_block),
    reference.linear: Kernel(linear, _covers),
    reference.add_linear: Kernel(add_linear, lambda residual, *inputs, **_: _covers(*inputs)),
    reference.linear_gelu: Kernel(linear_gelu, _covers),
    reference.qkv_attention: Kernel(layers.attention(loops.attention, loops.attention_vjp), _attends),
}
