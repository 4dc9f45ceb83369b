"""Products of NumPy arrays with operands rounded to bfloat16: faster than float32's, on AMD's processors twice.

It takes numba, and AMD's AVX512-BF16, Intel's AMX or ARM's BF16 and I8MM. These are the products of linear layers, and
attention's from as many tokens as gain from it. Weights, activations, sums and all else stay in float32.
The instructions take denormal numbers for zero.
"""

from __future__ import annotations

from tinyvit.kernels import jit


def possible() -> bool:
    """Whether the processor has what it takes, and gains from it, and numba is to be used."""
    return jit.wanted() and gains(jit.dot_instructions())


def available() -> bool:
    """Whether it is possible, and the kernels can be compiled."""
    return possible() and jit.compiles(f"{__name__}.table")


def gains(instructions: str) -> bool:
    """Whether such products are faster than float32's; of ARM's its makers say so, and it was not measured.

    AMD does VDPBF16PS, two float32 FMAs in one, as often as those. Intel does it at a quarter of that (88 GFLOP/s a
    core, float32's products 165, measured): its processors gain from AMX alone (1,450 to 1,750).
    """
    on_amd = instructions == "avx512" and jit.has("avx512bf16") and jit.processor_name().startswith("znver")
    return on_amd or instructions in ("amx", "arm")
