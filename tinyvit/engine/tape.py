"""The tape: what each recorded operation keeps for the backward pass."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

from tinyvit.backend.arrays import VJP, Array
from tinyvit.engine import checks

recording: ContextVar[bool] = ContextVar("tinyvit_recording", default=True)
_order = itertools.count()  # numbers nodes by age; next() is atomic, so threads may share it


@contextlib.contextmanager
def no_grad() -> Iterator[None]:
    """Within this context (or decorated function, in this thread) operations record nothing for a backward pass."""
    token = recording.set(False)
    try:
        yield
    finally:
        recording.reset(token)


class Node:
    """One recorded operation: where its inputs came from and how to carry a gradient back to them.

    It refers to the operations that made its inputs, not to their Tensors: an array that no vjp saved is freed as
    soon as its last Tensor is.
    """

    __slots__ = ("inputs", "n_outputs", "name", "order", "versions", "vjp")

    def __init__(
        self, name: str, inputs: tuple[Any, ...], vjp: VJP, versions: list[tuple[checks.Version, int]], n_outputs: int
    ) -> None:
        self.order = next(_order)
        self.name = name
        self.inputs = inputs  # each a leaf, or (node, which of its outputs); None where no gradient is needed
        self.vjp = vjp
        self.versions = versions  # of the inputs and outputs, as they were
        self.n_outputs = n_outputs

    def release(self) -> None:
        """Let go of everything saved, so that memory falls while the backward pass runs."""
        self.inputs, self.versions, self.vjp = (), [], freed


def freed(*_: Array) -> tuple[Array | None, ...]:
    raise RuntimeError(
        "the graph was freed by an earlier backward pass; "
        "run the forward pass again, or give that pass retain_graph=True"
    )
