"""A restricted unpickler: it can build nothing but arrays, bytes, strings, numbers and containers."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from typing import Any, BinaryIO

import numpy as np


class PlainUnpickler(pickle._Unpickler):
    """Refuses, by name, every function and class that is not in `plain`.

    NumPy's own names lead to the stand-ins below: a file that sets the state of a real array or dtype can crash the
    interpreter. `finished` makes arrays of the stand-ins. Built on the unpickler in Python, because the one in C
    reserves, and touches, as many gigabytes as a damaged file's memo number says.
    """

    known = "arrays, bytes, strings, numbers and containers"

    def __init__(self, file: BinaryIO, plain: Mapping[tuple[str, str], Any] | None = None) -> None:
        super().__init__(file, encoding="bytes")  # how Python 2's strings come back
        self.plain = PLAIN if plain is None else plain

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.plain:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, and only {self.known} are read")
        return PlainCall(self.plain[module, name])


class PlainCall:
    """A function that a stream may call. Made anew for each use: the stream can set its attributes, and only its."""

    __slots__ = ("function",)

    def __init__(self, function: Any) -> None:
        self.function = function

    def __call__(self, *arguments: Any) -> Any:
        return self.function(*arguments)


class PlainDtype:
    """Stands for a dtype of numbers or strings."""

    def __init__(self, spec: str | bytes, align: bool = False, copy: bool = False) -> None:
        spec = spec.decode("ascii") if isinstance(spec, bytes) else spec
        if not isinstance(spec, str) or np.dtype(spec).kind not in "biufcSU":
            raise pickle.UnpicklingError(f"it asks for an array of {spec!r}, and only numbers and strings are read")
        self.dtype = np.dtype(spec)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        order = state[1]  # the rest describes fields, which these dtypes do not have
        self.dtype = self.dtype.newbyteorder(order.decode("ascii") if isinstance(order, bytes) else order)


class PlainArray:
    """Stands for an array: made by NumPy's _reconstruct(type, shape, typecode), then given its state."""

    def __init__(self, *arguments: Any) -> None:
        self.content, self.dtype, self.shape, self.order = b"", PlainDtype("u1"), (0,), "C"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, self.shape, self.dtype, fortran, self.content = state
        self.order = "F" if fortran else "C"

    @classmethod
    def from_buffer(cls, content: bytes, dtype: PlainDtype, shape: tuple[int, ...], order: str) -> PlainArray:
        array = cls()
        array.content, array.dtype, array.shape, array.order = content, dtype, shape, order
        return array

    def array(self) -> np.ndarray:
        return np.frombuffer(self.content, self.dtype.dtype).reshape(self.shape, order=self.order)


def number(dtype: PlainDtype, content: bytes) -> Any:
    return np.frombuffer(content, dtype.dtype)[0]


def latin1(text: str, encoding: str) -> bytes:
    return text.encode("latin1")  # how Python 3 writes bytes in a pickle that Python 2 can read


def finished(value: Any, done: dict[int, Any] | None = None) -> Any:
    """`value` with the stand-ins in it, at any depth of dictionaries, lists and tuples, made into arrays.

    Each object is done once (`done`, by identity): a hundred bytes can name one object in a billion places.
    """
    done = {} if done is None else done
    if id(value) in done:
        return done[id(value)]
    if isinstance(value, PlainArray):
        result = value.array()
    elif isinstance(value, dict):
        result = {key: finished(item, done) for key, item in value.items()}
    elif isinstance(value, list | tuple):
        result = type(value)(finished(item, done) for item in value)
    else:
        return value
    done[id(value)] = result
    return result


PLAIN: dict[tuple[str, str], Any] = {
    ("numpy", "dtype"): PlainDtype,
    ("numpy", "ndarray"): None,  # named as an argument, never called
    ("_codecs", "encode"): latin1,
}
for core in ("numpy.core", "numpy._core"):  # NumPy 1 and 2
    PLAIN[f"{core}.multiarray", "_reconstruct"] = PlainArray
    PLAIN[f"{core}.multiarray", "scalar"] = number
    PLAIN[f"{core}.numeric", "_frombuffer"] = PlainArray.from_buffer
for builtins in ("builtins", "__builtin__"):  # Python 3 and 2
    for kind in (set, frozenset, bytearray, bytes, complex):
        PLAIN[builtins, kind.__name__] = kind
