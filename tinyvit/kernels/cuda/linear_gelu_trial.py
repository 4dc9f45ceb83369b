"""`python -m tinyvit.kernels.cuda.linear_gelu_trial JSON` tries a linear layer with GELU for Hopper (see `trial.py`).

Beside cuBLASLt's products and the kernels for every GPU: the results agree, and take less time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from tinyvit.backend import arrays
from tinyvit.kernels.cuda import comparison, linear, linear_gelu_sm90a

BYTES = 96 << 20  # of a wide activation: about twice the second cache
SUMS = 2**-15  # of a sum's |difference| / sum of |summed|: both are in float32, what is summed is rounded


def problems(xp: Any, *, scalar: str, inner: int, columns: int, approximate: str) -> Iterator[tuple[str, str | None]]:
    """What is wrong with the forward kernel, with the backward one, and with that of a whole MLP."""
    dtype = arrays.resolve_dtype(xp, {"bf16": "bfloat16", "f16": "float16"}[scalar])
    rng, limit = np.random.default_rng(0), comparison.LIMITS[scalar]
    count = max(linear_gelu_sm90a.LEAST_ROWS, BYTES // (2 * columns)) - 63  # the last tile of 64 rows is not full

    def draw(*shape: int, scale: float = 1.0) -> Any:
        return xp.asarray((scale * rng.standard_normal(shape, np.float32)).astype(dtype))

    rows, dy, bias, next_bias = draw(count, inner), draw(count, inner), draw(columns), draw(inner)
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
        return linear_gelu_sm90a.backward(xp, dy, next_weight, hidden, bias, approximate)

    def gradients() -> comparison.Comparisons:
        dx, partial = our_gradient()
        sums = xp.sum(partial, axis=0)
        yield "dx", dx, comparison.of_rows(xp, dx, others_gradient()[0]), limit
        yield "a sum", sums, comparison.of_sums(xp, sums, dx, 0), SUMS

    def in_two(layer: Callable[..., Any]) -> Any:
        between = layer(xp, rows, weight, bias, approximate, False)[0]
        return linear.product(xp, between, next_weight, next_bias, dy)

    def in_one() -> Any:
        return linear_gelu_sm90a.mlp(xp, dy, rows, weight, bias, next_weight, next_bias, approximate)

    def mlps() -> comparison.Comparisons:
        y = in_one()
        yield "y", y, comparison.of_rows(xp, y, in_two(linear.gelu_of_product)), limit

    yield "forward", comparison.problem(xp, results) or comparison.slower(ours, others)
    yield "backward", comparison.problem(xp, gradients) or comparison.slower(our_gradient, others_gradient)
    if inner > linear_gelu_sm90a.WIDEST:
        yield "mlp", None
        return
    in_twos = [functools.partial(in_two, layer) for layer in (linear.gelu_of_product, linear_gelu_sm90a.forward)]
    slower = (comparison.slower(in_one, other) for other in in_twos)
    yield "mlp", comparison.problem(xp, mlps) or next(filter(None, slower), None)


if __name__ == "__main__":
    comparison.main(problems)
