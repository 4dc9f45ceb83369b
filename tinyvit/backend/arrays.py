"""What tinyvit needs to know of an array whatever library it belongs to: its namespace, dtype and place."""

from __future__ import annotations

import contextlib
import functools
import zlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import array_api_compat
import array_api_compat.numpy as numpy_namespace
import numpy as np

from tinyvit.backend import cuda_graph

Array = Any  # an array of any library that follows the array API standard
# A vector-Jacobian product: from the gradients of an operation's results to those of its inputs, None where not needed.
VJP = Callable[..., tuple[Array | None, ...]]


def is_array(x: object) -> bool:
    return type(x) is np.ndarray or (not isinstance(x, np.generic) and array_api_compat.is_array_api_obj(x))


def namespace(x: Array) -> Any:
    """The array-API namespace that `x` belongs to."""
    if type(x) is np.ndarray:
        return numpy_namespace
    return array_api_compat.array_namespace(x)


def is_floating(x: Array) -> bool:
    dtype = x.dtype
    if isinstance(dtype, np.dtype):  # NumPy's and CuPy's arrays; to both, bfloat16 is a foreign dtype of kind "V"
        return dtype.kind == "f" or dtype.name == "bfloat16"
    return namespace(x).isdtype(dtype, "real floating")


def is_half(x: Array) -> bool:
    """Whether `x` holds float16 or bfloat16."""
    dtype = x.dtype
    if isinstance(dtype, np.dtype):
        return dtype.itemsize == 2 and dtype.name in ("float16", "bfloat16")
    return str(dtype).rpartition(".")[2] in ("float16", "bfloat16")


def to_numpy(x: Array) -> np.ndarray:
    """`x` as a NumPy array on the host."""
    if type(x) is np.ndarray:
        return x
    if array_api_compat.is_cupy_array(x):
        return x.get()
    if array_api_compat.is_torch_array(x):
        x = x.detach().cpu()
        if dtype_name(x.dtype) == "bfloat16":  # torch gives NumPy its bits only
            return np.asarray(x.view(namespace(x).int16)).view(_bfloat16())
    return np.asarray(x) if hasattr(x, "__array__") else np.from_dlpack(x)


def start_copy_to_host(x: Array) -> Callable[[], np.ndarray]:
    """Start to copy `x` to the host, and return a function that waits for the copy and returns a NumPy array.

    It does not wait for later work. It must be called, because the copy writes to memory of the host until then.
    """
    if not is_cupy(x) or not x.size:
        return functools.partial(to_numpy, x)
    import cupy
    import cupyx

    host = cupyx.empty_pinned(x.shape, x.dtype)
    x.get(out=host, blocking=False)
    copied = cupy.cuda.get_current_stream().record()

    def read() -> np.ndarray:
        copied.synchronize()
        return host

    return read


def convert(x: Array, like: Array) -> Array:
    """`x` in the library and on the device of `like`, with its own dtype."""
    if type(x) is type(like):
        if type(x) is np.ndarray:
            return x
        device = array_api_compat.device(like)
        return x if array_api_compat.device(x) == device else array_api_compat.to_device(x, device)
    if cuda_graph.capturing():
        raise cuda_graph.NotCapturable(f"an array {tuple(x.shape)} would be copied to the device each time")
    return namespace(like).asarray(to_numpy(x), device=array_api_compat.device(like))


def is_writable(x: Array) -> bool:
    """Whether the library's arrays can be changed in place; JAX's cannot."""
    return array_api_compat.is_writeable_array(x)


def assign(x: Array, key: Any, values: Array) -> Array:
    """`x` after x[key] = values: `x` itself, or another array where the library's arrays cannot be changed (JAX)."""
    if not is_writable(x):
        return x.at[key].set(values)
    x[key] = values
    return x


def as_array(x: Array) -> Array:
    """`x`, or if it is one of the scalars into which NumPy turns arrays without dimensions, such an array again."""
    return np.asarray(x) if isinstance(x, np.generic) else x


def astype(x: Array, dtype: Any) -> Array:
    """`x` with another dtype, given as a name, a NumPy dtype or the library's own; `x` itself if it has it."""
    xp = namespace(x)
    return xp.astype(x, resolve_dtype(xp, dtype), copy=False)


def clip(x: Array, low: float, high: float) -> Array:
    """`x` cut off at both ends. For CuPy array_api_compat does it by masks, each of which waits for the device."""
    return x.clip(low, high) if is_cupy(x) else namespace(x).clip(x, low, high)


def dtype_name(dtype: Any) -> str:
    """The standard's name of a dtype, e.g. "float32", whichever library spells it."""
    if dtype is None or isinstance(dtype, str):  # for NumPy, None is float64
        return str(dtype)
    try:
        return np.dtype(dtype).name
    except TypeError:
        return str(dtype).rpartition(".")[2]


def resolve_dtype(xp: Any, dtype: Any) -> Any:
    """A dtype of the library `xp`, given as a name, a NumPy dtype or the library's own. Raises TypeError."""
    name = dtype_name(dtype)
    try:
        return getattr(xp, name)
    except AttributeError:
        if name == "bfloat16" and xp.__name__ in ("array_api_compat.numpy", "array_api_compat.cupy"):
            return _bfloat16()
        raise TypeError(f"unknown dtype {dtype!r}") from None


def _bfloat16() -> np.dtype:
    try:
        import ml_dtypes
    except ImportError:
        raise TypeError("bfloat16 needs ml_dtypes: pip install ml_dtypes (cuda12 and cuda13 bring it)") from None
    return np.dtype(ml_dtypes.bfloat16)


def owns_memory(x: Array) -> bool:
    """Whether writing into `x` certainly changes no other array."""
    return getattr(x, "base", x) is None


def is_view_of(x: Array, y: Array) -> bool:
    """Whether `x` looks into the memory of `y`, as far as the library tells: NumPy and CuPy name an array's base."""
    base = getattr(x, "base", None)
    return base is not None and (base is y or base is getattr(y, "base", None))


def on_host(x: Array) -> bool:
    """Whether looking at values of `x` costs nothing: a NumPy array, not a device's."""
    return type(x) is np.ndarray


def is_cupy(x: Array) -> bool:
    return array_api_compat.is_cupy_array(x)


def device(x: Array) -> Any:
    """Where `x` lives, in the words of its library."""
    return array_api_compat.device(x)


def device_name(x: Array) -> Any:
    """What `mover` knows the place of `x` by: "cpu", "cuda:N" or the namespace of another library."""
    if on_host(x):
        return "cpu"
    return f"cuda:{x.device.id}" if is_cupy(x) else namespace(x)


def checksum(state: Mapping[str, np.ndarray]) -> int:
    """A CRC-32 of arrays and their names."""
    found = 0
    for name, array in sorted(state.items()):
        found = zlib.crc32(np.ascontiguousarray(array).tobytes(), zlib.crc32(name.encode(), found))
    return found


def on_device_of(x: Array) -> AbstractContextManager:
    """The context in which CuPy works on the device of `x`: by itself it takes the current one."""
    return x.device if array_api_compat.is_cupy_array(x) else contextlib.nullcontext()
