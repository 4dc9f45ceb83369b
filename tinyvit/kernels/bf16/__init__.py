"""Linear layers of NumPy arrays with operands rounded to bfloat16: twice float32's rate where a processor has that.

It takes AVX512-BF16 and numba. Weights, activations and sums stay in float32, and so does all but the linear layers.
"""

from __future__ import annotations

import functools
from contextvars import ContextVar

from tinyvit.kernels import jit

# Whether linear layers of float32 may round their operands to bfloat16.
rounds: ContextVar[bool] = ContextVar("tinyvit_bf16", default=False)


@functools.cache
def available() -> bool:
    """Whether this processor and this installation can."""
    if not jit.wanted():
        return False
    from llvmlite import binding

    return bool(binding.get_host_cpu_features().get("avx512bf16"))
