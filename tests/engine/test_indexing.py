"""Indexing and its gradient: NumPy's whole grammar against np.add.at, and every array library."""

import array
import math
import weakref

import numpy as np
import pytest
from drawing import LIBRARIES, WITH_JAX, check, host, place, seeds, shapes, values
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyvit import kernels
from tinyvit.engine.tensor import Tensor, grad
from tinyvit.kernels import reference


def integers(draw, length, shape):
    """Integers within +-length, in one of the forms that NumPy takes for an array of them."""
    x = np.random.default_rng(draw(seeds)).integers(-length, length, shape)
    forms = [lambda: x, lambda: Tensor(x), x.tolist, lambda: _tuples(x.tolist()), lambda: x.astype(np.int8)]
    if x.ndim == 1:
        forms += [lambda: array.array("q", x.tolist()), lambda: memoryview(np.ascontiguousarray(x))]
        forms += [lambda: range(length - 1, -1, -1)[: len(x)]] if len(x) in (1, length) else []
    return draw(st.sampled_from(forms))()


def _tuples(x):
    return tuple(map(_tuples, x)) if isinstance(x, list) else x


@st.composite
def indices(draw, shape):
    """A key for an array of `shape`: every part that NumPy has, in any order."""
    common = draw(st.sampled_from([(), (1,), (2,), (3,), (2, 1), (2, 3), (0,)]))
    parts, axis = [], 0
    while axis < len(shape):
        n = shape[axis]
        kinds = ["slice", "new", "all", "stop", "booleans", "mask"] + ["integer", "integers"] * (n > 0)
        kind = draw(st.sampled_from(kinds))
        if kind == "stop":
            break
        if kind == "integer":
            number = draw(st.integers(-n, n - 1))
            parts.append(draw(st.sampled_from([int, np.int64, np.uint8 if number >= 0 else np.int8]))(number))
        elif kind == "integers":
            parts.append(integers(draw, n, draw(st.sampled_from([common, common[-1:], ()])) or (1,)))
        elif kind == "mask":
            axes = draw(st.integers(1, len(shape) - axis))
            count = common[-1] if common and common[-1] <= math.prod(shape[axis : axis + axes]) else 1
            mask = np.zeros(math.prod(shape[axis : axis + axes]), bool)
            mask[:count] = True
            mask = np.random.default_rng(draw(seeds)).permutation(mask).reshape(shape[axis : axis + axes])
            parts.append(draw(st.sampled_from([mask, mask.tolist(), Tensor(mask)])))
            axis += axes - 1
        elif kind == "slice":
            parts.append(draw(st.slices(n)))
        else:
            parts.append({"new": None, "all": slice(None), "booleans": draw(st.booleans())}[kind])
            axis -= kind in ("new", "booleans")
        axis += 1
        if len(parts) > 6:
            break
    if draw(st.booleans()):
        parts.insert(draw(st.integers(0, len(parts))), ...)
    return parts[0] if len(parts) == 1 and draw(st.booleans()) and not isinstance(parts[0], tuple) else tuple(parts)


def plain(key):
    """The key as NumPy takes it."""
    if isinstance(key, tuple):
        return tuple(plain(k) for k in key)
    return key.data if isinstance(key, Tensor) else key


@settings(max_examples=200)
@given(data=st.data())
def test_every_index_of_numpy_s_gives_its_entries_and_each_their_gradient(data):
    shape = data.draw(shapes(min_dims=1, max_dims=3, max_side=4))
    x = values(data.draw, shape)
    key = data.draw(indices(shape))
    try:
        expected = x[plain(key)]
    except (IndexError, ValueError) as error:
        with pytest.raises(type(error)):
            Tensor(x)[key]
        return
    tensor = Tensor(x, requires_grad=True)
    result = tensor[key]
    assert np.array_equal(result.numpy(), expected)
    dy = values(data.draw, expected.shape)
    dx = np.zeros(shape)
    np.add.at(dx, plain(key), dy)
    check(grad(result, tensor, dy), dx, "numpy", "float64")


@pytest.mark.parametrize("backend", WITH_JAX)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_repeated_entries_get_all_their_gradients_in_every_library(backend, dtype):
    xp = LIBRARIES[backend]
    x = np.arange(12.0).reshape(3, 4)
    rows = xp.asarray(np.array([2, 0, 2, 2]))
    columns = xp.asarray(np.array([1, 3, 1, 0]))
    mask = xp.asarray(x > 4)
    keys = {
        "rows": ((rows, ...), ([2, 0, 2, 2],)),
        "pairs": ((rows, columns), ([2, 0, 2, 2], [1, 3, 1, 0])),
        "a mask": (mask, x > 4),
        "slices": ((slice(1, None), slice(None, None, 2)), (slice(1, None), slice(None, None, 2))),
        "new axes": ((None, 1, ..., None), (None, 1, ..., None)),
    }
    if backend == "array_api_strict":
        del keys["rows"]  # the standard takes integer arrays for all axes alone
    for name, (key, numpy_key) in keys.items():
        tensor = Tensor(place(x, backend, dtype), requires_grad=True)
        result = tensor[key]
        assert np.array_equal(host(result.data), x[numpy_key]), name
        dy = np.random.default_rng(0).standard_normal(x[numpy_key].shape)
        dx = np.zeros_like(x)
        np.add.at(dx, numpy_key, dy)
        check(grad(result, tensor, place(dy, backend, dtype)), dx, backend, dtype)


@pytest.mark.parametrize("backend", WITH_JAX)
@pytest.mark.parametrize("version", ["reference", "kernel"])
@given(data=st.data())
def test_sums_at_positions(backend, version, data):
    xp = LIBRARIES[backend]
    n, size = (5, 3) if backend == "jax" else (data.draw(st.integers(0, 20)), data.draw(st.integers(1, 6)))
    numbers = values(data.draw, (n,))
    positions = np.random.default_rng(data.draw(seeds)).integers(0, size, n)
    function = reference.sum_at if version == "reference" else kernels.best(reference.sum_at, xp)
    right = np.zeros(size)
    np.add.at(right, positions, numbers)
    for dtype in ("float32", "float64"):
        check(function(xp, place(numbers, backend, dtype), xp.asarray(positions), size), right, backend, dtype)


def test_sixteen_bits_are_added_up_in_float32():
    x = Tensor(np.zeros(2, np.float16), requires_grad=True)
    dx = grad(x[np.zeros(5000, int)], x, np.ones(5000, np.float16))
    assert dx.dtype == np.float16 and dx.tolist() == [5000, 0]


def test_an_index_that_the_caller_changes_afterwards_does_not_move_the_gradient():
    key = np.array([0, 0])
    x = Tensor(np.zeros(3), requires_grad=True)
    y = x[key]
    key[:] = 2
    assert grad(y, x, np.ones(2)).tolist() == [2, 0, 0]


def test_indexing_keeps_nothing_of_what_it_cuts_from():
    x = Tensor(np.ones((2, 3)), requires_grad=True)
    middle = x * 2.0
    array = weakref.ref(middle.data)
    y = middle[:, 1].sum()
    del middle
    assert array() is None and np.array_equal(grad(y, x), [[0, 2, 0], [0, 2, 0]])
