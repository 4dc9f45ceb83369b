"""Whether layers of NumPy arrays round to 16 or 8 bits, and their weights in those, packed once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, NamedTuple

from tinyvit.backend.arrays import Array


class Packed(NamedTuple):
    """A precision, "bf16" or "int8", and what was made of the weights that stay, by their `id`: None at first."""

    precision: str
    weights: dict[int, Any]


# None where linear layers compute in float32, or in arrays of 16 bits.
current: ContextVar[Packed | None] = ContextVar("tinyvit_packed_weights", default=None)

# Or each thread would pack the weight that all begin with. A signal's handler that predicts may come in between.
_one_at_a_time = threading.RLock()


def packed(weight: Array, pack: Callable[[Array], Any]) -> Any:
    """pack(weight), made once of a weight that stays."""
    now = current.get()
    if now is None or id(weight) not in now.weights:
        return pack(weight)
    if now.weights[id(weight)] is None:
        with _one_at_a_time:
            if now.weights[id(weight)] is None:
                now.weights[id(weight)] = pack(weight)
    return now.weights[id(weight)]
