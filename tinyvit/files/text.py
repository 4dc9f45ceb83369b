"""Names and messages as they may be shown: file and class names can hold anything."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


def printable(text: str) -> str:
    """`text` with everything escaped that a terminal would obey or could not show.

    These are control characters, newlines and tabs included, and bytes of a file name that are no text.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def nearest(word: str, known: Iterable[str]) -> str:
    """ "; did you mean X?" for the known word that begins with `word` or is most like it; all are lower case.

    Leading dashes are not compared.
    """
    word, by_name = word.lower().lstrip("-"), {other.lstrip("-"): other for other in known}
    found = [name for name in by_name if name.startswith(word)] or difflib.get_close_matches(word, by_name, n=1)
    return f"; did you mean {by_name[found[0]]}?" if word and found else ""


def one_line(error: object) -> str:
    """An error's message as one short line; of a KeyError what is missing, and its class for one without a message."""
    if isinstance(error, KeyError) and error.args:
        return one_line(f"there is no {error.args[0]}")
    return " ".join(str(error)[:400].split())[:200] or type(error).__name__


def aligned(rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Rows of cells as lines whose columns line up: the first `left` of them to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    cells = [[cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
             for row in rows]  # fmt: skip
    return ["  ".join(row).rstrip() for row in cells]
