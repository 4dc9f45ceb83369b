"""Shared by the tests that need a GPU: the marker, precisions, and comparisons of kernels with float64."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any

import array_api_compat.numpy as numpy_namespace
import numpy as np
import pytest

from tinyvit.backend import arrays
from tinyvit.kernels import reference

try:
    import cupy

    HAS_GPU = cupy.cuda.runtime.getDeviceCount() > 0
except Exception:  # no CuPy, no driver, no GPU
    HAS_GPU = False

needs_gpu = pytest.mark.gpu  # tests/conftest.py skips what is marked so where there is no GPU

PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
DTYPES = ("float32", "float16", "bfloat16")
LIMITS = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}  # of |actual - exact| / |exact|


def dtype(name: str) -> np.dtype:
    """The NumPy dtype of this name, also bfloat16."""
    return np.dtype(importlib.import_module("ml_dtypes").bfloat16 if name == "bfloat16" else name)


class Poisoned:
    """An array namespace whose empty arrays are full of NaN, so that an entry that no kernel writes is noticed."""

    def __init__(self, xp: Any) -> None:
        self._xp = xp

    def empty(self, shape: Any, dtype: Any) -> Any:
        x = self._xp.empty(shape, dtype=dtype)
        self._xp.reshape(x, (-1,)).view(np.uint8)[...] = 0xFF
        return x

    def __getattr__(self, name: str) -> Any:
        return getattr(self._xp, name)


def difference(actual: Any, exact: Any) -> float:
    """|actual - exact| / |exact|; infinite where an entry is NaN."""
    actual, exact = (np.asarray(arrays.to_numpy(x), np.float64) for x in (actual, exact))
    assert actual.shape == exact.shape
    error = float(np.linalg.norm(actual - exact) / max(np.linalg.norm(exact), 1e-30))
    return math.inf if math.isnan(error) else error


def check_kernel(
    kernel: Any, xp: Any, name: str, dtype: np.dtype, inputs: list, limit: float | None = None, **params: Any
) -> None:
    """A kernel's result and gradients are the reference's in float64, and the same bits when it runs again.

    Args:
        kernel: the `Kernel` of the reference operation `name`.
        xp: the namespace of the arrays that it takes.
        dtype: what floating arrays among `inputs` and `params` are rounded to.
        inputs: NumPy arrays in float64, or None.
        limit: of the relative difference; LIMITS of the dtype by default.
        params: the operation's parameters; arrays among them are moved, too.
    """

    def is_floating(x: Any) -> bool:
        return isinstance(x, np.ndarray) and x.dtype.kind == "f"

    def rounded(x: Any) -> Any:
        return x.astype(dtype) if is_floating(x) else x

    def exact(x: Any) -> Any:
        return rounded(x).astype(np.float64) if is_floating(x) else x

    def moved(x: Any) -> Any:
        return xp.asarray(rounded(x)) if isinstance(x, np.ndarray) else x

    def run(function: Callable, namespace: Any, place: Callable) -> list:
        needs = tuple(x is not None for x in inputs)
        arguments, parameters = [place(x) for x in inputs], {key: place(x) for key, x in params.items()}
        if place is moved and kernel.covers is not None:
            assert kernel.covers(*arguments, **parameters), "the kernel does not cover this case"
        y, vjp = function(namespace, *arguments, needs=needs, **parameters)
        dy = place(np.asarray(np.random.default_rng(1).standard_normal(y.shape)))
        return [arrays.to_numpy(x) if place is moved else x for x in (y, *vjp(dy)) if x is not None]

    expected = run(getattr(reference, name), numpy_namespace, exact)
    first, second = (run(kernel.run, Poisoned(xp), moved) for _ in "12")
    for got, again, right in zip(first, second, expected, strict=True):
        assert got.dtype == dtype
        assert difference(got, right) < (limit or LIMITS[arrays.dtype_name(dtype)])
        assert got.tobytes() == again.tobytes()
