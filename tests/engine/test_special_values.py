"""Zeros of both signs, infinities and NaN: values and gradients are torch's."""

import itertools

import numpy as np
import pytest
import torch

from tinyvit.engine import ops
from tinyvit.engine.tensor import Tensor

SPECIAL = [0.0, -0.0, 1.0, -1.0, 2.0, -2.0, 0.5, 3.0, 1e-30, np.inf, -np.inf, np.nan]
EXPONENTS = [*SPECIAL, -0.5, 1.5]
DTYPES = [np.float32, np.float64]


def agrees(ours, theirs, *inputs):
    """Result and gradients of one function by tinyvit and by torch, the signs of zeros included."""
    tensors = [Tensor(x, requires_grad=True) for x in inputs]
    torchs = [torch.tensor(x, requires_grad=True) for x in inputs]
    y, their_y = ours(*tensors), theirs(*torchs)
    y.backward(np.ones(y.shape, y.dtype))
    their_y.backward(torch.ones_like(their_y))
    pairs = [(y.data, their_y.detach()), *((a.grad, b.grad) for a, b in zip(tensors, torchs, strict=True))]
    for got, expected in pairs:
        expected = expected.numpy()
        assert np.allclose(got, expected, rtol=1e-5, atol=0, equal_nan=True)
        zeros = expected == 0
        assert np.array_equal(np.signbit(got[zeros]), np.signbit(expected[zeros]))


def grid(dtype, *axes):
    return [np.array(x, dtype) for x in zip(*itertools.product(*axes), strict=True)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_power_of_tensors(dtype):
    agrees(ops.power, torch.pow, *grid(dtype, SPECIAL, EXPONENTS))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("number", [*EXPONENTS, 0, 1, 2, 3, -1, -2])
def test_power_of_a_tensor_and_a_number(dtype, number):
    agrees(lambda x: x**number, lambda x: x**number, np.array(SPECIAL, dtype))
    agrees(lambda x: number**x, lambda x: number**x, np.array(EXPONENTS, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["add", "subtract", "multiply", "divide", "maximum", "minimum"])
def test_functions_of_two_numbers(name, dtype):
    agrees(getattr(ops, name), getattr(torch, name), *grid(dtype, SPECIAL, SPECIAL))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["negative", "abs", "exp", "log", "sqrt", "tanh", "sigmoid", "erf"])
def test_functions_of_one_number(name, dtype):
    x = np.array(SPECIAL, dtype)
    agrees(getattr(ops, name), getattr(torch, name), x[~np.isnan(x)] if name == "abs" else x)


@pytest.mark.parametrize("low, high", [(-1, 1), (None, 0.5), (0.0, None), (2.0, -2.0)])
def test_clip(low, high):
    agrees(lambda x: x.clip(low, high), lambda x: x.clip(low, high), np.array(SPECIAL))


def test_neither_numpy_s_error_state_nor_its_warnings_show():
    with np.errstate(all="raise"):
        x = Tensor(np.array([-200.0, 0.0, 1e30], np.float32), requires_grad=True)
        y = (x.exp() / x + x * x).log()
        y.backward(np.ones(3, np.float32))
    assert np.isnan(x.grad[1])
