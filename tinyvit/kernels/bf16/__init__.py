"""Products of NumPy arrays with operands rounded to bfloat16: twice float32's rate where a processor has that.

It takes an AMD processor with AVX512-BF16, and numba. These are the products of linear layers, and on the way forward
attention's, from as many tokens as gain from it. Weights, activations, sums and all else stay in float32.
"""

from __future__ import annotations

from tinyvit.kernels import jit


def possible() -> bool:
    """Whether the processor has what it takes, and gains from it, and numba is to be used."""
    return jit.wanted() and jit.has("avx512bf16") and gains(_processor())


def available() -> bool:
    """Whether it is possible, and the kernels can be compiled."""
    return possible() and jit.compiles(f"{__name__}.table")


def gains(processor: str) -> bool:
    """Whether a processor, by LLVM's name, does VDPBF16PS, two float32 FMAs in one, as often as those.

    AMD's do. Intel's do it at a quarter of that (88 GFLOP/s a core, float32's products 165, measured): theirs is AMX.
    """
    return processor.startswith("znver")


def _processor() -> str:
    from llvmlite import binding

    return binding.get_host_cpu_name()
