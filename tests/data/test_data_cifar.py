"""CIFAR-10's two layouts give the same data; broken files are named; a pickle runs nothing."""

import collections
import io
import os
import pickle
import re

import numpy as np
import pytest
from checkpoint_files import Call
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tinyvit.data import DataError, load_data, read_image
from tinyvit.data.sources.cifar import CLASSES, read_pickle
from tinyvit.files.plain_pickle import PLAIN, Function

COUNTS = {**{f"data_batch_{i}": 10 + i for i in range(1, 6)}, "test_batch": 7}  # any number of records


def data_set(name):
    rng = np.random.default_rng(list(COUNTS).index(name))
    count = COUNTS[name]
    return rng.integers(0, 256, (count, 3072), dtype=np.uint8), rng.integers(0, 10, count).tolist()


def write_binary(folder):
    folder.mkdir(parents=True)
    for name in COUNTS:
        pixels, labels = data_set(name)
        records = np.concatenate([np.array(labels, np.uint8)[:, None], pixels], axis=1)
        (folder / f"{name}.bin").write_bytes(records.tobytes())
    (folder / "batches.meta.txt").write_text("\n".join(CLASSES) + "\n\n")
    return folder


def write_python(folder, protocol=2):
    folder.mkdir(parents=True)
    for name in COUNTS:
        pixels, labels = data_set(name)
        batch = {b"batch_label": name.encode(), b"labels": labels, b"data": pixels, b"filenames": [b"x.png"]}
        (folder / name).write_bytes(pickle.dumps(batch, protocol=protocol))
    meta = {b"label_names": [name.encode() for name in CLASSES], b"num_vis": 3072}
    (folder / "batches.meta").write_bytes(pickle.dumps(meta, protocol=protocol))
    return folder


@pytest.fixture(scope="module")
def binary(tmp_path_factory):
    return load_data(write_binary(tmp_path_factory.mktemp("cifar") / "cifar-10-batches-bin"))


def test_contents(binary):
    assert (binary.name, binary.class_names, binary.image_size, binary.in_chans) == ("cifar10", CLASSES, (32, 32), 3)
    parts = [data_set(f"data_batch_{i}") for i in range(1, 6)]
    pixels = np.concatenate([pixels for pixels, _ in parts]).reshape(-1, 3, 32, 32)
    assert np.array_equal(binary.train.read(np.arange(len(binary.train))), pixels)
    assert binary.train.labels.tolist() == [label for _, labels in parts for label in labels]
    pixels, labels = data_set("test_batch")
    assert np.array_equal(binary.test.read(np.array([6, 2])), pixels[[6, 2]].reshape(2, 3, 32, 32))
    assert binary.test.labels.tolist() == labels and binary.test.labels.dtype == np.int64
    everything = np.concatenate([data_set(f"data_batch_{i}")[0] for i in range(1, 6)]).reshape(-1, 3, 1024) / 255
    np.testing.assert_allclose(binary.mean, everything.mean(axis=(0, 2)), rtol=1e-12)
    np.testing.assert_allclose(binary.std, everything.std(axis=(0, 2)), rtol=1e-10)


@pytest.mark.parametrize("protocol", [0, 2, 3, 4, 5])
def test_python_layout_is_the_same_data(binary, tmp_path, protocol):
    data = load_data(write_python(tmp_path / "anything", protocol))
    assert data.fingerprint == binary.fingerprint and data.class_names == binary.class_names
    assert np.array_equal(data.train.images, binary.train.images)
    assert np.array_equal(data.test.labels, binary.test.labels)


@pytest.mark.parametrize("write, name", [(write_binary, "cifar-10-batches-bin"), (write_python, "cifar-10-batches-py")])
def test_parent_directory(binary, tmp_path, write, name):
    write(tmp_path / name)
    assert load_data(str(tmp_path)).fingerprint == binary.fingerprint


def test_cache_directory(binary, tmp_path, monkeypatch):
    write_binary(tmp_path / "cifar-10-batches-bin")
    assert load_data("cifar10", cache_dir=tmp_path).fingerprint == binary.fingerprint
    monkeypatch.setenv("TINYVIT_CACHE", str(tmp_path))
    assert load_data("cifar10").fingerprint == binary.fingerprint


def test_other_size(binary, tmp_path):
    data = load_data(write_binary(tmp_path / "x"), image_size=48)
    assert data.image_size == (48, 48) and data.fingerprint == binary.fingerprint
    larger, smaller = data.test.read(np.arange(4)), binary.test.read(np.arange(4))
    assert larger.shape == (4, 3, 48, 48)
    np.testing.assert_allclose(larger.mean(axis=(2, 3)), smaller.mean(axis=(2, 3)), atol=6)


@pytest.mark.parametrize("options", [{}, {"crop_pct": 0.9, "interpolation": "bilinear"}, {"crop_mode": "squash"}])
def test_images_are_cut_as_recorded(binary, tmp_path, options):
    """At their own size, too: a run predicts from files what it was trained on."""
    data = load_data(write_binary(tmp_path / "x"), image_size=32, fit_options=options)
    read = data.test.read(np.arange(3))
    for i, image in enumerate(binary.test.read(np.arange(3))):
        file = io.BytesIO()
        Image.fromarray(image.transpose(1, 2, 0)).save(file, "png")
        assert np.array_equal(read_image(file, 32, **data.fit_options), read[i])
    assert data.fit_options == {"crop_pct": 1.0, **options} and data.fingerprint == binary.fingerprint


def test_without_class_names(tmp_path):
    (write_binary(tmp_path / "x") / "batches.meta.txt").unlink()
    assert load_data(tmp_path / "x").class_names == CLASSES


def test_a_huge_file_is_refused_before_it_is_read(tmp_path):
    os.truncate(write_binary(tmp_path / "x") / "data_batch_2.bin", 3073 << 30)
    with pytest.raises(DataError, match=r"data_batch_2\.bin has .* bytes, expected at most 268435456"):
        load_data(tmp_path / "x")


@pytest.mark.parametrize("size", [0, 3072, 3073 * 5 - 1, 3073 * 5 + 1])
def test_truncated_file_is_named(tmp_path, size):
    path = write_binary(tmp_path / "x") / "data_batch_3.bin"
    path.write_bytes(bytes(size))
    with pytest.raises(
        DataError, match=rf"data_batch_3\.bin is truncated: {size} bytes are not a whole number of 3073-"
    ):
        load_data(tmp_path / "x")


def test_missing_file_is_named(tmp_path):
    (write_binary(tmp_path / "x") / "data_batch_4.bin").unlink()
    with pytest.raises(DataError, match=r"x lacks data_batch_4\.bin$"):
        load_data(tmp_path / "x")


def test_wrong_label_is_named(tmp_path):
    path = write_binary(tmp_path / "x") / "test_batch.bin"
    content = bytearray(path.read_bytes())
    content[3073 * 2] = 10
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"test_batch\.bin gives image 2 the label 10, expected 0 to 9"):
        load_data(tmp_path / "x")


ROW = np.zeros((2, 3072), np.uint8)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ([1], "holds a list, expected a dictionary"),
        ({"labels": [0, 1]}, "has no 'data' array of uint8 rows of 3072"),
        ({"data": ROW[:, 1:], "labels": [0, 1]}, "has no 'data' array"),
        ({"data": ROW.astype(float), "labels": [0, 1]}, "has no 'data' array"),
        ({"data": ROW}, "has no 'labels' list of integers"),
        ({"data": ROW, "labels": [0, 0.5]}, "has no 'labels' list of integers"),
        ({"data": ROW, "labels": [0]}, "has 2 images and 1 labels"),
        ({"data": ROW[:0], "labels": []}, "has 0 images and 0 labels"),
        ({"data": ROW, "labels": [0, -1]}, "gives image 1 the label -1, expected 0 to 9"),
    ],
)
def test_strange_dictionaries(tmp_path, batch, message):
    (write_python(tmp_path / "x") / "data_batch_2").write_bytes(pickle.dumps(batch))
    with pytest.raises(DataError, match=rf"data_batch_2 {re.escape(message)}"):
        load_data(tmp_path / "x")


# --- the unpickler ------------------------------------------------------------------------------------------

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False)
    | st.binary(max_size=9) | st.binary(max_size=9).map(bytearray) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=4)
    | st.tuples(inner, inner)
    | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


def unpickled(tmp_path_factory, stream):
    path = tmp_path_factory.getbasetemp() / f"stream-{os.getpid()}"
    path.write_bytes(stream)
    return read_pickle(path)


@given(content=plain, protocol=st.integers(0, 5))
def test_plain_things_come_back(tmp_path_factory, content, protocol):
    assert unpickled(tmp_path_factory, pickle.dumps({"content": content}, protocol=protocol)) == {"content": content}


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("dtype", ["u1", ">i4", "<f8", "?", "S3", "U2", "c8"])
def test_arrays_and_numpy_numbers_come_back(tmp_path_factory, dtype, protocol):
    array = np.array([[0, 1, 2], [3, 4, 5]]).astype(dtype)
    content = {"c": array, "f": np.asfortranarray(array), "number": array[1, 2]}
    found = unpickled(tmp_path_factory, pickle.dumps(content, protocol=protocol))
    for name, value in content.items():
        assert np.array_equal(found[name], value) and found[name].dtype.kind == value.dtype.kind


@pytest.mark.parametrize("numpy_version", [b"numpy.core", b"numpy._core"])
def test_spelling_of_numpy_1_and_2(tmp_path_factory, numpy_version):
    """Each NumPy writes its own module name; both must be read, whichever is installed."""
    stream = pickle.dumps({"data": np.arange(6, dtype=np.uint8), "n": np.int64(3)}, protocol=2)
    stream = re.sub(rb"numpy\._?core", numpy_version, stream)
    assert numpy_version + b".multiarray" in stream
    found = unpickled(tmp_path_factory, stream)
    assert found["data"].tolist() == list(range(6)) and found["n"] == 3


def test_stream_of_python_2(tmp_path_factory):
    """Byte for byte what Python 2 wrote: str for keys and bytes, its own module names."""
    stream = (
        b"\x80\x02}q\x01(U\x06labelsq\x02]q\x03(K\x06K\x09eU\x04dataq\x04cnumpy.core.multiarray\n_reconstruct\nq\x05"
        b"cnumpy\nndarray\nq\x06K\x00\x85U\x01b\x87Rq\x07(K\x01K\x02K\x02\x86cnumpy\ndtype\nq\x08U\x02u1K\x00K\x01\x87R"
        b"q\x09(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x04\x3b\xff\x00\x80tbU\x01s"
        b"c__builtin__\nset\n]\x85Ru."
    )
    found = unpickled(tmp_path_factory, stream)
    assert found["labels"] == [6, 9] and found["s"] == [], "a set comes as a list"
    assert found["data"].dtype == np.uint8 and found["data"].tolist() == [[0x3B, 0xFF], [0x00, 0x80]]


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (Call(os.system, "touch {}"), "posix.system"),
        (Call(os.mkdir, "{}"), "posix.mkdir"),
        (Call(eval, "open('{}', 'w')"), "builtins.eval"),
        (Call(getattr, "{}", "upper"), "builtins.getattr"),
        (Call(np.load, "{}", None, True), "numpy.load"),
        (Call(np.save, "{}", 1), "numpy.save"),
        (collections.OrderedDict(a=1), "collections.OrderedDict"),
    ],
)
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_anything_else_is_refused_by_name(tmp_path, content, name, protocol):
    marker = tmp_path / "ran"
    stream = pickle.dumps({"x": content}, protocol=protocol)
    if isinstance(content, Call):
        function, args = content.call
        args = tuple(arg.replace("{}", str(marker)) if isinstance(arg, str) else arg for arg in args)
        stream = pickle.dumps({"x": Call(function, *args)}, protocol=protocol)
    path = tmp_path / "data_batch_1"
    path.write_bytes(stream)
    with pytest.raises(DataError) as error:
        read_pickle(path)
    assert re.fullmatch(rf"cannot read {re.escape(str(path))}: it asks for (\w+\.\w+), and only .*", str(error.value))
    if protocol >= 3:  # older protocols write Python 2's module names
        assert f"it asks for {name}, " in str(error.value)
    assert not marker.exists() and not list(tmp_path.glob("ran*"))


def test_arrays_of_objects_are_refused(tmp_path_factory):
    for content in (np.array([{}, None]), np.zeros(2, dtype=[("a", "i4"), ("b", "O")]), np.array(["1970"], "M8[s]")):
        with pytest.raises(DataError, match=r"it asks for an array of .*, and only numbers and strings are read"):
            unpickled(tmp_path_factory, pickle.dumps({"data": content}))


@pytest.mark.parametrize("name", [b"_codecs\nencode", b"numpy\ndtype", b"numpy.core.multiarray\n_reconstruct"])
def test_a_stream_changes_nothing_that_outlasts_it(tmp_path_factory, name):
    before = {key: value.call for key, value in PLAIN.items() if isinstance(value, Function)}
    for attribute in (b"__defaults__", b"__doc__", b"__setstate__", b"call"):
        text = b"X" + len(attribute).to_bytes(4, "little") + attribute
        stream = b"\x80\x02}U\x01xc" + name + b"\nN}" + text + b")s\x86bs."  # setattr(name, attribute, ())
        with pytest.raises(DataError, match="sets attributes of a Function"):
            unpickled(tmp_path_factory, stream)
    assert before == {key: value.call for key, value in PLAIN.items() if isinstance(value, Function)}


@given(st.binary(max_size=60))
def test_noise_is_an_error_in_one_line(tmp_path_factory, noise):
    with pytest.raises(DataError, match=r"\Acannot read [^\n]*\Z"):
        unpickled(tmp_path_factory, b"\x80\x02}" + noise.replace(b".", b""))  # nothing ends it


def test_one_object_in_a_billion_places_is_read_once(tmp_path_factory):
    nested = [np.arange(3, dtype=np.uint8)]
    for _ in range(60):
        nested = [nested, nested]
    found = unpickled(tmp_path_factory, pickle.dumps({"x": nested}))["x"]
    assert found[0] is found[1]
    for _ in range(60):
        found = found[1]
    assert found[0].tolist() == [0, 1, 2]
