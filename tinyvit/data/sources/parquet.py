"""Hugging Face data sets saved as parquet: a column of image files' bytes and a column of labels."""

from __future__ import annotations

import contextlib
import json
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyvit.data.base import DataError
from tinyvit.data.sources.shards import by_split, files_of
from tinyvit.data.stored import Rows
from tinyvit.files.text import one_line

if TYPE_CHECKING:
    import pyarrow

IMAGES = ("image", "img", "picture", "photo")  # usual names of the columns, in the order of preference
ROWS = 16  # that are read at a time
KEPT = 1 << 32  # bytes of images
LARGEST_GROUP = CACHE = 1 << 30  # bytes of images in a row group; in all those that are kept
LABELS = ("label", "labels", "fine_label", "class", "target")


def parquet_files(path: Path) -> list[Path]:
    """The parquet files of a data set; `metadata` is the name of image folders' notes."""
    return [file for file in files_of(path, ".parquet") if file.stem != "metadata"]


def find_in_parquet(path: Path) -> tuple[dict[str, Rows], Sequence[str]]:
    """The images of parquet files by part, and the order of their classes; see tinyvit.data.load_data.

    The images' bytes are kept in memory as they are stored if they take at most KEPT. Others are read when they are
    wanted, a row group for each image: slowly, in a random order. Raises DataError, also without pyarrow.
    """
    found = by_split(path, parquet_files(path))
    parts = {part: [Shard(file) for file in files] for part, files in found.items()}
    if [*parts] == ["train"] and (mixed := [s.file for s in parts["train"] if "split" in s.schema.names]):
        raise DataError(f"{mixed[0]} has a column split, which is not read: expected a file for each, train and test")
    order = parts["train"][0].class_names
    train = read_split(path, parts["train"])
    if train is None:
        raise DataError(f"{path}: the training images have no labels (all are null or -1)")
    read = {part: read_split(path, shards) for part, shards in parts.items() if part != "train"}
    others = {part: rows for part, rows in read.items() if rows is not None}  # published tests may lack their labels
    if not order and all(name.isdecimal() for name in train.classes):
        order = sorted(set(train.classes), key=int)
    return {"train": train, **others}, order


def read_split(root: Path, shards: Sequence[Shard]) -> Rows | None:
    """The images of a split, or None where it has no labels. Raises DataError naming a file, column or row."""
    found = [name for shard in shards for name in shard.classes]
    classes = [name for name in found if name is not None]
    if not classes:
        if not found:
            raise DataError(f"{shards[0].file} has no rows")
        return None
    base = root if root.is_dir() else root.parent
    names = [f"{s.file.relative_to(base).as_posix()}, row {i}" for s in shards for i in range(len(s.classes))]
    if None in found:
        raise DataError(f"{base / names[found.index(None)]} has no label (it is null or -1)")
    return Rows(base, names, classes, contents_of(shards))


def contents_of(shards: Sequence[Shard]) -> Callable[[int], bytes]:
    """What gives the bytes of each image of all shards. Raises DataError for too large row groups."""
    sizes = [size for shard in shards for size in shard.group_sizes]
    if sum(sizes) <= KEPT:
        return [content for shard in shards for content in shard.images()].__getitem__
    if max(sizes) > LARGEST_GROUP:
        large = next(shard.file for shard in shards if max(shard.group_sizes, default=0) > LARGEST_GROUP)
        raise DataError(f"{large} has row groups of {max(sizes):,} bytes, expected at most {LARGEST_GROUP:,}")
    groups = [(shard, g) for shard in shards for g in range(len(shard.groups))]
    starts = list(accumulate((shard.groups[g].num_rows for shard, g in groups), initial=0))  # the first row of each
    kept = lru_cache(max(2, CACHE // max(sizes)))(lambda shard, g: shard.group(g))

    def read(i: int) -> bytes:
        k = bisect_right(starts, i) - 1
        return kept(*groups[k])[i - starts[k]].as_py() or b""

    return read


class Shard:
    """One parquet file. Raises DataError for what it lacks."""

    def __init__(self, file: Path) -> None:
        self.file = file
        try:
            import pyarrow.parquet
        except ImportError:
            raise DataError('reading parquet files needs pyarrow: pip install "tinyvit[parquet]"') from None
        self.pyarrow = pyarrow
        with self._reading():
            self.metadata = pyarrow.parquet.read_metadata(file)
            self.groups = [self.metadata.row_group(g) for g in range(self.metadata.num_row_groups)]
            self.schema = self.metadata.schema.to_arrow_schema()
            str(self.schema)  # decodes all names, of which damaged ones fail here

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except (self.pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise DataError(f"{self.file} is not a readable parquet file: {one_line(error)}") from None

    @cached_property
    def group_sizes(self) -> list[int]:
        """How many bytes the images of each row group take."""
        name = self.image_column
        with self._reading():
            columns = [[group.column(c) for c in range(group.num_columns)] for group in self.groups]
            return [sum(c.total_uncompressed_size for c in some if f"{c.path_in_schema}.".startswith(f"{name}."))
                    for some in columns]  # fmt: skip

    def group(self, number: int) -> pyarrow.ChunkedArray:
        """The images' bytes in a row group."""
        with self._reading():
            whole = self.pyarrow.parquet.ParquetFile(self.file, metadata=self.metadata)
            return self._bytes(whole.read_row_group(number, columns=[self.image_column]).column(0).combine_chunks())

    def _bytes(self, column: Any) -> Any:
        """The column itself; of a struct, its bytes."""
        return column.field("bytes") if self.pyarrow.types.is_struct(column.type) else column

    @cached_property
    def features(self) -> dict[str, Mapping[str, Any]]:
        """What Hugging Face's `datasets` noted about each column; nothing where it did not."""
        try:
            found = json.loads(self.schema.metadata[b"huggingface"])["info"]["features"]
            return {name: found[name] for name in self.schema.names if isinstance(found.get(name), Mapping)}
        except (KeyError, TypeError, ValueError, AttributeError):
            return {}

    @property
    def class_names(self) -> list[str]:
        """The names that the label column notes for its numbers; none where it does not."""
        names = self.features.get(self.label_column, {}).get("names")
        return [str(name) for name in names] if isinstance(names, list) else []

    @cached_property
    def classes(self) -> list[str | None]:
        """Each row's class in words; None where it has none (null, or -1 as `datasets` writes it)."""
        names = self.class_names

        def word(row: int, value: int | str | None) -> str | None:
            if value is None or (isinstance(value, int) and value < 0):
                return None
            if isinstance(value, str) or not names:
                return str(value)
            if value >= len(names):
                raise DataError(f"{self.file}, row {row} has the label {value}, expected 0 ... {len(names) - 1}")
            return names[value]

        return [word(*each) for each in enumerate(self._read(self.label_column))]

    def images(self) -> list[bytes]:
        """Each row's bytes; b"" for a row without an image."""
        return [value or b"" for value in self._read(self.image_column)]

    @property
    def image_column(self) -> str:
        """The column of images: as noted by `datasets`, else of bytes, alone or in a struct."""
        types = self.pyarrow.types

        def holds(kind: pyarrow.DataType) -> bool:
            if types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
                kind = kind.field("bytes").type
            return types.is_binary(kind) or types.is_large_binary(kind)

        return self._pick("images (bytes, or a struct with bytes)", "Image", holds, IMAGES)

    @property
    def label_column(self) -> str:
        """The column of labels: as noted by `datasets`, else of whole numbers or text."""
        types = self.pyarrow.types

        def holds(kind: pyarrow.DataType) -> bool:
            kind = kind.value_type if types.is_dictionary(kind) else kind
            return types.is_integer(kind) or types.is_string(kind) or types.is_large_string(kind)

        return self._pick("labels (whole numbers or text)", "ClassLabel", holds, LABELS)

    def _pick(self, what: str, noted_as: str, holds: Callable[[Any], bool], usual: Sequence[str]) -> str:
        """The column whose type `holds` it: as noted, else of a usual name, else the only one."""
        possible = [column.name for column in self.schema if holds(column.type)]
        noted = [name for name in possible if self.features.get(name, {}).get("_type") == noted_as]
        candidates = noted or possible
        named = [name for name in usual if name in candidates] or candidates
        if named and self.schema.names.count(named[0]) > 1:
            raise DataError(f"{self.file} has several columns called {named[0]}")
        if named and (len(candidates) == 1 or named[0] in usual):
            return named[0]
        kinds = ", ".join(f"{column.name} ({str(column.type)[:60]})" for column in self.schema)
        raise DataError(
            f"{self.file}: expected a column of {what} called {', '.join(usual[:-1])} or {usual[-1]}, "
            f"found {kinds or 'no columns'}"
        )

    def _read(self, name: str) -> list[Any]:
        """The values of a column; of a struct, its bytes.

        It is read by few rows, and equal values are kept once: a small file can repeat a large one many times.
        """
        values: list[Any] = []
        seen: dict[Any, Any] = {}
        with self._reading():
            for batch in self.pyarrow.parquet.ParquetFile(self.file).iter_batches(ROWS, columns=[name]):
                values += [seen.setdefault(value, value) for value in self._bytes(batch.column(0)).to_pylist()]
        return values
