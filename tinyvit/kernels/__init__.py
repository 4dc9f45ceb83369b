"""The operations' arithmetic: a reference for any array library, and faster kernels for NumPy and CuPy.

A kernel has the signature of the reference operation that it replaces. `cpu/table.py`, `jit/table.py` (with numba),
`bf16/table.py` and `int8/table.py` (in those precisions) and `cuda/table.py` list the kernels of a library by their
reference operations, each with the arguments that it covers.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable
from contextvars import ContextVar
from types import ModuleType
from typing import Any, NamedTuple

from tinyvit.kernels import jit, packed_weights


class Notes:
    """What the kernels of one backward pass tell each other.

    Attributes:
        sums: an array, and the sums of its columns.
    """

    def __init__(self) -> None:
        self.sums: tuple[Any, Any] | None = None
        self._run: Callable[[list[Any]], None] | None = None
        self._work: list[Any] = []
        self._unfilled: set[int] = set()  # ids of arrays, which `_work` keeps alive

    def put_off(self, run: Callable[[list[Any]], None], work: Any, fills: list[Any]) -> None:
        """Leave work that fills arrays until one of them is read, then `run` all of it, perhaps in one launch."""
        self._run = run
        self._work.append(work)
        self._unfilled.update(map(id, fills))

    def finish(self, *needed: Any) -> None:
        """Do what was put off; if arrays are given, only where one of them waits for it."""
        if self._run is not None and (not needed or not self._unfilled.isdisjoint(map(id, needed))):
            work, self._work, self._unfilled = self._work, [], set()
            self._run(work)


notes: ContextVar[Notes | None] = ContextVar("tinyvit_notes", default=None)  # None outside of a backward pass

_NUMPY, _CUPY = "array_api_compat.numpy", "array_api_compat.cupy"


class Kernel(NamedTuple):
    """A faster version of a reference operation.

    Attributes:
        run: has the reference's signature and meaning.
        covers: whether `run` can do it, given the same arguments without the namespace; None if it always can.
    """

    run: Callable[..., Any]
    covers: Callable[..., Any] | None = None


def best(op: Callable[..., Any], xp: ModuleType) -> Callable[..., Any]:
    """The fastest version of the reference operation `op` for arrays of the namespace `xp`.

    What its kernel does not cover runs through `op`.
    """
    packed = packed_weights.current.get()
    return _fastest(xp, jit.worth_it(), packed.precision if packed else None).get(op, op)


@functools.cache
def _fastest(
    xp: ModuleType, with_jit: bool = True, precision: str | None = None
) -> dict[Callable[..., Any], Callable[..., Any]]:
    """For each reference operation that has a kernel for `xp`, what to run in its place."""
    if xp.__name__ == _NUMPY and precision:
        return _merged("cpu", "jit", precision)
    if xp.__name__ == _NUMPY and with_jit and jit.wanted():
        try:
            return _merged("cpu", "jit")
        except ImportError as problem:  # numba takes a while to follow NumPy
            warnings.warn(f"NumPy's kernels run, for numba does not work here: {problem}", stacklevel=2)
    if xp.__name__ == _NUMPY:
        return _merged("cpu")
    return _merged("cuda") if xp.__name__ == _CUPY else {}


@functools.cache
def _merged(*tables: str) -> dict[Callable[..., Any], Callable[..., Any]]:
    """The kernels of several tables; what one does not cover goes to that of the table before it, or the reference."""
    merged: dict[Callable[..., Any], Callable[..., Any]] = {}
    for name in tables:
        for op, kernel in importlib.import_module(f"tinyvit.kernels.{name}.table").KERNELS.items():
            merged[op] = _where_covered(merged.get(op, op), kernel)
    return merged


def _where_covered(otherwise: Callable[..., Any], kernel: Kernel) -> Callable[..., Any]:
    run, covers = kernel
    if covers is None:
        return run

    @functools.wraps(run)
    def run_or_refer(xp: ModuleType, *inputs: Any, **parameters: Any) -> Any:
        version = run if covers(*inputs, **parameters) else otherwise
        return version(xp, *inputs, **parameters)

    return run_or_refer
