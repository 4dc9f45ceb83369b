"""Linear layers of NumPy arrays with operands rounded to bfloat16: twice float32's rate where a processor has that.

It takes AVX512-BF16 and numba. Weights, activations and sums stay in float32, and so does all but the linear layers.
"""

from __future__ import annotations

import functools
import importlib
from contextvars import ContextVar

from tinyvit.kernels import jit

# Whether linear layers of float32 may round their operands to bfloat16.
rounds: ContextVar[bool] = ContextVar("tinyvit_bf16", default=False)


@functools.cache
def available() -> bool:
    """Whether this processor and this installation can."""
    if not jit.wanted():
        return False
    try:
        from llvmlite import binding

        found = binding.get_host_cpu_features().get("avx512bf16", False)
        return found and bool(importlib.import_module("tinyvit.kernels.bf16.table"))
    except (ImportError, RuntimeError):  # numba takes a while to follow NumPy; a processor that LLVM does not know
        return False
