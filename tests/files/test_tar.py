"""Reading tar archives: held against Python's tarfile, and against damage by accident and on purpose."""

import io
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyvit.files.tar import Member, read_members

FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
names = st.text(st.characters(codec="utf-8", exclude_characters="\0\n"), min_size=1, max_size=90).filter(
    lambda name: name.strip("/")
)
deep_names = st.builds(lambda name, times: "folder/" * times + name.strip("/"), names, st.integers(0, 30))


def archive(members, kind=tarfile.PAX_FORMAT, **how):
    """An archive of (name, content) or of TarInfo."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=kind, **how) as tar:
        for name, content in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size, info.mtime = len(content), 1.5 if kind == tarfile.PAX_FORMAT else 1
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


def read(tmp_path, content):
    (tmp_path / "a.tar").write_bytes(content)
    with open(tmp_path / "a.tar", "rb") as file:
        return list(read_members(file))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("tar")


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(deep_names, st.binary(max_size=1500)), max_size=6), st.sampled_from(FORMATS), st.data())
def test_members_are_those_of_tarfile(place, members, kind, data):
    try:
        content = archive(members, kind)
    except ValueError:  # ustar has no room for some names
        return
    found = read(place, content)
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        assert found == [Member(m.name, "", m.offset_data, m.size) for m in tar]
    assert [content[m.offset :][: m.size] for m in found] == [c for _, c in members]
    # Cut off anywhere before its end mark, it says so.
    cut = data.draw(st.integers(0, found[-1].offset + found[-1].size if found else 0))
    with pytest.raises(ValueError, match="cut off"):
        read(place, content[:cut])


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 511).filter(lambda byte: byte not in range(148, 156)), st.integers(1, 255), st.sampled_from(FORMATS)
)
def test_a_damaged_header_is_no_end(place, byte, change, kind):
    content = bytearray(archive([("a.jpg", b"x" * 600), ("b.jpg", b"y")], kind))
    second = read(place, content)[0].offset + 1024
    content[second + byte] ^= change
    with pytest.raises(ValueError, match=f"cut off or damaged at byte {second}"):
        read(place, content)


def special(name, kind, **what):
    info = tarfile.TarInfo(name)
    info.type = kind
    for key, value in what.items():
        setattr(info, key, value)
    return info


def test_kinds(place):
    kinds = [(tarfile.SYMTYPE, "a link"), (tarfile.LNKTYPE, "a link"), (tarfile.FIFOTYPE, "a pipe")]
    kinds += [(tarfile.CHRTYPE, "a device"), (tarfile.DIRTYPE, "a folder"), (tarfile.REGTYPE, "")]
    kinds += [(tarfile.AREGTYPE, ""), (tarfile.CONTTYPE, ""), (tarfile.GNUTYPE_SPARSE, "sparse")]
    kinds += [(b"V", "of the unknown kind b'V'")]
    content = archive([(special("m", kind, linkname="/etc/passwd"), b"") for kind, _ in kinds], tarfile.GNU_FORMAT)
    assert [member.kind for member in read(place, content)] == [what for _, what in kinds]
    sparse = special("m", tarfile.REGTYPE, pax_headers={"GNU.sparse.map": "0,1"})
    assert [member.kind for member in read(place, archive([(sparse, b"")]))] == ["sparse"]


def test_times_of_access_are_no_part_of_a_name(place):
    """GNU writes them where ustar has the beginning of a long name."""
    header = bytearray(tarfile.TarInfo("a.jpg").tobuf(tarfile.GNU_FORMAT))
    header[345:357] = b"14000000000\0"
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    assert [member.name for member in read(place, bytes(header) + bytes(1024))] == ["a.jpg"]


def test_no_archives(place):
    good = archive([("a.jpg", b"x")])
    for content, message in [
        (b"", "it is no tar archive, or cut off: empty file"),
        (b"PK" * 1000, "it is no tar archive"),
        (b"\x1f\x8b" + bytes(2000), "it is compressed: decompress it"),
        (good + good, "it goes on after its end mark at byte .*, as archives that were joined by cat do"),
        (archive([("a.jpg", b"x")], pax_headers={"size": "9" * 30}), "cut off: a.jpg has 9999.* bytes"),
        (archive([("a.jpg", b"x")], pax_headers={"size": "-9999"}), "cut off: a.jpg has -9999 bytes"),
        (good[:2048] + archive([("b", b"")], pax_headers={"size": "-9999"}), "damaged at byte 2048: b has -9999 bytes"),
        (archive([(special("a", tarfile.XHDTYPE), b"0 a=b\n")]), "it is no tar archive, or cut off: invalid header"),
        (archive([(special("a", tarfile.XHDTYPE), b"")] * 2000), "it is no tar archive, or cut off: .*recursion depth"),
    ]:
        with pytest.raises(ValueError, match=message):
            read(place, content)


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME])
def test_a_header_that_claims_gigabytes_is_not_read(place, kind):
    info = tarfile.TarInfo("a.jpg")
    info.type, info.size = kind, 2**33
    with open(place / "b.tar", "wb+") as file:
        file.write(info.tobuf(tarfile.GNU_FORMAT))
        file.truncate(2**33)
        file.seek(0)
        with pytest.raises(ValueError, match="goes on for 8589934592 bytes, at most 1048576 are read"):
            list(read_members(file))


def test_sizes_beyond_octal_digits(place):
    """GNU's base 256; a size that the file cannot hold is no memory to allocate."""
    info = tarfile.TarInfo("a.jpg")
    for size in (2**33, 2**63, 2**80):
        info.size = size
        with pytest.raises(ValueError, match=f"cut off: a.jpg has {size} bytes"):
            read(place, info.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
