"""cuBLASLt on the CPU, as documented: raw pointers, descriptions set byte by byte, Fortran order.

`CuBLASLt` stands for the module `nvmath.bindings.cublasLt`. It computes in float64, rounds once, and refuses what
NVIDIA's library refuses: layouts that do not fit each other, leading dimensions too small, pointers not aligned.
"""

from __future__ import annotations

import ctypes
import enum
import itertools
import math
from typing import Any

import cuda_sim
import numpy as np
from cuda_sim import decode, encode


class Epilogue(enum.IntEnum):
    DEFAULT = 1
    BIAS = 4
    GELU_BIAS = 36
    GELU_AUX_BIAS = 164


class MatmulDescAttribute(enum.IntEnum):
    TRANSA = 3
    TRANSB = 4
    EPILOGUE = 7
    BIAS_POINTER = 8
    EPILOGUE_AUX_POINTER = 11
    EPILOGUE_AUX_LD = 12


class MatmulPreferenceAttribute(enum.IntEnum):
    MAX_WORKSPACE_BYTES = 1
    REDUCTION_SCHEME_MASK = 3
    MIN_ALIGNMENT_A_BYTES = 5
    MIN_ALIGNMENT_B_BYTES = 6
    MIN_ALIGNMENT_C_BYTES = 7
    MIN_ALIGNMENT_D_BYTES = 8


class MatrixLayoutAttribute(enum.IntEnum):
    BATCH_COUNT = 5
    STRIDED_BATCH_OFFSET = 6


EIGHT_BYTES = (
    "BIAS_POINTER",
    "EPILOGUE_AUX_POINTER",
    "EPILOGUE_AUX_LD",
    "MAX_WORKSPACE_BYTES",
    "STRIDED_BATCH_OFFSET",
)  # cublasLt.h
SCALARS = {0: "float", 2: "f16", 14: "bf16"}  # cudaDataType_t
ITEMSIZE = {"float": 4, "f16": 2, "bf16": 2}
ALGORITHMS = (7, 8, 9)


class cuBLASLtError(Exception):
    pass


class HeuristicResult:
    """Room for algorithms, 96 bytes each."""

    def __init__(self, size: int) -> None:
        self._memory = np.zeros(96 * size, np.uint8)
        self.ptr = self._memory.ctypes.data


class CuBLASLt:
    """Args:
    without: epilogues for which there is no algorithm.
    refused: epilogues whose algorithm is offered and then refused.
    alignment: the largest MIN_ALIGNMENT_*_BYTES for which there are algorithms.

    Algorithms are numbers, 64 times in a row; three are offered. `unknown` are those that it does not take.
    """

    Epilogue, MatmulDescAttribute, MatmulPreferenceAttribute = Epilogue, MatmulDescAttribute, MatmulPreferenceAttribute
    MatrixLayoutAttribute = MatrixLayoutAttribute
    MatmulHeuristicResult, cuBLASLtError = HeuristicResult, cuBLASLtError

    version, unknown = 130100, ()

    def __init__(self, without: tuple[str, ...] = (), refused: tuple[str, ...] = (), alignment: int = 16) -> None:
        self._without, self._refused, self._alignment = without, refused, alignment
        self._numbers = itertools.count(1000)
        self._objects: dict[Any, Any] = {}
        self.calls: list[str] = []  # the epilogue of each product
        self.algorithms: list[int] = []  # and its algorithm

    def get_version(self) -> int:
        return self.version

    def _new(self, value: Any) -> int:
        number = next(self._numbers)
        self._objects[number] = value
        return number

    def create(self) -> int:
        return self._new("handle")

    def matmul_desc_create(self, compute_type: int, scale_type: int) -> int:
        assert compute_type in (68, 77) and scale_type == 0
        return self._new({})

    def matmul_preference_create(self) -> int:
        return self._new({})

    def matmul_preference_destroy(self, preference: int) -> None:
        del self._objects[preference]

    def _set(self, target: Any, attribute: enum.IntEnum, pointer: int, size: int) -> None:
        assert size == (8 if attribute.name in EIGHT_BYTES else 4), attribute
        self._objects[target][attribute] = int.from_bytes(ctypes.string_at(pointer, size), "little", signed=True)

    def matmul_desc_set_attribute(self, target: int, attribute: int, pointer: int, size: int) -> None:
        self._set(target, MatmulDescAttribute(attribute), pointer, size)

    def matmul_preference_set_attribute(self, target: int, attribute: int, pointer: int, size: int) -> None:
        self._set(target, MatmulPreferenceAttribute(attribute), pointer, size)

    def matrix_layout_create(self, kind: int, rows: int, columns: int, leading: int) -> int:
        assert rows > 0 and columns > 0 and leading >= rows
        layout = self._new((SCALARS[kind], rows, columns, leading))
        self._objects["batch", layout] = {}
        return layout

    def matrix_layout_set_attribute(self, target: int, attribute: int, pointer: int, size: int) -> None:
        self._set(("batch", target), MatrixLayoutAttribute(attribute), pointer, size)

    def matmul_algo_get_heuristic(
        self, handle: int, description: int, a: int, b: int, c: int, d: int, preference: int, wanted: int, results: int,
        count: int,
    ) -> None:  # fmt: skip
        assert self._objects[handle] == "handle" and wanted >= 1 and c == d
        settings = self._objects[description]
        self._check_shapes(settings, a, b, d)
        epilogue, rows = Epilogue(settings[MatmulDescAttribute.EPILOGUE]).name, self._objects[d][1]
        if epilogue in self._without or ("AUX" in epilogue and rows % 8):
            raise cuBLASLtError("NOT_SUPPORTED")
        limits = self._objects[preference]
        (alignment,) = {limits[MatmulPreferenceAttribute[f"MIN_ALIGNMENT_{x}_BYTES"]] for x in "ABCD"}
        assert alignment in (16, ITEMSIZE[self._objects[d][0]])
        if alignment > self._alignment:
            return
        offered = ALGORITHMS[:wanted]
        for i, algorithm in enumerate(offered):
            ctypes.memset(results + 96 * i, algorithm, 96)
        ctypes.memmove(count, ctypes.byref(ctypes.c_int(len(offered))), 4)

    def matmul_algo_check(
        self, handle: int, description: int, a: int, b: int, c: int, d: int, algorithm: int, result: int
    ) -> None:
        assert self._objects[handle] == "handle" and c == d
        self._check_shapes(self._objects[description], a, b, d)
        self._algorithm(algorithm)
        ctypes.memset(result, 0, 96)

    def _algorithm(self, pointer: int) -> int:
        (number,) = set(ctypes.string_at(pointer, 64))
        if number not in ALGORITHMS or number in self.unknown:
            raise cuBLASLtError("INVALID_VALUE")
        return number

    def _check_shapes(self, settings: dict, a: int, b: int, d: int) -> None:
        (_, ra, ca, _), (_, rb, cb, _), (_, rd, cd, _) = (self._objects[x] for x in (a, b, d))
        m, k = (ca, ra) if settings[MatmulDescAttribute.TRANSA] else (ra, ca)
        inner, n = (cb, rb) if settings[MatmulDescAttribute.TRANSB] else (rb, cb)
        assert (m, n, k) == (rd, cd, inner), "the matrices do not fit each other"

    def matmul(
        self, handle: int, description: int, alpha: int, a: int, a_layout: int, b: int, b_layout: int, beta: int,
        c: int, c_layout: int, d: int, d_layout: int, algorithm: int, workspace: int, workspace_size: int, stream: int,
    ) -> None:  # fmt: skip
        assert self._objects[handle] == "handle"
        number = self._algorithm(algorithm)
        assert all(pointer % 16 == 0 for pointer in (a, b, c, d)), "a pointer that is not aligned"
        ctypes.memset(workspace, 0xFF, workspace_size)
        settings, numbers = dict(self._objects[description]), (_float(alpha), _float(beta))
        self._check_shapes(settings, a_layout, b_layout, d_layout)
        batches = [self._objects["batch", layout] for layout in (a_layout, b_layout, c_layout, d_layout)]
        (many,) = {batch.get(MatrixLayoutAttribute.BATCH_COUNT, 1) for batch in batches}
        itemsize = ITEMSIZE[self._objects[d_layout][0]]
        steps = [itemsize * batch.get(MatrixLayoutAttribute.STRIDED_BATCH_OFFSET, 0) for batch in batches]
        epilogue = Epilogue(settings[MatmulDescAttribute.EPILOGUE]).name
        if epilogue in self._refused:
            raise cuBLASLtError("NOT_SUPPORTED")
        self.calls.append(epilogue)
        self.algorithms.append(number)

        def work() -> None:
            for i in range(many):
                at = [pointer + i * step for pointer, step in zip((a, b, c, d), steps, strict=True)]
                self._multiply(settings, *numbers, *at, a_layout, b_layout, d_layout)

        cuda_sim.launch(work)

    def _multiply(
        self, settings: dict, alpha: float, beta: float, a: int, b: int, c: int, d: int, a_layout: int, b_layout: int,
        d_layout: int,
    ) -> None:  # fmt: skip
        attribute = MatmulDescAttribute
        left, right = self._read(a, a_layout), self._read(b, b_layout)
        left = left.T if settings[attribute.TRANSA] else left
        right = right.T if settings[attribute.TRANSB] else right
        y = alpha * (left @ right)
        if beta:
            y += beta * self._read(c, d_layout)
        scalar, rows, columns, _ = self._objects[d_layout]
        epilogue = Epilogue(settings[attribute.EPILOGUE]).name
        bias = settings.get(attribute.BIAS_POINTER)
        if epilogue.endswith("BIAS"):
            y += decode(_vector(bias, scalar, rows))[:, None]
        if "AUX" in epilogue:
            leading = settings[attribute.EPILOGUE_AUX_LD]
            assert leading % 8 == 0 and leading >= rows
            self._write(settings[attribute.EPILOGUE_AUX_POINTER], (scalar, rows, columns, leading), y)
        if "GELU" in epilogue:
            y = 0.5 * y * (1 + np.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
        self._write(d, self._objects[d_layout], y)

    def _read(self, pointer: int, layout: int) -> np.ndarray:
        return decode(_matrix(pointer, *self._objects[layout]))

    def _write(self, pointer: int, layout: tuple, y: np.ndarray) -> None:
        _matrix(pointer, *layout)[...] = encode(y, layout[0])


def _float(pointer: int) -> float:
    return ctypes.c_float.from_address(pointer).value


def _vector(pointer: int, scalar: str, size: int) -> np.ndarray:
    assert pointer % ITEMSIZE[scalar] == 0, "a pointer that is not aligned"
    dtype = encode(np.zeros(1), scalar).dtype
    memory = (ctypes.c_uint8 * (size * ITEMSIZE[scalar])).from_address(pointer)
    return np.frombuffer(memory, dtype)


def _matrix(pointer: int, scalar: str, rows: int, columns: int, leading: int) -> np.ndarray:
    """The matrix (rows, columns) in Fortran order."""
    return _vector(pointer, scalar, leading * columns).reshape(columns, leading)[:, :rows].T
