"""Attention and dropout: masks, extreme scores, and shares of what is dropped."""

import math

import numpy as np
import pytest
from drawing import BACKENDS, TOLERANCE, check, error, host, place, torch_vjp
from operations import torch_attention

from tinyvit import functional as F
from tinyvit.backend import random
from tinyvit.engine.tensor import Tensor, grad


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


def test_attention_in_half_precision_does_not_overflow():
    qkv = np.zeros((1, 3, 6), np.float16)
    qkv[0, :, :4] = [[5, 0, 4, 0], [0, 5, 0, 4], [1, 1, 1, 1]]  # the highest score is 14: e^14 is infinite in float16
    qkv[0, :, 4:] = [[1, 2], [3, 4], [5, 6]]
    exact = F.qkv_attention(qkv.astype(np.float64), 1).data
    np.testing.assert_allclose(F.qkv_attention(qkv, 1).data, exact, rtol=2e-2)
