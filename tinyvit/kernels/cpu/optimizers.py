"""The optimizers' updates for NumPy: in place, in the parameter's dtype, a cache-sized piece at a time.

An update is a dozen passes over its arrays. Over whole arrays each pass would go through main memory;
piece by piece only the first one does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import ModuleType

import numpy as np

from tinyvit.kernels import reference

ROW = 1 << 12  # elements of one dot product: few enough for float32's sums, and for BLAS to call no threads
TINY = 1e-20  # a sum of squares that is certain to have lost nothing to underflow
BLOCK = 1 << 18  # elements: measured; smaller pieces sit deeper in the cache, but threads then wait for Python's lock


def _blocks(*arrays: np.ndarray) -> Iterator[tuple[np.ndarray, ...]]:
    """Matching pieces of equally shaped arrays, as views, each time followed by scratch space of the same shape."""
    rows = BLOCK
    if all(a.flags.c_contiguous for a in arrays):
        arrays = tuple(a.reshape(-1) for a in arrays)
    else:  # pieces along the first axis are views whatever the memory layout
        rows = max(1, BLOCK * arrays[0].shape[0] // arrays[0].size)
    scratch = np.empty_like(arrays[0][:rows])
    for start in range(0, len(arrays[0]), rows):
        pieces = [a[start : start + rows] for a in arrays]
        yield *pieces, scratch[: len(pieces[0])]


def sgd(
    xp: ModuleType, p: np.ndarray, g: np.ndarray, m: np.ndarray | None,
    *, lr: float, momentum: float, nesterov: bool, weight_decay: float,
) -> tuple[np.ndarray, np.ndarray | None]:  # fmt: skip
    if m is None:
        for p_, g_, t in _blocks(p, g):
            if weight_decay:
                np.multiply(p_, 1 - lr * weight_decay, out=p_)
            np.multiply(g_, lr, out=t)
            np.subtract(p_, t, out=p_)
        return p, None
    for p_, g_, m_, t in _blocks(p, g, m):
        if weight_decay:
            np.multiply(p_, weight_decay, out=t)
            g_ = np.add(t, g_, out=t)
        np.multiply(m_, momentum, out=m_)
        np.add(m_, g_, out=m_)
        if nesterov:  # p -= lr * (g + momentum * m), with one scratch array
            np.multiply(g_, lr, out=t)
            np.subtract(p_, t, out=p_)
        np.multiply(m_, lr * momentum if nesterov else lr, out=t)
        np.subtract(p_, t, out=p_)
    return p, m


def adamw(
    xp: ModuleType, p: np.ndarray, g: np.ndarray, m: np.ndarray, v: np.ndarray,
    *, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, step: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    correction = math.sqrt(1 - beta2**step)
    rate = lr * correction / (1 - beta1**step)
    for p_, g_, m_, v_, t in _blocks(p, g, m, v):
        np.subtract(g_, m_, out=t)
        np.multiply(t, 1 - beta1, out=t)
        np.add(m_, t, out=m_)
        np.multiply(g_, g_, out=t)
        np.multiply(t, 1 - beta2, out=t)
        np.multiply(v_, beta2, out=v_)
        np.add(v_, t, out=v_)
        np.sqrt(v_, out=t)
        np.add(t, eps * correction, out=t)
        np.divide(m_, t, out=t)
        np.multiply(t, rate, out=t)
        if weight_decay:
            np.multiply(p_, 1 - lr * weight_decay, out=p_)
        np.subtract(p_, t, out=p_)
    return p, m, v


def lerp(xp: ModuleType, a: np.ndarray, b: np.ndarray, *, weight: float) -> np.ndarray:
    for a_, b_, t in _blocks(a, b):
        np.subtract(b_, a_, out=t)
        np.multiply(t, weight, out=t)
        np.add(a_, t, out=a_)
    return a


def sum_of_squares(xp: ModuleType, x: np.ndarray) -> float:
    if x.dtype in (np.float32, np.float64):
        flat = x.reshape(-1)
        whole = flat.size - flat.size % ROW
        rows, rest = flat[:whole].reshape(-1, ROW), flat[whole:]
        with np.errstate(over="ignore", invalid="ignore"):
            total = float(np.sum(np.vecdot(rows, rows), dtype=np.float64)) + float(np.vecdot(rest, rest))
        if TINY < total < math.inf:
            return total
    return float(reference.sum_of_squares(xp, x))  # float32's squares may have overflowed or vanished
