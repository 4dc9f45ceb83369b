"""What tinyvit needs to know of an array whatever library it belongs to: its namespace, dtype and place."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any

import array_api_compat
import array_api_compat.numpy as numpy_namespace
import numpy as np

from tinyvit import kernels

Array = Any


def is_array(x: object) -> bool:
    return type(x) is np.ndarray or (not isinstance(x, np.generic) and array_api_compat.is_array_api_obj(x))


def namespace(x: Array) -> Any:
    """The array-API namespace that `x` belongs to."""
    if type(x) is np.ndarray:
        return numpy_namespace
    return array_api_compat.array_namespace(x)


def is_floating(x: Array) -> bool:
    if type(x) is np.ndarray:
        return x.dtype.kind == "f"
    return namespace(x).isdtype(x.dtype, "real floating")


def common_namespace(name: str, values: list[Any]) -> Any:
    """The one namespace of all arrays among `values`, whose dtypes must agree; numbers and None go with any.

    Raises:
        TypeError: no array, arrays of two libraries or two dtypes, or a fraction where the arrays hold integers.
    """
    first = None
    fractional = False
    for i, v in enumerate(values):
        if type(v) is not np.ndarray:
            if v is None:
                continue
            if isinstance(v, (bool, int, float, np.generic)):
                if isinstance(v, np.generic):
                    values[i] = v = v.item()  # a np.float64 scalar would turn float32 arrays into float64
                elif type(v) not in (bool, int, float):
                    values[i] = v = float(v)
                fractional = fractional or isinstance(v, float)
                continue
            if not is_array(v):
                raise TypeError(f"{name} expects arrays or numbers, got {type(v).__name__}")
        if first is None:
            first = v
        elif type(v) is not type(first) and namespace(v) is not namespace(first):
            libraries = " and ".join(type(a).__module__.partition(".")[0] for a in (first, v))
            raise TypeError(f"{name} expects arrays of one library, got {libraries}")
        elif v.dtype != first.dtype:
            raise TypeError(f"{name} expects arrays of one dtype, got {first.dtype} and {v.dtype}; use astype")
    if first is None:
        raise TypeError(f"{name} expects at least one array")
    if fractional and not is_floating(first):
        raise TypeError(f"{name} expects whole numbers beside {first.dtype} arrays; use astype")
    return namespace(first)


def to_numpy(x: Array) -> np.ndarray:
    """`x` as a NumPy array on the host."""
    if type(x) is np.ndarray:
        return x
    if array_api_compat.is_cupy_array(x):
        return x.get()
    if array_api_compat.is_torch_array(x):
        x = x.detach().cpu()
    return np.asarray(x) if hasattr(x, "__array__") else np.from_dlpack(x)


def convert(x: Array, like: Array) -> Array:
    """`x` in the library and on the device of `like`, with its own dtype."""
    if type(x) is type(like):
        if type(x) is np.ndarray:
            return x
        device = array_api_compat.device(like)
        return x if array_api_compat.device(x) == device else array_api_compat.to_device(x, device)
    if kernels.capturing():
        raise kernels.NotCapturable(f"an array {tuple(x.shape)} would be copied to the device each time")
    return namespace(like).asarray(to_numpy(x), device=array_api_compat.device(like))


def as_array(x: Array) -> Array:
    """`x`, or if it is one of the scalars into which NumPy turns arrays without dimensions, such an array again."""
    return np.asarray(x) if isinstance(x, np.generic) else x


def astype(x: Array, dtype: Any) -> Array:
    """`x` with another dtype, which may be given as a name, a NumPy dtype or the library's own; `x` itself if it has it."""
    xp = namespace(x)
    return xp.astype(x, resolve_dtype(xp, dtype), copy=False)


def dtype_name(dtype: Any) -> str:
    """The standard's name of a dtype, e.g. "float32", whichever library spells it."""
    if dtype is None or isinstance(dtype, str):  # for NumPy, None is float64
        return str(dtype)
    try:
        return np.dtype(dtype).name
    except TypeError:
        return str(dtype).rpartition(".")[2]


def resolve_dtype(xp: Any, dtype: Any) -> Any:
    name = dtype_name(dtype)
    try:
        return getattr(xp, name)
    except AttributeError:
        raise TypeError(f"unknown dtype {dtype!r}") from None


def owns_memory(x: Array) -> bool:
    """Whether writing into `x` certainly changes no other array."""
    return getattr(x, "base", x) is None


def is_view_of(x: Array, y: Array) -> bool:
    """Whether `x` looks into the memory of `y`, as far as the library tells: NumPy's and CuPy's arrays name their base."""
    base = getattr(x, "base", None)
    return base is not None and (base is y or base is getattr(y, "base", None))


def on_host(x: Array) -> bool:
    """Whether looking at values of `x` costs nothing: a NumPy array, not a device's."""
    return type(x) is np.ndarray


def on_device_of(x: Array) -> AbstractContextManager:
    """The context in which CuPy works on the device of `x`: by itself it takes the current one, whatever its arrays' is."""
    return x.device if array_api_compat.is_cupy_array(x) else contextlib.nullcontext()


def mover(target: Any) -> Callable[[Array], Array]:
    """The function that takes an array to `target`.

    Args:
        target: "cpu" (NumPy), "cuda" or "cuda:1" (CuPy), an array-API namespace module, or a floating dtype.

    Raises:
        RuntimeError: CuPy, its driver or a GPU is missing.
        ValueError: none of those.
    """
    if target == "cpu":
        return to_numpy
    if isinstance(target, str) and target.split(":")[0] == "cuda":
        return _to_cuda(target)
    if isinstance(target, ModuleType):
        return lambda x: target.asarray(to_numpy(x))
    if dtype_name(target) not in ("float16", "float32", "float64", "bfloat16"):
        raise ValueError(f'expected "cpu", "cuda", "cuda:N", an array-API namespace or a floating dtype, got {target!r}')
    return lambda x: astype(x, target)


def _to_cuda(target: str) -> Callable[[Array], Array]:
    try:
        import cupy
    except ImportError:
        raise RuntimeError(
            f'device {target} needs CuPy: pip install "tinyvit[cuda12]" or "tinyvit[cuda13]" (the CUDA version of the driver)'
        ) from None
    try:
        number = int(target.partition(":")[2] or 0)
    except ValueError:
        raise ValueError(f'expected "cuda" or "cuda:N", got {target!r}') from None
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise RuntimeError(f"device {target} cannot be used: CuPy finds no working GPU ({error})") from None
    if not 0 <= number < count:
        raise RuntimeError(f"device {target} does not exist: there are {count} GPUs")

    def move(x: Array) -> Array:
        with cupy.cuda.Device(number):
            return cupy.asarray(x if array_api_compat.is_cupy_array(x) else to_numpy(x))

    return move
