"""Multi-head self-attention as tinyvit, its reference and PyTorch's users call it: packed (B, N, 3 H D) to (B, N, H D).

All do the whole job from the output of the qkv layer to the input of the next one, whatever reshaping that takes them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tinyvit import kernels
from tinyvit.backend import arrays, parallel
from tinyvit.kernels import reference

Array = Any
BACKENDS = {"flash": "FLASH_ATTENTION", "cudnn": "CUDNN_ATTENTION", "efficient": "EFFICIENT_ATTENTION", "math": "MATH"}


@dataclass
class Inputs:
    """Sets of inputs, of which each call takes another one.

    Attributes:
        heads: H.
        qkvs: packed queries, keys and values, each (B, N, 3 H D).
        dys: gradients of the outputs, each (B, N, H D).
    """

    heads: int
    qkvs: list[Array]
    dys: list[Array]


def tinyvit_calls(inputs: Inputs, backward: bool) -> Callable[[int], list[Array]]:
    """Our kernel, on a CPU in shards on all cores as `TrainStep` and `predict` run it.

    It is called by itself, for within a backward pass it would also sum the columns of its gradient.
    """
    return _calls(kernels.best(reference.qkv_attention, arrays.namespace(inputs.qkvs[0])), inputs, backward)


def reference_calls(inputs: Inputs, backward: bool) -> Callable[[int], list[Array]]:
    """The same operation's reference in the array API, in the same shards."""
    return _calls(reference.qkv_attention, inputs, backward)


def _calls(operation: Callable, inputs: Inputs, backward: bool) -> Callable[[int], list[Array]]:
    xp = arrays.namespace(inputs.qkvs[0])

    def attend(qkv: Array, dy: Array) -> Array:
        y, vjp = operation(xp, qkv, num_heads=inputs.heads, needs=(backward,))
        return vjp(dy)[0] if backward else y

    return _in_shards(attend, inputs)


def _in_shards(function: Callable[[Array, Array], Array], inputs: Inputs) -> Callable[[int], list[Array]]:
    def call(i: int) -> list[Array]:
        qkv, dy = inputs.qkvs[i], inputs.dys[i]
        if not arrays.on_host(qkv):
            return [function(qkv, dy)]
        return list(parallel.run(parallel.plan(len(qkv)), lambda a, b: function(qkv[a:b], dy[a:b])))

    return call


def torch_calls(inputs: Inputs, backward: bool, backend: str) -> Callable[[int], list[Array]]:
    """`scaled_dot_product_attention` with one backend, on views of the packed activation and reshaped afterwards."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    qkvs = [_to_torch(qkv).requires_grad_(backward) for qkv in inputs.qkvs]
    dys = [_to_torch(dy) for dy in inputs.dys]
    only = getattr(SDPBackend, BACKENDS[backend])

    def attend(qkv: Any) -> Any:
        b, n, width = qkv.shape
        q, k, v = qkv.reshape(b, n, 3, inputs.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)  # (B, H, N, D)
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return y.transpose(1, 2).reshape(b, n, width // 3)

    def call(i: int) -> list[Any]:
        with sdpa_kernel(only), torch.set_grad_enabled(backward):
            y = attend(qkvs[i])
            return list(torch.autograd.grad(y, qkvs[i], dys[i])) if backward else [y]

    return call


def _to_torch(x: Array) -> Any:
    """The same memory as a tensor."""
    import torch

    if arrays.dtype_name(x.dtype) == "bfloat16":  # DLPack as CuPy speaks it knows no bfloat16
        return torch.from_dlpack(x.view("int16")).view(torch.bfloat16)
    return torch.from_dlpack(x)


def to_numpy(x: Any) -> Array:
    """A contender's result, whatever its library, as float64 on the host."""
    if type(x).__module__.partition(".")[0] == "torch":
        return x.detach().double().cpu().numpy()
    return arrays.to_numpy(x).astype("float64")


CONTENDERS: dict[str, Callable[[Inputs, bool], Callable[[int], list[Array]]]] = {
    "tinyvit": tinyvit_calls,
    "reference": reference_calls,
} | {f"torch {backend}": functools.partial(torch_calls, backend=backend) for backend in BACKENDS}
