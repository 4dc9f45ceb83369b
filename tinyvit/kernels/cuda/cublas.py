"""Matrix products through cuBLASLt, called through NVIDIA's own binding (nvmath-python).

CuPy's binding refuses to work while a CUDA graph is captured, and has no epilogues. cuBLASLt adds a bias and takes GELU
before the result leaves the chip. Its sums for a bias's gradient made the weight's product two to three times as long.

Matrices here are in C order: rows behind one another. cuBLASLt's are in Fortran order, so each of ours is its transpose
to it, and y = a b is computed as y^T = b^T a^T: `b` is cuBLASLt's A and `a` its B. A bias, which cuBLASLt adds to
columns of its result, is then added to our rows.

All sums are fp32. Where nvmath-python is missing, or cuBLASLt has no algorithm, CuPy's product and our own kernels run.
"""

from __future__ import annotations

import ctypes
import functools
import threading
import warnings
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, NamedTuple

import numpy as np

from tinyvit.backend.arrays import Array
from tinyvit.files.text import one_line
from tinyvit.kernels import cuda
from tinyvit.kernels.cuda import product_file

WORKSPACE = 32 << 20  # bytes, what NVIDIA recommends for Hopper
ALIGNMENT = 16  # bytes: where `cuda.ready` arrays start, at least
_ITEMSIZE = {"float": 4, "f16": 2, "bf16": 2}
_FP32_SUMS = 2  # cublasLtReductionScheme_t COMPUTE_TYPE: parts of a sum are never added up in 16 bits
_TYPES = {"float": 0, "f16": 2, "bf16": 14}  # cudaDataType_t
_FP32, _TF32 = 68, 77  # cublasComputeType_t
_RESULT = 96  # bytes of a cublasLtMatmulHeuristicResult_t, which begins with an algorithm

tf32: ContextVar[bool] = ContextVar("tinyvit_tf32", default=False)  # whether fp32 products may round operands to tf32
_lock = threading.Lock()  # plans are shared, and each call writes its own pointers into one
_plans: dict[_Key, _Algorithm | None] = {}  # None where CuPy's product is to run


class _Key(NamedTuple):
    """What decides how a product is computed: y (rows, columns) is the sum of `inner` products."""

    device: int
    scalar: str
    tf32: bool
    many: int  # such products
    rows: int
    columns: int
    inner: int
    a_transposed: bool
    b_transposed: bool
    epilogue: str  # of cublasLtEpilogue_t


class _Algorithm(NamedTuple):
    description: int
    layouts: tuple[int, ...]  # cuBLASLt's A, B and D
    algorithm: np.ndarray  # its bytes


def library() -> Any:
    """nvmath's module for cuBLASLt; None where it or NVIDIA's library is not installed: see `missing`."""
    return _load()[0]


def missing() -> str | None:
    """What `library` lacks, in one line; None if nothing."""
    return _load()[1]


@functools.cache
def _load() -> tuple[Any, str | None]:
    try:
        from nvmath.bindings import cublasLt

        cublasLt.get_version()
    except Exception as error:  # nvmath has one of its own for each thing that may be missing
        return None, one_line(f"{type(error).__name__}: {error}")
    return cublasLt, None


def linear(xp: Any, x: Array, weight: Array, bias: Array | None, residual: Array | None = None) -> Array | None:
    """x W^T + bias + residual: x (R, I), weight (O, I), bias (O,), residual (R, O) -> (R, O); None if not covered."""
    y = xp.empty((x.shape[0], weight.shape[0]), dtype=x.dtype)
    epilogue = "DEFAULT" if bias is None else "BIAS"
    done = _product(xp, x, weight, y, b_transposed=True, epilogue=epilogue, bias=bias, added=residual)
    return y if done else None


def linear_gelu(xp: Any, x: Array, weight: Array, bias: Array, keep: bool) -> tuple[Array, Array | None] | None:
    """gelu(x W^T + bias) by the tanh approximation, and where wanted what GELU was taken of; None if not covered."""
    if keep and weight.shape[0] % 8:  # what is kept has rows of whole vectors
        return None
    y = xp.empty((x.shape[0], weight.shape[0]), dtype=x.dtype)
    hidden = xp.empty(y.shape, dtype=x.dtype) if keep else None
    epilogue = "GELU_AUX_BIAS" if keep else "GELU_BIAS"
    done = _product(xp, x, weight, y, b_transposed=True, epilogue=epilogue, bias=bias, hidden=hidden)
    return (y, hidden) if done else None


def input_gradient(xp: Any, dy: Array, weight: Array) -> Array | None:
    """dy W: dy (R, O), weight (O, I) -> (R, I); None if not covered."""
    if tf32.get() and dy.dtype == np.float32 and cuda.capability() == 90:
        # Hopper's wgmma takes tf32 only from K-major operands, as those of the forward product are.
        return linear(xp, dy, cuda.ready(weight.T), None)
    dx = xp.empty((dy.shape[0], weight.shape[1]), dtype=dy.dtype)
    return dx if _product(xp, dy, weight, dx) else None


def weight_gradient(xp: Any, dy: Array, x: Array) -> Array | None:
    """dy^T x: dy (R, O), x (R, I) -> (O, I); None if not covered."""
    dweight = xp.empty((dy.shape[1], x.shape[1]), dtype=dy.dtype)
    return dweight if _product(xp, dy, x, dweight, a_transposed=True) else None


def products(
    xp: Any, a: Array, b: Array, transposed: tuple[bool, bool], alpha: float, beta: float, added: Array | None,
    out: Array | None,
) -> Array | None:  # fmt: skip
    """alpha op(a) op(b) + beta added, of many matrices each: (B, R, I), (B, I, C) -> (B, R, C); None if not covered."""
    size = len(a), a.shape[2 if transposed[0] else 1], b.shape[1 if transposed[1] else 2]
    y = xp.empty(size, dtype=a.dtype) if out is None else out
    flip_a, flip_b = transposed
    done = _product(xp, a, b, y, a_transposed=flip_a, b_transposed=flip_b, added=added, alpha=alpha, beta=beta)
    return y if done else None


def _product(
    xp: Any,
    a: Array,
    b: Array,
    y: Array,
    *,
    a_transposed: bool = False,
    b_transposed: bool = False,
    epilogue: str = "DEFAULT",
    bias: Array | None = None,
    hidden: Array | None = None,
    added: Array | None = None,
    alpha: float = 1.0,
    beta: float = 1.0,
) -> bool:
    """y = alpha op(a) op(b) + beta added, then the epilogue; whether it could be done.

    All arrays are `cuda.ready`, or start where such may; those with three axes are many matrices.
    """
    lt, scalar = library(), cuda.scalar(y.dtype)
    if lt is None or scalar is None:
        return False
    device, inner = cuda.device(), a.shape[-2] if a_transposed else a.shape[-1]
    fast = tf32.get() and y.dtype == np.float32
    many = y.shape[0] if y.ndim == 3 else 1
    key = _Key(device, scalar, fast, many, y.shape[-2], y.shape[-1], inner, a_transposed, b_transposed, epilogue)
    factors = np.array([alpha, 0.0 if added is None else beta], np.float32)
    with _lock:
        if key not in _plans:
            _plans[key] = _plan(key)
        plan = _plans[key]
        if plan is None:
            return False
        for name, array in (("BIAS_POINTER", bias), ("EPILOGUE_AUX_POINTER", hidden)):
            if array is not None:
                _set(lt.matmul_desc_set_attribute, plan.description, lt.MatmulDescAttribute[name], cuda.address(array))
        stream = cuda.stream()
        workspace = _workspace(xp, device, stream)
        a_layout, b_layout, y_layout = plan.layouts
        c = y if added is None else added
        try:
            lt.matmul(
                _handle(device), plan.description,
                factors.ctypes.data, cuda.address(b), a_layout, cuda.address(a), b_layout,
                factors[1:].ctypes.data, cuda.address(c), y_layout, cuda.address(y), y_layout,
                plan.algorithm.ctypes.data, cuda.address(workspace), WORKSPACE, stream,
            )  # fmt: skip
        except lt.cuBLASLtError as error:  # an algorithm that it offers and then refuses
            _plans[key] = None
            warnings.warn(f"cuBLASLt refuses a product ({error}), which is computed otherwise: {key}", stacklevel=2)
    return _plans[key] is not None


def _plan(key: _Key) -> _Algorithm | None:
    """How cuBLASLt is to compute such products: as a search has found, else its first choice; None if it has none."""
    lt = library()
    description = lt.matmul_desc_create(_TF32 if key.tf32 else _FP32, _TYPES["float"])
    attribute = lt.MatmulDescAttribute
    _set(lt.matmul_desc_set_attribute, description, attribute.TRANSA, key.b_transposed, np.int32)
    _set(lt.matmul_desc_set_attribute, description, attribute.TRANSB, key.a_transposed, np.int32)
    _set(lt.matmul_desc_set_attribute, description, attribute.EPILOGUE, lt.Epilogue[key.epilogue], np.uint32)
    # The search looks at pointers, too; the true ones come with each call, and are aligned no worse.
    if key.epilogue != "DEFAULT":
        _set(lt.matmul_desc_set_attribute, description, attribute.BIAS_POINTER, ALIGNMENT)
    if "AUX" in key.epilogue:
        _set(lt.matmul_desc_set_attribute, description, attribute.EPILOGUE_AUX_POINTER, ALIGNMENT)
        _set(lt.matmul_desc_set_attribute, description, attribute.EPILOGUE_AUX_LD, key.columns)

    shapes = (
        (key.columns, key.inner) if key.b_transposed else (key.inner, key.columns),
        (key.inner, key.rows) if key.a_transposed else (key.rows, key.inner),
        (key.rows, key.columns),
    )
    layouts = tuple(lt.matrix_layout_create(_TYPES[key.scalar], c, r, c) for r, c in shapes)
    for layout, (r, c) in zip(layouts, shapes, strict=True) if key.many > 1 else ():
        _set(lt.matrix_layout_set_attribute, layout, lt.MatrixLayoutAttribute.BATCH_COUNT, key.many, np.int32)
        _set(lt.matrix_layout_set_attribute, layout, lt.MatrixLayoutAttribute.STRIDED_BATCH_OFFSET, r * c)
    algorithm = product_file.find(_name(key))
    if algorithm is None or not _takes(key, description, layouts, algorithm):
        algorithm = next(iter(_choices(key, description, layouts, 1)), None)
    return None if algorithm is None else _Algorithm(description, layouts, algorithm)


def search(key: _Key, measure: Callable[[], float], count: int = 8) -> list[float]:
    """Use the algorithm for a kind of products with which `measure`, which computes one, is lowest, and keep it.

    It is called with each of the `count` that cuBLASLt's heuristic puts first. Returns what it gave, in their order.
    """
    plan, measured = _plans[key], []
    assert plan is not None
    for algorithm in _choices(key, plan.description, plan.layouts, count):
        _plans[key] = plan._replace(algorithm=algorithm)
        time = measure()
        if _plans[key] is not None:  # it was not refused
            measured.append((time, algorithm))
    if measured:
        best = min(measured, key=lambda pair: pair[0])[1]
        _plans[key] = plan._replace(algorithm=best)
        product_file.keep(_name(key), best)
    return [time for time, _ in measured]


def _name(key: _Key) -> str:
    kind = " ".join(f"{name}={value}" for name, value in key._asdict().items() if name != "device")
    return f"{cuda.device_name()}, cuBLASLt {library().get_version()}, {WORKSPACE} bytes: {kind}"


def _takes(key: _Key, description: int, layouts: tuple[int, ...], algorithm: np.ndarray) -> bool:
    lt, (a, b, y) = library(), layouts
    result = lt.MatmulHeuristicResult(1)
    try:
        lt.matmul_algo_check(_handle(key.device), description, a, b, y, y, algorithm.ctypes.data, result.ptr)
    except lt.cuBLASLtError:
        return False
    return True


def _choices(key: _Key, description: int, layouts: tuple[int, ...], count: int) -> list[np.ndarray]:
    """What cuBLASLt's heuristic puts first, for matrices aligned as well as it has anything for."""
    lt, (a, b, y) = library(), layouts
    results, found, limit = lt.MatmulHeuristicResult(count), np.zeros(1, np.int32), lt.MatmulPreferenceAttribute
    for alignment in (ALIGNMENT, _ITEMSIZE[key.scalar]):
        preference = lt.matmul_preference_create()
        _set(lt.matmul_preference_set_attribute, preference, limit.MAX_WORKSPACE_BYTES, WORKSPACE, np.uint64)
        _set(lt.matmul_preference_set_attribute, preference, limit.REDUCTION_SCHEME_MASK, _FP32_SUMS, np.uint32)
        for matrix in "ABCD":
            name = limit[f"MIN_ALIGNMENT_{matrix}_BYTES"]
            _set(lt.matmul_preference_set_attribute, preference, name, alignment, np.uint32)
        try:
            lt.matmul_algo_get_heuristic(
                _handle(key.device), description, a, b, y, y, preference, count, results.ptr, found.ctypes.data
            )
        except lt.cuBLASLtError:  # an epilogue that it does not have for these types or sizes
            found[0] = 0
        lt.matmul_preference_destroy(preference)
        if found[0]:
            break
    texts = (ctypes.string_at(results.ptr + _RESULT * i, product_file.SIZE) for i in range(found[0]))
    return [np.frombuffer(text, np.uint8).copy() for text in texts]


def _set(function: Any, target: int, attribute: int, value: int, dtype: Any = np.int64) -> None:
    cell = np.array([value], dtype)
    function(target, attribute, cell.ctypes.data, cell.nbytes)


@functools.cache
def _handle(device: int) -> int:
    return library().create()


_workspaces: dict[tuple[int, int], Array] = {}


def _workspace(xp: Any, device: int, stream: int) -> Array:
    """One for each stream, so that products on two streams do not meet in it."""
    if (device, stream) not in _workspaces:
        _workspaces[device, stream] = cuda.lasting(xp, WORKSPACE)  # of no graph, for it outlives them all
    return _workspaces[device, stream]
