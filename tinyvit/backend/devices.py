"""Devices: moving arrays to them, and what is missing where a GPU cannot be used."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np

from tinyvit.backend import arrays
from tinyvit.backend.arrays import Array, astype, dtype_name, is_cupy, is_floating, namespace, to_numpy
from tinyvit.errors import ReportedError
from tinyvit.files.text import one_line


class DeviceError(ReportedError, RuntimeError):
    """A device that cannot be used."""


def pick_device(name: str) -> str:
    """ "cpu", "cuda" or "cuda:N" for the same or "auto", which takes a GPU where one works. Raises DeviceError."""
    if name == "cpu":
        return "cpu"
    device = "cuda" if name == "auto" else name
    try:
        probe = mover(device)(np.ones((2, 2), np.float32))
        with arrays.on_device_of(probe):
            # cuBLAS (which 1 x 1 does not need), CUDA's headers and its compiler must be there for this.
            float((probe + probe @ probe)[0, 0])
        if arrays.is_cupy(probe):
            probe.device.use()  # a command uses one GPU
        return device
    except Exception as error:  # a driver or GPU is missed in many ways, and CuPy's errors have no names without CuPy
        if name == "auto":
            return "cpu"
        raise DeviceError(f"no GPU can be used: {one_line(error)}") from None


def mover(target: Any) -> Callable[[Array], Array]:
    """The function that takes an array to `target`.

    Args:
        target: "cpu" (NumPy), "cuda" or "cuda:1" (CuPy), an array-API namespace module, or a floating dtype,
            which leaves arrays of whole numbers as they are.

    Raises:
        DeviceError: CuPy, its driver or a GPU is missing.
        ValueError: none of those.
    """
    if target == "cpu":
        return to_numpy
    if isinstance(target, str) and target.split(":")[0] == "cuda":
        return _to_cuda(target)
    if isinstance(target, ModuleType):
        return lambda x: x if namespace(x) is target else target.asarray(to_numpy(x))
    if dtype_name(target) not in ("float16", "float32", "float64", "bfloat16"):
        raise ValueError(
            f'expected "cpu", "cuda", "cuda:N", an array-API namespace or a floating dtype, got {target!r}'
        )
    return lambda x: astype(x, target) if is_floating(x) else x


def free_memory(device: Any) -> float:
    """Bytes that are free on a device, named as for `mover`; infinite where its library does not tell."""
    if not (isinstance(device, str) and device.startswith("cuda")):
        return math.inf
    gpu_count(device)  # says what is missing, if anything is
    import cupy

    with cupy.cuda.Device(_number(device)):
        return cupy.cuda.runtime.memGetInfo()[0]


def _number(target: str) -> int:
    """The GPU that "cuda" or "cuda:N" names."""
    number = target.partition(":")[2] if ":" in target else "0"
    if not number.isdecimal():
        raise ValueError(f'expected "cuda" or "cuda:N", got {target!r}')
    return int(number)


def _to_cuda(target: str) -> Callable[[Array], Array]:
    number = _number(target)
    count = gpu_count(f"device {target}")
    if number >= count:
        there = "is one GPU, cuda:0" if count == 1 else f"are {count} GPUs, cuda:0 to cuda:{count - 1}"
        raise DeviceError(f"device {target} does not exist: there {there}")
    import cupy

    def move(x: Array) -> Array:
        with cupy.cuda.Device(number):
            return cupy.asarray(x if is_cupy(x) else to_numpy(x))

    return move


def gpu_count(wanted: str) -> int:
    """How many GPUs CuPy finds, at least one. Raises DeviceError: why `wanted` cannot be had, in one line."""
    bring = 'pip install "tinyvit[cuda12]" or "tinyvit[cuda13]"'
    try:
        import cupy
    except ModuleNotFoundError as error:
        if error.name != "cupy":
            raise DeviceError(f"{wanted} needs CuPy, which misses {error.name}: {bring}") from None
        raise DeviceError(f"{wanted} needs CuPy: {bring} (the CUDA version of the driver)") from None
    except Exception as error:  # CuPy is installed, but not what it is built for
        raise DeviceError(f"{wanted} needs CuPy, which cannot be imported ({one_line(error)}): {bring}") from None
    runtime = cupy.cuda.runtime
    try:
        count = runtime.getDeviceCount()
    except runtime.CUDARuntimeError as error:
        driver, needed = runtime.driverGetVersion(), runtime.runtimeGetVersion()
        if not driver:
            problem = f"there is no NVIDIA driver ({one_line(error)})"
        elif driver // 1000 < needed // 1000:
            known, made_for = cuda_version(driver), cuda_version(needed)
            problem = f"the driver knows CUDA {known}, CuPy is made for {made_for}: {bring}, whichever fits"
        else:
            problem = f"CuPy finds no GPU ({one_line(error)})"
        raise DeviceError(f"{wanted} cannot be used: {problem}") from None
    if not count:
        raise DeviceError(f"{wanted} cannot be used: the driver finds no GPU")
    return count


def cuda_version(number: int) -> str:
    """12090 -> "12.9"."""
    return f"{number // 1000}.{number % 1000 // 10}"


def describe_gpu(number: int) -> str:
    """The name, memory and compute capability of a GPU."""
    import cupy

    gpu = cupy.cuda.runtime.getDeviceProperties(number)
    return f"{gpu['name'].decode()}, {gpu['totalGlobalMem'] / 2**30:.0f} GiB, {gpu['major']}.{gpu['minor']}"


def describe_device(x: Any) -> str:
    """The device of the array `x`: "cpu", a GPU as `describe_gpu` has it, or another library's name."""
    name = arrays.device_name(x)
    if arrays.is_cupy(x):
        return f"{name} {describe_gpu(x.device.id)}"
    return name if isinstance(name, str) else name.__name__


def describe_gpus() -> list[str]:
    """Each GPU, as `describe_gpu` has it, or the reason why there is none."""
    try:
        count = gpu_count("a GPU")
    except RuntimeError as error:
        return [f"none ({error})"]
    return [f"cuda:{i} {describe_gpu(i)}" for i in range(count)]


def cuda_versions() -> dict[str, str | None]:
    """The newest CUDA version that the driver knows, and the one that CuPy uses; empty without CuPy."""
    try:
        from cupy.cuda import runtime

        numbers = {"CUDA of the driver": runtime.driverGetVersion(), "CUDA of CuPy": runtime.runtimeGetVersion()}
    except Exception:  # CuPy is not installed, or broken, as the line about the GPU says
        return {}
    return {name: cuda_version(number) if number else None for name, number in numbers.items()}
