"""Numbers and arrays that optimizers and averages are given: what is wrong with them, and copies of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any

import numpy as np

from tinyvit.backend import arrays
from tinyvit.backend.arrays import Array

State = dict[str, np.ndarray]


def number(name: str, value: Any, below: float = math.inf) -> float:
    if not (isinstance(value, Real) and 0 <= float(value) < below):
        limit = "" if below == math.inf else f" and below {below:g}"
        raise ValueError(f"{name} must be a number of at least 0{limit}, got {value!r}")
    return float(value)


def check_like(what: str, value: Array, p: Array) -> None:
    if tuple(value.shape) != tuple(p.shape):
        raise ValueError(f"{what} has shape {tuple(value.shape)}, the parameter has {tuple(p.shape)}")
    if arrays.namespace(value) is not arrays.namespace(p):
        raise TypeError(f"{what} is of {type(value).__module__}, the parameter of {type(p).__module__}")
    if value.dtype != p.dtype:
        raise TypeError(f"{what} is {value.dtype}, the parameter is {p.dtype}")


def check_state(what: str, state: Mapping[str, np.ndarray], expected: Mapping[str, Array]) -> None:
    problems = [f"missing {key}" for key in expected if key not in state]
    problems += [f"unexpected {key}" for key in state if key not in expected]
    for key in expected.keys() & state.keys():
        given, wanted = describe(state[key]), describe(expected[key])
        if given != wanted:
            problems.append(f"{key} is {given}, expected {wanted}")
    if problems:
        raise ValueError(f"{what}: " + "; ".join(sorted(problems)))


def describe(x: Array) -> str:
    return f"{arrays.dtype_name(x.dtype)} {tuple(x.shape)}"


def zeros_like(x: Array) -> Array:
    with arrays.on_device_of(x):
        return arrays.namespace(x).zeros_like(x)


def copy_to_numpy(x: Array) -> np.ndarray:
    return np.array(arrays.to_numpy(x))


def copy_like(x: np.ndarray, like: Array) -> Array:
    """A copy of `x` in the library and on the device of `like`."""
    return arrays.convert(np.array(x), like)
