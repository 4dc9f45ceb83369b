"""The operations' arithmetic: a reference for any array library, and faster versions for NumPy and CuPy.

A kernel has the name and the signature of the reference operation that it stands in for
(`tinyvit.kernels.reference`), so finding one is a look-up by name; where there is none the reference runs.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

_MODULES = {
    "array_api_compat.numpy": "tinyvit.kernels.cpu.layers",
    "array_api_compat.cupy": "tinyvit.kernels.cuda.layers",
}


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
