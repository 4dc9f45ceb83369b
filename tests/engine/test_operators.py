"""Operators, methods and comparisons of Tensors, the numbers beside them, and the errors of operations."""

import contextlib
import inspect
import itertools
import operator
import warnings
import weakref

import array_api_strict
import numpy as np
import pytest
import torch
from drawing import LIBRARIES, TOLERANCE, WITH_JAX, check, host, place

from tinyvit.engine import ops
from tinyvit.engine.tensor import Tensor, grad, no_grad

OPERATORS = {
    "a + b": lambda a, b: a + b,
    "a - b": lambda a, b: a - b,
    "a * b": lambda a, b: a * b,
    "a / b": lambda a, b: a / b,
    "a ** b": lambda a, b: a**b,
    "a @ b": lambda a, b: a @ b,
}
NUMBERS = [2, 2.5, True, np.float64(2.5), np.float32(2.5), np.int64(2), np.bool_(True)]


@pytest.mark.parametrize("backend", WITH_JAX)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", OPERATORS)
def test_operators_take_tensors_arrays_and_numbers_on_either_side(name, dtype, backend):
    f = OPERATORS[name]
    x, y = np.array([[1.5, 2.0], [0.5, 1.25]]), np.array([[2.0, 0.75], [1.0, 3.0]])
    a, b = (place(v, backend, dtype) for v in (x, y))
    others = (
        []
        if name == "a @ b"
        else [n for n in NUMBERS if backend not in ("array_api_strict", "torch") or not isinstance(n, bool)]
    )
    for left, right, expected in [
        (Tensor(a), Tensor(b), f(x, y)),
        (Tensor(a), b, f(x, y)),
        *([(a, Tensor(b), f(x, y))] if backend not in ("array_api_strict", "torch") else []),  # which refuse ours
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
    for name in [
        "abs",
        "exp",
        "log",
        "sqrt",
        "tanh",
        "sigmoid",
        "sum",
        "mean",
        "var",
        "std",
        "max",
        "min",
        "argmax",
        "flatten",
        "transpose",
    ]:
        assert np.array_equal(getattr(x, name)().data, getattr(ops, name)(x).data), name
    assert x.clip(2, 3).data.tolist() == [[2, 3], [2, 3]]
    assert x.astype("float32").dtype == np.float32
    assert (-x).data.tolist() == [[-1, -4], [-2, -3]] and x.T.data.tolist() == [[1, 2], [4, 3]]
    assert x.reshape(4).shape == x.reshape(-1).shape == x.reshape((4,)).shape == x.reshape([4]).shape == (4,)
    assert x.permute_dims(1, 0).shape == (2, 2) and x.broadcast_to(3, 2, 2).shape == (3, 2, 2)
    assert x[0, 0].reshape().shape == x[0, 0].reshape(()).shape == () and x[1].data.tolist() == [2, 3]
    assert x.sum(axis=()).data.tolist() == x.data.tolist()


@pytest.mark.parametrize("backend", WITH_JAX)
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
        (lambda x: Tensor([1, 2]) + np.float32(2), "add expects whole numbers beside int64 arrays; use astype"),
        (lambda x: ops.exp(2.0), "exp expects at least one array"),
        (lambda x: ops.where(np.ones(3, bool), 1.0, 2.0), "where expects at least one array"),
        (lambda x: ops.concat([]), "concat expects at least one array"),
        (lambda x: ops.concat([x, 1.0]), "concat expects arrays of at least 1 dimensions, got float"),
        (lambda x: ops.concat([x.sum()]), "concat expects arrays of at least 1 dimensions, got shape ()"),
        (lambda x: ops.add(x), "add expects a, b; b is missing"),
        (lambda x: ops.exp(x, 1), "exp takes at most 1 arguments, got 2"),
        (lambda x: ops.sum(x, 0, axis=0), "multiple values for keyword argument 'axis'"),
        (lambda x: x @ 2.0, "matmul expects arrays with at least one axis, got shapes (3,) and ()"),
        (lambda x: x.T, "T expects two axes, got shape (3,); use transpose() for the last two"),
        (lambda x: x.sum().transpose(), "transpose expects at least two axes, got shape ()"),
        (lambda x: x.reshape(1, 3, 1).flatten(2, 0), "flatten expects start_dim before end_dim, got 2 and 0 of 3 axes"),
        (lambda x: x.max(dim=0), "torch's max(dim=...) gives values and positions; write max(axis=...)"),
        (lambda x: x == [1.0, 2.0, 3.0], "a tensor is compared with tensors, arrays and numbers, got a list"),
        (lambda x: x < array_api_strict.ones(3), "comparisons expect arrays of one library, got numpy and array_api"),
        (lambda x: x.astype("float33"), "unknown dtype 'float33'"),
        (lambda x: x + np.ones(2, np.float32), "(3,) (2,)"),
        (lambda x: x @ np.ones(2, np.float32), "matmul expects shapes (..., N, K) and (..., K, M), got (3,) and (2,)"),
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
    assert list(inspect.signature(ops.clip).parameters) == ["x", "min", "max"]


def test_a_variance_without_degrees_of_freedom_has_no_gradient_either():
    x = Tensor(np.ones(3), requires_grad=True)
    with warnings.catch_warnings(category=RuntimeWarning, action="ignore"):  # "Degrees of freedom <= 0"
        y = ops.var(x, correction=3)
    assert np.isnan(y.data) and np.isnan(grad(y, x)).all()


@pytest.mark.parametrize("backend", WITH_JAX)
def test_comparisons_are_elementwise_and_a_tensor_is_hashed_by_identity(backend):
    xp = LIBRARIES[backend]
    a, b = (place(v, backend, "float32") for v in (np.array([[1.0, 2.0, 3.0]]), np.array([[1.0], [3.0]])))
    x, y = host(a), host(b)
    for compare in (operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge):
        for left, right, expected in [
            (Tensor(a, requires_grad=True), Tensor(b), compare(x, y)),
            (Tensor(a), b, compare(x, y)),
            (Tensor(a), 2, compare(x, 2)),
            (Tensor(a), np.float64(2), compare(x, 2)),
            (2.5, Tensor(a), compare(2.5, x)),
        ]:
            result = compare(left, right)
            assert isinstance(result, Tensor) and result.dtype == xp.bool and not result.requires_grad
            assert np.array_equal(result.numpy(), expected)
    t, other = Tensor(a), Tensor(a)
    assert {t: 1, other: 2}[t] == 1 and len({t, other, t}) == 2 and hash(t) == hash(t)
    assert (t == None) is False and (t != "a") is True  # noqa: E711
    assert 2.0 in t and 5.0 not in t and None not in t and (+t) is t
    with pytest.raises(ValueError, match=r"expects one element, got shape \(1, 3\)"):
        bool(t == other)


def test_class_numbers_of_other_dtypes_are_compared_by_value():
    logits = Tensor(np.array([[0.1, 0.9], [0.8, 0.2]], np.float32))
    for dtype in (np.uint8, np.int32, np.int64, np.float64):
        labels = np.array([1, 1], dtype)
        assert (logits.argmax(-1) == labels).astype("float32").mean().item() == 0.5
        assert (labels == logits.argmax(-1)).numpy().tolist() == [True, False]


def test_methods_and_names_of_torch_have_its_meaning():
    x = np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32)
    ours, theirs = Tensor(x), torch.tensor(x)
    for f in (
        lambda t: t.var(), lambda t: t.std(), lambda t: t.var(1), lambda t: t.std(dim=(0, 2), keepdim=True),
        lambda t: t.var(1, correction=0), lambda t: t.sum(dim=1), lambda t: t.mean(dim=-1, keepdim=True),
        lambda t: t.argmax(), lambda t: t.argmax(1), lambda t: t.argmax(dim=-1, keepdim=True), lambda t: t.max(),
        lambda t: t.min(), lambda t: t.view(6, 4), lambda t: t.view((-1,)), lambda t: t.permute(2, 0, 1),
        lambda t: t.permute((1, 2, 0)), lambda t: t.flatten(), lambda t: t.flatten(1), lambda t: t.flatten(0, 1),
        lambda t: t.sigmoid(), lambda t: t.clip(-0.5, 0.5), lambda t: t.clip(min=0.0), lambda t: t.clip(max=0.0),
        lambda t: t.transpose(0, 1), lambda t: t[0].T,
    ):  # fmt: skip
        assert np.allclose(f(ours).numpy(), f(theirs).numpy(), rtol=1e-5) and f(ours).shape == tuple(f(theirs).shape)
    assert ops.concat([ours, ours], dim=1).shape == (2, 6, 4) and ops.stack([ours, ours], dim=-1).shape == (2, 3, 4, 2)
    assert f"{ours.sum():.3f}" == f"{theirs.sum():.3f}" and f"{ours[0, 0]}" == str(ours[0, 0])
    with pytest.raises(TypeError):
        f"{ours:.3f}"
    assert ours.device == "cpu"


def test_a_deviation_of_zero_has_gradient_zero_as_in_torch():
    x, t = Tensor(np.ones((2, 3)), requires_grad=True), torch.ones(2, 3, requires_grad=True)
    x.std(axis=1).sum().backward()
    t.std(dim=1).sum().backward()
    assert np.array_equal(x.grad, t.grad.numpy())


@pytest.mark.parametrize("shapes", [((2, 3), (2, 3)), ((3,), (2, 3)), ((3, 2), (3,)), ((5, 1, 3), (4, 3, 1))])
def test_products_of_shapes_that_do_not_fit_are_refused_in_one_line(shapes):
    a, b = map(np.zeros, shapes)
    for left, right in ((Tensor(a), Tensor(b)), (Tensor(a), b), (a, Tensor(b))):
        with pytest.raises(ValueError, match=r"^matmul expects .*, got .*$") as raised:
            left @ right
        assert f"{shapes[0]} and {shapes[1]}" in str(raised.value)


def test_requires_grad_and_numel_are_torch_s():
    for library in (lambda x: Tensor(x), torch.tensor):
        x = library(np.ones((2, 3)))
        assert x.numel() == 6 and not x.requires_grad and x.requires_grad_() is x and x.requires_grad
        y = x * 2
        assert y.requires_grad_() is y
        with pytest.raises(RuntimeError, match=r"lea(f|ves)"):
            y.requires_grad_(False)
        assert x.requires_grad_(False) is x and not (x * 2).requires_grad
        with pytest.raises((TypeError, RuntimeError), match=r"[oO]nly .*floating"):
            library(np.arange(2)).requires_grad_()
