"""Properties of every version (reference or kernel) of every operation, for the tests that enumerate them."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as TF
from drawing import (
    LIBRARIES,
    TOLERANCE,
    check,
    error,
    host,
    kernel_table,
    layouts,
    place,
    small_blocks,
    torch_vjp,
    values,
    versions,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyvit.backend import arrays


@dataclass
class Example:
    """One drawn call of an operation of arrays, in float64, and the same computation by torch."""

    inputs: list[np.ndarray | None]
    theirs: Any
    params: dict[str, Any] = field(default_factory=dict)  # arrays among them are placed like the inputs
    condition: float = 1.0  # by how much the function itself enlarges the rounding of its float32 inputs


def operations(module: ModuleType) -> set[str]:
    """The names of a module's operations."""
    functions = {name: f for name, f in vars(module).items() if inspect.isfunction(f)}
    return {name for name, f in functions.items() if "needs" in inspect.signature(f).parameters}


def find_version(module: ModuleType, name: str, backend: str, version: str) -> Callable:
    """The kernel for a library, or the reference in `module`; several results are joined along their last axis."""
    op = (vars(module) if version == "reference" else kernel_table(backend, jit=version == "jit"))[name]

    def joined(xp: ModuleType, *inputs: Any, **params: Any) -> tuple[Any, Callable]:
        result, vjp = op(xp, *inputs, **params)
        if not isinstance(result, tuple):
            return result, vjp
        width = result[0].shape[-1]
        parts = [slice(i * width, (i + 1) * width) for i in range(len(result))]
        return xp.concat(result, axis=-1), lambda dy: vjp(*(dy[..., part] for part in parts))

    return joined


def place_params(params: dict[str, Any], backend: str, dtype: str, layout: str = "C") -> dict[str, Any]:
    return {
        key: place(v, backend, dtype if v.dtype.kind == "f" else v.dtype.name, layout)
        if isinstance(v, np.ndarray)
        else v
        for key, v in params.items()
    }


def agrees_with_torch(function: Callable, example: Example, backend: str, draw: Callable) -> None:
    """Values and gradients; what the operation saved and returned stays intact when it or its vjp runs once more."""
    y, dy, gradients = torch_vjp(example.theirs, example.inputs, draw)
    xp, layout, block = LIBRARIES[backend], draw(layouts), draw(st.sampled_from([None, 1, 17]))
    for dtype in TOLERANCE:
        inputs = [place(x, backend, dtype, layout) for x in example.inputs]
        params = place_params(example.params, backend, dtype, layout)
        needs = tuple(x is not None for x in inputs)
        seed = place(dy, backend, dtype, draw(layouts))
        with small_blocks(backend, block):
            result, vjp = function(xp, *inputs, needs=needs, **params)
            first = vjp(seed)
            kept = [host(x).copy() for x in (result, *first) if x is not None]
            again, vjp_again = function(xp, *inputs, needs=needs, **params)
            second = vjp(seed)
            vjp_again(seed)
        tolerance = TOLERANCE[dtype] * (example.condition if dtype == "float32" else 1.0)
        for got, expected in zip((result, *first), (y, *gradients), strict=True):
            if expected is not None:
                check(arrays.as_array(got), expected, backend, dtype, tolerance)
        for before, once, twice in zip(
            kept,
            [x for x in (result, *first) if x is not None],
            [x for x in (again, *second) if x is not None],
            strict=True,
        ):
            assert np.array_equal(before, host(once)) and np.array_equal(before, host(twice))
        for x, before in zip(inputs, example.inputs, strict=True):
            assert x is None or np.array_equal(host(x), before.astype(dtype))


def same_with_fewer_gradients(function: Callable, example: Example, backend: str, draw: Callable) -> None:
    """What is returned does not depend on which gradients are wanted."""
    inputs = [place(x, backend, "float32") for x in example.inputs]
    params = place_params(example.params, backend, "float32")
    some = tuple(x is not None and draw(st.booleans()) for x in inputs)
    none, every = (False,) * len(inputs), tuple(x is not None for x in inputs)
    results = {needs: function(LIBRARIES[backend], *inputs, needs=needs, **params) for needs in (none, some, every)}
    y, vjp = results[every]
    dy = place(values(draw, host(y).shape), backend, "float32")
    full = vjp(dy)
    for needs, (other, other_vjp) in results.items():
        assert error(host(other), host(y)) < 1e-6
        for wanted, g, expected in zip(needs, other_vjp(dy) if True in needs else none, full, strict=True):
            if wanted:
                assert error(host(g), host(expected)) < 1e-6


def checks_of(module: ModuleType, cases: dict[str, Callable]) -> tuple[Callable, Callable]:
    """Two tests of every version, in every library, of a module's operations, whose calls `cases` draw by name."""
    every_version = pytest.mark.parametrize(
        "name, backend, version",
        [pytest.param(name, *v.values, id=v.id, marks=v.marks) for name in cases for v in versions(name)],
    )

    @every_version
    @given(data=st.data())
    def agrees(name: str, backend: str, version: str, data: Any) -> None:
        agrees_with_torch(find_version(module, name, backend, version), cases[name](data.draw), backend, data.draw)

    @every_version
    @settings(max_examples=8)
    @given(data=st.data())
    def gives_the_same(name: str, backend: str, version: str, data: Any) -> None:
        function = find_version(module, name, backend, version)
        same_with_fewer_gradients(function, cases[name](data.draw), backend, data.draw)

    return agrees, gives_the_same


def torch_attention(q, k, v, mask, keep):
    """Written out, because torch's own gives NaN where a query may look nowhere."""
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    allowed = torch.ones_like(scores, dtype=torch.bool)
    if mask is not None:
        mask = torch.tensor(mask)
        allowed = torch.broadcast_to(mask if mask.dtype == torch.bool else mask > -torch.inf, scores.shape)
        scores = scores if mask.dtype == torch.bool else scores + torch.where(mask > -torch.inf, mask, 0.0)
    e = torch.exp(scores - scores.detach().amax(-1, keepdim=True)) * allowed
    p = e / e.sum(-1, keepdim=True).clamp(min=1e-300)
    return (p if keep is None else p * torch.tensor(keep)) @ v


small = st.integers(1, 3)
sizes = st.sampled_from([1, 2, 3, 5, 8])


def windows(draw, most=2):
    """Image, kernel, stride and padding (at most `most` on a side) that have at least one window."""
    kernel, stride = (draw(small), draw(small)), (draw(small), draw(small))
    padding = tuple((draw(st.integers(0, min(most, k))), draw(st.integers(0, min(most, k)))) for k in kernel)
    size = tuple(max(draw(sizes), k - sum(pad)) for k, pad in zip(kernel, padding, strict=True))
    return size, kernel, stride, padding


def padded(x, padding, value=0.0):
    return TF.pad(x, (*padding[1], *padding[0]), value=value)
