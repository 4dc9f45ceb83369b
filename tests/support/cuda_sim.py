"""Runs the sources of the CUDA kernels on the CPU, through their own Python wrappers, with NumPy arrays for CuPy's.

Arrays that the wrappers allocate are full of NaN, so that an entry that no kernel writes is noticed. They, and those
that `guarded` makes, lie between margins of NaN. A read beyond an array makes the result NaN; `check_margins` finds a
write there.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import math
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import array_api_compat.numpy as numpy_namespace
import numpy as np

from tinyvit import kernels
from tinyvit.backend import cuda_graph
from tinyvit.kernels import cuda
from tinyvit.kernels.cuda import cublas

SHIM = Path(__file__).parent / "cuda_shim"
COMPILER = shutil.which(os.environ.get("CXX", "g++")) if os.name == "posix" else None
MARGIN = 1 << 16  # bytes before and after an array: several rows of it
SCALARS = {"float": np.dtype(np.float32), "f16": np.dtype(np.float16), "bf16": np.dtype(np.uint16)}  # bf16: its bits

_margins: list[np.ndarray] = []
allocate: Callable[[int], np.ndarray] | None = None  # stands for CuPy's allocator: gives bytes; None for fresh ones
launch: Callable[[Callable[[], None]], None] = lambda work: work()  # what becomes of a kernel's launch


# --- numbers --------------------------------------------------------------------------------------------------------


def encode(x: np.ndarray, scalar: str) -> np.ndarray:
    """float64 numbers as the device's, rounded to nearest even."""
    if scalar != "bf16":
        return x.astype(SCALARS[scalar])
    bits = x.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def decode(x: np.ndarray) -> np.ndarray:
    """The device's numbers in float64."""
    if x.dtype != np.uint16:
        return x.astype(np.float64)
    return (x.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def error(actual: np.ndarray, expected: np.ndarray) -> float:
    """|actual - expected| / |expected|, infinite where there is a NaN."""
    assert actual.shape == expected.shape
    difference = np.linalg.norm(actual - expected) / max(np.linalg.norm(expected), 1e-30)
    return math.inf if np.isnan(difference) else float(difference)


# --- arrays ---------------------------------------------------------------------------------------------------------


def empty(shape: Sequence[int] | int, dtype: Any) -> np.ndarray:
    """An array of NaN (or -1) between margins of the same; a stand-in's arrays are as it gives them."""
    dtype = np.dtype(dtype)
    size = int(np.prod(shape)) * dtype.itemsize
    if allocate is not None:
        return allocate(size).view(dtype).reshape(shape)
    memory = np.full(size + 2 * MARGIN + 16, 0xFF, np.uint8)
    start = MARGIN - memory.ctypes.data % 16
    _margins.extend([memory[:start], memory[start + size :]])
    return memory[start : start + size].view(dtype).reshape(shape)


def guarded(x: np.ndarray) -> np.ndarray:
    """A copy between margins."""
    y = empty(x.shape, x.dtype)
    y[...] = x
    return y


def check_margins() -> None:
    assert all((margin == 0xFF).all() for margin in _margins), "a kernel wrote beyond an array"


class Namespace:
    """NumPy, with `empty` as above."""

    empty = staticmethod(empty)

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)


# --- kernels --------------------------------------------------------------------------------------------------------


class Kernel:
    """Called as CuPy's kernels are."""

    def __init__(self, library: ctypes.CDLL, name: str) -> None:
        self._name = name
        self._run = getattr(library, f"run_{name}")
        self._run.restype = ctypes.c_char_p
        sizes = (ctypes.c_int * 64)()
        self._sizes = sizes[: getattr(library, f"parameters_{name}")(sizes)]
        self.seed = 0

    def __call__(self, grid: tuple, block: tuple, arguments: tuple, shared_mem: int = 0) -> None:
        assert min(grid) > 0 and max(grid[1:], default=1) < 65536, f"a grid of {grid}"
        assert shared_mem <= cuda.shared_limit(), f"{shared_mem} bytes of shared memory"
        cells = []
        for argument, size in zip(arguments, self._sizes, strict=True):
            if isinstance(argument, np.ndarray) and argument.dtype.fields:  # a structure goes by value
                argument = argument[()]
            elif isinstance(argument, np.ndarray):
                assert argument.flags.c_contiguous, f"{self._name} got an array that is not contiguous"
                argument = np.uint64(argument.ctypes.data)
            assert isinstance(argument, np.generic), f"{self._name} got {argument!r}: CuPy would guess its type"
            assert argument.dtype.itemsize == size, f"{self._name} expects {size} bytes, got {argument.dtype}"
            cells.append(np.array([argument]))
        pointers = (ctypes.c_void_p * len(cells))(*(cell.ctypes.data for cell in cells))
        threes = [(ctypes.c_uint * 3)(*(*size, 1, 1)[:3]) for size in (grid, block)]
        launch(functools.partial(self._launch, threes, shared_mem, cells, pointers))

    def _launch(self, threes: list, shared_mem: int, cells: list[np.ndarray], pointers: ctypes.Array) -> None:
        """With arguments that lie in `cells`, at these addresses."""
        message = self._run(*threes, ctypes.c_size_t(shared_mem), pointers, ctypes.c_uint64(_seed))
        if message:
            raise RuntimeError(f"{self._name}: {message.decode()}")


def _upload(to: np.ndarray, values: np.ndarray) -> None:
    """As CuPy's `ndarray.set` does it, which casts and broadcasts nothing."""
    assert to.dtype == values.dtype, f"{values.dtype} array cannot be set to {to.dtype} array"
    assert to.shape == values.shape, f"shape mismatch: {values.shape} cannot be set to {to.shape}"
    assert to.flags.c_contiguous, "cannot set to a non-contiguous array"
    work = functools.partial(np.copyto, to, values)
    if cuda_graph.capturing():
        cuda_graph.after_capture(work)
    else:
        work()


_seed = 0


@contextlib.contextmanager
def device(
    folder: Path,
    seed: int = 0,
    shared_limit: int = 163 << 10,
    multiprocessors: int = 3,
    capability: int = 80,
    compiler: tuple[int, int] = (13, 0),
    library: Any = None,
) -> Iterator[Namespace]:
    """Within this context the wrappers of CuPy's kernels work on NumPy arrays.

    Args:
        folder: where compiled kernels are kept.
        seed: shuffles the order of threads; 0 for none.
        shared_limit, multiprocessors, capability: the device's.
        compiler: NVIDIA's run-time compiler's version.
        library: stands for cuBLASLt; None for a machine without it.
    """
    global _seed
    ready = cuda.ready
    names = {dtype.name: scalar for scalar, dtype in SCALARS.items()}
    stand_ins = {
        "kernel": lambda file, name, **constants: _kernel(folder, file, name, tuple(constants.items())),
        "scalar": lambda dtype: names.get(np.dtype(dtype).name),
        "address": lambda x: x.ctypes.data,
        "shared_limit": lambda: shared_limit,
        "multiprocessors": lambda: multiprocessors,
        "capability": lambda: capability,
        "compiler": lambda: compiler,
        "ready": lambda x: ready(np.asarray(x)),  # NumPy makes scalars of arrays without dimensions
        "upload": _upload,
        "device": lambda: 0,
        "device_name": lambda: "NVIDIA Simulation",
        "stream": lambda: 0,
    }
    before = {name: getattr(cuda, name) for name in stand_ins} | {"library": cublas.library, "missing": cublas.missing}
    _seed = seed
    for name, value in stand_ins.items():
        setattr(cuda, name, value)
    cublas.library = lambda: library
    cublas.missing = lambda: "no library" if library is None else None
    try:
        yield Namespace()
        check_margins()
    finally:
        _margins.clear()
        cublas.library, cublas.missing = before.pop("library"), before.pop("missing")
        for name, value in before.items():
            setattr(cuda, name, value)
        cublas._plans.clear()
        cublas._handle.cache_clear()
        cublas._workspaces.clear()


@contextlib.contextmanager
def everything_on_device(folder: Path, **machine: Any) -> Iterator[None]:
    """Within this context whole models of NumPy arrays run on the CUDA kernels (for what `device` takes)."""
    before = kernels._NUMPY, kernels._CUPY
    kernels._NUMPY, kernels._CUPY = "", numpy_namespace.__name__
    try:
        with device(folder, **machine):
            _forget_kernels()
            yield
    finally:
        kernels._NUMPY, kernels._CUPY = before
        _forget_kernels()


def cuda_version(op: Callable) -> Callable:
    """What runs for a reference operation on CuPy arrays: its CUDA kernel, or the reference where that covers less."""
    return kernels._where_covered(op, importlib.import_module("tinyvit.kernels.cuda.table").KERNELS[op])


def _forget_kernels() -> None:
    kernels._fastest.cache_clear()


@functools.cache
def _kernel(folder: Path, file: str, name: str, constants: tuple[tuple[str, Any], ...]) -> Kernel:
    return Kernel(ctypes.CDLL(str(build(folder, file, constants))), name)


def kernel_names(source: str) -> list[str]:
    """The kernels that a CUDA source defines."""
    return re.findall(r"__global__ void\s+(?:__launch_bounds__\([^)]*\)\s+)?(\w+)\(", source)


def build(folder: Path, file: str, constants: tuple[tuple[str, Any], ...]) -> Path:
    """FILE.cu compiled for the CPU."""
    names = kernel_names((cuda.FOLDER / f"{file}.cu").read_text())
    main = "".join(f"#define {key} {value}\n" for key, value in constants) + f'#include "{file}.cu"\n'
    main += "".join(f"EXPORT({name})\n" for name in names)
    shim = _compile(folder / "shim.o", (SHIM / "shim.cpp").read_text(), "-O2", "-c")
    headers = folder / "headers.h"  # compiled once, for they take half of the time
    _compile(folder / "headers.h.gch", '#include "export.h"\n', "-Og", "-x", "c++-header")
    label = "-".join([file, *(f"{key}={value}" for key, value in constants)])
    return _compile(folder / f"{label}.so", main, "-Og", "-include", str(headers), "-shared", str(shim))


def _compile(result: Path, source: str, *options: str) -> Path:
    """Compile `source` into `result`, unless that was done before, by this process or another one."""
    import fcntl

    with open(result.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not result.exists():
            main = result.with_suffix(".cpp")
            main.write_text(source)
            flags = ["-std=c++17", "-fPIC", "-Wall", "-Werror", "-Wno-unknown-pragmas", "-DTINYVIT_CPU"]
            command = [COMPILER, *flags, f"-I{SHIM}", f"-I{cuda.FOLDER}"]
            scratch = result.with_suffix(".part")
            subprocess.run([*command, *options, str(main), "-o", str(scratch)], check=True)
            os.replace(scratch, result)
    return result
