"""Linear layers in 8 bits, on processors that have products of bytes."""

import importlib
import inspect

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

pytest.importorskip("numba")

from tinyvit import create_model, no_grad, predict
from tinyvit import kernels as all_kernels
from tinyvit.execution.inference import predictions
from tinyvit.kernels import int8, reference


@pytest.fixture(scope="module", autouse=True)
def available(numba_kernels):
    if not int8.available():
        pytest.skip("this processor has no instructions for products of bytes")


def table():
    return all_kernels._merged("cpu", "jit", "int8")


def test_kernels_take_what_their_references_take():
    for op, kernel in importlib.import_module("tinyvit.kernels.int8.table").KERNELS.items():
        assert [*inspect.signature(kernel.run).parameters] == [*inspect.signature(op).parameters]


def rounded(x):
    """To 255 steps in each row; exact but for a scale of float32."""
    highest = np.abs(x).max(-1, keepdims=True)
    return np.rint(x.astype(np.float64) * (np.float32(127) / highest)) * (highest / np.float32(127))


@example(17, 70, 49, True, 0)  # a panel of which 17 columns count: one more than a narrow tile has
@given(st.integers(1, 200), st.integers(1, 70) | st.just(3100), st.integers(32, 100), st.booleans(), st.integers(0, 99))
def test_products_are_those_of_rounded_operands(rows, inner, outer, biased, seed):
    rng = np.random.default_rng(seed)
    x, weight, bias, residual = (
        rng.standard_normal(s, np.float32) for s in ((1, rows, inner), (outer, inner), outer, (1, rows, outer))
    )
    shift = bias if biased else 0
    expected = rounded(x) @ rounded(weight).T + shift
    near = 1e-6 * np.abs(expected).max() + 1e-6
    strided = np.repeat(weight, 2, axis=1)[:, ::2]
    y, _ = table()[reference.linear](None, x, strided, bias if biased else None, needs=(False,) * 3)
    assert y.shape == expected.shape and np.abs(y - expected).max() < near
    y, _ = table()[reference.add_linear](None, residual, x, weight, bias if biased else None, needs=(False,) * 4)
    assert np.abs(y - expected - residual).max() < 2 * near
    for approximate in ("none", "tanh"):
        wide = torch.nn.functional.gelu(torch.tensor(expected - shift + bias), approximate=approximate).numpy()
        y, _ = table()[reference.linear_gelu](None, x, weight, bias, approximate=approximate, needs=(False,) * 3)
        assert np.abs(y - wide).max() < 4 * near


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_shows_in_its_row_and_output_only(bad):
    x, weight = np.ones((9, 40), np.float32), np.ones((33, 40), np.float32)
    x[4, 7], weight[20, 3] = bad, bad
    y, _ = table()[reference.linear](None, x, weight, None, needs=(False,) * 3)
    expected = np.full((9, 33), True)
    expected[4], expected[:, 20] = False, False
    assert np.array_equal(np.isfinite(y), expected)


def test_rows_of_zeros_and_tiny_numbers_give_the_bias():
    x, weight, bias = np.zeros((3, 40), np.float32), np.ones((33, 40), np.float32), np.arange(33, dtype=np.float32)
    x[1] = 1e-45
    y, _ = table()[reference.linear](None, x, weight, bias, needs=(False,) * 3)
    assert np.array_equal(y, np.tile(bias, (3, 1)))


@pytest.mark.parametrize("size", [1e-37, 1e-30, 1e30])
def test_small_and_large_numbers_meet_their_inverse(size):
    x, weight = np.full((1, 64), size, np.float32), np.full((32, 64), 0.5 / size, np.float32)
    x[0, 0], weight[:, 1] = 0, 0
    y, _ = table()[reference.linear](None, x, weight, None, needs=(False,) * 3)
    assert np.abs(y - 31).max() < 1


@pytest.mark.parametrize("large", ["rows", "weights"])
def test_a_finite_result_of_huge_numbers_is_finite(large):
    huge, small = np.full((40, 64), 1e34, np.float32), np.full((40, 64), 0.01, np.float32)
    y, _ = table()[reference.linear](
        None, *((huge, small) if large == "rows" else (small, huge)), None, needs=(False,) * 3
    )
    assert np.abs(y / 6.4e33 - 1).max() < 1e-5


def test_scales_whose_product_is_infinite_spoil_nothing():
    x, weight = np.zeros((1, 64), np.float32), np.zeros((32, 64), np.float32)
    x[0, 0], weight[:, 2] = 1e21, 1e22
    y, _ = table()[reference.linear](None, x, weight, None, needs=(False,) * 3)
    assert not y.any()


def test_a_layer_with_a_gradient_or_for_few_classes_stays_in_float32():
    x, weight = (np.random.default_rng(i).standard_normal((40, 40), np.float32) for i in range(2))
    for w, needs in ((weight[:31], False), (weight, True)):
        y, _ = table()[reference.linear](None, x, w, np.zeros(len(w), np.float32), needs=(needs, False, False))
        assert np.abs(y - x.astype(np.float64) @ w.T).max() < 1e-4


def test_predictions_are_float32_s_to_8_bits_and_follow_the_weights():
    model = create_model("vit_nano_patch8_32", num_classes=5)
    x = np.random.default_rng(0).standard_normal((40, 3, 32, 32), np.float32)
    model.head.weight.data = np.random.default_rng(1).standard_normal(model.head.weight.shape, np.float32)
    exact = predict(model, x)

    def batches():
        yield x
        with no_grad():
            for block in model.blocks:
                block.mlp.fc1.weight *= 2
        yield x

    first, second = predictions(model, batches(), precision="int8")
    assert first.dtype == np.float32 and 0 < np.linalg.norm(first - exact) < 0.05 * np.linalg.norm(exact)
    changed = predict(model, x)
    assert np.linalg.norm(second - changed) < 0.05 * np.linalg.norm(changed) < np.linalg.norm(second - exact)
    assert np.array_equal(predict(model, x), changed)
