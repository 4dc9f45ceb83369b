"""The operations' arithmetic: a reference for any array library, and faster kernels for NumPy and CuPy.

A kernel has the signature of the reference operation that it replaces. `cpu/table.py` and `cuda/table.py` list the
kernels of a library by their reference operations, each with the arguments that it covers.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

_TABLES = {"array_api_compat.numpy": "tinyvit.kernels.cpu.table", "array_api_compat.cupy": "tinyvit.kernels.cuda.table"}


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
    return _fastest(xp).get(op, op)


@functools.cache
def _fastest(xp: ModuleType) -> dict[Callable[..., Any], Callable[..., Any]]:
    """For each reference operation that has a kernel for `xp`, what to run in its place."""
    table = importlib.import_module(_TABLES[xp.__name__]).KERNELS if xp.__name__ in _TABLES else {}
    return {op: _where_covered(op, kernel) for op, kernel in table.items()}


def _where_covered(op: Callable[..., Any], kernel: Kernel) -> Callable[..., Any]:
    run, covers = kernel
    if covers is None:
        return run

    @functools.wraps(run)
    def run_or_refer(xp: ModuleType, *inputs: Any, **parameters: Any) -> Any:
        version = run if covers(*inputs, **parameters) else op
        return version(xp, *inputs, **parameters)

    return run_or_refer
