"""Kernels for NumPy arrays in float32, compiled by numba (the extra `jit`): loops that NumPy does not have.

numba compiles them when they are needed for the first time, for the processor that it finds, and keeps the code in its
cache: NUMBA_CACHE_DIR, else beside the source, else in the user's cache directory. TINYVIT_JIT=0 leaves them out.
"""

from __future__ import annotations

import contextlib
import contextvars
import importlib.util
import os
from collections.abc import Iterator, Mapping

FEW = 32  # images: loading numba takes half a second and 110 MB, more than it saves on fewer

_few: contextvars.ContextVar[bool] = contextvars.ContextVar("tinyvit_few_images", default=False)


def wanted(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether these kernels are to be used: numba is installed, and the environment does not say TINYVIT_JIT=0."""
    return environment.get("TINYVIT_JIT") != "0" and importlib.util.find_spec("numba") is not None


@contextlib.contextmanager
def worth_it_for(images: int) -> Iterator[None]:
    """Within this context, which computes so many images in all, these kernels are left out below FEW."""
    token = _few.set(images < FEW)
    try:
        yield
    finally:
        _few.reset(token)


def worth_it() -> bool:
    """Whether no context says that there are too few images for these kernels."""
    return not _few.get()
