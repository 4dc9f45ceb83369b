"""Initial values of parameters: float32 arrays, drawn from the random state of the context (`backend.random`)."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from contextvars import ContextVar

import numpy as np

from tinyvit.backend import random

Shape = tuple[int, ...]

_drawing: ContextVar[bool] = ContextVar("tinyvit_drawing", default=True)


@contextlib.contextmanager
def no_init() -> Iterator[None]:
    """Within this context new parameters are zeros and nothing is drawn: for weights that are loaded afterwards."""
    token = _drawing.set(False)
    try:
        yield
    finally:
        _drawing.reset(token)


def xavier_uniform(shape: Shape, fan_out: int | None = None) -> np.ndarray:
    """Uniform in +-sqrt(6 / (fan_in + fan_out)) (Glorot & Bengio 2010).

    Args:
        shape: (out, in).
        fan_out: `out` if None.
    """
    bound = math.sqrt(6.0 / (shape[1] + (fan_out or shape[0])))
    return _draw(shape, lambda g: (g.random(shape, dtype=np.float32) * 2.0 - 1.0) * bound)


def normal(shape: Shape, std: float) -> np.ndarray:
    """Normal with mean 0."""
    return _draw(shape, lambda g: g.standard_normal(shape, dtype=np.float32) * std)


def truncated_normal(shape: Shape, std: float) -> np.ndarray:
    """Normal with mean 0; values beyond two standard deviations are drawn again."""

    def draw(g: np.random.Generator) -> np.ndarray:
        x = g.standard_normal(shape, dtype=np.float32)
        while (far := np.abs(x) > 2.0).any():
            x[far] = g.standard_normal(int(far.sum()), dtype=np.float32)
        return x * std

    return _draw(shape, draw)


def he_normal(shape: Shape) -> np.ndarray:
    """Normal whose variance is 2 / fan_in, for layers before a ReLU (He et al. 2015, arXiv:1502.01852)."""
    return normal(shape, math.sqrt(2.0 / math.prod(shape[1:])))


def lecun_normal(shape: Shape) -> np.ndarray:
    """Truncated normal whose variance is 1 / fan_in (LeCun et al. 1998); shape (out, in, ...)."""
    # A unit normal that is cut at +-2 has a standard deviation of 0.8796.
    return truncated_normal(shape, math.sqrt(1.0 / math.prod(shape[1:])) / 0.87962566103423978)


def _draw(shape: Shape, draw: Callable[[np.random.Generator], np.ndarray]) -> np.ndarray:
    generator = random.generator()  # also where nothing is drawn, so that later draws stay the same
    return draw(generator).astype(np.float32) if _drawing.get() else np.zeros(shape, np.float32)
