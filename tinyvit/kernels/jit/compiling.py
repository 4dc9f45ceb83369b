"""What compiles the loops, and what they call that Python does not have."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from llvmlite import ir
from numba import boolean, config, float32, int32, int64, njit, types, void
from numba.core import event
from numba.core.caching import _CacheLocator
from numba.extending import intrinsic
from numba.misc.appdirs import AppDirs

from tinyvit.distributed.launch import launched

# mypy: disable-error-code="no-untyped-def, attr-defined"


def _forget_older(directories: Sequence[Path]) -> None:
    """Remove the indices in numba's caches of these directories that are older than one of their source files.

    numba itself looks only at the file of the cached function, not at those of what it calls.
    """
    newest = max(file.stat().st_mtime for directory in directories for file in directory.glob("*.py"))
    roots = [Path(root) for root in (config.CACHE_DIR, AppDirs("numba", appauthor=False).user_cache_dir) if root]
    for directory in directories:
        place = _CacheLocator.get_suitable_cache_subpath(str(directory / "any.py"))
        for cache in (directory / "__pycache__", *(root / place for root in roots)):
            for index in cache.glob("*.nbi"):
                with contextlib.suppress(OSError):  # another process removes it, too, or none may
                    if index.stat().st_mtime < newest:
                        index.unlink()


_forget_older([Path(__file__).parents[1] / name for name in ("jit", "bf16", "int8")])


class _Announce(event.Listener):
    """Says once that loops are compiled, when numba does not find them in its cache."""

    said = launched()[2] > 0  # the first process says it

    def on_start(self, event: event.Event) -> None:
        if not self.said:
            print(
                "tinyvit: compiling loops for this processor and precision, once: 10 to 30 seconds",
                file=sys.stderr,
                flush=True,
            )
        self.said = True

    def on_end(self, event: event.Event) -> None:
        pass


def read(ndim: int) -> types.Array:
    """A float32 array that is only read."""
    return types.Array(float32, ndim, "C", readonly=True)


def written(ndim: int) -> types.Array:
    return types.Array(float32, ndim, "C")


def compiled(
    *arguments: types.Type, result: types.Type = void, reorder: bool = False, inline: bool = False
) -> Callable:
    """Compile a function for these arguments, or take it from the cache.

    `reorder` lets LLVM add up sums in another order, `inline` puts the function into those that call it.
    """
    options: dict[str, Any] = dict(nogil=True, error_model="numpy", forceinline=inline)
    options["fastmath"] = {"contract", "reassoc", "nsz"} if reorder else {"contract"}

    def wrap(function: Callable) -> Any:
        with event.install_listener("numba:compile", _announce):
            try:
                return njit(result(*arguments), cache=True, **options)(function)
            except RuntimeError:  # numba finds no directory that it may write to
                return njit(result(*arguments), **options)(function)

    return wrap


_announce = _Announce()


@compiled(int64, result=written(1))
def aligned(size):
    """Room for so many numbers, aligned to cache lines of 64 bytes: loads of that size are twice as fast then."""
    room = np.empty(size + 16, np.float32)
    skip = -(room.ctypes.data // 4) & 15
    return room[skip : skip + size]


# --- what LLVM has and Python has not ---------------------------------------------------------------------------------


@intrinsic
def widest(typing):
    """Lets LLVM use registers of 512 bits in the function that calls this: on Intel's processors it stops at 256."""

    def generate(context, builder, signature, args):
        # llvmlite's own `add` knows only attributes without a value.
        set.add(builder.function.attributes, '"prefer-vector-width"="512"')
        return context.get_dummy_value()

    return void(), generate


@intrinsic
def float_of_bits(typing, bits):
    return float32(int32), lambda context, builder, signature, args: builder.bitcast(args[0], ir.FloatType())


@intrinsic
def bits_of_float(typing, x):
    return int32(float32), lambda context, builder, signature, args: builder.bitcast(args[0], ir.IntType(32))


def _binary(name: str) -> Any:
    """LLVM's intrinsic function of this name, of two float32 numbers."""

    @intrinsic
    def function(typing, x, y):
        def generate(context, builder, signature, args):
            real = ir.FloatType()
            declared = builder.module.declare_intrinsic(name, [real], ir.FunctionType(real, [real, real]))
            return builder.call(declared, args)

        return float32(float32, float32), generate

    return function


maximum, copysign = _binary("llvm.maximum"), _binary("llvm.copysign")  # of NaN and x: NaN


@intrinsic
def product(typing, address, transpose_a, transpose_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc):
    """The `cblas_sgemm` with 64-bit sizes at `address`, row by row; matrices are the addresses of their first entry."""
    signature = void(int64, boolean, boolean, *(int64,) * 3, float32, *(int64,) * 4, float32, int64, int64)

    def generate(context, builder, signature, args):
        enum, size, real = ir.IntType(32), ir.IntType(64), ir.FloatType()
        takes = [enum, enum, enum, size, size, size, real, size, size, size, size, real, size, size]
        function = builder.inttoptr(args[0], ir.FunctionType(ir.VoidType(), takes).as_pointer())
        transpose = [builder.select(x, enum(112), enum(111)) for x in args[1:3]]  # CblasTrans, CblasNoTrans
        builder.call(function, [enum(101), *transpose, *args[3:]])  # CblasRowMajor
        return context.get_dummy_value()

    return signature, generate
