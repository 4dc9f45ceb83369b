"""The CUDA kernels beside this file, compiled and loaded by CuPy when they are first needed."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tinyvit.backend import arrays, cuda_graph
from tinyvit.backend.arrays import Array

FOLDER = Path(__file__).parent
NULL = np.uint64(0)  # a pointer to nothing, as a kernel's argument
# CuPy adds -ftz=true, -arch=… and --device-as-default-execution-space; before CUDA 12.9 none may be given twice.
OPTIONS = ("-std=c++17",)
_SCALARS = {"float32": "float", "float16": "f16", "bfloat16": "bf16"}


def scalar(dtype: Any) -> str | None:
    """The kernels' name of a dtype; None if they do not know it, or the device is older than compute capability 8.0."""
    return _SCALARS.get(arrays.dtype_name(dtype)) if capability() >= 80 else None


def covers(x: Array, other: Array | None = None, *_: Any, **__: Any) -> bool:
    """Whether the kernels know the dtype of `x`, and neither array is empty."""
    return bool(scalar(x.dtype) and x.size and (other is None or other.size))


def address(x: Array) -> int:
    """Where the array's first element lies in the device's memory."""
    return x.data.ptr


def ready(x: Array) -> Array:
    """`x` as the kernels read it: C order, from a 16-byte boundary on."""
    return x if is_ready(x) else x.copy()


def is_ready(x: Array) -> bool:
    return x.flags.c_contiguous and address(x) % 16 == 0


def lasting(xp: Any, nbytes: int) -> Array:
    """Bytes outside of the memory of a graph that is being captured, for values that come from the host.

    An array in the graph's own memory would be written over by each replay. The caller keeps this one alive as long
    as the graph, as `upload` does.
    """
    if not cuda_graph.capturing():
        return xp.empty(nbytes, dtype=xp.uint8)
    import cupy

    with cupy.cuda.using_allocator(cupy.get_default_memory_pool().malloc):
        return xp.empty(nbytes, dtype=xp.uint8)


def upload(to: Array, values: np.ndarray) -> None:
    """Copy host numbers into a device array, in the order of the stream and without waiting.

    While a graph is captured, the copy runs after the capture, since a captured copy would be repeated with each
    replay. The graph keeps the array alive.
    """
    if cuda_graph.capturing():
        cuda_graph.after_capture(lambda: to.set(values))
    else:
        to.set(values)


def kernel(file: str, name: str, **constants: Any) -> Callable:
    """The kernel `name` of FILE.cu on the current device, compiled with these constants.

    A file whose name ends with `_sm90a` is compiled for that architecture, which is Hopper's alone.
    It is called with grid, block (tuples), arguments (arrays and NumPy scalars) and `shared_mem`, in bytes.
    """
    return _kernel(device(), file, name, tuple(constants.items()))


def cache_file(name: str) -> Path:
    """A file beside CuPy's compiled kernels."""
    return Path(os.environ.get("CUPY_CACHE_DIR") or os.path.expanduser("~/.cupy/kernel_cache")) / name


def capability() -> int:
    """The current device's compute capability, 90 for 9.0."""
    return _facts(device()).capability


def compiler() -> tuple[int, int]:
    """The version of NVIDIA's run-time compiler that CuPy uses, (12, 9) for 12.9."""
    import cupy

    return cupy.cuda.nvrtc.getVersion()


def shared_limit() -> int:
    """Bytes of shared memory that one block may have on the current device."""
    return _facts(device()).shared_limit


def blocks_that_fit(shared: int) -> int:
    """How many blocks with so many bytes of shared memory a multiprocessor has room for: each takes another 1024."""
    return (shared_limit() + 1024) // (shared + 1024)


def multiprocessors() -> int:
    return _facts(device()).multiprocessors


def device_name() -> str:
    """The current device's name, such as "NVIDIA H200"."""
    import cupy

    return cupy.cuda.runtime.getDeviceProperties(device())["name"].decode()


def device() -> int:
    """The current device's number."""
    import cupy

    return cupy.cuda.runtime.getDevice()


def stream() -> int:
    """The current stream, as NVIDIA's libraries take it."""
    import cupy

    return cupy.cuda.get_current_stream().ptr


class _Facts(NamedTuple):
    capability: int
    shared_limit: int
    multiprocessors: int


@functools.cache
def _facts(number: int) -> _Facts:
    import cupy

    gpu = cupy.cuda.Device(number)
    attributes = gpu.attributes
    return _Facts(
        int(gpu.compute_capability), attributes["MaxSharedMemoryPerBlockOptin"], attributes["MultiProcessorCount"]
    )


@functools.cache
def _kernel(device: int, file: str, name: str, constants: tuple[tuple[str, Any], ...]) -> Callable:
    function = _module(device, file, constants).get_function(name)
    function.max_dynamic_shared_size_bytes = _facts(device).shared_limit - function.shared_size_bytes
    return function


@functools.cache
def _module(device: int, file: str, constants: tuple[tuple[str, Any], ...]) -> Any:
    import cupy

    options = [*OPTIONS, *(f"-D{key}={value}" for key, value in constants)]
    if file.endswith("_sm90a"):
        options.append("-arch=sm_90a")
    return cupy.RawModule(code=source(file), options=tuple(options))


@functools.cache
def source(file: str) -> str:
    """The text of FILE.cu with its headers inlined, once each: CuPy's disk cache does not look into included files."""
    text, inlined = (FOLDER / f"{file}.cu").read_text(), set()
    while found := re.search(r'#include "(\w+\.cuh)"', text):
        header = "" if found[1] in inlined else (FOLDER / found[1]).read_text().replace("#pragma once", "")
        inlined.add(found[1])
        text = text.replace(found[0], header, 1)
    return text
