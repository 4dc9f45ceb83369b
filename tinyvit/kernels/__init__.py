"""Faster versions of operations, one module for an array library.

A kernel has the name and the signature of the reference operation that it stands in for
(`tinyvit.kernels.reference`), so finding one is a look-up by name; where there is none the reference runs.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from types import ModuleType
from typing import Any

_MODULES = {"array_api_compat.numpy": "tinyvit.kernels.numpy_", "array_api_compat.cupy": "tinyvit.kernels.cupy_"}


@functools.cache
def best(op: Callable, xp: ModuleType) -> Callable:
    """The fastest version of the reference operation `op` for arrays of the namespace `xp`."""
    module = _MODULES.get(xp.__name__)
    if module is None or not op.__module__.startswith("tinyvit."):  # a user's own operation may share a name
        return op
    return importlib.import_module(module).KERNELS.get(op.__name__, op)


@functools.cache
def together(name: str, xp: ModuleType) -> Any:
    """The class that does an optimizer's operation for many arrays at once; None where there is none."""
    module = _MODULES.get(xp.__name__)
    return module and getattr(importlib.import_module(module), "TOGETHER", {}).get(name)


# --- capturing ------------------------------------------------------------------------------------------------------

_waiting: ContextVar[list[Callable[[], None]] | None] = ContextVar("tinyvit_waiting", default=None)


class NotCapturable(RuntimeError):
    """Work that depends on the host each time, which a captured graph would repeat as it was."""


def capturing() -> bool:
    """Whether a device's launches are being recorded into a graph, not run."""
    return _waiting.get() is not None


def after_capture(work: Callable[[], None]) -> None:
    """Leave `work` for the time between a capture and the first launch of its graph; it lives as long as that."""
    _waiting.get().append(work)


@contextlib.contextmanager
def capture() -> Iterator[list[Callable[[], None]]]:
    """Within this context `capturing` holds; the list that is given takes what `after_capture` is given."""
    waiting: list[Callable[[], None]] = []
    token = _waiting.set(waiting)
    try:
        yield waiting
    finally:
        _waiting.reset(token)
