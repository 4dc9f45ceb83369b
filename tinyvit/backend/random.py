"""Random numbers without a hidden stream: each is a function of (seed, step, number, sample).

The number counts the draws of a forward pass, so that two dropout layers differ. The sample is the index in the whole
batch, so that masks do not depend on how a batch is cut into shards. Inside `scope` all four are fixed. Outside of
every scope the count continues from the start of the process.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np


class Draw(NamedTuple):
    """What a mask derives from. The step may be an array without dimensions, so that it can change on a device."""

    seed: int
    step: int | Any
    number: int
    first_sample: int


@dataclass(frozen=True)
class _State:
    seed: int = 0
    step: int | Any = 0
    first_sample: int = 0
    numbers: Iterator[int] = field(default_factory=itertools.count)


# Outside every scope all contexts count the same places.
_state: ContextVar[_State] = ContextVar("tinyvit_random", default=_State())  # noqa: B039


@contextlib.contextmanager
def scope(seed: int, step: int | Any = 0, first_sample: int = 0) -> Iterator[None]:
    """Derive every draw in this context from `seed`, `step` and its place; the batch's first sample is `first_sample`.

    `step` may also be an int64 array without dimensions, which draws on its device read there.

    Raises:
        ValueError: a negative number.
    """
    for name, value in (("seed", seed), ("step", step), ("first_sample", first_sample)):
        if isinstance(value, Integral) and value < 0:
            raise ValueError(f"{name} must not be negative, got {value}")
    token = _state.set(_State(int(seed), int(step) if isinstance(step, Integral) else step, int(first_sample)))
    try:
        yield
    finally:
        _state.reset(token)


def generator() -> np.random.Generator:
    """A generator for the next number, for draws that belong to no sample (initialisation)."""
    state = _state.get()
    return np.random.default_rng((state.seed, state.step, next(state.numbers)))


def draw() -> Draw:
    """The next draw, for a mask."""
    state = _state.get()
    return Draw(state.seed, state.step, next(state.numbers), state.first_sample)


def keep_mask(drop: float, samples: int, shape: tuple[int, ...], at: Draw | None = None) -> np.ndarray:
    """Booleans (samples, *shape), each True with probability 1 - drop; of the next number unless a draw is given.

    A counter-based generator (Philox: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") is moved
    straight to the first sample of this shard.
    """
    at = draw() if at is None else at
    size = int(np.prod(shape, dtype=np.int64))
    blocks = -(-size // 8)  # one block of Philox gives 256 bits: eight 32-bit draws
    bits = np.random.Philox(np.random.SeedSequence((at.seed, int(at.step), at.number)))
    bits.advance(at.first_sample * blocks)
    draws = bits.random_raw(samples * blocks * 4).view(np.uint32).reshape(samples, blocks * 8)[:, :size]
    return (draws >= threshold(drop)).reshape(samples, *shape)


def threshold(drop: float) -> np.uint32:
    """32-bit draws from here on are kept."""
    return np.uint32(min(round(drop * 2**32), 2**32 - 1))
