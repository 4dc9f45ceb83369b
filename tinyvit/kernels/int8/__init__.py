"""Linear layers of NumPy arrays in 8-bit whole numbers, for predictions.

A product runs at 2.3 to 3.7 times float32's rate with AVX512-VNNI, at 1.4 to 1.5 times with AVX2. It takes numba, and
one of these, AVX-VNNI, Intel's AMX or ARM's I8MM and BF16; all give the same sums. Each output of a weight and each
row of activations has a scale of its own, which makes its largest entry 127. Sums are exact; bias, GELU, residual and
all but the linear layers are float32.
"""

from __future__ import annotations

from tinyvit.kernels import jit


def possible() -> bool:
    """Whether the processor has what it takes and numba is to be used."""
    return jit.wanted() and jit.dot_instructions() != ""


def available() -> bool:
    """Whether it is possible, and the kernels can be compiled."""
    return possible() and jit.compiles(f"{__name__}.table")
