"""Pickles, read by an interpreter of their opcodes that executes nothing and builds plain values only.

A pickle is a program for a machine with a stack and a memo (documented in Python's `pickletools`). Python's own
unpickler calls whatever the program names, recurses where it nests values, and lets a few bytes reserve gigabytes. This
one knows a table of harmless functions, never recurses, and keeps within limits of opcodes, bytes and keys:

- None, booleans, numbers, strings, bytes, lists, tuples, dictionaries, and NumPy's arrays and numbers are built;
- a set comes as a list, so that nothing in it is hashed;
- any other function or class is refused by name, or has a `StandIn` where the caller allows that.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

import numpy as np

MOST_OPCODES = 400_000  # in one pickle: under a second; a ViT with its optimizer has some 20,000
MOST_BYTES = 80_000_000  # of one pickle; those of CIFAR-10 have 31 MB
MOST_KEYS = 20_000  # keys that are not strings: Python's hashes of numbers can be made to collide
MOST_DIMENSIONS = 8
LARGEST_NUMBER = 64  # bytes of a NumPy number


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
    machine = Machine(functions, unknown, persistent)
    limited: Any = LimitedFile(file)
    for count, (opcode, argument, _) in enumerate(pickletools.genops(limited)):
        if count == MOST_OPCODES:
            raise PickleError(f"its pickle has more than {MOST_OPCODES} opcodes")
        if opcode.name == "STOP":
            return machine.pop()
        try:
            handle = OPCODES[opcode.name]
        except KeyError:
            raise PickleError(f"its pickle has an opcode that is not read ({opcode.name})") from None
        handle(machine, argument)
    raise PickleError("its pickle is cut short")


class LimitedFile:
    """The part of a file that a pickle may fill."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.left = file, MOST_BYTES

    def read(self, size: int) -> bytes:
        return self.count(self.file.read(min(size, self.left)))

    def readline(self) -> bytes:
        return self.count(self.file.readline(self.left))

    def count(self, content: bytes) -> bytes:
        self.left -= len(content)
        if not self.left:
            raise PickleError(f"its pickle has more than {MOST_BYTES} bytes")
        return content


class Machine:
    """The state of the interpreter: a stack, the stacks below the marks, and the memo."""

    def __init__(self, functions: Mapping[tuple[str, str], Any], unknown: Any, persistent: Any) -> None:
        self.functions, self.unknown, self.persistent = functions, unknown, persistent
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.made = 0  # bytes that functions have made
        self.keys = 0  # keys that are not strings

    def pop(self) -> Any:
        if not self.stack:
            raise PickleError("its pickle takes more values than it gives")
        return self.stack.pop()

    def top(self) -> Any:
        if not self.stack:
            raise PickleError("its pickle takes more values than it gives")
        return self.stack[-1]

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def push_bytes(self, value: str) -> None:
        self.stack.append(value.encode("latin1"))  # a string of Python 2; pickletools gives it as text

    def mark(self, _: Any = None) -> None:
        self.below.append(self.stack)
        self.stack = []

    def pop_mark(self) -> list[Any]:
        """The values above the last mark."""
        if not self.below:
            raise PickleError("its pickle takes more values than it gives")
        values, self.stack = self.stack, self.below.pop()
        return values

    def discard(self, _: Any) -> None:
        self.pop() if self.stack else self.pop_mark()

    def push_tuple(self, count: int) -> None:
        values = [self.pop() for _ in range(count)]
        self.push(tuple(reversed(values)))

    def extend(self, values: list[Any]) -> None:
        """Add items to the list, or to the set, on top."""
        if isinstance(self.top(), list):
            self.stack[-1].extend(values)
        elif not isinstance(self.stack[-1], StandIn):
            raise PickleError(f"its pickle adds items to a {type(self.stack[-1]).__name__}")

    def append(self, _: Any) -> None:
        value = self.pop()
        self.extend([value])

    def update(self, flat: list[Any]) -> None:
        """Add keys and values, one after the other in `flat`, to the dictionary on top."""
        if isinstance(self.top(), StandIn):
            return
        if not isinstance(self.stack[-1], dict) or len(flat) % 2:
            raise PickleError("its pickle sets items of what is no dictionary")
        for key in flat[::2]:
            self.check_key(key)
        self.stack[-1].update(zip(flat[::2], flat[1::2], strict=True))

    def push_dict(self, _: Any) -> None:
        values = self.pop_mark()
        self.push({})
        self.update(values)

    def set_item(self, _: Any) -> None:
        value, key = self.pop(), self.pop()
        self.update([key, value])

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

    def remember(self, index: int) -> None:
        self.memo[index] = self.top()

    def recall(self, index: int) -> None:
        if index not in self.memo:
            raise PickleError(f"its pickle refers to value {index}, which it does not have")
        value = self.memo[index]
        self.push(value if type(value) is not PlainArray or value.array is None else value.array)

    def find(self, module: Any, name: Any) -> Any:
        if not isinstance(module, str) or not isinstance(name, str):
            raise PickleError("its pickle names a function by something other than text")
        found = self.functions.get((module, name))
        return self.unknown(module, name) if found is None else found

    def push_global(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self.push(self.find(module, name))

    def push_stack_global(self, _: Any) -> None:
        name, module = self.pop(), self.pop()
        self.push(self.find(module, name))

    def call(self, _: Any) -> None:
        arguments, function = self.pop(), self.pop()
        if isinstance(function, StandIn):
            self.push(StandIn(function.name))
            return
        if not isinstance(function, Function) or not isinstance(arguments, tuple):
            raise PickleError(f"its pickle calls a {type(function).__name__}")
        value = function.call(*arguments)
        self.made += len(value) if isinstance(value, bytes) else 0
        if self.made > MOST_BYTES:
            raise PickleError(f"its pickle makes more than {MOST_BYTES} bytes")
        self.push(value)

    def call_with_keywords(self, _: Any) -> None:
        self.pop()
        self.call(None)

    def set_state(self, _: Any) -> None:
        state, target = self.pop(), self.top()
        if isinstance(target, PlainArray | PlainDtype):
            target.set_state(state)
            if isinstance(target, PlainArray):
                self.stack[-1] = target.array
        elif not isinstance(target, StandIn | dict):  # an OrderedDict's attributes are dropped
            raise PickleError(f"its pickle sets attributes of a {type(target).__name__}")

    def push_persistent(self, identifier: Any) -> None:
        if self.persistent is None:
            raise PickleError("its pickle refers to something outside it")
        self.push(self.persistent(identifier))


OPCODES: dict[str, Callable[[Machine, Any], object]] = {
    "PROTO": lambda m, _: None,
    "FRAME": lambda m, _: None,
    "MARK": Machine.mark,
    "POP": Machine.discard,
    "POP_MARK": lambda m, _: m.pop_mark(),
    "DUP": lambda m, _: m.push(m.top()),
    "NONE": lambda m, _: m.push(None),
    "NEWTRUE": lambda m, _: m.push(True),
    "NEWFALSE": lambda m, _: m.push(False),
    **dict.fromkeys(("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4"), Machine.push),
    **dict.fromkeys(("FLOAT", "BINFLOAT"), Machine.push),
    **dict.fromkeys(("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"), Machine.push),
    **dict.fromkeys(("SHORT_BINBYTES", "BINBYTES", "BINBYTES8"), Machine.push),
    "BYTEARRAY8": lambda m, content: m.push(bytes(content)),
    **dict.fromkeys(("STRING", "BINSTRING", "SHORT_BINSTRING"), Machine.push_bytes),
    "EMPTY_LIST": lambda m, _: m.push([]),
    "EMPTY_SET": lambda m, _: m.push([]),
    "EMPTY_DICT": lambda m, _: m.push({}),
    "EMPTY_TUPLE": lambda m, _: m.push(()),
    "TUPLE1": lambda m, _: m.push_tuple(1),
    "TUPLE2": lambda m, _: m.push_tuple(2),
    "TUPLE3": lambda m, _: m.push_tuple(3),
    "TUPLE": lambda m, _: m.push(tuple(m.pop_mark())),
    "LIST": lambda m, _: m.push(m.pop_mark()),
    "FROZENSET": lambda m, _: m.push(m.pop_mark()),
    "DICT": Machine.push_dict,
    "APPEND": Machine.append,
    "APPENDS": lambda m, _: m.extend(m.pop_mark()),
    "ADDITEMS": lambda m, _: m.extend(m.pop_mark()),
    "SETITEM": Machine.set_item,
    "SETITEMS": lambda m, _: m.update(m.pop_mark()),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), Machine.remember),
    "MEMOIZE": lambda m, _: m.remember(len(m.memo)),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), Machine.recall),
    "GLOBAL": Machine.push_global,
    "STACK_GLOBAL": Machine.push_stack_global,
    **dict.fromkeys(("REDUCE", "NEWOBJ"), Machine.call),
    "NEWOBJ_EX": Machine.call_with_keywords,
    "BUILD": Machine.set_state,
    "PERSID": Machine.push_persistent,
    "BINPERSID": lambda m, _: m.push_persistent(m.pop()),
}
