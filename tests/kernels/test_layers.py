"""The ViT's operations: every version of each (reference and kernels, in every library) against the same torch one."""

import inspect
import math
from typing import Any

import array_api_strict
import numpy as np
import pytest
import torch
import torch.nn.functional as TF
from drawing import (
    BACKENDS,
    LIBRARIES,
    TOLERANCE,
    check,
    error,
    host,
    kernel_table,
    place,
    shapes,
    sides,
    torch_vjp,
    values,
    versions,
)
from hypothesis import given
from hypothesis import strategies as st
from operations import Example, agrees_with_torch, find_version, operations, same_with_fewer_gradients

from tinyvit import functional as F
from tinyvit.backend import random
from tinyvit.engine import ops
from tinyvit.engine.tensor import Tensor, grad
from tinyvit.kernels.cpu import layers, optimizers
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
def _linear_gelu(draw):
    approximate = draw(st.sampled_from(["none", "tanh"]))
    return Example(
        linear_inputs(draw),
        lambda x, weight, bias: TF.gelu(TF.linear(x, weight, bias), approximate=approximate),
        {"approximate": approximate},
    )


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
    for backend in LIBRARIES:
        for name in set(kernel_table(backend)) - {op.__name__ for op in optimizers.KERNELS} - {"sum_at"}:
            assert name in references | operations(convolution), f"nothing tests the kernel {name}"
            if name in references:
                ours, spec = (
                    list(inspect.signature(f).parameters)
                    for f in (kernel_table(backend)[name], getattr(reference, name))
                )
                assert ours == spec, name


ALL_VERSIONS = [pytest.param(name, *v.values, id=v.id, marks=v.marks) for name in CASES for v in versions(name)]


@pytest.mark.parametrize("name, backend, version", ALL_VERSIONS)
@given(data=st.data())
def test_every_version_agrees_with_torch(name, backend, version, data):
    agrees_with_torch(find_version(reference, name, backend, version), CASES[name](data.draw), backend, data.draw)


@pytest.mark.parametrize("name, backend, version", ALL_VERSIONS)
@given(data=st.data())
def test_every_version_gives_the_same_where_fewer_gradients_are_wanted(name, backend, version, data):
    same_with_fewer_gradients(
        find_version(reference, name, backend, version), CASES[name](data.draw), backend, data.draw
    )


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


# --- loss ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_cross_entropy_of_extreme_logits(dtype):
    x = Tensor(np.array([[1e4, -1e4, 0], [-1e4, 1e4, 1e4]], dtype), requires_grad=True)
    loss = F.cross_entropy(x, np.array([1, 1]))
    assert float(loss) == pytest.approx((2e4 + math.log(2)) / 2, rel=1e-6)
    assert grad(loss, x).tolist() == [[0.5, -0.5, 0.0], [0.0, -0.25, 0.25]]
    perfect = F.cross_entropy(x[:1, :], np.array([0]))
    assert float(perfect) == 0.0 and perfect.dtype == dtype


@pytest.mark.parametrize("integer", [np.uint8, np.int8, np.int16, np.int32, np.int64, np.uint64])
def test_class_numbers_of_any_integer_dtype(integer):
    """More classes than the labels' dtype can count must not make two of them equal."""
    logits = np.random.default_rng(0).standard_normal((3, 300))
    labels = [0, 1, 99]
    expected = TF.cross_entropy(torch.tensor(logits), torch.tensor(labels))
    assert float(F.cross_entropy(logits, np.array(labels, integer))) == pytest.approx(float(expected), rel=1e-12)


def test_one_hot_probabilities_are_class_numbers():
    logits, labels = np.random.default_rng(0).standard_normal((4, 5)), np.array([0, 4, 2, 2])
    for smoothing in (0.0, 0.1):
        losses = [
            float(F.cross_entropy(logits, t, label_smoothing=smoothing))
            for t in (labels, np.eye(5)[labels], Tensor(np.eye(5)[labels]))
        ]
        assert losses == [losses[0]] * 3


# --- dropout ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("drop", [F.dropout, F.drop_path])
def test_dropout_zeroes_the_right_share_and_scales_the_rest(drop, dtype, backend):
    x = Tensor(place(np.ones((400, 3, 5)), backend, dtype), requires_grad=True)
    for p in (0.25, np.float64(0.9)):
        with random.scope(1):
            y = drop(x, p, training=True)
        kept = host(y.data) != 0
        check(y.data, kept / (1 - p), backend, dtype)
        n = 400 * (15 if drop is F.dropout else 1)
        assert abs(kept.mean() - (1 - p)) < 5 * math.sqrt(p * (1 - p) / n)
        if drop is F.drop_path:
            assert (kept == kept[:, :1, :1]).all()
        else:
            assert 0 < kept[0].mean() < 1 or 0 < kept[1].mean() < 1
        check(grad((y * 2.0).sum(), x), 2 * kept / (1 - p), backend, dtype)
    for y in (drop(x, 0.5, training=False), drop(x, 0.0, training=True)):
        assert y is x
    assert (
        not host(drop(x, 1.0, training=True).data).any()
        and not np.isnan(host(grad(drop(x, 1.0, training=True).sum(), x))).any()
    )


def test_attention_dropout_keeps_the_expectation():
    rng = np.random.default_rng(0)
    q, k, v = (np.broadcast_to(rng.standard_normal((1, 2, 3, 4)), (4000, 2, 3, 4)).astype(np.float32) for _ in range(3))
    with random.scope(2):
        dropped = F.attention(q, k, v, dropout=0.3).data
    plain = F.attention(q, k, v).data
    assert np.abs(dropped - plain).max() > 0.1
    assert np.abs(dropped.mean(axis=0) - plain[0]).max() < 5 * dropped.std(axis=0).max() / math.sqrt(4000)
    assert np.array_equal(F.attention(q, k, v, dropout=0.3, training=False).data, plain)


def test_packed_attention_is_attention():
    """The same masks and the same draws for both forms."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, 3, 4, 5)) for _ in range(3))
    packed = np.stack([q, k, v], axis=0).transpose(1, 3, 0, 2, 4).reshape(2, 4, -1)
    mask = rng.standard_normal((1, 3, 4, 4)) > 0
    for options in ({}, {"mask": mask}, {"dropout": 0.4}, {"mask": mask, "dropout": 0.4}):
        with random.scope(3):
            apart = F.attention(q, k, v, **options).data
        with random.scope(3):
            together = F.qkv_attention(packed, 3, **options).data
        assert error(together, apart.transpose(0, 2, 1, 3).reshape(2, 4, -1)) < 1e-14


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("score", [-1000.0, -40.0, 40.0, 1000.0])
def test_attention_of_extreme_scores(score, dtype, backend):
    """Scores whose exponentials all overflow or all vanish, among images with ordinary ones."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((3, 1, 4, 2)) for _ in range(3))
    q[1], k[1] = abs(score) / math.sqrt(2), np.sign(score) + 2.0 ** -np.arange(7, 11)[:, None]
    packed = np.concatenate([x.transpose(0, 2, 1, 3).reshape(3, 4, 2) for x in (q, k, v)], axis=2)

    def theirs(qkv):
        q, k, v = (part[:, None] for part in qkv.chunk(3, dim=2))
        return torch_attention(q, k, v, None, None)[:, 0]

    y, dy, (expected,) = torch_vjp(theirs, [packed], lambda strategy: 1)
    t = Tensor(place(packed, backend, dtype), requires_grad=True)
    result = F.qkv_attention(t, 1)
    tolerance = 1e-10 if dtype == "float64" else 2e-4  # float32's own rounding of a score of 1000 is 6e-5
    check(result.data, y, backend, dtype, tolerance)
    check(grad(result, t, place(dy, backend, dtype)), expected, backend, dtype, tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_a_query_that_may_look_nowhere_gives_zeros(kind, dtype, backend):
    q, k, v = (
        Tensor(place(np.random.default_rng(i).standard_normal((1, 1, 3, 4)), backend, dtype), requires_grad=True)
        for i in range(3)
    )
    allowed = np.array([[True, False, True], [False, False, False], [True, True, True]])
    mask = place(allowed, backend, "bool") if kind == "bool" else place(np.where(allowed, 0, -np.inf), backend, dtype)
    y = F.attention(q, k, v, mask=mask)
    assert not host(y.data)[0, 0, 1].any() and host(y.data)[0, 0, [0, 2]].all()
    dq, dk, dv = (host(g) for g in grad(y.sum(), [q, k, v]))
    assert all(np.isfinite(g).all() for g in (dq, dk, dv))
    assert not dq[0, 0, 1].any() and dv[0, 0, 1].any()


# --- the public functions ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
def test_patch_embed_is_a_strided_convolution(bias):
    """Rectangular images and patches, more than three channels."""
    rng = np.random.default_rng(0)
    images, weight, b = (
        rng.standard_normal((2, 5, 6, 12)),
        rng.standard_normal((7, 5, 3, 4)),
        rng.standard_normal(7),
    )
    inputs = [images, weight, b if bias else None]

    def theirs(x, w, b):
        return TF.conv2d(x, w, b, stride=(3, 4)).flatten(2).transpose(1, 2)

    rng_draw = lambda strategy: 5
    y, dy, gradients = torch_vjp(theirs, inputs, rng_draw)
    tensors = [None if x is None else Tensor(x, requires_grad=True) for x in inputs]
    result = F.patch_embed(*tensors)
    check(result.data, y, "numpy", "float64")
    for got, expected in zip(grad(result, [t for t in tensors if t is not None], dy), gradients, strict=False):
        check(got, expected, "numpy", "float64")


def test_functions_take_arrays_and_tensors_and_pass_their_options_on():
    rng = np.random.default_rng(0)
    x, w, b = rng.standard_normal((2, 3)), rng.standard_normal((4, 3)), rng.standard_normal(4)
    tx = torch.tensor(x)
    for ours, theirs in [
        (F.linear(x, w, b), TF.linear(tx, torch.tensor(w), torch.tensor(b))),
        (
            F.linear_gelu(x, w, b, "tanh"),
            TF.gelu(TF.linear(tx, torch.tensor(w), torch.tensor(b)), approximate="tanh"),
        ),
        (
            F.layer_norm(x, w[0], w[1], 0.5),
            TF.layer_norm(tx, (3,), torch.tensor(w[0]), torch.tensor(w[1]), 0.5),
        ),
        (F.layer_norm(x, w[0], w[1]), TF.layer_norm(tx, (3,), torch.tensor(w[0]), torch.tensor(w[1]), 1e-6)),
        (F.gelu(x), TF.gelu(tx)),
        (F.gelu(x, "tanh"), TF.gelu(tx, approximate="tanh")),
        (F.softmax(x), tx.softmax(-1)),
        (F.softmax(x, 0), tx.softmax(0)),
        (F.log_softmax(x, axis=0), tx.log_softmax(0)),
    ]:
        assert isinstance(ours, Tensor) and not ours.requires_grad
        check(ours.data, theirs, "numpy", "float64")


A4 = np.ones((1, 2, 3, 4), np.float32)
X = np.ones((2, 3), np.float32)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: F.linear(X, X.T), "linear expects x (..., in) and weight (out, in), got (2, 3) and (3, 2)"),
        (lambda: F.linear(X, X, X[0]), "linear expects a bias of shape (2,), got (3,)"),
        (
            lambda: F.linear(X, X.astype(np.float64)),
            "linear expects arrays of one dtype, got float32 and float64; use astype",
        ),
        (
            lambda: F.linear(X, array_api_strict.ones((2, 3), dtype=array_api_strict.float32)),
            "linear expects arrays of one library, got numpy and array_api_strict",
        ),
        (
            lambda: F.layer_norm(X, X[0], X[:, 0]),
            "layer_norm expects x (..., D), weight and bias (D,), got (2, 3), (3,) and (2,)",
        ),
        (lambda: F.gelu(X, "erf"), 'gelu expects approximate "none" or "tanh", got \'erf\''),
        (
            lambda: F.attention(A4, A4, A4[:, :, :2]),
            "attention expects q (B, H, N, D), k (B, H, M, D) and v (B, H, M, E), "
            "got (1, 2, 3, 4), (1, 2, 3, 4) and (1, 2, 2, 4)",
        ),
        (
            lambda: F.attention(A4, A4, A4, mask=np.zeros((3, 3))),
            "attention expects a mask of booleans or of dtype float32, got float64",
        ),
        (
            lambda: F.attention(A4, A4, A4, mask=np.zeros((3, 3), int)),
            "attention expects a mask of booleans or of dtype float32, got int64",
        ),
        (
            lambda: F.attention(A4, A4, A4, mask=np.zeros((5, 1, 3, 3), bool)),
            "attention expects a mask that broadcasts to (1, 2, 3, 3), got (5, 1, 3, 3)",
        ),
        (lambda: F.attention(A4, A4, A4, dropout=1.5), "a dropout probability must lie in 0 ... 1, got 1.5"),
        (
            lambda: F.qkv_attention(A4[0], 3),
            "qkv_attention expects (B, N, 3 * num_heads * D), got (2, 3, 4) with 3 heads",
        ),
        (lambda: F.patchify(A4, (2, 2)), "image size 3x4 is not divisible by patch size 2"),
        (lambda: F.patchify(A4, (3, 3)), "image size 3x4 is not divisible by patch size 3"),
        (lambda: F.patchify(A4, (2, 4)), "image size 3x4 is not divisible by patch size 2x4"),
        (lambda: F.patchify(X, (1, 1)), "expected images (B, C, H, W), got shape (2, 3)"),
        (
            lambda: F.patch_embed(A4, A4[:, :1]),
            "patch_embed expects images (B, C, H, W) and weight (D, C, h, w), got (1, 2, 3, 4) and (1, 1, 3, 4)",
        ),
        (lambda: F.dropout(X, -0.1), "a dropout probability must lie in 0 ... 1, got -0.1"),
        (lambda: F.cross_entropy(X, np.array([0, 3])), "labels must lie in 0 ... 2, got 0 ... 3"),
        (lambda: F.cross_entropy(X, np.array([-1, 0])), "labels must lie in 0 ... 2, got -1 ... 0"),
        (
            lambda: F.cross_entropy(X, np.array([0])),
            "cross_entropy expects class numbers (2,) or probabilities (2, 3), got int64 labels of shape (1,)",
        ),
        (
            lambda: F.cross_entropy(X, np.ones(2, np.float32)),
            "cross_entropy expects class numbers (2,) or probabilities (2, 3), got float32 labels of shape (2,)",
        ),
        (
            lambda: F.cross_entropy(X, np.ones((2, 3))),
            "cross_entropy expects probabilities of dtype float32, got float64",
        ),
        (
            lambda: F.cross_entropy(X[:0], np.ones(0, int)),
            "cross_entropy expects logits (B, C) with at least one entry, got (0, 3)",
        ),
        (
            lambda: F.cross_entropy(X, np.array([0, 1]), label_smoothing=1.5),
            "label_smoothing must lie in 0 ... 1, got 1.5",
        ),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(make, message):
    with pytest.raises((TypeError, ValueError)) as caught:
        make()
    assert str(caught.value) == message


def test_attention_in_half_precision_does_not_overflow():
    qkv = np.zeros((1, 3, 6), np.float16)
    qkv[0, :, :4] = [[5, 0, 4, 0], [0, 5, 0, 4], [1, 1, 1, 1]]  # the highest score is 14: e^14 is infinite in float16
    qkv[0, :, 4:] = [[1, 2], [3, 4], [5, 6]]
    exact = F.qkv_attention(qkv.astype(np.float64), 1).data
    np.testing.assert_allclose(F.qkv_attention(qkv, 1).data, exact, rtol=2e-2)


def test_what_gets_no_gradient_may_not_ask_for_one():
    x, asks = np.ones((1, 1, 2, 2)), Tensor(np.ones((2, 2)), requires_grad=True)
    with pytest.raises(ValueError, match="an attention mask must not require a gradient"):
        F.attention(x, x, x, mask=asks)
    with pytest.raises(ValueError, match="labels must not require a gradient"):
        F.cross_entropy(np.ones((2, 2)), asks)
    assert F.cross_entropy(np.ones((2, 2)), asks.detach()).shape == ()


def test_labels_may_be_written_over_before_the_gradient_is_taken():
    logits, labels = Tensor(np.eye(3, dtype=np.float32), requires_grad=True), np.array([0, 1, 2])
    loss = F.cross_entropy(logits, labels)
    before = grad(loss, logits, retain_graph=True)
    labels[:] = 0
    assert np.array_equal(grad(loss, logits), before)
