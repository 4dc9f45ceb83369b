"""Shared by the tests of optimizers and averages: parameters, a model of them."""

import types

import numpy as np

from tinyvit.engine.tensor import Tensor

STEPS = 20


def parameter(x):
    return Tensor(x, requires_grad=True)


def model_of(**named):
    return types.SimpleNamespace(named_parameters=lambda: named.items(), **named)


def error(actual, expected):
    """The largest difference relative to the largest value."""
    expected = np.asarray(expected)
    return np.abs(np.asarray(actual) - expected).max() / max(np.abs(expected).max(), 1e-300)
