"""What gpu_check's parts share: the device, where results go, comparisons with float64, times of captured launches."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from tinyvit.evaluation.metrics import EvaluationError, pick_device
from tinyvit.kernels import reference
from tinyvit.kernels.cuda.table import KERNELS

try:
    pick_device("cuda")
    import array_api_compat.cupy as xp
    import cupy
except EvaluationError as error:
    sys.exit(f"gpu_check: {error}")

try:
    import ml_dtypes

    BF16 = np.dtype(ml_dtypes.bfloat16)
except ImportError:
    sys.exit("gpu_check needs ml_dtypes, for bfloat16")

FP32, FP16 = np.dtype(np.float32), np.dtype(np.float16)
LIMITS = {FP32: 1e-5, FP16: 2e-3, BF16: 1e-2}
rng = np.random.default_rng(0)
results: list[dict[str, Any]] = []


class Poisoned:
    """CuPy's namespace, whose empty arrays are full of NaN."""

    @staticmethod
    def empty(shape: Any, dtype: Any) -> Any:
        x = xp.empty(shape, dtype=dtype)
        x.data.memset(0xFF, x.nbytes)
        return x

    def __getattr__(self, name: str) -> Any:
        return getattr(xp, name)


def error(actual: Any, expected: Any) -> float:
    """|actual - expected| / |expected|."""
    actual, expected = (np.asarray(x, np.float64) for x in (actual, expected))
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    return float(np.linalg.norm(actual - expected) / max(np.linalg.norm(expected), 1e-30))


def record(what: str, errors: list[float], limit: float, same: bool = True) -> None:
    worst = max(math.inf if math.isnan(e) else e for e in errors)
    results.append({"check": what, "error": worst, "limit": limit, "repeats": same, "ok": worst < limit and same})
    if not results[-1]["ok"]:
        print(f"FAILED {what}: error {worst:.1e}, limit {limit:.0e}{'' if same else ', other bits the second time'}")


def compare(name: str, dtype: np.dtype, inputs: list, limit: float | None = None, **params: Any) -> None:
    """A kernel's results and gradients against the reference's in float64."""

    def rounded(x: Any) -> Any:
        return x.astype(dtype) if isinstance(x, np.ndarray) and x.dtype.kind == "f" else x

    def exact(x: Any) -> Any:
        return rounded(x).astype(np.float64) if isinstance(x, np.ndarray) and x.dtype.kind == "f" else x

    def on_device(x: Any) -> Any:
        return cupy.asarray(rounded(x)) if isinstance(x, np.ndarray) else x

    def run(function: Callable, namespace: Any, place: Callable) -> list:
        needs = tuple(x is not None for x in inputs)
        y, vjp = function(namespace, *map(place, inputs), needs=needs, **{k: place(v) for k, v in params.items()})
        dy = np.asarray(np.random.default_rng(1).standard_normal(y.shape))
        return [y, *vjp(place(dy))]

    expected = run(getattr(reference, name), np_namespace(), exact)
    first, second = (
        [cupy.asnumpy(x) for x in run(KERNELS[getattr(reference, name)].run, Poisoned(), on_device) if x is not None]
        for _ in "12"
    )
    errors = [error(a, b) for a, b in zip(first, [x for x in expected if x is not None], strict=True)]
    same = all(a.tobytes() == b.tobytes() for a, b in zip(first, second, strict=True))
    shapes = " ".join(str(x.shape) for x in inputs if x is not None)
    record(f"{name} {dtype.name} {shapes}", errors, limit or LIMITS[dtype], same)


def np_namespace() -> Any:
    import array_api_compat.numpy

    return array_api_compat.numpy


@functools.cache
def stream() -> Any:
    """The one that is captured and timed: each stream has room of its own for cuBLASLt, which is kept."""
    return cupy.cuda.Stream(non_blocking=True)


def microseconds(calls: list[Callable[[], Any]], repeats: int = 15) -> float:
    """Time of one call on the device: a graph goes through all of them, which touch different memory."""
    cupy.cuda.Device().synchronize()  # inputs were made on another stream
    with stream():
        kept = [call() for call in calls]  # compiles, and keeps each call's arrays apart
        del kept
        stream().begin_capture()
        kept = [call() for call in calls]
        graph = stream().end_capture()
        times = []
        for _ in range(repeats):
            start, end = cupy.cuda.Event(), cupy.cuda.Event()
            start.record(stream())
            graph.launch(stream())
            end.record(stream())
            end.synchronize()
            times.append(cupy.cuda.get_elapsed_time(start, end) * 1e3 / len(calls))
    del kept
    return float(np.median(times))


def sets(nbytes: int) -> range:
    """Numbers for as many sets of inputs as overflow the cache twice."""
    l2 = cupy.cuda.Device().attributes["L2CacheSize"]
    return range(max(2, min(50, math.ceil(3 * l2 / nbytes))))


@functools.cache
def noise(dtype: np.dtype) -> Any:
    bits = rng.standard_normal(1 << 20, dtype=np.float32).astype(dtype).view(f"u{dtype.itemsize}")
    return cupy.asarray(bits)


def random_array(shape: Any, dtype: np.dtype = BF16) -> Any:
    """Normal numbers, which repeat after a million."""
    size = int(np.prod(shape))
    return cupy.resize(noise(dtype), size).view(dtype).reshape(shape)
