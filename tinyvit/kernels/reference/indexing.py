"""The gradient of indexing, in the array API standard alone."""

from __future__ import annotations

from typing import Any

from tinyvit.backend import arrays
from tinyvit.backend.arrays import Array


def sum_at(xp: Any, values: Array, positions: Array, size: int) -> Array:
    """For each i < size the sum of the values at position i: values (n,), positions (n,) integers -> (size,).

    The standard has no scatter. The values are sorted by position, and neighbours at the same position are added up
    over distances 1, 2, 4, ... (a segmented scan), so that the last of each position holds its sum.
    """
    if not values.shape[0] or not size:
        return xp.zeros((size,), dtype=values.dtype, device=arrays.device(values))
    order = xp.argsort(positions)
    positions, sums = xp.take(positions, order), xp.take(values, order)
    sums = xp.astype(sums, xp.float32) if arrays.is_half(values) else sums
    distance = 1
    while distance < positions.shape[0] and bool(xp.any(same := positions[distance:] == positions[:-distance])):
        added = xp.where(same, sums[:-distance], xp.zeros_like(sums[:-distance]))
        sums = xp.concat([sums[:distance], sums[distance:] + added])
        distance *= 2
    targets = xp.arange(size, dtype=positions.dtype, device=arrays.device(positions))
    last = xp.searchsorted(positions, targets, side="right") - 1
    last = xp.where(last < 0, xp.zeros_like(last), last)
    found = xp.take(positions, last) == targets
    result = xp.take(sums, last)
    return xp.astype(xp.where(found, result, xp.zeros_like(result)), values.dtype, copy=False)
