"""Names and messages as they may be shown: file and class names can hold anything."""

from __future__ import annotations


def printable(text: str) -> str:
    """`text` with everything escaped that a terminal would obey or could not show.

    These are control characters, newlines and tabs included, and bytes of a file name that are no text.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def one_line(error: object) -> str:
    """An error's message as one short line; its class for one without a message."""
    return " ".join(str(error)[:400].split())[:200] or type(error).__name__
