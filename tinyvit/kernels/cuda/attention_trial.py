"""`python -m tinyvit.kernels.cuda.attention_trial JSON` tries attention for Hopper beside the kernels for every GPU.

With a load that fills the GPU, as far as 256 MiB of q, k and v do: blocks share multiprocessors, and one follows the
other there. The longest sequences get fewer blocks than that.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from tinyvit.backend import arrays
from tinyvit.kernels import cuda
from tinyvit.kernels.cuda import attention, attention_sm90a, comparison

HEADS, ROUNDS, MOST_BYTES = 3, 5, 256 << 20  # of a sample; of blocks on each multiprocessor; of q, k and v
EXACT = 1e-4  # of a logarithm's |difference| / |logarithm|, which is in float32


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

    limit, many = comparison.LIMITS[scalar], attention_sm90a.MANY

    def forward(heads: int) -> comparison.Comparisons:
        ours, logs = attention_sm90a.forward(*settings, True, heads)
        heads_of = (-1, dim)
        yield "y", ours, comparison.of_rows(xp, xp.reshape(ours, heads_of), xp.reshape(y, heads_of)), limit
        yield "a logarithm", logs, comparison.of_rows(xp, logs[..., None], row_log[..., None]), EXACT

    def gradients() -> comparison.Comparisons:
        # Not before: a fault of the forward kernel is this one's, too, where it has ended the GPU's use.
        right, _ = attention.mma_backward(*settings, y, dy, row_log, False)
        ours, sums = attention_sm90a.backward(*settings, y, dy, row_log, True)
        parts, others = (xp.reshape(x, (batch, n, 3, HEADS, dim)) for x in (ours, right))
        for i, part in enumerate(("dq", "dk", "dv")):
            yield part, parts[:, :, i], comparison.of_rows(xp, parts[:, :, i], others[:, :, i]), limit
        yield "a sum", sums, comparison.of_sums(xp, sums, ours, 1), comparison.SUMS[scalar]

    # A head divided among as many blocks as may be, and with all its queries in one.
    found = (comparison.problem(xp, functools.partial(forward, heads)) for heads in (1, many))
    yield "forward", next(filter(None, found), None)
    if backward:
        yield "backward", comparison.problem(xp, gradients)


if __name__ == "__main__":
    comparison.main(problems)
