"""Linear layers of NumPy arrays in 8-bit whole numbers, for predictions: up to four times float32's rate.

It takes a processor with AVX512-VNNI, and numba. Each output of a weight and each row of activations has a scale of its
own, which makes its largest entry 127. Sums are exact; bias, GELU, residual and all but the linear layers are float32.
"""

from __future__ import annotations

import functools
import importlib
from contextvars import ContextVar
from typing import Any

from tinyvit.kernels import jit

# Where linear layers compute in 8 bits, what was made of the weights that stay, by the `id` of their arrays: None at
# first. None itself where they do not.
packed: ContextVar[dict[int, Any] | None] = ContextVar("tinyvit_int8", default=None)


def possible() -> bool:
    """Whether the processor has what it takes and numba is to be used."""
    return jit.wanted() and jit.has("avx512vnni")


@functools.cache
def available() -> bool:
    """Whether it is possible, and the kernels can be compiled."""
    try:
        return possible() and bool(importlib.import_module("tinyvit.kernels.int8.table"))
    except ImportError:  # numba takes a while to follow NumPy
        return False
