"""What the tape keeps: arrays that are changed in place are noticed, and memory is freed as soon as it can be."""

import gc
import weakref

import numpy as np
import pytest
from drawing import BACKENDS, host, place

from tinyvit import functional as F
from tinyvit.engine import ops
from tinyvit.engine.tensor import Tensor, apply, grad, no_grad


def leaf(x):
    return Tensor(np.asarray(x, np.float64), requires_grad=True)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.reshape(6), lambda x: x.T, lambda x: x[0], lambda x: x.reshape(3, 2)[1:],
        lambda x: x.astype("float64"),  # the very array
    ],
)  # fmt: skip
def test_a_change_through_a_view_is_noticed(view):
    x = leaf([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    hidden = x * 2.0
    part, other = view(hidden), hidden + 1.0
    y = (hidden * hidden).sum() + other.sum()
    part.data += 1
    with pytest.raises(RuntimeError, match="was changed in place"):
        y.backward()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "compute",
    [lambda x: x * x, lambda x: ops.exp(x), lambda x: F.softmax(x), lambda x: ops.sqrt(x), lambda x: x @ x.T],
)
def test_a_saved_array_that_was_changed_in_place_is_noticed(compute, backend):
    def fresh():
        return Tensor(place(np.array([[1.0, 2.0], [3.0, 4.0]]), backend, "float64") * 1.0, requires_grad=True)

    message = "was changed in place after the forward pass"
    for changed in ("input", "output", "detached", "told"):
        x = fresh()
        y = compute(x)
        total = (y * 2.0).sum()
        if changed == "input":
            x.data += 1
        elif changed == "output":
            y.data *= 2
        elif changed == "detached":
            x.detach().data += 1
        else:
            x.data[0, ...] = 0.0
            x.changed()
        for call in (total.backward, lambda total=total, x=x: grad(total, x)):
            with pytest.raises(RuntimeError, match=message):
                call()
    x = fresh()
    y = compute(x)
    y.data *= 2
    with pytest.raises(RuntimeError, match=message):  # though no further operation has seen it
        grad(y, x, y.detach())
    x = fresh()
    total = compute(x).sum()
    expected = grad(compute(fresh_x := fresh()).sum(), fresh_x)
    x.data = x.data + 1  # another array: the one that was saved is intact
    assert np.array_equal(host(grad(total, x)), host(expected))


def test_a_change_before_the_forward_pass_is_none_of_its_business():
    x = leaf([1.0, 2.0])
    old = (x * x).sum()
    x.data += 1
    (x * x).sum().backward()
    assert x.grad.tolist() == [4, 6]
    with pytest.raises(RuntimeError, match="an input or output of multiply was changed"):
        old.backward()


def counting(xp, x, *, alive, counts, needs):
    """An operation that counts, in its backward pass, how many of the watched arrays are alive."""

    def vjp(dy):
        counts.append(sum(ref() is not None for ref in alive))
        return (dy,)

    return x * 1.0, vjp


def test_memory_falls_while_the_backward_pass_runs():
    for walk in (lambda y, x: y.backward(), lambda y, x: grad(y, x)):
        alive, counts = [], []
        x = y = leaf(np.ones(1000))
        for _ in range(10):
            for _ in range(5):
                y = ops.exp(y * 0.1)
                alive.append(weakref.ref(y.data))
            y = apply(counting, y, alive=alive, counts=counts)
        y = y.sum()
        assert sum(ref() is not None for ref in alive) == 50
        walk(y, x)
        assert counts == [50 - 5 * i for i in range(10)]
        assert all(ref() is None for ref in alive)


def test_what_no_gradient_needs_is_freed_at_once():
    x = leaf(np.ones(1000))
    hidden = x + 1.0
    seen = weakref.ref(hidden.data)
    y = (hidden + 2.0).sum()
    del hidden
    assert seen() is None
    assert grad(y, x).sum() == 1000
    hidden = ops.exp(x)
    seen = weakref.ref(hidden.data)
    with no_grad():
        ops.exp(hidden)
    y = ops.exp(hidden.detach())
    del hidden
    assert seen() is None


def test_a_graph_that_is_dropped_is_freed_without_the_garbage_collector():
    gc.collect()
    gc.disable()
    try:
        x = leaf(np.ones(10))
        y = ops.exp(x) * 2.0
        seen = weakref.ref(y.data)
        total = (y * y).sum()
        del y
        assert seen() is not None
        del total
        assert seen() is None
    finally:
        gc.enable()


def test_twenty_thousand_operations_in_a_row():
    """Nothing recurses: not the forward pass, not the backward pass, not the deletion of either."""
    x = y = leaf(0.0)
    for n in range(1, 20_001):
        y = y + 1.0
        if n == 10_000:
            y.backward()  # frees this part
            y = y.detach() + x
    assert float(y) == 20_000.0
    y.backward(retain_graph=True)
    assert float(x.grad) == 2.0
    seen = weakref.ref(y)
    del y  # deletes the other part as a whole
    assert seen() is None
