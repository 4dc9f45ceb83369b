"""Operations on 16 bits: computed in float32 and rounded once, in every library that has float16 and bfloat16."""

import inspect
import math

import numpy as np
import pytest
from drawing import BACKENDS, LIBRARIES, error, kernel_table
from hypothesis import given, settings
from hypothesis import strategies as st
from operations import operations

from tinyvit import Tensor, create_model
from tinyvit import functional as F
from tinyvit.backend import arrays, random
from tinyvit.engine import ops
from tinyvit.kernels import reference

ROUNDING = {"float16": 2.0**-11, "bfloat16": 2.0**-8}
CARRIERS = [backend for backend in BACKENDS if backend != "array_api_strict"]
EXACT = {"mlp", "patchify", "max_pool2d", "relu"}  # made of others, or moving numbers and adding up a handful at most


def to_half(x, dtype, backend="numpy"):
    return arrays.astype(LIBRARIES[backend].asarray(np.asarray(x, np.float32)), dtype)


def wide(x):
    return arrays.to_numpy(x).astype(np.float64)


def test_every_operation_that_adds_up_is_computed_in_float32():
    """A new one must say so, unless it only moves numbers."""
    for module in (reference, reference):
        undecorated = {name for name in operations(module) if not hasattr(vars(module)[name], "__wrapped__")}
        assert undecorated <= EXACT, undecorated - EXACT
    kernels = kernel_table("numpy")
    shared = kernels.keys() & (operations(reference) | operations(reference)) - EXACT
    assert len(shared) > 3 and all(hasattr(kernels[name], "__wrapped__") for name in shared)


CASES = {
    "linear": (lambda x, w, b: F.linear(x, w, b), [(3, 5, 24), (7, 24), (7,)]),
    "linear_gelu": (lambda x, w, b: F.linear_gelu(x, w, b), [(3, 5, 24), (7, 24), (7,)]),
    "layer_norm": (lambda x, w, b: F.layer_norm(x, w, b), [(3, 5, 24), (24,), (24,)]),
    "gelu": (lambda x: F.gelu(x, "tanh"), [(4, 9)]),
    "softmax": (lambda x: F.softmax(x), [(4, 9)]),
    "qkv_attention": (lambda x: F.qkv_attention(x, 2, queries=3), [(2, 5, 48)]),
    "attention": (lambda q, k, v: F.attention(q, k, v), [(2, 2, 5, 8)] * 3),
    "cross_entropy": (lambda x: F.cross_entropy(x, np.array([0, 3, 2, 4])), [(4, 5)]),
    "add": (lambda x, y: x + y, [(4, 5, 6), (5, 1)]),
    "multiply": (lambda x, y: x * y * 0.1, [(4, 5, 6), (6,)]),
    "divide": (lambda x, y: x / (y * y + 1), [(4, 5), (5,)]),
    "mean": (lambda x: x.mean(axis=1), [(4, 50, 3)]),
    "var": (lambda x: x.var(axis=(0, 2)), [(4, 5, 3)]),
    "clip": (lambda x: x.clip(-0.3, 0.7), [(4, 9)]),
    "power": (lambda x: (x * x + 0.5) ** 1.5, [(4, 9)]),
    "matmul": (lambda x, y: x @ y, [(3, 4, 5), (5, 6)]),
    "tanh": (lambda x: ops.tanh(x), [(4, 9)]),
}


@pytest.mark.parametrize("backend", CARRIERS)
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("name", CASES)
@settings(max_examples=4)  # of numbers alone: the shapes are fixed
@given(seed=st.integers(0, 2**32 - 1))
def test_values_and_gradients_are_float32_s_rounded(name, dtype, backend, seed):
    """From the same 16-bit inputs; each rounding on the way (three at most here) costs half a last digit."""
    function, shapes = CASES[name]
    rng = np.random.default_rng(seed)
    inputs = [to_half(rng.standard_normal(shape), dtype, backend) for shape in shapes]
    dy = None
    results = []
    for precision in ("float64", dtype):
        tensors = [Tensor(arrays.astype(x, precision), requires_grad=True) for x in inputs]
        y = function(*tensors)
        dy = to_half(rng.standard_normal(y.shape), dtype, backend) if dy is None else dy
        y.backward(arrays.astype(dy, precision))
        assert all(arrays.dtype_name(x.dtype) == precision for x in (y, *(t.grad for t in tensors)))
        results.append([wide(y.data), *(wide(t.grad) for t in tensors)])
    for exact, got in zip(*results, strict=True):
        assert error(got, exact, floor=0.5) < 3 * ROUNDING[dtype]


@pytest.mark.parametrize("backend", CARRIERS)
@pytest.mark.parametrize("dtype", ROUNDING)
def test_long_sums_lose_nothing(dtype, backend):
    """4096 ones come to 4096, where additions in bfloat16 would stop at 256 and in float16 at 2048."""
    ones = Tensor(to_half(np.ones((4096, 3)), dtype, backend))
    assert wide(ones.sum(axis=0).data).tolist() == [4096.0] * 3
    assert wide((ones * 2.0).mean(axis=0).data).tolist() == [2.0] * 3
    bias = Tensor(to_half(np.zeros(3), dtype, backend), requires_grad=True)
    (ones + bias).backward(ones.data)
    assert wide(bias.grad).tolist() == [4096.0] * 3
    weight = Tensor(to_half(np.ones((2, 3)), dtype, backend), requires_grad=True)
    y = F.linear(ones, weight, None)
    y.backward(LIBRARIES[backend].ones_like(y.data))
    assert wide(weight.grad).tolist() == [[4096.0] * 3] * 2


@pytest.mark.parametrize("backend", CARRIERS)
@pytest.mark.parametrize("dtype", ROUNDING)
def test_normalisation_and_softmax_bear_large_numbers(dtype, backend):
    """Squares of 300 overflow float16, exponentials of the differences do not exist in it."""
    x = to_half(np.linspace(-300, 300, 64)[None], dtype, backend)
    one, zero = (to_half(np.full(64, value), dtype, backend) for value in (1.0, 0.0))
    exact = wide(x)
    expected = (exact - exact.mean()) / exact.std()
    assert error(wide(F.layer_norm(x, one, zero).data), expected) < 2 * ROUNDING[dtype]
    assert wide(F.softmax(Tensor(x)).data).sum() == pytest.approx(1, abs=4 * ROUNDING[dtype])
    loss = F.cross_entropy(Tensor(x), np.array([0]))
    assert float(wide(loss.data)) == pytest.approx(600, rel=0.01)


@pytest.mark.parametrize("backend", CARRIERS)
@pytest.mark.parametrize("dtype", ROUNDING)
def test_dropout_keeps_the_dtype(dtype, backend):
    x = Tensor(to_half(np.ones((64, 200)), dtype, backend), requires_grad=True)
    for function in (F.dropout, F.drop_path):
        with random.scope(1, 2):
            y = function(x, 0.3, training=True)
        assert arrays.dtype_name(y.dtype) == dtype
        kept = wide(y.data)
        assert set(np.unique(kept)) == {0.0, float(wide(to_half(1 / 0.7, dtype)))}


@pytest.mark.parametrize("dtype", ROUNDING)
def test_a_model_of_16_bits(dtype):
    model = create_model("vit_nano_patch8_32", distilled=True, init_values=0.1, num_classes=3)
    images = np.random.default_rng(0).standard_normal((2, 3, 32, 32)).astype(np.float32)
    for p in (model.head.weight, model.head_dist.weight):
        p.data = np.random.default_rng(1).standard_normal(p.shape).astype(np.float32)
    expected = model(images).numpy()
    logits = model.to(dtype)(images)
    assert arrays.dtype_name(logits.dtype) == dtype and error(wide(logits.data), expected) < 8 * ROUNDING[dtype]
    F.cross_entropy(logits, np.array([0, 2])).backward()
    assert all(arrays.dtype_name(p.grad.dtype) == dtype for p in model.parameters())
    state = {name: x.astype(np.float32) for name, x in model.state_dict().items()}
    assert all(math.isfinite(x.sum()) for x in state.values())


def test_signatures_survive_the_decoration():
    assert list(inspect.signature(reference.layer_norm).parameters) == ["xp", "x", "weight", "bias", "eps", "needs"]
    assert float(ops.mean(Tensor(np.ones((2, 3))), 1).sum()) == 2.0
