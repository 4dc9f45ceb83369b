"""Pickles, read by an interpreter that executes nothing and builds plain values only.

A pickle is a program for a machine with a stack and a memo (documented in Python's `pickletools`). Python's usual
unpickler calls whatever the program names, and lets a few bytes reserve gigabytes. This one is Python's other, which is
written in Python, with a table of harmless functions and opcodes, and limits of reads, bytes and keys:

- None, booleans, numbers, strings, bytes, lists, tuples, dictionaries, and NumPy's arrays and numbers are built;
- a set comes as a list, so that nothing in it is hashed;
- any other function or class is refused by name, or has a `StandIn` where the caller allows that.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

import numpy as np

MOST_READS = 600_000  # in one pickle, two for an opcode: a second; 5,000 tensors with an optimizer take 270,000
MOST_BYTES = 80_000_000  # of one pickle; those of CIFAR-10 have 31 MB
MOST_KEYS = 20_000  # keys that are not strings: Python's hashes of numbers can be made to collide
MOST_DIMENSIONS = 8
LARGEST_NUMBER = 64  # bytes of a NumPy number
OPCODES = """
    PROTO FRAME STOP MARK POP POP_MARK DUP PUT BINPUT LONG_BINPUT MEMOIZE GET BINGET LONG_BINGET NONE NEWTRUE
    NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT UNICODE SHORT_BINUNICODE BINUNICODE
    BINUNICODE8 SHORT_BINBYTES BINBYTES BINBYTES8 BYTEARRAY8 STRING BINSTRING SHORT_BINSTRING EMPTY_TUPLE TUPLE
    TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST LIST APPEND APPENDS EMPTY_SET FROZENSET ADDITEMS EMPTY_DICT DICT SETITEM
    SETITEMS GLOBAL STACK_GLOBAL REDUCE NEWOBJ NEWOBJ_EX BUILD PERSID BINPERSID
"""  # that are read: not those of old classes (INST, OBJ), of a registry (EXT1, …) and of buffers elsewhere
PYTHONS: Any = pickle._Unpickler  # of its attributes type checkers know a few


class PickleError(ValueError):
    """A pickle that is damaged, too large, or asks for what is not read."""


class Function:
    """A function that a pickle may call. A pickle cannot change it."""

    __slots__ = ("call",)

    def __init__(self, call: Callable[..., Any]) -> None:
        self.call = call


class StandIn:
    """Stands for an object of an unknown class; it has a name and does nothing."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name


class PlainDtype:
    """Stands for a NumPy dtype of numbers or strings."""

    def __init__(self, spec: str | bytes, align: bool = False, copy: bool = False) -> None:
        spec = as_text(spec)
        if not isinstance(spec, str) or len(spec) > 16 or np.dtype(spec).kind not in "biufcSU":
            raise PickleError(f"it asks for an array of {str(spec)[:40]!r}, and only numbers and strings are read")
        self.dtype = np.dtype(spec)

    def set_state(self, state: Any) -> None:
        self.dtype = self.dtype.newbyteorder(as_text(state[1]))  # the rest describes fields, which these do not have


class PlainArray:
    """Stands for an array between NumPy's _reconstruct(type, shape, typecode) and the setting of its state."""

    array: np.ndarray | None = None

    def __init__(self, *arguments: Any) -> None:
        pass

    def set_state(self, state: Any) -> None:
        _, shape, dtype, fortran, content = state
        self.array = array_of(content, dtype, shape, "F" if fortran else "C")


def array_of(content: Any, dtype: PlainDtype, shape: Any, order: str) -> np.ndarray:
    """An array that shares the memory of `content`."""
    if not isinstance(content, bytes) or not isinstance(dtype, PlainDtype):
        raise PickleError("it holds an array of objects, and only numbers and strings are read")
    if not isinstance(shape, tuple) or len(shape) > MOST_DIMENSIONS:
        raise PickleError(f"it holds an array of more than {MOST_DIMENSIONS} dimensions")
    return np.frombuffer(content, dtype.dtype).reshape(shape, order="F" if order == "F" else "C")


def number(dtype: PlainDtype, content: bytes) -> Any:
    if len(content) > LARGEST_NUMBER:
        raise PickleError(f"it holds a number of {len(content)} bytes")
    return np.frombuffer(content, dtype.dtype)[0]


def to_bytes(content: str | bytes = b"", encoding: str = "latin1") -> bytes:
    """bytes(…) and bytearray(…) of bytes or text; of a number they would reserve that many bytes."""
    if not isinstance(content, str | bytes):
        raise PickleError(f"it makes bytes of a {type(content).__name__}")
    return content.encode("latin1") if isinstance(content, str) else content


def as_it_is(items: Any = ()) -> Any:
    """set(list) and frozenset(list): the list itself."""
    return items


def as_text(value: Any) -> Any:
    """The strings of Python 2, which come as bytes, as text; anything else unchanged."""
    return value.decode("latin1") if isinstance(value, bytes) else value


PLAIN: dict[tuple[str, str], Any] = {
    ("numpy", "dtype"): Function(PlainDtype),
    ("numpy", "ndarray"): StandIn("numpy.ndarray"),  # named as an argument, never called
    ("_codecs", "encode"): Function(to_bytes),  # how Python 3 writes bytes in a pickle that Python 2 can read
}
for core in ("numpy.core", "numpy._core"):  # NumPy 1 and 2
    PLAIN[f"{core}.multiarray", "_reconstruct"] = Function(PlainArray)
    PLAIN[f"{core}.multiarray", "scalar"] = Function(number)
    PLAIN[f"{core}.numeric", "_frombuffer"] = Function(array_of)
for builtins in ("builtins", "__builtin__"):  # Python 3 and 2
    PLAIN |= {(builtins, kind): Function(as_it_is) for kind in ("set", "frozenset")}
    PLAIN |= {(builtins, kind): Function(to_bytes) for kind in ("bytes", "bytearray")}


def refuse(module: str, name: str) -> Any:
    asked = f"{module}.{name}"[:100]
    raise PickleError(f"it asks for {asked}, and only arrays, bytes, strings, numbers and containers are read")


def load_pickle(
    file: BinaryIO,
    functions: Mapping[tuple[str, str], Any] = PLAIN,
    *,
    unknown: Callable[[str, str], Any] = refuse,
    persistent: Callable[[Any], Any] | None = None,
) -> Any:
    """The value of the pickle at the position of `file`, which then stands behind it.

    Args:
        file: a binary file.
        functions: what a module's name stands for, by (module, name): a Function, or any value.
        unknown: gives the value of any other (module, name), or raises.
        persistent: gives the value of a persistent identifier, by which torch refers to its storages.

    Raises:
        PickleError: the pickle is damaged, too large, or asks for what is not read.
        Exception: whatever the functions raise for arguments that do not suit them.
    """
    try:
        return Reader(file, functions, unknown, persistent).load()
    except (EOFError, IndexError):
        raise PickleError("its pickle is cut short, or takes more values than it gives") from None


class LimitedFile:
    """The part of a file that a pickle may fill."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.reads, self.left = file, MOST_READS, MOST_BYTES

    def read(self, size: int) -> bytes:
        return self.count(self.file.read(min(size, self.left)))

    def readline(self) -> bytes:
        return self.count(self.file.readline(self.left))

    def count(self, content: bytes) -> bytes:
        self.reads, self.left = self.reads - 1, self.left - len(content)
        if not self.reads or not self.left:
            raise PickleError(f"its pickle has more than {MOST_BYTES} bytes, or {MOST_READS} parts")
        return content


class Memo(dict[int, Any]):
    """What a pickle comes back to; an array that was not yet set when it was remembered is set now."""

    def __getitem__(self, index: int) -> Any:
        value = super().__getitem__(index)
        return value if type(value) is not PlainArray or value.array is None else value.array


class Reader(PYTHONS):
    """Python's interpreter of opcodes, in Python, with methods of ours for those that call, hash or reserve memory."""

    def __init__(self, file: BinaryIO, functions: Mapping[tuple[str, str], Any], unknown: Any, persistent: Any) -> None:
        super().__init__(LimitedFile(file), encoding="bytes")
        self.memo = Memo()
        self.functions, self.unknown, self.persistent = functions, unknown, persistent
        self.made = 0  # bytes that functions have made
        self.keys = 0  # keys that are not strings

    def find_class(self, module: str, name: str) -> Any:
        found = self.functions.get((module, name))
        return self.unknown(module, name) if found is None else found

    def persistent_load(self, identifier: Any) -> Any:
        if self.persistent is None:
            raise PickleError("its pickle refers to something outside it")
        return self.persistent(identifier)

    def extend(self, values: list[Any]) -> None:
        """Add items to the list, or to the set, on top."""
        if isinstance(self.stack[-1], list):
            self.stack[-1].extend(values)
        elif not isinstance(self.stack[-1], StandIn):
            raise PickleError(f"its pickle adds items to a {type(self.stack[-1]).__name__}")

    def update(self, flat: list[Any]) -> None:
        """Add keys and values, one after the other in `flat`, to the dictionary on top."""
        if isinstance(self.stack[-1], StandIn):
            return
        if not isinstance(self.stack[-1], dict) or len(flat) % 2:
            raise PickleError("its pickle sets items of what is no dictionary")
        for key in flat[::2]:
            self.check_key(key)
        self.stack[-1].update(zip(flat[::2], flat[1::2], strict=True))

    def check_key(self, key: Any) -> None:
        """Refuse a key that would take long to hash, or whose hash the file could choose too often."""
        if isinstance(key, str | bytes):
            return
        self.keys += 1
        parts = key if type(key) is tuple and len(key) <= MOST_DIMENSIONS else (key,)
        for part in parts:
            if isinstance(part, int) and not -(2**63) <= part < 2**64:
                raise PickleError("a dictionary has a key of many digits")
            if part is not None and not isinstance(part, str | bytes | int | float | np.number | StandIn):
                raise PickleError(f"a dictionary has a {type(part).__name__} as a key")
        if self.keys > MOST_KEYS:
            raise PickleError(f"it has more than {MOST_KEYS} keys that are not strings")

    def call(self, function: Any, arguments: Any) -> Any:
        if isinstance(function, StandIn):
            return StandIn(function.name)
        if not isinstance(function, Function) or not isinstance(arguments, tuple):
            raise PickleError(f"its pickle calls a {type(function).__name__}")
        value = function.call(*arguments)
        self.made += len(value) if isinstance(value, bytes) else 0
        if self.made > MOST_BYTES:
            raise PickleError(f"its pickle makes more than {MOST_BYTES} bytes")
        return value

    # --- opcodes --------------------------------------------------------------------------------------------------

    def load_unread(self) -> None:
        raise PickleError("its pickle has an opcode that is not read")

    def load_frame(self) -> None:
        self.read(8)  # how many bytes come next: only to read them faster

    def load_bytearray8(self) -> None:
        self.append(self.read(int.from_bytes(self.read(8), "little")))

    def load_append(self) -> None:
        value = self.stack.pop()
        self.extend([value])

    def load_appends(self) -> None:
        self.extend(self.pop_mark())

    def load_dict(self) -> None:
        values = self.pop_mark()
        self.append({})
        self.update(values)

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.update([key, value])

    def load_setitems(self) -> None:
        self.update(self.pop_mark())

    def load_reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        self.append(self.call(function, arguments))

    def load_newobj_ex(self) -> None:
        self.stack.pop()  # arguments by keyword
        self.load_reduce()

    def load_build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, PlainArray | PlainDtype):
            target.set_state(state)
            if isinstance(target, PlainArray):
                self.stack[-1] = target.array
        elif not isinstance(target, StandIn | dict):  # an OrderedDict's attributes are dropped
            raise PickleError(f"its pickle sets attributes of a {type(target).__name__}")

    load_newobj = load_reduce
    load_additems = load_appends
    load_empty_set, load_frozenset = PYTHONS.load_empty_list, PYTHONS.load_list


Reader.dispatch = dict.fromkeys(range(256), Reader.load_unread)
for code in (getattr(pickle, name)[0] for name in OPCODES.split()):
    Reader.dispatch[code] = getattr(Reader, PYTHONS.dispatch[code].__name__)
