"""Elementary operations, held against torch: values and gradients, in both precisions and every array library."""

import math
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import numpy as np
import pytest
import torch
from drawing import TOLERANCE, check, host, layouts, place, references_only, shapes, torch_vjp, values, versions
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tinyvit.backend import arrays
from tinyvit.engine import ops
from tinyvit.engine.tensor import Tensor, grad


@dataclass
class Example:
    """One drawn call: inputs in float64, the same computation by tinyvit (on Tensors) and by torch."""

    inputs: list[np.ndarray]
    ours: Any
    theirs: Any


CASES: dict[str, Any] = {}
END = np.array([-2.0, -1.0, -0.75, -0.5, 0.0, 0.25, 0.5, 1.0, 1.5])


def case(*names):
    def register(function):
        for name in names:
            CASES[name] = lambda draw, name=name: function(draw, name)
        return function

    return register


def pair(draw, *kinds):
    drawn = draw(hnp.mutually_broadcastable_shapes(num_shapes=2, max_dims=4, min_side=0, max_side=4))
    return [values(draw, shape, draw(st.sampled_from(kinds))) for shape in drawn.input_shapes]


@case("add", "subtract", "multiply")
def _arithmetic(draw, name):
    return Example(pair(draw, "normal"), getattr(ops, name), getattr(torch, name))


@case("maximum", "minimum")
def _extremum(draw, name):
    return Example(pair(draw, "normal", "grid"), getattr(ops, name), getattr(torch, name))


@case("divide")
def _divide(draw, name):
    return Example(pair(draw, "positive"), ops.divide, torch.divide)


@case("power")
def _power(draw, name):
    exponent = draw(st.sampled_from([None, 0, 1, 2, 3, -1, 0.5, -1.5]))
    if exponent is None:
        return Example(pair(draw, "positive"), ops.power, torch.pow)
    kind = "normal" if exponent in (0, 1, 2, 3) else "positive"
    return Example([values(draw, draw(shapes()), kind)], lambda x: x**exponent, lambda x: x**exponent)


@case("negative", "abs", "exp", "tanh", "sigmoid", "erf", "cos", "sin")
def _everywhere(draw, name):
    kind = draw(st.sampled_from(["normal", "grid"]))
    return Example([values(draw, draw(shapes()), kind)], getattr(ops, name), getattr(torch, name))


@case("log", "sqrt")
def _positive(draw, name):
    return Example([values(draw, draw(shapes()), "positive")], getattr(ops, name), getattr(torch, name))


@case("clip")
def _clip(draw, name):
    low, high = draw(st.sampled_from([(-1, 1), (None, 0.5), (-0.5, None), (0, 0), (1.0, -1.0)]))
    kind = draw(st.sampled_from(["normal", "grid"]))
    return Example(
        [values(draw, draw(shapes()), kind)], lambda x: ops.clip(x, low, high), lambda x: torch.clamp(x, low, high)
    )


@case("where")
def _where(draw, name):
    drawn = draw(hnp.mutually_broadcastable_shapes(num_shapes=3, max_dims=4, min_side=0, max_side=4)).input_shapes
    condition = values(draw, drawn[0]) > 0
    inputs = [values(draw, shape) for shape in drawn[1:]]

    def ours(*tensors):
        like = tensors[0].data
        return ops.where(arrays.convert(condition, like), *tensors)

    return Example(inputs, ours, lambda a, b: torch.where(torch.tensor(condition), a, b))


@case("matmul")
def _matmul(draw, name):
    drawn = draw(
        hnp.mutually_broadcastable_shapes(signature="(m?,n),(n,p?)->(m?,p?)", min_side=0, max_side=5, max_dims=3)
    )
    return Example([values(draw, shape) for shape in drawn.input_shapes], ops.matmul, torch.matmul)


def axis_of(draw, shape):
    """None, one axis or several, counted from either end."""
    if not shape:
        return None
    several = draw(st.lists(st.integers(0, len(shape) - 1), min_size=1, unique=True))
    several = tuple(i - len(shape) * draw(st.booleans()) for i in several)
    return draw(st.sampled_from([None, several, several[0]]))


def torch_axes(axis, shape):
    return tuple(range(len(shape))) if axis is None else axis


@case("sum", "mean", "max", "min")
def _reduction(draw, name):
    shape = draw(shapes(min_side=0 if name == "sum" else 1))
    x = values(draw, shape, draw(st.sampled_from(["normal", "grid"])))
    axis, keepdims = axis_of(draw, shape), draw(st.booleans())
    theirs = {"max": torch.amax, "min": torch.amin}.get(name) or getattr(torch, name)
    return Example(
        [x],
        lambda x: getattr(ops, name)(x, axis, keepdims=keepdims),
        lambda x: theirs(x, torch_axes(axis, shape), keepdim=keepdims) if shape else x * 1.0,
    )


@case("var", "std")
def _var(draw, name):
    shape = draw(shapes(min_dims=1, min_side=2))
    axis, keepdims, correction = axis_of(draw, shape), draw(st.booleans()), draw(st.sampled_from([0, 1, 0.5]))
    return Example(
        [values(draw, shape)],
        lambda x: getattr(ops, name)(x, axis, correction, keepdims),
        lambda x: getattr(torch, name)(x, torch_axes(axis, shape), correction=correction, keepdim=keepdims),
    )


@case("reshape")
def _reshape(draw, name):
    shape = draw(shapes(min_side=1))
    order = draw(st.permutations(shape))
    cut = draw(st.integers(0, len(order)))
    target = (math.prod(order[:cut]), *order[cut:])
    if draw(st.booleans()):
        target = (-1, *target[1:])
    return Example([values(draw, shape)], lambda x: ops.reshape(x, target), lambda x: torch.reshape(x, target))


@case("permute_dims")
def _permute_dims(draw, name):
    shape = draw(shapes())
    axes = tuple(i - len(shape) * draw(st.booleans()) for i in draw(st.permutations(range(len(shape)))))
    return Example([values(draw, shape)], lambda x: ops.permute_dims(x, axes), lambda x: torch.permute(x, axes))


@case("flatten")
def _flatten(draw, name):
    shape = draw(shapes())
    ends = sorted(draw(st.integers(0, max(len(shape) - 1, 0))) for _ in range(2))
    start, end = (i - len(shape) * (draw(st.booleans()) and bool(shape)) for i in ends)
    return Example([values(draw, shape)], lambda x: ops.flatten(x, start, end), lambda x: torch.flatten(x, start, end))


@case("transpose")
def _transpose(draw, name):
    shape = draw(shapes(min_dims=2))
    a, b = (draw(st.integers(-len(shape), len(shape) - 1)) for _ in range(2))
    return Example([values(draw, shape)], lambda x: ops.transpose(x, a, b), lambda x: torch.transpose(x, a, b))


@case("broadcast_to")
def _broadcast_to(draw, name):
    shape = draw(shapes(min_side=1))
    target = draw(hnp.broadcastable_shapes(shape, min_dims=len(shape), max_dims=5, max_side=4))
    target = tuple(np.broadcast_shapes(shape, target))
    return Example(
        [values(draw, shape)], lambda x: ops.broadcast_to(x, target), lambda x: torch.broadcast_to(x, target)
    )


@case("getitem")
def _getitem(draw, name):
    shape = draw(shapes(min_dims=1))
    key = draw(hnp.basic_indices(shape, allow_newaxis=True))
    key = tuple(_forwards(k) for k in (key if isinstance(key, tuple) else (key,)))
    if Ellipsis not in key:
        key = (*key, ...)  # the standard asks for one where axes are left out
    return Example([values(draw, shape)], lambda x: x[key], lambda x: x[key])


def _forwards(key):
    """torch has no negative steps."""
    return slice(None) if isinstance(key, slice) and (key.step or 1) < 0 else key


@case("concat", "stack")
def _joined(draw, name):
    shape = draw(shapes(min_dims=name == "concat"))
    n = draw(st.integers(1, 4))
    dims = len(shape) + (name == "stack")
    axis = draw(st.integers(-dims, dims - 1))
    parts = [list(shape) for _ in range(n)]
    if name == "concat":
        for part in parts:
            part[axis] = draw(st.integers(0, 3))
    return Example(
        [values(draw, part) for part in parts],
        lambda *tensors: getattr(ops, name)(tensors, axis),
        lambda *tensors: getattr(torch, name)(tensors, dim=axis),
    )


@case("astype")
def _astype(draw, name):
    return Example([values(draw, draw(shapes()))], lambda x: ops.astype(x, x.dtype), lambda x: x * 1.0)


def test_every_operation_has_a_case():
    public = {
        name
        for name, f in vars(ops).items()
        if isinstance(f, FunctionType) and not name.startswith("_") and name not in ("argmax", "compare")
    }
    assert public == set(CASES)


FIXED = {  # what few draws can miss: numbers at the ends, and each exponent
    "clip": [
        Example([END], lambda x, ends=ends: ops.clip(x, *ends), lambda x, ends=ends: torch.clamp(x, *ends))
        for ends in ((-1, 1), (None, 0.5), (-0.5, None))
    ],
    "power": [
        Example([END], lambda x, exponent=exponent: x**exponent, lambda x, exponent=exponent: x**exponent)
        for exponent in (0, 1, 2, 3)
    ],
}

ALL_VERSIONS = [pytest.param(name, *v.values, id=v.id, marks=v.marks) for name in CASES for v in versions(name)]


@pytest.mark.parametrize("name, backend, version", ALL_VERSIONS)
@settings(max_examples=10)  # for each of several libraries
@given(data=st.data())
def test_values_and_gradients_agree_with_torch(name, backend, version, data):
    """Broadcasting both ways, lengths 0 and 1, any memory layout, and any choice of inputs that require a gradient."""
    example = CASES[name](data.draw)
    y, dy, gradients = torch_vjp(example.theirs, example.inputs, data.draw)
    layout, dy_layout = data.draw(layouts), data.draw(layouts)
    wanted = data.draw(st.lists(st.booleans(), min_size=len(gradients), max_size=len(gradients)))
    for dtype in TOLERANCE:
        placed = [place(x, backend, dtype, layout) for x in example.inputs]
        tensors = [Tensor(x, requires_grad=need) for x, need in zip(placed, wanted, strict=True)]
        with references_only(version == "reference"):
            result = example.ours(*tensors)
        check(result.data, y, backend, dtype)
        assert result.requires_grad == any(wanted)
        seed = place(dy, backend, dtype, dy_layout)
        if any(wanted):
            got = iter(grad(result, [t for t in tensors if t.requires_grad], seed))
            for need, expected in zip(wanted, gradients, strict=True):
                if need:
                    check(next(got), expected, backend, dtype)
        for x, before in zip([*placed, seed], [*example.inputs, dy], strict=True):
            assert np.array_equal(host(x), before)


@pytest.mark.parametrize("name, backend, version", [p for p in ALL_VERSIONS if p.values[0] in FIXED])
def test_ends_and_exponents_agree_with_torch(name, backend, version):
    for example in FIXED[name]:
        y, dy, (expected,) = torch_vjp(example.theirs, example.inputs, lambda _: 0)
        for dtype in TOLERANCE:
            x = Tensor(place(END, backend, dtype), requires_grad=True)
            with references_only(version == "reference"):
                result = example.ours(x)
            check(result.data, y, backend, dtype)
            check(grad(result, [x], place(dy, backend, dtype))[0], expected, backend, dtype)
