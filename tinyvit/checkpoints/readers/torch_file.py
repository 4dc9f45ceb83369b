"""torch's own files (.pth, .pt, .bin), read without torch and without executing what is in them.

There are two layouts. Since torch 1.6 a file is an uncompressed zip archive: `NAME/data.pkl` is a pickle in which every
tensor names a storage, and `NAME/data/KEY` holds a storage's bytes. Before, a file was a row of pickles (a magic
number, the protocol, the machine, the content, the storages' keys), then the storages, each after its length.

`files.plain_pickle` interprets the pickles. The numbers of a tensor are read only when they are needed, so an
optimizer's state beside the weights costs nothing.
"""

from __future__ import annotations

import io
import math
import os
import re
import struct
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from tinyvit.checkpoints.checkpoint import CheckpointError
from tinyvit.checkpoints.readers.common import DTYPES, open_zip, read_bytes, widen
from tinyvit.files.plain_pickle import MOST_DIMENSIONS, PLAIN, Function, StandIn, as_it_is, as_text, load_pickle
from tinyvit.files.text import one_line

MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
SHARED = 1 << 26  # bytes that tensors may have beyond the file's size, when they share storages

STORAGES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8",
    "ByteStorage": "U8", "BoolStorage": "BOOL", "UntypedStorage": "U8",
}  # fmt: skip
TYPES = {"bfloat16": "BF16"} | {dtype.name: code for code, dtype in DTYPES.items() if code != "BF16"}
# Names of the standard library that stand for values. Others can do something: a file that names them is refused.
VALUES = re.compile(
    r"argparse\.Namespace|pathlib\.(\w+\.)?\w*Path|collections\.\w+|datetime\.\w+|decimal\.Decimal|fractions\.Fraction"
    r"|uuid\.UUID|types\.SimpleNamespace|enum\.\w+|copy_?reg\._reconstructor"
    r"|(builtins|__builtin__)\.(object|int|long|float|complex|bool|str|unicode|list|dict|tuple|range|slice)"
)
STANDARD_LIBRARY = sys.stdlib_module_names | {"__builtin__", "copy_reg", "commands", "cPickle", "urllib2"}


@dataclass(frozen=True)
class Storage:
    """A row of numbers in the file; `start` is where this part of it begins."""

    key: str
    dtype: str
    start: int = 0


@dataclass(frozen=True)
class StoredTensor:
    """A tensor whose numbers are still in the file; offset and strides count elements of `dtype`."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str


def rebuild(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> Any:
    """torch._utils._rebuild_tensor and _rebuild_tensor_v2; `rest` is requires_grad, hooks, metadata."""
    if len(rest) > 2 and rest[2]:
        raise ValueError("it holds a conjugated or negated view of a tensor")
    return stored_tensor(storage, offset, shape, strides, getattr(storage, "dtype", None))


def rebuild_typed(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> Any:
    """torch._utils._rebuild_tensor_v3, for dtypes without a storage class; `rest` is requires_grad, hooks, dtype, …"""
    return stored_tensor(storage, offset, shape, strides, rest[2])


def stored_tensor(storage: Any, offset: Any, shape: Any, strides: Any, dtype: Any) -> Any:
    """A tensor; a StandIn for one whose dtype is not read. Raises ValueError when it is damaged."""
    if isinstance(storage, StandIn) or isinstance(dtype, StandIn):
        return storage if isinstance(storage, StandIn) else dtype
    sizes = (shape, strides)
    if not all(isinstance(numbers, tuple) and len(numbers) <= MOST_DIMENSIONS for numbers in sizes):
        raise ValueError(f"it holds a tensor without a shape of at most {MOST_DIMENSIONS} dimensions")
    numbers = (offset, *shape, *strides)
    if len(shape) != len(strides) or not all(isinstance(n, int) and 0 <= n < 1 << 60 for n in numbers):
        raise ValueError(f"it holds a tensor whose shape is damaged: {str(numbers)[:100]}")
    if not isinstance(storage, Storage) or not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError("it holds a tensor without a storage or a dtype")
    return StoredTensor(storage, offset, shape, strides, dtype)


def rebuild_parameter(tensor: Any, *rest: Any) -> Any:
    return tensor


def rebuild_subclass(function: Any, kind: Any, arguments: Any, state: Any) -> Any:
    """torch._tensor._rebuild_from_type_v2, for parameters with attributes and for subclasses of tensors."""
    if not isinstance(function, Function) or not isinstance(arguments, tuple) or function.call is rebuild_subclass:
        return StandIn("torch.Tensor")
    return function.call(*arguments)


def ordered_dict(items: Any = ()) -> dict[Any, Any]:
    """OrderedDict(); Python 2 gives it a list of pairs, which is emptied, so that to give it again costs nothing."""
    pairs = items[:] if isinstance(items, list) else []
    if isinstance(items, list):
        items.clear()
    if not all(isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str | bytes) for pair in pairs):
        raise ValueError("it holds an OrderedDict whose keys are not text")
    return dict(pairs)


TENSORS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): Function(ordered_dict),
    ("torch", "Size"): Function(as_it_is),
    ("torch._utils", "_rebuild_tensor"): Function(rebuild),
    ("torch._utils", "_rebuild_tensor_v2"): Function(rebuild),
    ("torch._utils", "_rebuild_tensor_v3"): Function(rebuild_typed),
    ("torch._utils", "_rebuild_parameter"): Function(rebuild_parameter),
    ("torch._utils", "_rebuild_parameter_with_state"): Function(rebuild_parameter),
    ("torch._tensor", "_rebuild_from_type_v2"): Function(rebuild_subclass),
}
FUNCTIONS = PLAIN | TENSORS


def other_name(module: str, name: str) -> Any:
    """The value of a name that is no function of TENSORS. Raises ValueError for functions of the standard library."""
    if name in STORAGES and module in ("torch", "torch.cuda", "torch.storage"):
        return STORAGES[name]
    if name in TYPES and module == "torch":
        return TYPES[name]
    full = f"{module}.{name}"[:100]
    if module.partition(".")[0] in STANDARD_LIBRARY and not VALUES.fullmatch(full):
        raise ValueError(f"it asks for {full}, and only tensors, arrays, strings, numbers and containers are read")
    return StandIn(full)


def describe(value: Any) -> str:
    """What a value of a pickle is, for a message."""
    return value.name if isinstance(value, StandIn) else f"a {type(value).__name__}"


class TorchFile:
    """The content of a .pth file: `content`, in which tensors are StoredTensor, and `read`, which gets their numbers.

    Args:
        path: for messages.
        file: the file, which stays open as long as numbers are read.

    Raises CheckpointError for a file that is damaged, or that names a function of the standard library.
    """

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self.file, self.size = path, file, os.fstat(file.fileno()).st_size
        self.left = self.size + SHARED  # bytes that may still be read
        self.storages: dict[str, Storage | StandIn] = {}
        self.places: dict[str, Callable[[], np.ndarray]] = {}  # what reads a storage's bytes
        self.loaded: dict[str, np.ndarray] = {}  # storages of which only a part has been asked for
        try:
            archive = file.read(2) == b"PK"
            file.seek(0)
            self.content = self.open_archive() if archive else self.open_legacy()
        except CheckpointError:
            raise
        except Exception as error:  # a broken or hostile stream can raise nearly anything
            raise CheckpointError(f"{path}: cannot be read as a torch file: {one_line(error)}") from None

    def open_archive(self) -> Any:
        """The content of a zip archive."""
        archive = open_zip(self.file)
        members = {member.filename: member for member in archive.infolist()}
        roots = [name.removesuffix("data.pkl") for name in members if name.endswith("/data.pkl")]
        if len(roots) != 1:
            raise ValueError(f"it is a zip archive, but not one of torch's: it holds {len(roots) or 'no'} data.pkl")
        if any(name.startswith(f"{roots[0]}code/") for name in members):
            raise ValueError("it is a TorchScript program, expected a state dict")

        def read(member: zipfile.ZipInfo) -> np.ndarray:
            return np.frombuffer(archive.read(member), np.uint8)

        for name, member in members.items():
            if member.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{name[:100]} is compressed, which torch never does")
            if member.file_size > self.size:
                raise ValueError("the file is cut short")
            if not member.CRC:  # its writer left out the checksums, which zipfile compares
                del member.CRC
            self.places[name.removeprefix(f"{roots[0]}data/")] = partial(read, member)
        byteorder = members.get(f"{roots[0]}byteorder")
        if byteorder and archive.read(byteorder) != b"little":
            raise ValueError("it was written on a big-endian machine")
        return self.unpickle(io.BytesIO(archive.read(members[f"{roots[0]}data.pkl"])))

    def open_legacy(self) -> Any:
        """The content of a row of pickles."""
        file = self.file
        magic, protocol, machine = (self.unpickle(file) for _ in range(3))
        if magic != MAGIC:
            raise ValueError("it does not begin as torch's files do")
        if protocol != PROTOCOL:
            raise ValueError(f"its protocol is not {PROTOCOL}")
        if not isinstance(machine, dict) or machine.get("little_endian", machine.get(b"little_endian")) is False:
            raise ValueError("it was written on a big-endian machine")
        content, keys = self.unpickle(file), self.unpickle(file)
        if not isinstance(keys, list) or not all(isinstance(key, str | bytes) for key in keys):
            raise ValueError("its list of storages is damaged")
        position = file.tell()
        for key in map(as_text, keys):
            storage = self.storages[key]
            if isinstance(storage, StandIn):
                raise ValueError(f"it holds a {storage.name}, and only tensors of NumPy's dtypes and bfloat16 are read")
            file.seek(position)
            (numel,) = struct.unpack("<q", file.read(8))
            length = numel * DTYPES[storage.dtype].itemsize
            self.places[key] = partial(read_bytes, file, position + 8, length)
            position += 8 + length
            if numel < 0 or position > self.size:
                raise ValueError("the file is cut short")
        return content

    def unpickle(self, file: BinaryIO) -> Any:
        return load_pickle(file, FUNCTIONS, unknown=other_name, persistent=self.storage)

    def storage(self, identifier: Any) -> Any:
        """The storage that a persistent identifier names, ("storage", type, key, device, count); in old files also
        with a view of it, (key, offset, count)."""
        kind, *rest = map(as_text, identifier) if isinstance(identifier, tuple) and len(identifier) <= 6 else [None]
        if kind == "module" and rest and isinstance(rest[0], StandIn):  # a class with its source, in old files
            return rest[0]
        if kind != "storage" or len(rest) < 4:
            raise ValueError("it refers to something that is no storage")
        dtype, key, _, _, *view = rest
        if isinstance(dtype, StandIn) and isinstance(key, str):
            return self.storages.setdefault(key, dtype)
        if not isinstance(dtype, str) or dtype not in DTYPES or not isinstance(key, str):
            raise ValueError("it refers to a damaged storage")
        storage = self.storages.setdefault(key, Storage(key, dtype))
        if not view or view[0] is None or isinstance(storage, StandIn):
            return storage
        start = view[0][1]
        if not isinstance(start, int) or not 0 <= start < 1 << 60:
            raise ValueError("it refers to a damaged view of a storage")
        return replace(storage, start=start)

    def read(self, name: str, value: Any) -> np.ndarray:
        """The numbers of an entry of the content, in memory that nothing else uses; bfloat16 comes as float32."""
        try:
            if isinstance(value, np.ndarray):
                self.count(value.nbytes)
                return value.copy()
            if not isinstance(value, StoredTensor):
                raise ValueError(f"expected a tensor, found {describe(value)}")
            return self.tensor(value)
        except Exception as error:
            raise CheckpointError(f"{self.path}: {name[:100]} cannot be read: {one_line(error)}") from None

    def tensor(self, tensor: StoredTensor) -> np.ndarray:
        item, key = DTYPES[tensor.dtype], tensor.storage.key
        count = math.prod(tensor.shape)
        reach = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.strides, strict=True)) if count else 0
        self.count(max(count, reach) * item.itemsize)
        start = tensor.storage.start * DTYPES[tensor.storage.dtype].itemsize + tensor.offset * item.itemsize
        end = start + reach * item.itemsize
        if key not in self.places:
            raise ValueError(f"its storage {key[:40]} is missing")
        whole = self.loaded.pop(key) if key in self.loaded else self.places[key]()
        if end > whole.size:
            raise ValueError(f"it ends at byte {end} of a storage of {whole.size}")
        if end - start < whole.size:
            self.loaded[key] = whole
        flat, strides = whole[start:end].view(item), [stride * item.itemsize for stride in tensor.strides]
        view = np.lib.stride_tricks.as_strided(flat, tensor.shape, strides)  # within `flat`: it has `reach` elements
        return widen(view) if tensor.dtype == "BF16" else np.array(view, order="C")

    def count(self, size: int) -> None:
        """Keep what is read within the size of the file."""
        self.left -= size
        if self.left < 0:
            raise ValueError(f"its tensors have more bytes than the file ({self.size}): they repeat the same numbers")
