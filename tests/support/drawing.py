"""Shared by the tests of the engine and the kernels: drawn arrays, array libraries, and errors against torch."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import math
from collections.abc import Callable, Sequence
from typing import Any

import array_api_compat.numpy
import array_api_compat.torch
import array_api_strict
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from on_gpu import HAS_GPU, needs_gpu

from tinyvit import kernels
from tinyvit.backend import arrays

TOLERANCE = {"float64": 1e-10, "float32": 1e-5}

torch.set_num_threads(1)  # these arrays are too small for more

LIBRARIES: dict[str, Any] = {
    "numpy": array_api_compat.numpy, "array_api_strict": array_api_strict, "torch": array_api_compat.torch,
}  # fmt: skip
if HAS_GPU:
    LIBRARIES["cupy"] = importlib.import_module("array_api_compat.cupy")
if importlib.util.find_spec("jax"):
    jax = importlib.import_module("jax")
    jax.config.update("jax_enable_x64", True)
    LIBRARIES["jax"] = jax.numpy
MARKS = {"cupy": needs_gpu}
BACKENDS = [pytest.param(name, marks=MARKS[name]) if name in MARKS else name for name in LIBRARIES if name != "jax"]
WITH_JAX = [*BACKENDS, *(["jax"] if "jax" in LIBRARIES else [])]  # for few small tests: JAX compiles for each shape

HAS_NUMBA = importlib.util.find_spec("numba") is not None


def kernel_table(backend: str, jit: bool = False) -> dict[str, Callable]:
    """What runs in place of reference operations on arrays of this library, by the operations' names.

    With `jit` only what numba compiles, and with it what stands in where that does not cover the arguments.
    """
    table = kernels._fastest(LIBRARIES[backend])
    if jit:
        merged, own = kernels._merged("cpu", "jit"), importlib.import_module("tinyvit.kernels.jit.table").KERNELS
        table = {op: merged[op] for op in own}
    return {op.__name__: run for op, run in table.items()}


def versions(name: str) -> list[Any]:
    """Every version of an operation, as (library, "reference", "kernel" or "jit") parameters of a test."""
    found = []
    for backend in (name for name in LIBRARIES if name != "jax"):
        marks = MARKS.get(backend, ())
        found.append(pytest.param(backend, "reference", id=f"{name}-{backend}", marks=marks))
        if name in kernel_table(backend):
            found.append(pytest.param(backend, "kernel", id=f"{name}-{backend}-kernel", marks=marks))
        if backend == "numpy" and HAS_NUMBA and name in kernel_table(backend, jit=True):
            found.append(pytest.param(backend, "jit", id=f"{name}-{backend}-jit"))
    return found


@contextlib.contextmanager
def references_only(active: bool = True):
    """Within this context no kernel stands in for a reference operation."""
    best = kernels.best
    kernels.best = (lambda op, xp: op) if active else best
    try:
        yield
    finally:
        kernels.best = best


@contextlib.contextmanager
def small_blocks(backend: str, size: int | None):
    """Kernels that work through their arrays in blocks get blocks smaller than the arrays of these tests."""
    used = [*kernel_table(backend).values(), *(kernel_table(backend, jit=True).values() if HAS_NUMBA else [])]
    modules = {importlib.import_module(kernel.__module__) for kernel in used}
    before = {module: module.BLOCK for module in modules if size is not None and hasattr(module, "BLOCK")}
    for module in before:
        module.BLOCK = size
    try:
        yield
    finally:
        for module, block in before.items():
            module.BLOCK = block


def shapes(min_dims: int = 0, max_dims: int = 4, min_side: int = 0, max_side: int = 5) -> st.SearchStrategy:
    return hnp.array_shapes(min_dims=min_dims, max_dims=max_dims, min_side=min_side, max_side=max_side)


sides = st.sampled_from([1, 2, 3, 5, 8])
seeds = st.integers(0, 2**32 - 1)


def values(draw: Callable, shape: Sequence[int], kind: str = "normal") -> np.ndarray:
    """A float64 array whose entries are float32 numbers, so that both precisions start from the same ones.

    kind: "normal"; "positive", between 1/2 and 2; "grid", small whole numbers, so that entries tie and hit limits;
        "spread", the same but distinct from each other.
    """
    rng = np.random.default_rng(draw(seeds))
    if kind == "normal":
        x = rng.standard_normal(shape)
    elif kind == "positive":
        x = rng.uniform(0.5, 2.0, shape)
    elif kind == "grid":
        x = rng.integers(-2, 3, shape)
    elif kind == "spread":
        x = rng.permutation(math.prod(shape)).reshape(shape) - 2
    else:
        raise ValueError(kind)
    return np.asarray(x, np.float32).astype(np.float64)


LAYOUTS = ("C", "F", "strided", "reversed")
layouts = st.sampled_from(LAYOUTS)


def place(x: np.ndarray | None, backend: str, dtype: str, layout: str = "C") -> Any:
    """`x` in a library, with a memory layout; NumPy memory is read-only, which catches whoever writes into an input."""
    if x is None:
        return None
    xp = LIBRARIES[backend]
    if backend == "array_api_strict":  # a wrapper around a NumPy array, whose layout it keeps
        return xp.asarray(place(x, "numpy", dtype, layout), copy=None)
    if backend in ("torch", "jax"):  # torch has no negative strides, JAX no strides at all
        return xp.asarray(np.array(place(x, "numpy", dtype, layout), order="K"))
    x = xp.asarray(x.astype(dtype), copy=True)
    if layout == "F":
        x = xp.asarray(x.T, copy=True, order="C").T if x.ndim > 1 else x
    elif layout == "strided":
        x = xp.stack([x, xp.zeros_like(x)], axis=-1)[..., 0]
    elif layout == "reversed":
        x = xp.flip(xp.asarray(xp.flip(x), copy=True))
    x = arrays.as_array(x)
    if backend == "numpy":
        x.flags.writeable = False
    return x


def host(x: Any) -> np.ndarray:
    return arrays.to_numpy(x)


def error(actual: Any, expected: Any, floor: float = 1.0) -> float:
    """The largest difference, relative to the largest expected entry, or to `floor` (the size of the inputs) where
    cancellation leaves less than that."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    if actual.size == 0:
        return 0.0
    if np.isnan(actual).any():
        return math.inf
    return float(np.abs(actual - expected).max() / max(np.abs(expected).max(), floor))


def check(
    actual: Any, expected: torch.Tensor | np.ndarray, backend: str, dtype: str, tolerance: float | None = None
) -> None:
    """`actual` is an array of this library and dtype with the expected shape and values."""
    xp = LIBRARIES[backend]
    assert arrays.is_array(actual) and arrays.namespace(actual) is xp, type(actual)
    assert arrays.dtype_name(actual.dtype) == dtype
    expected = expected.detach().numpy() if isinstance(expected, torch.Tensor) else expected
    assert tuple(actual.shape) == expected.shape
    assert error(host(actual), expected) < (TOLERANCE[dtype] if tolerance is None else tolerance)


def torch_vjp(
    function: Callable, inputs: Sequence[np.ndarray | None], draw: Callable
) -> tuple[np.ndarray, np.ndarray, list[np.ndarray | None]]:
    """torch's result of `function` in float64, a gradient drawn for it, and the gradients that torch gets from that."""
    tensors = [None if x is None else torch.tensor(x, requires_grad=True) for x in inputs]
    y = function(*tensors)
    dy = values(draw, tuple(y.shape))
    wanted = [t for t in tensors if t is not None]
    got = iter(torch.autograd.grad(y, wanted, torch.tensor(dy), allow_unused=True, materialize_grads=True))
    return y.detach().numpy(), dy, [None if t is None else next(got).numpy() for t in tensors]
