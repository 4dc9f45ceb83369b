"""`python -m tinyvit.kernels.cuda.linear_gelu_trial JSON` tries a linear layer with GELU for Hopper (see `trial.py`).

Beside cuBLASLt's products and the kernels for every GPU: the results agree, and take less time.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np

from tinyvit.backend import arrays
from tinyvit.kernels.cuda import comparison, linear, linear_gelu_sm90a

ROUNDS = 4  # tiles of 64 rows that each warpgroup takes; the last one is not full


def problems(xp: Any, *, scalar: str, inner: int, columns: int, approximate: str) -> Iterator[tuple[str, str | None]]:
    """What is wrong with the forward kernel, and with the backward one."""
    dtype = arrays.resolve_dtype(xp, {"bf16": "bfloat16", "f16": "float16"}[scalar])
    rng, limit = np.random.default_rng(0), comparison.LIMITS[scalar]
    _, warpgroups, workers, _ = linear_gelu_sm90a.plan(1 << 30, inner, columns, True)
    count = ROUNDS * workers * 64 * warpgroups - 63

    def draw(*shape: int, scale: float = 1.0) -> Any:
        return xp.asarray((scale * rng.standard_normal(shape, np.float32)).astype(dtype))

    rows, dy, bias = draw(count, inner), draw(count, inner), draw(columns)
    weight, next_weight = draw(columns, inner, scale=inner**-0.5), draw(inner, columns, scale=inner**-0.5)
    hidden = linear.product(xp, rows, weight)
    others = functools.partial(linear.gelu_of_product, xp, rows, weight, bias, approximate, True)
    ours = functools.partial(linear_gelu_sm90a.forward, xp, rows, weight, bias, approximate, True)

    def results() -> comparison.Comparisons:
        y, kept = ours()
        yield "y", y, comparison.of_rows(xp, y, others()[0]), limit
        yield "what is kept", kept, comparison.of_rows(xp, kept, hidden), limit
        y, _ = linear_gelu_sm90a.forward(xp, rows, weight, bias, approximate, False)
        yield "y without what is kept", y, comparison.of_rows(xp, y, others()[0]), limit

    def others_gradient() -> tuple[Any, Any]:
        return linear.gelu_gradient(xp, hidden, bias, linear.input_gradient(xp, dy, next_weight), approximate)

    def our_gradient() -> tuple[Any, Any]:
        dx, partial = linear_gelu_sm90a.backward(xp, dy, next_weight, hidden, bias, approximate)
        return dx, *linear.sum_partials(xp, partial, dx.dtype)

    def gradients() -> comparison.Comparisons:
        dx, sums = our_gradient()
        yield "dx", dx, comparison.of_rows(xp, dx, others_gradient()[0]), limit
        yield "a sum", sums, comparison.of_sums(xp, sums, dx, 0), comparison.SUMS[scalar]

    yield "forward", comparison.problem(xp, results) or comparison.slower(ours, others)
    yield "backward", comparison.problem(xp, gradients) or comparison.slower(our_gradient, others_gradient)


if __name__ == "__main__":
    comparison.main(problems)
