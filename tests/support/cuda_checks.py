"""Kernels in the simulator against the reference in float64."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import array_api_compat.numpy as numpy_namespace
import cuda_sim
import numpy as np
from cuda_sim import SCALARS, cuda_version, decode, encode, error, guarded

from tinyvit.kernels import reference

TOLERANCE = {"float": 2e-6, "f16": 2e-3, "bf16": 1e-2}


def draw(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    return np.asarray(np.random.default_rng(seed).standard_normal(shape))


def both(
    folder: Path, name: str, scalar: str, inputs: list, params: dict, seed: int = 0, **machine: Any
) -> tuple[list, list]:
    """Results and gradients of a kernel and of the reference in float64.

    Floating arrays among `inputs` and `params` are rounded to the kernel's numbers first.
    """

    def rounded(x: Any) -> Any:
        return encode(x, scalar) if isinstance(x, np.ndarray) and x.dtype.kind == "f" else x

    def exact(x: Any) -> Any:
        return decode(rounded(x)) if isinstance(x, np.ndarray) and x.dtype.kind == "f" else x

    def on_device(x: Any) -> Any:
        return guarded(rounded(x)) if isinstance(x, np.ndarray) else x

    def run(function: Callable, xp: Any, place: Callable) -> list:
        needs = tuple(x is not None for x in inputs)
        y, vjp = function(xp, *map(place, inputs), needs=needs, **{key: place(x) for key, x in params.items()})
        return [np.asarray(y), *vjp(place(draw(9, y.shape)))]

    expected = run(getattr(reference, name), numpy_namespace, exact)
    with cuda_sim.device(folder, seed, **machine) as xp:
        actual = run(cuda_version(getattr(reference, name)), xp, on_device)
    assert all(x is None or x.dtype == SCALARS[scalar] for x in actual)
    return actual, expected


def check(folder: Path, name: str, scalar: str, inputs: list, params: dict, **machine: Any) -> None:
    """Values and gradients are right, and the same bits whatever order threads run in."""
    actual, expected = both(folder, name, scalar, inputs, params, seed=0, **machine)
    shuffled, _ = both(folder, name, scalar, inputs, params, seed=1, **machine)
    for got, again, right in zip(actual, shuffled, expected, strict=True):
        if right is not None:
            assert error(decode(got), right) < TOLERANCE[scalar]
            assert np.array_equal(got, again)
