"""torch's own files (.pth, .pt, .bin), read without torch and without executing what is in them.

Two layouts exist. Since torch 1.6 a file is an uncompressed zip archive: `NAME/data.pkl` is a pickle in which every
tensor names a storage, and `NAME/data/KEY` holds a storage's bytes. Before, a file was a row of pickles (a magic
number, the protocol, the machine, the content, the storages' keys), then the storages, each after its length.

The pickles are read by the restricted unpickler, with stand-ins for the functions that rebuild tensors; bytes are
read when a tensor is asked for, so an optimizer's state beside the weights costs nothing.
"""

from __future__ import annotations

import math
import os
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from tinyvit.checkpoints.checkpoint import CheckpointError
from tinyvit.checkpoints.readers.common import read_into, reason, widen
from tinyvit.files.plain_pickle import PLAIN, PlainArray, PlainUnpickler

MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
MOST_REPEATED = 1 << 26  # elements that an expanded tensor (stride 0) may have beyond those stored

DTYPES = {
    "float64": "<f8", "float32": "<f4", "float16": "<f2", "bfloat16": "<u2",
    "int64": "<i8", "int32": "<i4", "int16": "<i2", "int8": "|i1",
    "uint64": "<u8", "uint32": "<u4", "uint16": "<u2", "uint8": "|u1", "bool": "|b1",
}  # fmt: skip
STORAGES = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8",
    "ByteStorage": "uint8", "BoolStorage": "bool", "UntypedStorage": "uint8",
}  # fmt: skip


class Storage(NamedTuple):
    """A row of numbers in the file; `start` is where this part of it begins."""

    key: str
    dtype: str
    numel: int
    start: int = 0


class StoredTensor(NamedTuple):
    """A tensor whose numbers are still in the file; offset and strides count elements of `dtype`."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str


class PlainDict(dict):  # type: ignore[type-arg]
    """Stands for OrderedDict, whose attributes (a state dict's `_metadata`) are dropped."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        pass


def rebuild(storage: Storage, offset: int, shape: Any, strides: Any, *rest: Any) -> StoredTensor:
    """torch._utils._rebuild_tensor and _rebuild_tensor_v2; `rest` is requires_grad, hooks, metadata."""
    if len(rest) > 2 and rest[2]:
        raise ValueError("it holds a conjugated or negated view of a tensor")
    return StoredTensor(storage, offset, tuple(shape), tuple(strides), storage.dtype)


def rebuild_typed(storage: Storage, offset: int, shape: Any, strides: Any, *rest: Any) -> StoredTensor:
    """torch._utils._rebuild_tensor_v3, for dtypes without a storage class; `rest` is requires_grad, hooks, dtype, …"""
    return StoredTensor(storage, offset, tuple(shape), tuple(strides), rest[2])


def rebuild_parameter(tensor: StoredTensor, *rest: Any) -> StoredTensor:
    return tensor


def rebuild_subclass(function: Any, kind: Any, arguments: Any, state: Any) -> Any:
    return function(*arguments)


TENSORS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): PlainDict,
    ("torch", "Size"): tuple,
    ("torch", "device"): str,
    ("torch", "Tensor"): None,  # named as an argument, never called
    ("torch.nn.parameter", "Parameter"): None,
    ("torch._utils", "_rebuild_tensor"): rebuild,
    ("torch._utils", "_rebuild_tensor_v2"): rebuild,
    ("torch._utils", "_rebuild_tensor_v3"): rebuild_typed,
    ("torch._utils", "_rebuild_parameter"): rebuild_parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): rebuild_parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): rebuild_subclass,
}


class TorchUnpickler(PlainUnpickler):
    """The restricted unpickler, with tensors and their storages."""

    known = "tensors, arrays, strings, numbers and containers"

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file, PLAIN | TENSORS)
        self.storages: dict[str, Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        if name in STORAGES and module in ("torch", "torch.cuda", "torch.storage"):
            return STORAGES[name]
        if name in DTYPES and module == "torch":
            return name
        return super().find_class(module, name)

    def persistent_load(self, pid: Any) -> Storage:
        kind, dtype, key, _, numel, *view = (text(part) for part in pid)
        if kind != "storage" or dtype not in DTYPES or not isinstance(key, str) or not isinstance(numel, int):
            raise ValueError(f"it refers to {kind!r}, expected a storage")
        storage = self.storages.setdefault(key, Storage(key, dtype, numel))
        return storage._replace(start=view[0][1]) if view and view[0] else storage


def text(value: Any) -> Any:
    """Python 2's strings as strings."""
    return value.decode("latin1") if isinstance(value, bytes) else value


Places = Mapping[str, tuple[int, int, int]]  # of each storage: where it starts, how many bytes it has, their CRC or 0


class TorchFile:
    """The content of a .pth file: `content`, in which tensors are StoredTensor, and `read`, which gets their numbers.

    Raises CheckpointError for a file that is damaged, or that asks for anything but tensors and plain containers.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with open(path, "rb") as file:
                self.size = os.fstat(file.fileno()).st_size
                archive = file.read(2) == b"PK"
                file.seek(0)
                self.places, self.content = open_archive(file) if archive else open_legacy(file, self.size)
        except Exception as error:  # a broken or hostile stream can raise nearly anything
            raise CheckpointError(f"{path}: cannot be read as a torch file: {reason(error)}") from None

    def read(self, name: str, value: Any) -> np.ndarray:
        """The numbers of an entry of the content, in memory that nothing else uses; bfloat16 comes as float32."""
        try:
            if isinstance(value, PlainArray):
                return value.array().copy()
            if not isinstance(value, StoredTensor):
                raise ValueError(f"expected a tensor, found a {type(value).__name__}")
            return self.tensor(value)
        except Exception as error:
            raise CheckpointError(f"{self.path}: {name} cannot be read: {reason(error)}") from None

    def tensor(self, tensor: StoredTensor) -> np.ndarray:
        storage, offset, shape, strides, dtype = tensor
        kind = item_type(dtype)
        if len(shape) != len(strides) or min((storage.start, offset, *shape, *strides), default=0) < 0:
            raise ValueError("its shape is damaged")
        count = math.prod(shape)
        reach = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) if count else 0
        if count > reach + MOST_REPEATED:
            raise ValueError("its strides repeat the same few numbers")
        flat = self.part(storage, offset * kind.itemsize, reach * kind.itemsize).view(kind)
        strides = [stride * kind.itemsize for stride in strides]
        view = np.lib.stride_tricks.as_strided(flat, shape, strides)  # within `flat`: it has `reach` elements
        if dtype == "bfloat16":
            return widen(view)
        return view if view.flags.c_contiguous and count == reach else np.array(view, order="C")

    def part(self, storage: Storage, skip: int, size: int) -> np.ndarray:
        """`size` of a storage's bytes, after `skip`, from the file."""
        if storage.key not in self.places:
            raise ValueError(f"its storage {storage.key} is missing")
        start, stored, crc = self.places[storage.key]
        skip += storage.start * item_type(storage.dtype).itemsize
        if skip + size > stored:
            raise ValueError(f"it ends at byte {skip + size} of a storage of {stored}")
        if start + skip + size > self.size:
            raise ValueError("the file is cut short")
        content = np.empty(size, np.uint8)
        with open(self.path, "rb", buffering=0) as file:
            read_into(file, start + skip, content)
        if crc and size == stored and zlib.crc32(content) != crc:  # 0: the writer left it out
            raise ValueError("its bytes are damaged (the checksum differs)")
        return content


def item_type(dtype: str) -> np.dtype:
    """The NumPy dtype that holds an element; of bfloat16, its bits."""
    return np.dtype(DTYPES[dtype])


def open_archive(file: BinaryIO) -> tuple[Places, Any]:
    """Where the storages are, and the content, of a zip archive."""
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
    roots = [m.filename.removesuffix("data.pkl") for m in members if m.filename.endswith("/data.pkl")]
    if len(roots) != 1:
        raise ValueError("it is a zip archive, but not one of torch's: it holds no data.pkl")
    root = roots[0]
    places = {}
    if any(member.filename.startswith(f"{root}code/") for member in members):
        raise ValueError("it is a TorchScript program, expected a state dict")
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{member.filename} is compressed, which torch never does")
        file.seek(member.header_offset)
        name_length, extra_length = struct.unpack("<26x2H", file.read(30))
        start = member.header_offset + 30 + name_length + extra_length
        places[member.filename.removeprefix(root).removeprefix("data/")] = (start, member.file_size, member.CRC)
    if "byteorder" in places and stored_bytes(file, places["byteorder"]) != b"little":
        raise ValueError("it was written on a big-endian machine")
    file.seek(places["data.pkl"][0])
    return places, TorchUnpickler(file).load()


def stored_bytes(file: BinaryIO, place: tuple[int, int, int]) -> bytes:
    file.seek(place[0])
    return file.read(min(place[1], 16))


def open_legacy(file: BinaryIO, size: int) -> tuple[Places, Any]:
    """Where the storages are, and the content, of a row of pickles."""
    if TorchUnpickler(file).load() != MAGIC:
        raise ValueError("it does not begin as torch's files do")
    protocol, machine = TorchUnpickler(file).load(), TorchUnpickler(file).load()
    if protocol != PROTOCOL:
        raise ValueError(f"its protocol is {protocol}, expected {PROTOCOL}")
    if not {text(key): value for key, value in machine.items()}.get("little_endian", True):
        raise ValueError("it was written on a big-endian machine")
    unpickler = TorchUnpickler(file)
    content, keys = unpickler.load(), TorchUnpickler(file).load()
    places = {}
    position = file.tell()
    for key in map(text, keys):
        storage = unpickler.storages[key]
        file.seek(position)
        (numel,) = struct.unpack("<q", file.read(8))
        length = numel * item_type(storage.dtype).itemsize
        places[key] = (position + 8, length, 0)
        position += 8 + length
        if numel < 0 or position > size:
            raise ValueError("the file is cut short")
    return places, content
