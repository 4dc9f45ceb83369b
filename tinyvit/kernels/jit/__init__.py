"""Kernels for NumPy arrays in float32, compiled by numba (the extra `jit`): loops that NumPy does not have.

numba compiles them when they are needed for the first time, for the processor that it finds, and keeps the code in its
cache: NUMBA_CACHE_DIR, else beside the source, else in the user's cache directory. TINYVIT_JIT=0 leaves them out.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping


def wanted(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether these kernels are to be used: numba is installed, and the environment does not say TINYVIT_JIT=0."""
    return environment.get("TINYVIT_JIT") != "0" and importlib.util.find_spec("numba") is not None
