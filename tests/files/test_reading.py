"""Only regular files are opened; JSON is limited in size and depth; fields have types and ranges."""

import json
import os
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyvit.files.fields import boolean, checked, either, integer, list_of, number, one_of, optional, text
from tinyvit.files.reading import check_regular, open_regular, parse_json, read_text


def test_a_regular_file_is_opened(tmp_path):
    (tmp_path / "a").write_bytes(b"content")
    (tmp_path / "link").symlink_to("a")
    for name in ("a", "link"):
        assert open_regular(tmp_path / name).read() == b"content"
        assert check_regular(tmp_path / name) == 7


@pytest.mark.skipif(sys.platform == "win32", reason="named pipes are files only on POSIX")
def test_pipes_and_devices_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero", "/dev/null"):
        for read in (open_regular, check_regular, read_text):
            with pytest.raises(OSError, match="expected a regular file") as caught:
                read(path)
            assert caught.value.filename == str(path)
    with pytest.raises(IsADirectoryError):
        open_regular(tmp_path)
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "absent")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
        ("[1]", "holds a list, expected an object"),
        ("{", "not JSON"),
        ('{"a": ' + "1" * 5000 + "}", "not JSON"),
    ],
)
def test_json_that_is_refused(content, problem):
    with pytest.raises(ValueError, match=problem):
        parse_json(content)


def test_text_that_is_not_utf8(tmp_path):
    (tmp_path / "a.json").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(ValueError, match="not UTF-8 text"):
        read_text(tmp_path / "a.json")


FIELDS = {
    "width": integer(1, 100),
    "rate": number(0, 1),
    "bias": boolean,
    "name": text,
    "mode": one_of("center", "squash"),
    "mean": list_of(number(-1, 1), 1, 4),
    "size": either(integer(1, 9), list_of(integer(1, 9), 2, 2)),
    "scale": optional(number(0, 1)),
}
GOOD = {"width": 3, "rate": 1, "bias": True, "name": "x", "mode": "squash", "mean": [0, 0.5], "size": [1, 2]}


def test_good_values_come_back():
    assert checked(GOOD | {"scale": None, "other": 1}, FIELDS) == GOOD | {
        "mean": (0, 0.5),
        "size": (1, 2),
        "scale": None,
    }
    assert checked({}, FIELDS) == {}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("width", 0), ("width", 101), ("width", 2.0), ("width", True), ("width", "3"), ("width", None),
        ("width", 10**400),
        ("rate", float("nan")), ("rate", float("inf")), ("rate", 10**400), ("rate", "0.5"), ("rate", True),
        ("bias", 1), ("bias", "true"), ("name", 3), ("name", "x" * 10_001), ("mode", "crop"), ("mode", ["center"]),
        ("mean", []), ("mean", [0] * 5), ("mean", 0.5), ("mean", {"0": 1}), ("mean", [0, "x"]), ("size", [1]),
        ("size", 10), ("scale", 2),
    ],
)  # fmt: skip
def test_bad_values_are_named(name, value):
    with pytest.raises(ValueError, match=f"{name}( is .*,|:) expected ") as caught:
        checked(GOOD | {name: value}, FIELDS)
    assert len(str(caught.value)) < 200 and "\n" not in str(caught.value)


def test_missing_fields_and_no_object():
    with pytest.raises(ValueError, match="there is no width"):
        checked({}, FIELDS, required=["width"])
    for values in ([], None, 3, "x" * 10**6):
        with pytest.raises(ValueError, match="expected an object") as caught:
            checked(values, FIELDS)
        assert len(str(caught.value)) < 100


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(values=st.dictionaries(st.sampled_from(list(FIELDS)), JSON))
def test_any_json_gives_values_in_range_or_one_line(values):
    try:
        found = checked(values, FIELDS)
    except ValueError as error:
        assert "\n" not in str(error)
    else:
        assert checked(json.loads(json.dumps(found)), FIELDS) == found
