"""The CUDA sources of attention, run on the CPU, against the reference in float64."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import array_api_compat.numpy as numpy_namespace
import cuda_sim
import numpy as np
import pytest
from cuda_checks import TOLERANCE, both, check, draw
from cuda_sim import SCALARS, decode, encode, error, guarded

from tinyvit import functional as F
from tinyvit.engine.tensor import Tensor, grad
from tinyvit.kernels import cuda, reference
from tinyvit.kernels.cuda import attention, attention_sm90a, cublas

pytestmark = pytest.mark.skipif(cuda_sim.COMPILER is None, reason="no C++ compiler")


ATTENTION = [
    # scalar, batch, rows, heads, head dimension
    ("bf16", 2, 1, 2, 64),
    ("bf16", 2, 17, 2, 16),
    ("bf16", 1, 65, 3, 64),
    ("bf16", 1, 197, 1, 64),
    ("bf16", 1, 65, 2, 80),
    ("bf16", 1, 40, 1, 128),
    ("f16", 2, 65, 1, 64),
    ("f16", 1, 17, 3, 72),
    ("float", 1, 65, 2, 64),
    ("float", 2, 17, 1, 80),
    ("float", 1, 197, 1, 16),
    # dimensions between multiples of 8
    ("bf16", 2, 17, 2, 12),
    ("f16", 1, 17, 3, 65),
    ("float", 2, 17, 1, 79),
]


@pytest.mark.parametrize("scalar, batch, n, heads, dim", ATTENTION)
def test_attention(folder, scalar, batch, n, heads, dim):
    qkv = np.random.default_rng(n + dim).standard_normal((batch, n, 3 * heads * dim))
    check(folder, "qkv_attention", scalar, [qkv], {"num_heads": heads})


@pytest.mark.parametrize("n, limit", [(197, 60 << 10), (96, 50 << 10)])
def test_attention_over_several_blocks_and_portions_of_keys(folder, n, limit):
    """More rows than a block's registers hold, and less shared memory than a block would like to have."""
    qkv = np.random.default_rng(0).standard_normal((1, n, 3 * 2 * 64))
    with cuda_sim.device(folder, shared_limit=limit):
        constants, portions, _ = attention.backward_tiling(n, n, 64, 2)
        assert portions > 1
        if n == 96:  # the last portion ends where the keys do
            assert n == portions * 16 * constants["TILES"] * constants["WARPS"]
        else:
            assert attention.forward_tiling(n, n, 64, 2).parts > 1
    check(folder, "qkv_attention", "bf16", [qkv], {"num_heads": 2}, shared_limit=limit)


@pytest.mark.parametrize("scalar, n, queries, dim", [("bf16", 65, 1, 64), ("float", 65, 17, 64), ("f16", 17, 17, 72)])
def test_attention_of_the_first_tokens(folder, scalar, n, queries, dim):
    qkv = np.random.default_rng(n).standard_normal((2, n, 3 * 2 * dim))
    check(folder, "qkv_attention", scalar, [qkv], {"num_heads": 2, "queries": queries})


@pytest.mark.parametrize("n, dim", [(65, 64), (40, 128)])
def test_attention_in_tf32(folder, n, dim):
    """Products of operands rounded to 11 bits: errors of 2^-12 on average, where cut ones would have twice that."""
    token = cublas.tf32.set(True)
    try:
        qkv = np.random.default_rng(n).standard_normal((1, n, 3 * 2 * dim))
        actual, expected = both(folder, "qkv_attention", "float", [qkv], {"num_heads": 2})
    finally:
        cublas.tf32.reset(token)
    for ours, right in zip(actual, expected, strict=True):
        assert 2e-4 < error(decode(ours), right) < 8e-4


@pytest.mark.parametrize("scalar, n, queries", [("bf16", 65, None), ("float", 33, 17), ("f16", 17, 1)])
def test_attention_with_dropout(folder, scalar, n, queries):
    rng = np.random.default_rng(n)
    qkv, kept = rng.standard_normal((2, n, 3 * 2 * 16)), rng.random((2, 2, queries or n, n)) > 0.3
    params = {"num_heads": 2, "queries": queries, "dropout_mask": kept / 0.7}
    check(folder, "qkv_attention", scalar, [qkv], params)


@pytest.mark.parametrize(
    "scalar, n, queries, dim, limit",
    [("bf16", 65, 65, 64, 163), ("f16", 17, 1, 72, 163), ("float", 17, 17, 80, 163), ("bf16", 96, 96, 64, 50),
     ("f16", 3, 3, 8, 163)],
)  # fmt: skip
def test_sums_of_the_gradient_of_attention(folder, scalar, n, queries, dim, limit):
    """Those of what is written, for each sample, whatever that is; over several portions of keys, too."""
    sizes = ((n, 3 * 2), (queries, 2), (queries, 2))
    qkv, y, dy = (encode(draw(n, (2, rows, width * dim)), scalar) for rows, width in sizes)
    settings = cuda.NULL, 2, queries, np.float32(1 / math.sqrt(dim))
    with cuda_sim.device(folder, 1, shared_limit=limit << 10) as xp:
        saved = guarded(y), guarded(dy), guarded(np.full((2, 2, queries), 6, np.float32))
        dqkv, sums = attention.mma_backward(xp, guarded(qkv), *settings, *saved, True)
        assert attention.mma_backward(xp, guarded(qkv), *settings, *saved, False)[1] is cuda.NULL
    assert error(sums.astype(np.float64), decode(dqkv).sum(axis=1)) < 1e-6


def test_the_bias_before_attention_takes_those_sums(folder, monkeypatch):
    launched, tensors = [], [draw(i, shape).astype(np.float32) for i, shape in enumerate([(3, 5, 8), (48, 8), 48])]

    def gradients():
        x, weight, bias = (Tensor(a, requires_grad=True) for a in tensors)
        y = F.qkv_attention(F.linear(x, weight, bias), num_heads=2)
        return grad(y, [x, weight, bias], draw(7, y.shape).astype(np.float32))

    expected = gradients()
    with cuda_sim.everything_on_device(folder):
        kernel = cuda.kernel
        monkeypatch.setattr(cuda, "kernel", lambda file, name, **c: launched.append(name) or kernel(file, name, **c))
        actual = gradients()
    assert launched[-2:] == ["attention_backward", "sum_partials"]
    for ours, right in zip(actual, expected, strict=True):
        assert error(ours.astype(np.float64), right.astype(np.float64)) < 2e-6


@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize("scalar", SCALARS)
def test_attention_of_large_logits(folder, scalar, negative):
    """Up to 1e4, where all but one of a row's probabilities vanish: no overflow, no NaN."""
    n, dim = 65, 64
    qkv = np.random.default_rng(1).standard_normal((1, n, 3 * dim))
    q, k = qkv[0, :, :dim], qkv[0, :, dim : 2 * dim]
    if negative:  # all of them: what stands in for keys beyond the last must not count as 0, the largest
        k[...] = k / 100 - q.mean(axis=0)
        q[...] = q / 100 + q.mean(axis=0)
    qkv[..., : 2 * dim] *= math.sqrt(1e4 * math.sqrt(dim) / np.abs(q @ k.T).max())
    logits = q @ k.T / math.sqrt(dim)
    assert 9.9e3 < np.abs(logits).max() < 1.01e4 and (not negative or logits.max() < -5e3)
    actual, expected = both(folder, "qkv_attention", scalar, [qkv], {"num_heads": 1})
    assert error(decode(actual[0]), expected[0]) < 10 * TOLERANCE[scalar]
    # A probability near 0 or 1 is a difference of numbers near 1e4: single precision leaves three digits of it.
    assert error(decode(actual[1]), expected[1]) < 3e-2


def test_short_attention_is_compiled_for_the_blocks_that_fit():
    """More than shared memory holds would only take registers away."""
    for limit, queries, blocks in ((227, 65, 4), (99, 65, 2), (227, 1, 8)):
        with cuda_sim.device(Path(), shared_limit=limit << 10):
            constants = attention.forward_tiling(65, queries, 64, 2).constants
        assert (constants["ONCE"], constants["RESIDENT"]) == (1, blocks)


def test_attention_plans_fit_every_shape():
    """Whatever N and D are: every row has a warp, no part is empty, and no block takes more than there is."""
    for limit, dim, itemsize in itertools.product((99 << 10, 163 << 10, 227 << 10), range(8, 129, 8), (2, 4)):
        for n in (1, 16, 17, 50, 65, 80, 81, 112, 113, 197, 257, 577, 785, 1025, 4097):
            with cuda_sim.device(Path(), shared_limit=limit):
                forward = attention.forward_tiling(n, n, dim, itemsize)
                backward = attention.backward_tiling(n, n, dim, itemsize)
            assert backward or n > 1000  # a head's statistics fill the memory of a small device
            for constants, parts, shared in filter(None, (forward, backward)):
                rows = 16 * constants["TILES"] * constants["WARPS"]
                assert parts * rows >= n > (parts - 1) * rows and shared <= limit
                assert 1 <= constants["WARPS"] * constants["RESIDENT"] <= 64 and constants["WARPS"] <= 8


# --- Hopper -----------------------------------------------------------------------------------------------------------

HOPPER = {"capability": 90, "shared_limit": 227 << 10}
SM90A = [
    # scalar, heads, rows, queries, head dimension, bytes of shared memory, and what is expected of the plan
    ("bf16", 2, 197, 197, 64, 227 << 10, {"WARPGROUPS": 1, "STAGES": 4}),
    ("f16", 1, 130, 70, 32, 227 << 10, {"WARPGROUPS": 1, "STAGES": 3}),
    ("f16", 1, 129, 129, 48, 227 << 10, {"WARPGROUPS": 1, "STAGES": 3}),
    ("bf16", 1, 257, 257, 16, 227 << 10, {"WARPGROUPS": 2, "STAGES": 5}),
    ("bf16", 1, 208, 208, 80, 227 << 10, {"WARPGROUPS": 3, "STAGES": 4}),
    ("f16", 1, 273, 200, 128, 100 << 10, {"WARPGROUPS": 2, "STAGES": 3}),  # a ring of chunks
]


@pytest.mark.parametrize("scalar, heads, n, queries, dim, limit, plan", SM90A)
def test_attention_on_hopper(folder, scalar, heads, n, queries, dim, limit, plan):
    """Results and the logarithms for the backward pass are softmax's by NumPy, whatever order threads run in."""
    qkv = encode(draw(n, (1, n, 3 * heads * dim)), scalar)
    q, k, v = decode(qkv).reshape(n, 3, heads, dim).transpose(1, 2, 0, 3)
    scores = q[:, :queries] @ k.transpose(0, 2, 1) / math.sqrt(dim)
    logs = np.log2(np.exp(scores).sum(axis=-1))
    y = (np.exp(scores) / np.exp(scores).sum(axis=-1, keepdims=True) @ v).transpose(1, 0, 2)
    results = []
    for seed in (0, 1):
        with cuda_sim.device(folder, seed, multiprocessors=1, **HOPPER | {"shared_limit": limit}) as xp:
            assert plan.items() <= attention_sm90a.forward_plan(n, queries, dim, heads).constants.items()
            scale = np.float32(1 / math.sqrt(dim))
            results.append(attention_sm90a.forward(xp, guarded(qkv), cuda.NULL, heads, queries, scale, True))
    assert error(decode(results[0][0]), y.reshape(1, queries, heads * dim)) < TOLERANCE[scalar] / 2
    assert error(results[0][1].astype(np.float64), logs[None]) < 1e-6
    assert all(np.array_equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.parametrize(
    "scalar, n, queries, dim, last",
    [("bf16", 300, 300, 64, 48), ("f16", 130, 70, 32, 16), ("f16", 129, 129, 48, 16), ("bf16", 160, 96, 64, 32),
     ("bf16", 130, 128, 16, 64)],
)  # fmt: skip
def test_the_gradient_of_attention_on_hopper(folder, monkeypatch, scalar, n, queries, dim, last):
    """Over several portions of keys, in any order of threads, two heads in one block or in two; tokens that are no
    queries get no gradient as such. Of the last 64 queries no more are computed with than whole tiles hold.
    """
    qkv, dy = (encode(draw(n, (1, rows, width * dim)), scalar) for rows, width in ((n, 3 * 2), (queries, 2)))
    settings = cuda.NULL, 2, queries, np.float32(1 / math.sqrt(dim))
    y, vjp = reference.qkv_attention(numpy_namespace, decode(qkv), num_heads=2, queries=queries, needs=(True,))
    (right,) = vjp(decode(dy))
    q, k, _ = decode(qkv).reshape(n, 3, 2, dim).transpose(1, 2, 0, 3)
    log = np.log2(np.exp(q[:, :queries] @ k.transpose(0, 2, 1) / math.sqrt(dim)).sum(axis=-1)).astype(np.float32)
    results, launches = [], []

    def noting(kernel):
        def find(*names, **constants):
            def launch(grid, block, arguments, shared_mem):
                dq_sum = arguments[5]
                launches.append((constants["LAST"], grid, dq_sum.shape))
                kernel(*names, **constants)(grid, block, arguments, shared_mem)
                assert np.isfinite(dq_sum[:, :64]).all()  # each block has used its own

            return launch

        return find

    for seed in (0, 1):
        with cuda_sim.device(folder, seed, multiprocessors=2 - seed, **HOPPER) as xp, monkeypatch.context() as patch:
            given = guarded(encode(y, scalar)), guarded(dy), guarded(log[None])
            patch.setattr(cuda, "kernel", noting(cuda.kernel))
            results.append(attention_sm90a.backward(xp, guarded(qkv), *settings, *given, True))
    (dqkv, sums), again = results
    rounding = {"bf16": 2**-9, "f16": 2**-12}[scalar] * np.abs(decode(dqkv)).sum(axis=1)  # which the sums are before
    assert (np.abs(sums - decode(dqkv).sum(axis=1)) < rounding / 2).all()
    assert launches == [(last, (blocks,), (blocks, 64 * math.ceil(queries / 64), dim)) for blocks in (2, 1)]
    for part in range(3):  # of q, k and v
        ours, exact = (x.reshape(n, 3, -1)[:, part] for x in (decode(dqkv), right))
        assert error(ours, exact) < TOLERANCE[scalar] / 2
    assert all(np.array_equal(*pair) for pair in zip((dqkv, sums), again, strict=True))


def test_hoppers_plans_fit_every_shape():
    for dim, n, heads in itertools.product(range(16, 129, 16), (128, 129, 197, 257, 577, 785, 1025, 4097), (1, 3000)):
        with cuda_sim.device(Path(), multiprocessors=132, **HOPPER):
            constants, parts, shared = attention_sm90a.forward_plan(n, n, dim, heads)
        tiles, chunks, stages = math.ceil(n / 64), math.ceil(n / constants["KEYS"]), constants["STAGES"]
        assert (parts - 1) * constants["WARPGROUPS"] < tiles  # no block without a tile
        assert stages == chunks or (3 <= stages < chunks and parts * constants["WARPGROUPS"] >= tiles)
        assert (shared + 1024) * constants["RESIDENT"] <= 228 << 10
        assert constants["RESIDENT"] * constants["WARPGROUPS"] <= 4


@pytest.mark.parametrize(
    "n, heads, parts",
    [(197, 1, 4), (197, 132, 4), (197, 133, 2), (197, 384, 1), (197, 3072, 1), (577, 12, 3), (577, 132, 1),
     (577, 140, 3), (577, 768, 1)],
)  # fmt: skip
def test_hoppers_heads_are_divided_where_that_is_faster(n, heads, parts):
    """On an H200: 577 tokens are ten tiles for blocks of four, so 140 heads take two rounds of 3 x 4 tiles and a
    loading of 2, or divided by three, four rounds of 4 and 2: 28 and 24.
    """
    with cuda_sim.device(Path(), multiprocessors=132, **HOPPER):
        assert attention_sm90a.forward_plan(n, n, 64, heads).parts == parts
