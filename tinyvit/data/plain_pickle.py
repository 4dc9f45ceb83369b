"""Reading a pickled dictionary of a data set; nothing in the file is executed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tinyvit.data.base import DataError
from tinyvit.files.plain_pickle import PLAIN, PlainUnpickler, finished

__all__ = ["PLAIN", "load_plain_pickle"]


def load_plain_pickle(path: Path) -> dict[str, Any]:
    """The dictionary in a pickle file, its keys as strings. Raises DataError: nothing in the file is executed."""
    with open(path, "rb") as file:
        try:
            content = finished(PlainUnpickler(file).load())
        except Exception as error:  # a broken or hostile stream can raise nearly anything
            message = " ".join(str(error).split())[:200] or type(error).__name__
            raise DataError(f"cannot read {path}: {message}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} holds a {type(content).__name__}, expected a dictionary")
    return {key.decode(errors="replace") if isinstance(key, bytes) else key: value for key, value in content.items()}
