"""Kernels for NumPy arrays in float32, compiled by numba (the extra `jit`): loops that NumPy does not have.

numba compiles them when they are needed for the first time, for the processor that it finds, and keeps the code in its
cache: NUMBA_CACHE_DIR, else beside the source, else in the user's cache directory. TINYVIT_JIT=0 leaves them out.
"""

from __future__ import annotations

import contextlib
import contextvars
import ctypes
import functools
import importlib
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

FEW = 32  # images: loading numba takes half a second and 110 MB, more than it saves on fewer

_few: contextvars.ContextVar[bool] = contextvars.ContextVar("tinyvit_few_images", default=False)


def wanted(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether these kernels are to be used: numba is installed, and the environment does not say TINYVIT_JIT=0."""
    return not refused("TINYVIT_JIT", environment) and _installed()


def refused(variable: str, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether a variable of the environment says no."""
    return environment.get(variable, "").strip().lower() in ("0", "false", "no", "n", "off")


def missing(environment: Mapping[str, str] = os.environ) -> str:
    """What these kernels lack, with the cure; "" if they are wanted."""
    if wanted(environment):
        return ""
    return "numba's kernels (unset TINYVIT_JIT)" if _installed() else 'numba 0.62 or newer (pip install "tinyvit[jit]")'


@functools.cache
def _installed() -> bool:
    """Whether there is a numba of 0.62 or newer: the LLVM of older ones ends the process at `compiling.maximum`."""
    try:
        version = importlib.metadata.version("numba")
    except importlib.metadata.PackageNotFoundError:
        return False
    found = re.match(r"(\d+)\.(\d+)", version)
    new_enough = found is None or tuple(map(int, found.groups())) >= (0, 62)  # None: built from source
    if not new_enough:
        cure = 'expected 0.62 or newer: pip install "tinyvit[jit]"'
        warnings.warn(f"NumPy's kernels run, for numba {version} is too old, {cure}", stacklevel=2)
    return new_enough


@functools.cache
def has(feature: str) -> bool:
    """Whether the processor has a feature, by LLVM's name, and numba is not told to compile for another one."""
    if any(name in os.environ for name in ("NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES", "NUMBA_ENABLE_AVX")):
        return False
    try:
        from llvmlite import binding

        return bool(binding.get_host_cpu_features().get(feature)) or feature in _arm_features()
    except (ImportError, RuntimeError, OSError):  # a processor that LLVM does not know, a system that hides its own
        return False


def processor_name() -> str:
    """As LLVM has it: "znver4"."""
    from llvmlite import binding

    return binding.get_host_cpu_name()


@functools.cache
def _arm_features() -> set[str]:
    """Those of bf16 and i8mm that an ARM processor has, of which LLVM says nothing."""
    if platform.machine() not in ("aarch64", "arm64"):
        return set()
    names = {"bf16": "hw.optional.arm.FEAT_BF16", "i8mm": "hw.optional.arm.FEAT_I8MM"}
    if sys.platform == "darwin":
        said = subprocess.run(["sysctl", *names.values()], capture_output=True, text=True).stdout
        return {name for name, key in names.items() if f"{key}: 1" in said}
    return names.keys() & Path("/proc/cpuinfo").read_text().split()


@functools.cache
def dot_instructions() -> str:
    """The instructions for sums of products of 16 and 8 bits, or of 8 alone, or "".

    "amx", "arm" (both), "avx512" (both or 8), "avxvnni", "avx2" (8).
    """
    on_linux = (sys.platform, platform.machine()) == ("linux", "x86_64")
    if on_linux and all(has(feature) for feature in ("amx-bf16", "amx-int8", "avx512bf16")):
        # Not AVX-512's: numba, which knows the processor alone, could find the code of the other kind in its cache.
        return "amx" if _tiles_permitted() else ""
    if has("avx512vnni"):
        return "avx512"
    if has("bf16") and has("i8mm"):
        return "arm"
    return next((kind for kind in ("avxvnni", "avx2") if has(kind)), "")


def _tiles_permitted() -> bool:
    """Whether Linux lets this process use AMX's tiles: it wants to be asked, and may refuse."""
    number, request, tile_data = 158, 0x1023, 18  # arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return ctypes.CDLL(None).syscall(number, request, tile_data) == 0


def compiles(module: str) -> bool:
    """Whether the kernels of a module can be compiled: numba takes a while to follow NumPy."""
    try:
        importlib.import_module(module)
    except ImportError:
        return False
    return True


@contextlib.contextmanager
def worth_it_for(images: int) -> Iterator[None]:
    """Within this context, which computes so many images in all, these kernels are left out below FEW."""
    token = _few.set(images < FEW)
    try:
        yield
    finally:
        _few.reset(token)


def worth_it() -> bool:
    """Whether no context says that there are too few images for these kernels."""
    return not _few.get()
