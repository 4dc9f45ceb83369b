"""`python -m tinyvit.kernels.cuda.attention_trial JSON` tries attention for Hopper beside the kernels for every GPU.

With a load that fills the GPU, as far as 256 MiB of q, k and v do: blocks share multiprocessors, and one follows the
other there. The longest sequences get fewer blocks than that.
"""

from __future__ import annotations

import functools
import json
import math
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from tinyvit.backend import arrays
from tinyvit.backend.arrays import Array
from tinyvit.kernels import cuda
from tinyvit.kernels.cuda import attention, attention_sm90a, trial

HEADS, ROUNDS, MOST_BYTES = 3, 5, 256 << 20  # of a sample; of blocks on each multiprocessor; of q, k and v
LIMITS = {"bf16": 1e-2, "f16": 2e-3}  # of a row's |difference| / |row|; both round to 16 bits
SUMS = {"bf16": 2**-9, "f16": 2**-12}  # of a sum's |difference| / sum of |summed|, which are rounded and it is not
EXACT = 1e-4  # of a logarithm's, which is in float32
TINY = 1e-30  # beside which nothing is divided by zero
# The errors of a kernel itself, by CUDA's and the driver's names without "_": others say nothing of it, such as a full
# disk where CuPy keeps what it compiles, or a GPU that is lost.
FAULTS = re.compile(
    "compileexception|cudaerror(illegal(address|instruction)|invalid(addressspace|pc)|misalignedaddress|hardwarestack|launch)"
)

Comparisons = Iterator[tuple[str, Array, Array, float]]  # a name, our numbers, how far off they are and may be


def main(text: str) -> None:
    import array_api_compat.cupy as xp
    import cupy

    request = json.loads(text)
    cupy.cuda.Device.from_pci_bus_id(request.pop("gpu")).use()
    for found in problems(xp, **request):
        print(trial.FOUND + json.dumps(found), flush=True)


def problems(
    xp: Any, *, scalar: str, n: int, queries: int, dim: int, backward: bool
) -> Iterator[tuple[str, str | None]]:
    """What is wrong with the forward kernel, and with the backward one where it takes such heads."""
    dtype = arrays.resolve_dtype(xp, {"bf16": "bfloat16", "f16": "float16"}[scalar])
    rng, width = np.random.default_rng(0), HEADS * dim
    batch = min(math.ceil(ROUNDS * cuda.multiprocessors() / HEADS), max(1, MOST_BYTES // (6 * n * width)))
    qkv, dy = (
        xp.asarray(rng.standard_normal(shape, np.float32).astype(dtype))
        for shape in ((batch, n, 3 * width), (batch, queries, width))
    )
    settings = xp, qkv, cuda.NULL, HEADS, queries, np.float32(1 / math.sqrt(dim))
    y, row_log = attention.mma_forward(*settings, True)

    limit, many = LIMITS[scalar], attention_sm90a.MANY

    def forward(heads: int) -> Comparisons:
        ours, logs = attention_sm90a.forward(*settings, True, heads)
        heads_of = (-1, dim)
        yield "y", ours, _of_rows(xp, xp.reshape(ours, heads_of), xp.reshape(y, heads_of)), limit
        yield "a logarithm", logs, _of_rows(xp, logs[..., None], row_log[..., None]), EXACT

    def gradients() -> Comparisons:
        # Not before: a fault of the forward kernel is this one's, too, where it has ended the GPU's use.
        right, _ = attention.mma_backward(*settings, y, dy, row_log, False)
        ours, sums = attention_sm90a.backward(*settings, y, dy, row_log, True)
        parts, others = (xp.reshape(x, (batch, n, 3, HEADS, dim)) for x in (ours, right))
        for i, part in enumerate(("dq", "dk", "dv")):
            yield part, parts[:, :, i], _of_rows(xp, parts[:, :, i], others[:, :, i]), limit
        summed = ours.astype(xp.float32)
        differences = xp.abs(sums - xp.sum(summed, axis=1)) / (xp.sum(xp.abs(summed), axis=1) + TINY)
        yield "a sum", sums, differences, SUMS[scalar]

    # A head divided among as many blocks as may be, and with all its queries in one.
    found = (_problem(xp, functools.partial(forward, heads)) for heads in (1, many))
    yield "forward", next(filter(None, found), None)
    if backward:
        yield "backward", _problem(xp, gradients)


def _problem(xp: Any, run: Callable[[], Comparisons]) -> str | None:
    """What is wrong with what `run` gives, if anything: NaN is, too, and two runs that differ in a bit."""
    try:
        for (name, ours, differences, limit), (_, again, *_) in zip(run(), run(), strict=True):
            difference = float(xp.max(differences))
            if not difference < limit:
                return f"{name} differs by {difference:.1e}, more than {limit:.0e}"
            bits, again_bits = (x.view(f"uint{8 * x.dtype.itemsize}") for x in (ours, again))
            if xp.any(bits != again_bits):
                return f"{name} is not the same twice"
    except Exception as error:
        text = f"{type(error).__name__}: {error}".splitlines()[0]
        if not FAULTS.search(text.replace("_", "").lower()):
            raise
        return text
    return None


def _of_rows(xp: Any, ours: Array, other: Array) -> Array:
    """|ours - other| / |other| of each row."""
    ours, other = ours.astype(xp.float32), other.astype(xp.float32)

    def norm(x: Array) -> Array:
        return xp.sqrt(xp.sum(x * x, axis=-1))

    return norm(ours - other) / (norm(other) + TINY)


if __name__ == "__main__":
    main(sys.argv[1])
