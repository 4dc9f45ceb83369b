"""The precision that a model computes in: 16 bits, TF32, or that of its parameters.

Mixed precision (Micikevicius et al. 2017, arXiv:1710.03740): the parameters stay in float32 as master weights. Before
a step or predictions they are rounded to 16 bits, and the model runs on the rounded weights. Products are summed in
float32; layer norm, softmax and the loss are computed in it. Gradients update the master weights, so that an update
far smaller than the last digit of a 16-bit weight is not lost. bfloat16 has float32's range. float16 has not, so its
loss is scaled to keep small gradients above zero.

On a CPU that multiplies bfloat16 fast (AMD's AVX512-BF16, Intel's AMX, ARM's BF16 with I8MM; with numba) bf16 rounds
the operands of linear layers, and those of attention with many tokens, alone. Weights and activations stay in float32.
int8, for predictions, has 8 bits for the operands of linear layers (AVX2 and later, ARM's BF16 with I8MM).
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from tinyvit.backend import arrays
from tinyvit.engine.tensor import Array, Tensor
from tinyvit.files.text import nearest
from tinyvit.kernels import bf16, int8, jit, packed_weights
from tinyvit.kernels.cuda import cublas
from tinyvit.nn import Buffer, Module, Parameter

PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
PREDICTION_PRECISIONS = (*PRECISIONS, "int8")
_CPU_OF_INT8 = "a CPU with AVX2 (and AMX, if it has that, granted by Linux) or ARM's BF16 and I8MM"
_DTYPES = {"bf16": "bfloat16", "fp16": "float16"}


def hint(name: str, known: Sequence[str]) -> str:
    """What to say of a name that is not a `known` precision."""
    return ": it is for predictions alone, train in bf16 or fp32" if name == "int8" else nearest(name, known)


class Precision:
    """The precision that a model with these weights computes in.

    Args:
        name: "fp32" for that of the weights; "tf32" for the same with the operands of products rounded to TF32 (10
            bits of mantissa, float32's range; NVIDIA GPUs of compute capability 8.0 and later); "bf16" or "fp16" for
            weights rounded to 16 bits, on some CPUs for rounded operands of linear layers (see above); "int8" for
            operands of linear layers in 8 bits (some CPUs, too).
        weights: the model's, float32 unless the name is "fp32".
        gradients: whether gradients are wanted, which int8 has not.

    Raises:
        ValueError: no such precision, or the weights' dtype, library or device does not have it.
    """

    def __init__(self, name: str, weights: Sequence[Tensor], gradients: bool = False) -> None:
        if name not in (known := PRECISIONS if gradients else PREDICTION_PRECISIONS):
            raise ValueError(f"expected a precision of {', '.join(known)}, got {name!r}{hint(str(name), known)}")
        self.name, self._weights = name, list(weights)
        self._packed: packed_weights.Packed | None = None  # for a CPU's products of 16 or 8 bits
        self._stay = not gradients  # whether the weights do: packed ones are kept then
        self.dtype = None  # of the rounded weights
        self._rounded: list[Array] = []
        self._current: list[tuple[Array, int]] = []  # the weights that were rounded or packed, with their versions
        if name == "fp32":
            return
        like = self._weights[0].data
        if other := {arrays.dtype_name(p.dtype) for p in self._weights} - {"float32"}:
            raise ValueError(f"precision {name} expects a float32 model, got {', '.join(sorted(other))}")
        if name == "tf32":
            _check_tf32(like, "fp32, bf16 or fp16" if gradients else "fp32, bf16, fp16 or int8")
            return
        on_cpu = arrays.namespace(like) is arrays.numpy_namespace
        if name == "int8":
            if not on_cpu:
                raise ValueError('precision int8 is for models on a CPU: --device cpu, or model.to("cpu")')
            if not int8.available():
                fitting = "a numba that works with this NumPy" if int8.possible() else _CPU_OF_INT8
                raise ValueError(f"precision int8 needs {jit.missing() or fitting}: expected fp32, bf16 or fp16")
            self._packed = packed_weights.Packed("int8", {})
            return
        if name == "bf16" and on_cpu and bf16.available():
            self._packed = packed_weights.Packed("bf16", {})
            return
        try:
            self.dtype = arrays.resolve_dtype(arrays.namespace(like), _DTYPES[name])
        except TypeError as error:
            if name == "bf16" and on_cpu and (lacks := jit.missing()):
                slow = "slower than fp32, ml_dtypes (pip install ml_dtypes)"
                raise ValueError(f"precision bf16 on a CPU needs {lacks} or, {slow}: expected fp32 or fp16") from None
            raise ValueError(f"precision {name}: {error}") from None

    @contextlib.contextmanager
    def products(self) -> Iterator[None]:
        """Within this context, in this thread, products are computed in this precision."""
        tf32 = cublas.tf32.set(self.name == "tf32")
        packed = packed_weights.current.set(self._packed)
        # What is too large for 16 bits becomes infinite; the loss or the gradient's norm shows it, no warning is due.
        quiet: Any = {} if self.dtype is None else {"over": "ignore", "invalid": "ignore"}
        try:
            with np.errstate(**quiet):
                yield
        finally:
            cublas.tf32.reset(tf32)
            packed_weights.current.reset(packed)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Within this context the model computes in this precision; 16-bit weights replace its own meanwhile."""
        with self.products():
            if self.dtype is None:
                yield
                return
            masters = [p.data for p in self._weights]
            try:
                if not self.is_current():
                    self._round(masters)
                for p, rounded in zip(self._weights, self._rounded, strict=True):
                    p.data = rounded
                yield
            finally:
                for p, master in zip(self._weights, masters, strict=True):
                    p.data = master

    def copy_of(self, model: Module) -> Module:
        """A copy of the model that holds the 16-bit weights; the model itself in other precisions."""
        if self.dtype is None:
            return model
        self.refresh()
        tensors: dict[int, Any] = {id(b): b for b in model.buffers()}
        for t, rounded in zip(self._weights, self._rounded, strict=True):
            tensors[id(t)] = Buffer(rounded) if isinstance(t, Buffer) else Parameter(rounded, t.requires_grad)
        return copy.deepcopy(model, tensors)

    def _round(self, masters: list[Array]) -> None:
        """Round the weights to 16 bits, in place after the first time: a captured graph has their addresses."""
        if not self._rounded:
            self._rounded = [arrays.astype(x, self.dtype) for x in masters]
        else:
            for rounded, master in zip(self._rounded, masters, strict=True):
                rounded[...] = arrays.astype(master, self.dtype)

    def refresh(self) -> None:
        """Round the weights again if one has changed."""
        if self._packed is not None and self._stay and not self.is_current():
            self._current = [(p.data, p.version) for p in self._weights]
            self._packed.weights.clear()
            self._packed.weights.update((id(data), None) for data, _ in self._current)
        # On a CPU always, which costs little beside such a step: nobody tells of a write into a weight's array.
        if self.dtype is not None and (arrays.on_host(self._weights[0].data) or not self.is_current()):
            with np.errstate(over="ignore"):
                self._round([p.data for p in self._weights])
            self.note_rounded()

    def rounded(self) -> dict[int, Array]:
        """The 16-bit weights, by the `id` of the weights, for an optimizer that updates both."""
        return {id(p): rounded for p, rounded in zip(self._weights, self._rounded, strict=False)}

    def note_rounded(self) -> None:
        """Note that the 16-bit weights have the weights' present values."""
        self._current = [(p.data, p.version) for p in self._weights] if self._rounded else []

    def is_current(self) -> bool:
        """Whether no weight was changed since they were rounded or packed last."""
        return bool(self._current) and all(
            p.data is data and p.version == changes
            for p, (data, changes) in zip(self._weights, self._current, strict=True)
        )


def _check_tf32(like: Array, others: str) -> None:
    if not arrays.is_cupy(like):
        raise ValueError(f"precision tf32 is a GPU's, and the model is on a CPU: expected {others}")
    if cublas.library() is None:
        bring = 'pip install "tinyvit[cuda12]" or "tinyvit[cuda13]"'
        raise ValueError(f"precision tf32 needs nvmath-python: {bring} ({cublas.missing()})")


class LossScale:
    """The factor of a float16 loss (section 3.2 of the paper), which adapts to the gradients.

    A gradient that overflows halves it, and is not used; GROW_AFTER good ones in a row double it. It lives beside
    `like` and changes in place.
    """

    START, GROW_AFTER, LARGEST = 2.0**16, 2000, 2.0**24

    def __init__(self, like: Array) -> None:
        xp, device = arrays.namespace(like), arrays.device(like)
        self.value = xp.asarray(self.START, dtype=xp.float32, device=device)
        self.good = xp.asarray(0, dtype=xp.int32, device=device)  # steps since the last change

    def update(self, grad_norm: Array | float) -> bool:
        """Take note of the norm of the last gradient, and say whether it is finite, which is read from the device."""
        xp = arrays.namespace(self.value)
        finite = xp.isfinite(xp.asarray(grad_norm, device=arrays.device(self.value)))
        zero, one = xp.zeros_like(self.good), xp.ones_like(self.value)
        good = xp.where(finite, self.good + 1, zero)
        grown = good >= self.GROW_AFTER
        factor = xp.where(finite, xp.where(grown, one * 2.0, one), one * 0.5)
        # Not clip, which array_api_compat puts together from masks: on a GPU each of them is waited for.
        self.value[...] = xp.minimum(xp.maximum(self.value * factor, one), one * self.LARGEST)
        self.good[...] = xp.where(grown, zero, good)
        return bool(finite)

    def state_dict(self) -> dict[str, np.ndarray]:
        """Copies of "loss_scale" and "good_steps"."""
        return {name: np.array(arrays.to_numpy(x)) for name, x in self._state()}

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        """Raises ValueError where a name is missing."""
        for name, x in self._state():
            if name not in state:
                raise ValueError(f"the state of the loss scale: missing {name}")
            x[...] = arrays.astype(arrays.convert(np.array(state[name]), x), x.dtype)

    def _state(self) -> list[tuple[str, Array]]:
        return [("loss_scale", self.value), ("good_steps", self.good)]
