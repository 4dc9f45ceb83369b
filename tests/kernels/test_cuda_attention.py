"""The CUDA sources of attention, run on the CPU, against the reference in float64."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import cuda_sim
import numpy as np
import pytest
from cuda_checks import TOLERANCE, both, check
from cuda_sim import SCALARS, decode, error

from tinyvit.kernels.cuda import attention

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
    ("f16", 1, 197, 2, 16),
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


@pytest.mark.parametrize("scalar, n, queries", [("bf16", 65, 1), ("float", 33, 17), ("f16", 17, 17)])
def test_attention_of_the_first_tokens(folder, scalar, n, queries):
    qkv = np.random.default_rng(n).standard_normal((2, n, 3 * 2 * 16))
    check(folder, "qkv_attention", scalar, [qkv], {"num_heads": 2, "queries": queries})


@pytest.mark.parametrize("scalar, n, queries", [("bf16", 65, None), ("float", 33, 17), ("f16", 17, 1)])
def test_attention_with_dropout(folder, scalar, n, queries):
    rng = np.random.default_rng(n)
    qkv, kept = rng.standard_normal((2, n, 3 * 2 * 16)), rng.random((2, 2, queries or n, n)) > 0.3
    params = {"num_heads": 2, "queries": queries, "dropout_mask": kept / 0.7}
    check(folder, "qkv_attention", scalar, [qkv], params)


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
