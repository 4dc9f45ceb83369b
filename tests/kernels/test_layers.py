"""The ViT's operations: every version of each (reference and kernels, in every library) against the same torch one."""

import importlib
import inspect
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as TF
from drawing import BACKENDS, HAS_NUMBA, TOLERANCE, host, place, shapes, sides, values
from hypothesis import given
from hypothesis import strategies as st
from operations import Example, agrees_with_torch, checks_of, find_version, operations, torch_attention

from tinyvit import functional as F
from tinyvit.engine import ops
from tinyvit.engine.tensor import Tensor, grad
from tinyvit.kernels.cpu import layers
from tinyvit.kernels.reference import convolution
from tinyvit.kernels.reference import layers as reference

CASES: dict[str, Any] = {}


def case(function):
    CASES[function.__name__.strip("_")] = function
    return function


rows = st.lists(st.sampled_from([0, 1, 2, 3, 5]), max_size=3)


def linear_inputs(draw):
    n_in, n_out = draw(sides), draw(sides)
    x = values(draw, (*draw(rows), n_in))
    return [x, values(draw, (n_out, n_in)), values(draw, (n_out,))]


@case
def _linear(draw):
    x, weight, bias = linear_inputs(draw)
    return Example([x, weight, draw(st.sampled_from([bias, None]))], TF.linear)


@case
def _add_linear(draw):
    x, weight, bias = linear_inputs(draw)
    residual = values(draw, (*x.shape[:-1], len(weight)))
    inputs = [residual, x, weight, draw(st.sampled_from([bias, None]))]
    return Example(inputs, lambda residual, *linear: residual + TF.linear(*linear))


@case
def _add_scaled(draw):
    shape = (draw(sides), *draw(rows), draw(sides))
    scale = values(draw, (shape[0],) + (1,) * (len(shape) - 1), "grid")
    theirs = torch.tensor(scale)
    return Example([values(draw, shape), values(draw, shape)], lambda a, b: a + theirs * b, {"scale": scale})


@case
def _linear_gelu(draw):
    approximate = draw(st.sampled_from(["none", "tanh"]))
    return Example(
        linear_inputs(draw),
        lambda x, weight, bias: TF.gelu(TF.linear(x, weight, bias), approximate=approximate),
        {"approximate": approximate},
    )


@case
def _mlp(draw):
    approximate, hidden, outputs = draw(st.sampled_from(["none", "tanh"])), draw(sides), draw(sides)
    x = values(draw, (*draw(rows), draw(sides)))
    residual = draw(st.sampled_from([values(draw, (*x.shape[:-1], outputs)), None]))
    weights = [values(draw, shape) for shape in ((hidden, x.shape[-1]), (hidden,), (outputs, hidden), (outputs,))]

    def theirs(residual, x, *weights):
        y = TF.linear(TF.gelu(TF.linear(x, *weights[:2]), approximate=approximate), *weights[2:])
        return y if residual is None else residual + y

    return Example([residual, x, *weights], theirs, {"approximate": approximate})


@case
def _layer_norm(draw):
    n, eps = draw(sides), draw(st.sampled_from([1e-6, 1e-5, 0.1]))
    x = values(draw, (*draw(rows), n), "spread")  # rows of equal entries would be all cancellation
    return Example(
        [x + draw(st.sampled_from([0, 0, 100])), values(draw, (n,)), values(draw, (n,))],
        lambda x, weight, bias: TF.layer_norm(x, (n,), weight, bias, eps),
        {"eps": eps},
    )


@case
def _gelu(draw):
    approximate, scale = draw(st.sampled_from(["none", "tanh"])), draw(st.sampled_from([1, 5]))
    x = values(draw, draw(shapes()), draw(st.sampled_from(["normal", "grid"])))
    return Example([x * scale], lambda x: TF.gelu(x, approximate=approximate), {"approximate": approximate})


def softmax_example(draw, theirs):
    shape = draw(shapes(min_dims=1, min_side=1))
    axis, scale = draw(st.integers(-len(shape), len(shape) - 1)), draw(st.sampled_from([1, 30]))
    return Example([values(draw, shape) * scale], lambda x: theirs(x, dim=axis), {"axis": axis})


@case
def _softmax(draw):
    return softmax_example(draw, torch.softmax)


@case
def _log_softmax(draw):
    return softmax_example(draw, torch.log_softmax)


def mask_and_keep(draw, shape):
    """A mask that broadcasts to `shape` (None, booleans, or numbers down to -inf) and dropout's factors (or None)."""
    part = tuple(n if draw(st.booleans()) else 1 for n in shape)[draw(st.integers(0, 4)) :]
    allowed = np.asarray(values(draw, part) > -0.5)
    added = np.where(allowed, values(draw, part), -math.inf)
    keep = (values(draw, shape) > -0.5) * 1.5
    return draw(st.sampled_from([None, allowed, added])), draw(st.sampled_from([None, keep]))


@case
def _attention(draw):
    (b, h, n, m), d, e = (draw(sides) for _ in range(4)), draw(sides), draw(sides)
    mask, keep = mask_and_keep(draw, (b, h, n, m))
    scale = draw(st.sampled_from([1, 5]))  # small scores and such that overflow if exponentiated as they are
    return Example(
        [values(draw, shape) * s for shape, s in (((b, h, n, d), scale), ((b, h, m, d), scale), ((b, h, m, e), 1))],
        lambda q, k, v: torch_attention(q, k, v, mask, keep),
        {"mask": mask, "dropout_mask": keep},
        condition=scale**2,
    )


@case
def _qkv_attention(draw):
    b, n, h, d = draw(st.sampled_from([0, 1, 2, 3])), draw(sides), draw(sides), draw(sides)
    queries = draw(st.none() | st.integers(1, n))
    n_queries = queries or n
    mask, keep = mask_and_keep(draw, (b, h, n_queries, n))

    def theirs(qkv):
        q, k, v = (part.reshape(b, n, h, d).transpose(1, 2) for part in qkv.chunk(3, dim=2))
        return torch_attention(q[:, :, :n_queries], k, v, mask, keep).transpose(1, 2).reshape(b, n_queries, h * d)

    scale = draw(st.sampled_from([1, 5]))
    qkv = values(draw, (b, n, 3 * h * d)) * scale
    parameters = {"num_heads": h, "queries": queries, "mask": mask, "dropout_mask": keep}
    return Example([qkv], theirs, parameters, condition=scale**2)


@case
def _patchify(draw):
    size = (draw(st.integers(1, 4)), draw(st.integers(1, 4)))
    shape = (draw(st.integers(0, 3)), draw(st.integers(1, 4)), *(n * draw(st.integers(1, 3)) for n in size))

    def theirs(images):
        if not shape[0]:
            return images.reshape(0, shape[2] * shape[3] // math.prod(size), shape[1] * math.prod(size))
        return TF.unfold(images, size, stride=size).transpose(1, 2)

    return Example([values(draw, shape)], theirs, {"patch_size": size})


@case
def _cross_entropy(draw):
    b, c, scale = draw(sides), draw(sides), draw(st.sampled_from([1, 100, 1e4]))
    smoothing = draw(st.sampled_from([0.0, 0.1, 1.0]))
    labels = np.random.default_rng(b * c).integers(0, c, b)
    if draw(st.booleans()):
        labels = values(draw, (b, c), "positive")  # not normalised: their sum is a weight
    theirs = torch.tensor(labels)
    return Example(
        [values(draw, (b, c)) * scale],
        lambda x: TF.cross_entropy(x, theirs, label_smoothing=smoothing),
        {"labels": labels, "label_smoothing": smoothing},
    )


def test_every_operation_has_a_case_and_every_kernel_a_reference():
    references = operations(reference)
    assert references == set(CASES)
    for room in ("cpu", "cuda", *(["jit"] if HAS_NUMBA else [])):  # CuPy's table needs no CuPy
        for op, kernel in importlib.import_module(f"tinyvit.kernels.{room}.table").KERNELS.items():
            ours, spec = (list(inspect.signature(f).parameters) for f in (kernel.run, op))
            assert ours == spec, op.__name__
            tested = op.__name__ in references | operations(convolution)
            assert tested == ("needs" in spec), f"nothing tests the kernel {op.__name__}"


test_every_version_agrees_with_torch, test_fewer_gradients_change_nothing = checks_of(reference, CASES)


@pytest.mark.parametrize("exp, unit", [(np.exp, 1.0), (np.exp2, 1.0 / math.log(2.0))])
@pytest.mark.parametrize("name", ["gelu", "qkv_attention"])
@given(data=st.data())
def test_the_kernels_may_take_either_exponential(name, exp, unit, data):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layers, "_exp", exp)
        patch.setattr(layers, "_UNIT", unit)
        agrees_with_torch(find_version(reference, name, "numpy", "kernel"), CASES[name](data.draw), "numpy", data.draw)


# --- the error function -------------------------------------------------------------------------------------------

GRID = np.concatenate([np.linspace(-7, 7, 20_001), np.geomspace(1e-30, 100, 500), -np.geomspace(1e-30, 100, 500)])
for limit in (0.46875, 1.0, 6.0):  # both sides of where one approximation takes over from another
    GRID = np.append(GRID, [s * np.nextafter(limit, to) for s in (-1, 1) for to in (0, limit, 9)])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype, tolerance", [("float64", 1e-12), ("float32", 1e-7)])
def test_erf_is_exact(dtype, tolerance, backend):
    x = GRID.astype(dtype)
    expected = np.array([math.erf(v) for v in x.tolist()])
    y = host(ops.erf(Tensor(place(x, backend, dtype))).data)
    assert y.dtype == dtype
    assert np.abs(y - expected).max() < tolerance
    small = np.abs(x) < 1e-3  # relative accuracy where erf is nearly linear
    assert (np.abs(y - expected)[small] <= 2 * np.finfo(dtype).eps * np.abs(expected[small])).all()


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_erf_of_special_values(dtype):
    tiny, huge = np.finfo(dtype).smallest_subnormal, np.finfo(dtype).max
    x = np.array([0.0, -0.0, np.inf, -np.inf, huge, -huge, tiny, -tiny, np.nan], dtype)
    y = ops.erf(Tensor(x)).data
    assert y[:6].tolist() == [0, 0, 1, -1, 1, -1]
    assert np.abs(y[6:8] / x[6:8] - 1.128).max() < 0.2 and np.isnan(y[8])
    finite = Tensor(x[:4], requires_grad=True)
    assert grad(ops.erf(finite).sum(), finite)[2:].tolist() == [0, 0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype, tolerance", [("float64", 1e-12), ("float32", 1.5e-7)])
def test_gelu_is_exact(dtype, tolerance, backend):
    """Through the public function, so the kernel where there is one. torch's own float32 GELU is off by 3e-7."""
    x = GRID.astype(dtype)
    phi = np.array([0.5 * math.erfc(-v * math.sqrt(0.5)) for v in x.tolist()])
    slope = phi + x.astype(np.float64) * np.exp(-0.5 * x.astype(np.float64) ** 2) / math.sqrt(2 * math.pi)
    t = Tensor(place(x, backend, dtype), requires_grad=True)
    y = F.gelu(t)
    scale = np.maximum(np.abs(x), 1.0)
    assert (np.abs(host(y.data) - x * phi) / scale).max() < tolerance
    assert np.abs(host(grad(y.sum(), t)) - slope).max() < 2 * tolerance


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_gelu_of_large_values(dtype, approximate):
    x = Tensor(np.array([1e4, -1e4, 50.0, -50.0, 0.0], dtype), requires_grad=True)
    y = F.gelu(x, approximate)
    assert y.data.tolist() == pytest.approx([1e4, 0, 50, 0, 0], abs=1e-30)
    assert grad(y.sum(), x).tolist() == pytest.approx([1, 0, 1, 0, 0.5], abs=1e-29)
    assert np.isnan(F.gelu(np.array([np.nan], dtype), approximate).data[0])
