"""Checking what files say: a description of their fields, each with a type and a range.

    FIELDS = {"hidden_size": integer(1, 65536), "image_mean": list_of(number(-100, 100), 1, 64)}
    values = checked(json.loads(text), FIELDS)

A check is a function that gives the value as it is to be used, or raises ValueError saying what it expects.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Collection, Mapping
from typing import Any

Check = Callable[[Any], Any]


def checked(values: Any, fields: Mapping[str, Check], *, required: Collection[str] = ()) -> dict[str, Any]:
    """The fields of `values`, each passed through its check; fields without a check are left out.

    Args:
        values: an object read from a file.
        fields: the check of each field.
        required: fields that must be present.

    Raises:
        ValueError: `values` is no object, a required field is missing, or a value does not pass its check.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"it holds {shown(values)}, expected an object")
    for name in required:
        if name not in values:
            raise ValueError(f"there is no {name}")
    found = {}
    for name, check in fields.items():
        if name in values:
            try:
                found[name] = check(values[name])
            except ValueError as error:
                given = ":" if isinstance(values[name], Mapping) else f" is {shown(values[name])},"
                raise ValueError(f"{name}{given} {error}") from None
    return found


def record(fields: Mapping[str, Check]) -> Check:
    """An object that has all of these fields; others are left out."""
    return lambda values: checked(values, fields, required=fields)


def shown(value: Any) -> str:
    """A short form of any value for a message."""
    if isinstance(value, int) and abs(value) >= 10**40:
        return "a number of more than 40 digits"
    return reprlib.repr(value) if isinstance(value, str | int | float | None) else f"a {type(value).__name__}"


def integer(low: int, high: int) -> Check:
    """A whole number from `low` to `high`."""

    def check(value: Any) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise ValueError(f"expected a whole number from {low} to {high}")
        return value

    return check


def number(low: float, high: float) -> Check:
    """A finite number from `low` to `high`, as a float."""

    def check(value: Any) -> float:
        if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
            raise ValueError(f"expected a number from {low:g} to {high:g}")
        return float(value)

    return check


def boolean(value: Any) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise ValueError("expected true or false")
    return value


def text(value: Any) -> str:
    """A string of at most 10,000 characters."""
    if not isinstance(value, str) or len(value) > 10_000:
        raise ValueError("expected a text of at most 10000 characters")
    return value


def one_of(*choices: Any) -> Check:
    """One of a few values of JSON, of the same type."""
    expected = f"{', '.join(map(str, choices[:-1]))} or {choices[-1]}"

    def check(value: Any) -> Any:
        if not any(type(value) is type(choice) and value == choice for choice in choices):
            raise ValueError(f"expected {'one of ' if choices[2:] else ''}{expected}")
        return value

    return check


def list_of(item: Check, low: int, high: int) -> Check:
    """A list of `low` to `high` items that all pass a check, as a tuple."""

    def check(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list | tuple) or not low <= len(value) <= high:
            raise ValueError(f"expected a list of {low} to {high} items")
        return tuple(map(item, value))

    return check


def object_of(item: Check) -> Check:
    """An object whose values all pass a check."""

    def check(value: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise ValueError("expected an object")
        return {name: item(each) for name, each in value.items()}

    return check


def either(*checks: Check) -> Check:
    """What passes one of several checks."""

    def check(value: Any) -> Any:
        problems = []
        for each in checks:
            try:
                return each(value)
            except ValueError as error:
                problems.append(str(error))
        raise ValueError(", or ".join(problems))

    return check


def optional(check: Check) -> Check:
    """null, or what passes a check."""
    return lambda value: None if value is None else check(value)
