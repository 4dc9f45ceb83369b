"""What the engine checks around an operation: its arguments, and arrays that are changed in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tinyvit.backend import arrays


def common_namespace(name: str, values: list[Any], parameters: dict[str, Any]) -> Any:
    """The one namespace of all arrays among `values`, whose dtypes must agree; numbers and None go with any.

    NumPy's scalars become Python's numbers, in place: a np.float64 would turn float32 arrays into float64.

    Raises:
        TypeError: no array, arrays of two libraries or two dtypes, or a fraction where the arrays hold integers.
    """
    for key, value in parameters.items():
        if isinstance(value, np.generic):
            parameters[key] = value.item()
    first = None
    fractional = False
    for i, v in enumerate(values):
        if type(v) is not np.ndarray:
            if v is None:
                continue
            if isinstance(v, (bool, int, float, np.generic)):
                values[i] = v = _plain_number(v)
                fractional = fractional or isinstance(v, float)
                continue
            if not arrays.is_array(v):
                raise TypeError(f"{name} expects arrays or numbers, got {type(v).__name__}")
        if first is None:
            first = v
        elif type(v) is not type(first) and arrays.namespace(v) is not arrays.namespace(first):
            libraries = " and ".join(type(a).__module__.partition(".")[0] for a in (first, v))
            raise TypeError(f"{name} expects arrays of one library, got {libraries}")
        elif v.dtype != first.dtype:
            raise TypeError(f"{name} expects arrays of one dtype, got {first.dtype} and {v.dtype}; use astype")
    if first is None:
        raise TypeError(f"{name} expects at least one array")
    if fractional and not arrays.is_floating(first):
        raise TypeError(f"{name} expects whole numbers beside {first.dtype} arrays; use astype")
    return arrays.namespace(first)


def _plain_number(x: Any) -> bool | int | float:
    if isinstance(x, np.generic):
        return x.item()
    return x if type(x) in (bool, int, float) else float(x)


Version = list[int]  # holds how often an array was changed in place; tensors whose arrays share memory share the list


def share_versions(inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
    """Give outputs that are an input's array, or views of it, its version: a change of one is a change of the other."""
    for output in outputs:
        is_view = not arrays.owns_memory(output._data)
        for tensor in inputs:
            if output._data is tensor._data or (is_view and arrays.is_view_of(output._data, tensor._data)):
                output._version = tensor._version


def check_unchanged(name: str, versions: Sequence[tuple[Version, int]]) -> None:
    """Raise RuntimeError if an array was changed since the operation `name` recorded its version."""
    if any(version[0] != count for version, count in versions):
        raise RuntimeError(
            f"an input or output of {name} was changed in place after the forward pass, which its gradient may need; "
            "run the forward pass again after the change"
        )
