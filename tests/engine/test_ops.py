"""Elementary operations, held against torch: values and gradients, in both precisions and every array library."""

import contextlib
import inspect
import itertools
import math
import weakref
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import array_api_strict
import numpy as np
import pytest
import torch
from drawing import (
    BACKENDS,
    LIBRARIES,
    TOLERANCE,
    check,
    host,
    layouts,
    place,
    references_only,
    shapes,
    torch_vjp,
    values,
    versions,
)
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tinyvit.engine import ops
from tinyvit.engine.tensor import Tensor, grad, no_grad


@dataclass
class Example:
    """One drawn call: inputs in float64, the same computation by tinyvit (on Tensors) and by torch."""

    inputs: list[np.ndarray]
    ours: Any
    theirs: Any


CASES: dict[str, Any] = {}


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


@case("negative", "abs", "exp", "tanh", "erf")
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
        [values(draw, draw(shapes()), kind)],
        lambda x: ops.clip(x, low, high),
        lambda x: torch.clamp(x, low, high),
    )


@case("where")
def _where(draw, name):
    drawn = draw(hnp.mutually_broadcastable_shapes(num_shapes=3, max_dims=4, min_side=0, max_side=4)).input_shapes
    condition = values(draw, drawn[0]) > 0
    inputs = [values(draw, shape) for shape in drawn[1:]]

    def ours(*tensors):
        like = tensors[0].data
        return ops.where(ops.arrays.convert(condition, like), *tensors)

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


@case("sum", "mean", "max")
def _reduction(draw, name):
    shape = draw(shapes(min_side=0 if name == "sum" else 1))
    x = values(draw, shape, draw(st.sampled_from(["normal", "grid"])))
    axis, keepdims = axis_of(draw, shape), draw(st.booleans())
    theirs = torch.amax if name == "max" else getattr(torch, name)
    return Example(
        [x],
        lambda x: getattr(ops, name)(x, axis, keepdims=keepdims),
        lambda x: theirs(x, torch_axes(axis, shape), keepdim=keepdims) if shape else x * 1.0,
    )


@case("var")
def _var(draw, name):
    shape = draw(shapes(min_dims=1, min_side=2))
    axis, keepdims, correction = axis_of(draw, shape), draw(st.booleans()), draw(st.sampled_from([0, 1, 0.5]))
    return Example(
        [values(draw, shape)],
        lambda x: ops.var(x, axis, correction, keepdims),
        lambda x: torch.var(x, torch_axes(axis, shape), correction=correction, keepdim=keepdims),
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
    key = key if isinstance(key, tuple) else (key,)
    if Ellipsis not in key:
        key = (*key, ...)  # the standard asks for one where axes are left out
    numbers = np.array(np.arange(math.prod(shape)).reshape(shape)[key])  # torch has no negative steps
    return Example(
        [values(draw, shape)],
        lambda x: x[key],
        lambda x: torch.take(x, torch.tensor(numbers)) if x.numel() else x.reshape(numbers.shape),
    )


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
        if isinstance(f, FunctionType)
        and f.__module__ == ops.__name__
        and not name.startswith("_")
        and name != "operation"
    }
    assert public == set(CASES)


ALL_VERSIONS = [pytest.param(name, *v.values, id=v.id, marks=v.marks) for name in CASES for v in versions(name)]


@pytest.mark.parametrize("name, backend, version", ALL_VERSIONS)
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


@given(data=st.data())
def test_indexing_with_arrays_agrees_with_torch(data):
    """Integer arrays (an entry may be taken twice) and masks; Tensors serve as keys too."""
    shape = data.draw(shapes(min_dims=1, min_side=1))
    x = values(data.draw, shape)
    if data.draw(st.booleans()):
        key = data.draw(hnp.integer_array_indices(shape))
    else:
        key = values(data.draw, shape[: data.draw(st.integers(1, len(shape)))]) > 0
    theirs = tuple(torch.tensor(k) for k in key) if isinstance(key, tuple) else torch.tensor(key)
    y, dy, (dx,) = torch_vjp(lambda t: t[theirs], [x], data.draw)
    for k in (key, tuple(map(Tensor, key)) if isinstance(key, tuple) else Tensor(key)):
        tensor = Tensor(x, requires_grad=True)
        result = tensor[k]
        assert np.array_equal(result.data, y)
        check(grad(result, tensor, dy), dx, "numpy", "float64")


def test_the_standard_has_no_scatter():
    x = Tensor(array_api_strict.ones((4,)), requires_grad=True)
    y = x[array_api_strict.asarray([0, 0, 2])]
    with pytest.raises(TypeError, match="not defined by the array API standard"):
        grad(y.sum(), x)


OPERATORS = {
    "a + b": lambda a, b: a + b,
    "a - b": lambda a, b: a - b,
    "a * b": lambda a, b: a * b,
    "a / b": lambda a, b: a / b,
    "a ** b": lambda a, b: a**b,
    "a @ b": lambda a, b: a @ b,
}
NUMBERS = [2, 2.5, True, np.float64(2.5), np.float32(2.5), np.int64(2), np.bool_(True)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", OPERATORS)
def test_operators_take_tensors_arrays_and_numbers_on_either_side(name, dtype, backend):
    f = OPERATORS[name]
    x, y = np.array([[1.5, 2.0], [0.5, 1.25]]), np.array([[2.0, 0.75], [1.0, 3.0]])
    a, b = (place(v, backend, dtype) for v in (x, y))
    others = [] if name == "a @ b" else [n for n in NUMBERS if backend != "array_api_strict" or not isinstance(n, bool)]
    for left, right, expected in [
        (Tensor(a), Tensor(b), f(x, y)),
        (Tensor(a), b, f(x, y)),
        *([(a, Tensor(b), f(x, y))] if backend != "array_api_strict" else []),  # which refuses what it does not know
        *((Tensor(a), n, f(x, float(n))) for n in others if not isinstance(n, np.bool_)),
        *((n, Tensor(a), f(float(n), x)) for n in others if not isinstance(n, np.bool_)),
    ]:
        result = f(left, right)
        assert isinstance(result, Tensor)
        check(result.data, expected, backend, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", [n for n in OPERATORS if n != "a @ b"])
def test_gradients_beside_a_number_agree_with_torch(name, dtype):
    f = OPERATORS[name]
    x = np.array([[1.5, 2.0], [0.5, 1.25]])
    for number in (2, 0.75, np.float64(1.5)):
        for swap in (False, True):
            g = (lambda v, n=float(number): f(n, v)) if swap else (lambda v, n=float(number): f(v, n))
            t = torch.tensor(x, requires_grad=True)
            (expected,) = torch.autograd.grad(g(t).sum(), t)
            a = Tensor(place(x, "numpy", dtype), requires_grad=True)
            result = f(number, a) if swap else f(a, number)
            check(grad(result.sum(), a), expected, "numpy", dtype)


def test_methods_are_the_functions():
    x = Tensor(np.array([[1.0, 4.0], [2.0, 3.0]]))
    for name in ("abs", "exp", "log", "sqrt", "tanh", "sum", "mean", "var", "max", "transpose"):
        assert np.array_equal(getattr(x, name)().data, getattr(ops, name)(x).data), name
    assert x.clip(2, 3).data.tolist() == [[2, 3], [2, 3]]
    assert x.astype("float32").dtype == np.float32
    assert (-x).data.tolist() == [[-1, -4], [-2, -3]] and x.T.data.tolist() == [[1, 2], [4, 3]]
    assert x.reshape(4).shape == x.reshape(-1).shape == x.reshape((4,)).shape == x.reshape([4]).shape == (4,)
    assert x.permute_dims(1, 0).shape == (2, 2) and x.broadcast_to(3, 2, 2).shape == (3, 2, 2)
    assert x[0, 0].reshape().shape == x[0, 0].reshape(()).shape == () and x[1].data.tolist() == [2, 3]
    assert x.sum(axis=()).data.tolist() == x.data.tolist()


@pytest.mark.parametrize("backend", BACKENDS)
def test_astype_changes_the_result_and_gives_the_gradient_back_in_the_input_s_dtype(backend):
    xp = LIBRARIES[backend]
    for before, after in itertools.permutations(TOLERANCE, 2):
        for spelt in (after, np.dtype(after), getattr(xp, after)):
            x = Tensor(place(np.array([1.0, 2.0]), backend, before), requires_grad=True)
            y = x.astype(spelt)
            check(y.data, np.array([1.0, 2.0]), backend, after)
            check(grad((y * 3.0).sum(), x), np.array([3.0, 3.0]), backend, before)
    whole = x.astype("int64")
    assert whole.data.dtype == xp.int64 and not whole.requires_grad


def test_numpy_scalars_as_parameters_do_not_change_the_dtype():
    x = Tensor(np.array([0.5, 2.0, 3.0], np.float32), requires_grad=True)
    for y in (
        ops.clip(x, np.float64(1.0), np.float64(2.5)),
        ops.var(x, correction=np.float64(1)),
        ops.sum(x, axis=np.int64(0)),
        ops.where(np.array([True, False, True]), x, np.float64(0.5)),
        ops.maximum(x, np.float64(1.0)),
    ):
        assert y.dtype == np.float32
        assert grad(y.sum(), x).dtype == np.float32


def test_ties_share_the_gradient_and_limits_belong_to_the_inside():
    x = Tensor(np.array([2.0, 1.0, 2.0, 0.0]), requires_grad=True)
    assert grad(x.max(), x).tolist() == [0.5, 0.0, 0.5, 0.0]
    assert grad(ops.maximum(x, 1.0).sum(), x).tolist() == [1.0, 0.5, 1.0, 0.0]
    assert grad(ops.minimum(x, x).sum(), x).tolist() == [1.0, 1.0, 1.0, 1.0]
    assert grad(x.clip(1.0, 2.0).sum(), x).tolist() == [1.0, 1.0, 1.0, 0.0]
    assert grad(x.abs().sum(), x).tolist() == [1.0, 1.0, 1.0, 0.0]


def test_power_at_zero_is_torch_s():
    base, exponent = np.array([0.0, 0.0, 0.0, 2.0, 3.0]), np.array([0.0, 1.0, 2.0, 0.0, -1.0])
    t = [torch.tensor(v, requires_grad=True) for v in (base, exponent)]
    expected = torch.autograd.grad(torch.pow(*t).sum(), t)
    a, b = Tensor(base, requires_grad=True), Tensor(exponent, requires_grad=True)
    for ours, theirs in zip(grad((a**b).sum(), [a, b]), expected, strict=True):
        assert np.array_equal(ours, theirs.numpy())
    assert grad((a**0).sum(), a).tolist() == [0.0] * 5


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda x: x + np.ones(3), "add expects arrays of one dtype, got float32 and float64; use astype"),
        (
            lambda x: x * array_api_strict.ones(3, dtype=array_api_strict.float32),
            "multiply expects arrays of one library, got numpy and array_api_strict",
        ),
        (lambda x: x + "1", "add expects arrays or numbers, got str"),
        (lambda x: [1.0] * x, "multiply expects arrays or numbers, got list"),
        (lambda x: Tensor([1, 2]) * 0.5, "multiply expects whole numbers beside int64 arrays; use astype"),
        (
            lambda x: Tensor([1, 2]) + np.float32(2),
            "add expects whole numbers beside int64 arrays; use astype",
        ),
        (lambda x: ops.exp(2.0), "exp expects at least one array"),
        (lambda x: ops.where(np.ones(3, bool), 1.0, 2.0), "where expects at least one array"),
        (lambda x: ops.concat([]), "concat expects at least one array"),
        (lambda x: ops.concat([x, 1.0]), "concat expects arrays of at least 1 dimensions, got float"),
        (lambda x: ops.concat([x.sum()]), "concat expects arrays of at least 1 dimensions, got shape ()"),
        (lambda x: ops.add(x), "add expects a, b; b is missing"),
        (lambda x: ops.exp(x, 1), "exp takes at most 1 arguments, got 2"),
        (lambda x: ops.sum(x, 0, axis=0), "multiple values for keyword argument 'axis'"),
        (lambda x: x @ 2.0, "matmul expects arrays with at least one axis, got shapes (3,) and ()"),
        (lambda x: x.T, "transpose expects at least two axes, got shape (3,)"),
        (lambda x: x.astype("float33"), "unknown dtype 'float33'"),
        (lambda x: x + np.ones(2, np.float32), "(3,) (2,)"),
        (lambda x: x @ np.ones(2, np.float32), "size 2 is different from 3"),
        (lambda x: x.reshape(2), "cannot reshape array of size 3 into shape (2,)"),
        (lambda x: ops.concat([x, x], axis=1), "axis 1 is out of bounds for array of dimension 1"),
        (lambda x: ops.stack([x, x], axis=2), "axis 2 is out of bounds for array of dimension 2"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(make, message):
    with pytest.raises((TypeError, ValueError)) as caught:
        make(Tensor(np.ones(3, np.float32)))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_only_what_the_gradient_needs_is_kept_alive():
    """The gradient of hidden * mask with respect to hidden needs the mask alone; without gradients nothing is kept."""
    for context, mask_lives in ((contextlib.nullcontext(), True), (no_grad(), False)):
        hidden = Tensor(np.ones(5), requires_grad=True) + 1.0
        mask = np.ones(5)
        seen, seen_mask = weakref.ref(hidden.data), weakref.ref(mask)
        with context:
            y = hidden * mask
        del hidden, mask
        assert seen() is None
        assert (seen_mask() is not None) is mask_lives
        assert y.shape == (5,)


def test_signatures_tell_what_to_call():
    assert str(inspect.signature(ops.sum)).startswith("(x:") and "needs" not in str(inspect.signature(ops.var))
    assert list(inspect.signature(ops.clip).parameters) == ["x", "low", "high"]


def test_a_variance_without_degrees_of_freedom_has_no_gradient_either():
    x = Tensor(np.ones(3), requires_grad=True)
    with pytest.warns(RuntimeWarning, match="[Dd]egrees of freedom|invalid value"):
        y = ops.var(x, correction=3)
    assert np.isnan(y.data) and np.isnan(grad(y, x)).all()


def test_indexing_keeps_nothing_of_what_it_cuts_from():
    x = Tensor(np.ones((2, 3)), requires_grad=True)
    middle = x * 2.0
    array = weakref.ref(middle.data)
    y = middle[:, 1].sum()
    del middle
    assert array() is None and np.array_equal(grad(y, x), [[0, 2, 0], [0, 2, 0]])
