"""CSV files of path and label, and parquet files as Hugging Face's `datasets` writes them."""

import builtins
import json
import re
import subprocess
import sys

import numpy as np
import pytest
from pictures import assert_error, colours, paint, picture
from running import environment

from tinyvit.data import load_data
from tinyvit.data.sources import listing, parquet
from tinyvit.data.splits import ArraySplit, FileSplit


def colours_seen(data):
    return [tuple(c) for split in (data.train, data.test) for c in colours(split)]


# --- CSV ----------------------------------------------------------------------------------------------------


def table(root, text, encoding="utf-8"):
    (root / "pets.csv").write_bytes(text.encode(encoding))
    return root / "pets.csv"


@pytest.fixture
def pets(tmp_path):
    """Three images each of cats and dogs; image i of class k has the colour (k, i, 0)."""
    for k, name in enumerate(("cat", "dog")):
        for i in range(3):
            paint(tmp_path / "photos" / f"{name}{i}.png", (k, i, 0))
    return tmp_path


ROWS = [(f"photos/{name}{i}.png", name) for i in range(3) for name in ("dog", "cat")]
PLAIN = "path,label\n" + "".join(f"{path},{label}\n" for path, label in ROWS)


def test_a_csv_is_split_like_a_folder(pets):
    data = load_data(table(pets, PLAIN), val_fraction=0.34, seed=1)
    assert (data.name, data.class_names, data.image_size) == ("pets", ("cat", "dog"), (8, 8))
    assert np.bincount(data.train.labels).tolist() == [2, 2] and np.bincount(data.test.labels).tolist() == [1, 1]
    found = colours(data.train) + colours(data.test)
    assert sorted(found) == [[k, i] for k in range(2) for i in range(3)]
    assert [k for k, _ in found] == [*data.train.labels, *data.test.labels]
    again, other = (load_data(pets / "pets.csv", val_fraction=0.34, seed=seed) for seed in (1, 2))
    assert again.fingerprint == data.fingerprint != other.fingerprint and data.fingerprint.startswith("csv-")


def test_a_split_column_decides(pets):
    splits = ["train", "train", "Train", "train", "val", " test"]
    text = "split,label,remark,path\n" + "".join(
        f"{s},{label},,{path}\n" for s, (path, label) in zip(splits, ROWS, strict=True)
    )
    data = load_data(table(pets, text))
    assert colours(data.train) == [[1, 0], [0, 0], [1, 1], [0, 1]] and colours(data.test) == [[0, 2]]
    (pets / "pets.csv").write_text(text.replace(" test", "val"))
    assert colours(load_data(pets / "pets.csv").test) == [[1, 2], [0, 2]]


def test_spaces_around_a_label_make_no_class(pets):
    data = load_data(table(pets, PLAIN.replace("dog0.png,dog", "dog0.png, dog ")))
    assert data.class_names == ("cat", "dog") and len(data.train) + len(data.test) == 6


def test_quotes_marks_and_absolute_paths(pets):
    paint(pets / "photos" / 'a, "b".png', (1, 9, 0))
    rows = [*ROWS[:-1], (str(pets / "photos" / "cat2.png"), "cat"), ('"photos/a, ""b"".png"', '"dog, mostly"')]
    rows += [("photos/dog0.png", '"dog, mostly"')]
    text = "\ufeffpath,label\r\n" + "".join(f"{path},{label}\r\n" for path, label in rows)
    data = load_data(table(pets, text))
    assert data.class_names == ("cat", "dog", "dog, mostly")
    assert sorted(colours(data.train) + colours(data.test))[-1] == [1, 9]


def test_the_fingerprint_of_a_csv_knows_its_labels(pets):
    before = load_data(table(pets, PLAIN)).fingerprint
    assert load_data(table(pets, PLAIN.replace("dog0.png,dog", "dog0.png,cat"))).fingerprint != before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "ROOT/pets.csv begins with nothing, expected a header with the columns path and label .*"),
        ("photos/cat0.png,cat\n", "ROOT/pets.csv begins with 'photos/cat0.png', 'cat', expected a header .*"),
        ("path;label\na;b\n", "ROOT/pets.csv begins with 'path;label', expected a header .*"),
        ("path,label\n", "ROOT/pets.csv has no row with the split train, found no row at all"),
        ("path,label\na.png\n", r"ROOT/pets.csv, line 2 has another number of values than .* \(2\)"),
        ("path,label\na.png,cat\nb.png,dog,7\n", r"ROOT/pets.csv, line 3 has another number of values than .* \(2\)"),
        ("path,label,path\na.png,cat,b.png\n", "ROOT/pets.csv has several columns called path"),
        ("path,label\na.png,\n", "ROOT/pets.csv, line 2 has no label"),
        ("path,label\na.png, \n", "ROOT/pets.csv, line 2 has no label"),
        ("path,label\n,cat\n", "ROOT/pets.csv, line 2 has no path"),
        (
            "path,label,split\na.png,cat,later\n",
            "ROOT/pets.csv, line 2 has the split 'later', expected train, val or test",
        ),
        ("path,label,split\na.png,cat,test\n", "ROOT/pets.csv has no row with the split train, found only test"),
        ("path,label\na.png,cat\n", "ROOT/pets.csv must hold training images of .* two classes, found only cat"),
        ('path,label\n"a.png,cat\n', "ROOT/pets.csv, after line 1: unexpected end of data"),
        ("path,label\n" + "a" * 2**21, "ROOT/pets.csv, after line 1: a line has more than 1048576 characters"),
        (
            "path,label,split\na,cat,train\nb,dog,train\nc,emu,test\n",
            r"ROOT/pets.csv: 'emu' is a class of test images that no training image has \(they have cat, dog\)",
        ),
    ],
)
def test_csv_files_that_cannot_be_used(pets, text, message):
    assert_error(message, table(pets, text), pets)


def test_a_csv_that_is_no_text(pets):
    assert_error("ROOT/pets.csv is not text in UTF-8", table(pets, PLAIN.replace(",cat", ",cät"), "latin-1"), pets)


def test_missing_images_of_a_csv(pets):
    source = table(pets, PLAIN + "photos/gone.png,cat\n")
    missing = re.escape("No such file or directory (--skip-corrupt leaves such images out)")
    assert_error(f"cannot read image ROOT/photos/gone.png: {missing}", source, pets)
    data = load_data(source, skip_corrupt=True)
    assert data.train.skipped + data.test.skipped == [str(pets / "photos/gone.png")]
    assert len(data.train) + len(data.test) == 6


# --- parquet ------------------------------------------------------------------------------------------------

NAMES = ["zebra", "ant", "cow"]


@pytest.fixture
def pa():
    pytest.importorskip("pyarrow")
    import pyarrow.parquet

    return pyarrow


def note(names=NAMES, image="image", label="label"):
    """What `datasets` writes into a schema."""
    features = {image: {"_type": "Image"}, label: {"_type": "ClassLabel", "names": names}}
    return {b"huggingface": json.dumps({"info": {"features": features}}).encode()}


def save(pa, path, labels, contents=None, *, names=("image", "label"), metadata=None, kind=None, label_type=None):
    """A parquet file whose image i of class k has the colour (k, i, 0)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if contents is None:
        contents = [picture((k if isinstance(k, int) and k >= 0 else 0, i, 0)) for i, k in enumerate(labels)]
    if kind is None:
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        contents = [{"bytes": c, "path": f"{i}.png"} for i, c in enumerate(contents)]
    columns = {names[0]: pa.array(contents, kind), names[1]: pa.array(labels, label_type)}
    pa.parquet.write_table(pa.table(columns).replace_schema_metadata(metadata), path, row_group_size=2)


@pytest.fixture
def snacks(tmp_path, pa):
    """As on the hub: several shards for training, one for the test."""
    save(pa, tmp_path / "data" / "train-00000-of-00002.parquet", [0, 1, 2], metadata=note())
    save(pa, tmp_path / "data" / "train-00001-of-00002.parquet", [2, 2, 0, 1], metadata=note())
    save(pa, tmp_path / "data" / "validation-00000-of-00001.parquet", [1], metadata=note())
    save(pa, tmp_path / "data" / "test-00000-of-00001.parquet", [2, 0], metadata=note())
    return tmp_path


def test_shards_splits_and_names(snacks):
    data = load_data(snacks)
    assert data.class_names == tuple(NAMES) and data.image_size == (8, 8) and data.name == snacks.name
    assert data.train.labels.tolist() == [0, 1, 2, 2, 2, 0, 1]
    assert colours(data.train) == [[0, 0], [1, 1], [2, 2], [2, 0], [2, 1], [0, 2], [1, 3]]
    assert colours(data.test) == [[2, 0], [0, 1]] and data.test.labels.tolist() == [2, 0]
    assert isinstance(data.train, ArraySplit)


def test_large_images_are_decoded_when_read(snacks, monkeypatch):
    data = load_data(snacks, image_size=80)
    assert isinstance(data.train, FileSplit) and isinstance(data.test, ArraySplit)
    assert colours(data.train) == colours(load_data(snacks).train)
    monkeypatch.setattr(listing, "MEMORY", 0)
    assert isinstance(load_data(snacks).test, FileSplit)


def test_images_beyond_the_memory_are_read_with_their_row_group(snacks, pa, monkeypatch):
    kept = load_data(snacks)
    monkeypatch.setattr(parquet, "KEPT", 100)
    monkeypatch.setattr(parquet, "CACHE", 0)
    monkeypatch.setattr(parquet.Shard, "images", None)  # which would read them all
    data = load_data(snacks, image_size=80)
    assert data.train.labels.tolist() == kept.train.labels.tolist()
    assert colours(data.train) == colours(kept.train) and colours(data.test) == colours(kept.test)
    assert data.fingerprint == kept.fingerprint
    contents = [picture((0, 0, 0)), b"no image", None, picture((1, 3, 0)), picture((0, 4, 0)), picture((1, 5, 0))]
    save(pa, snacks / "bad.parquet", [0, 0, 1, 1, 0, 1], contents)
    data = load_data(snacks / "bad.parquet", skip_corrupt=True)
    assert sorted(colours_seen(data)) == [(0, 0), (0, 4), (1, 3), (1, 5)]
    monkeypatch.setattr(parquet, "LARGEST_GROUP", 99)
    assert_error("ROOT/bad.parquet has row groups of .* at most 99", snacks / "bad.parquet", snacks)


def test_other_places_and_layouts(tmp_path, pa):
    for parts in (["train.parquet", "test.parquet"], ["plain_text/train-0.parquet", "plain_text/test-0.parquet"]):
        root = tmp_path / parts[0].replace("/", "-")
        for file, labels in zip(parts, ([0, 1, 0], [1]), strict=True):
            save(pa, root / file, labels)
        assert (len(load_data(root).train), len(load_data(root).test)) == (3, 1)
    save(pa, tmp_path / "refs" / "train" / "0000.parquet", [0, 1])
    save(pa, tmp_path / "refs" / "test" / "0000.parquet", [1])
    assert len(load_data(tmp_path / "refs").test) == 1
    save(pa, tmp_path / "alone" / "tested.parquet", [0, 0, 1, 1])
    for source in (tmp_path / "alone", tmp_path / "alone" / "tested.parquet"):
        data = load_data(source)
        assert np.bincount(data.train.labels).tolist() == np.bincount(data.test.labels).tolist() == [1, 1]
    save(pa, tmp_path / "two" / "a" / "train.parquet", [0, 1])
    save(pa, tmp_path / "two" / "b" / "train.parquet", [0, 1])
    assert_error("ROOT/two holds several data sets, expected one of them: a, b", tmp_path / "two", tmp_path)


@pytest.mark.parametrize(
    ("labels", "label_type", "expected"),
    [
        ([10, 9, 10, 9], "int64", ("9", "10")),
        ([1, 0, 1, 0], "uint8", ("0", "1")),
        (["b", "a", "a", "b"], "string", ("a", "b")),
        (["b", "a", "a", "b"], "large_string", ("a", "b")),
    ],
)
@pytest.mark.parametrize("metadata", [None, {b"huggingface": b"no JSON"}, {b"huggingface": b'{"info": []}'}, {}])
def test_labels_without_names(tmp_path, pa, labels, label_type, expected, metadata):
    contents = [picture((9, i, 0)) for i in range(4)]
    save(pa, tmp_path / "train.parquet", labels, contents, label_type=getattr(pa, label_type)(), metadata=metadata)
    data = load_data(tmp_path, val_fraction=0.5)
    assert data.class_names == expected
    numbers = dict(zip(colours_seen(data), [*data.train.labels, *data.test.labels], strict=True))
    assert [expected[numbers[9, i]] for i in range(4)] == [str(label) for label in labels]


def test_dictionaries_bare_bytes_and_other_columns(tmp_path, pa):
    table_ = pa.table({
        "id": pa.array(range(4)),
        "photo": pa.array([picture((1, i, 0)) for i in range(4)], pa.large_binary()),
        "class": pa.array(["x", "y", "x", "y"]).dictionary_encode(),
    })  # fmt: skip
    pa.parquet.write_table(table_, tmp_path / "train.parquet")
    assert load_data(tmp_path).class_names == ("x", "y")


def test_noted_columns_are_preferred(tmp_path, pa):
    """As in CIFAR-100, but with the label under a name of its own."""
    contents = [picture((i, 0, 0)) for i in range(4)]
    table_ = pa.table({"image": [b""] * 4, "img": contents, "label": [5, 6, 7, 8], "kind": [0, 1, 0, 1]})
    metadata = note(["a", "b"], "img", "kind")
    pa.parquet.write_table(table_.replace_schema_metadata(metadata), tmp_path / "train.parquet")
    assert load_data(tmp_path).class_names == ("a", "b")


def test_classes_without_a_training_image_are_left_out(tmp_path, pa):
    save(pa, tmp_path / "train.parquet", [0, 2, 0, 2], metadata=note())
    assert load_data(tmp_path).class_names == ("zebra", "cow")
    save(pa, tmp_path / "test.parquet", [1], metadata=note())
    message = r"ROOT: 'ant' is a class of test images that no training image has \(they have zebra, cow\)"
    assert_error(message, tmp_path, tmp_path)


@pytest.mark.parametrize("hidden", [-1, None])
def test_a_test_split_without_labels_gives_way(snacks, pa, hidden):
    for metadata in (note(), None):
        options = {"metadata": metadata, "label_type": pa.int64()}
        save(pa, snacks / "data" / "test-00000-of-00001.parquet", [hidden, hidden], **options)
        assert load_data(snacks).test.labels.tolist() == [1]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, -1, 1], "ROOT/data/train-0.parquet, row 1 has no label (it is null or -1)"),
        ([0, 1, None], "ROOT/data/train-0.parquet, row 2 has no label (it is null or -1)"),
        ([-1, -1, -1], "ROOT: the training images have no labels (all are null or -1)"),
        ([0, 1, 3], "ROOT/data/train-0.parquet, row 2 has the label 3, expected 0 ... 2"),
        ([], "ROOT/data/train-0.parquet has no rows"),
        ([0, 0], "ROOT must hold training images of at least two classes, found only zebra"),
        ([0, 0, 1], "class ant of ROOT has one image, at least two are needed to split it"),
    ],
)
def test_labels_that_cannot_be_used(tmp_path, pa, labels, message):
    save(pa, tmp_path / "data" / "train-0.parquet", labels, metadata=note(), label_type=pa.int64())
    assert_error(re.escape(message), tmp_path, tmp_path)


def test_corrupt_images_are_named(tmp_path, pa):
    contents = [picture((0, 0, 0)), b"no image", None, picture((1, 3, 0)), picture((0, 4, 0)), picture((1, 5, 0))]
    save(pa, tmp_path / "data" / "train-0.parquet", [0, 0, 1, 1, 0, 1], contents)
    save(pa, tmp_path / "data" / "test-0.parquet", [0, 1])
    hint = r" \(--skip-corrupt leaves such images out\)"
    what = f"cannot read image ROOT/data/train-0.parquet, row 1: not an image that Pillow knows{hint}"
    assert_error(what, tmp_path, tmp_path)
    data = load_data(tmp_path, skip_corrupt=True)
    assert data.train.skipped == [str(tmp_path / "data" / f"train-0.parquet, row {i}") for i in (1, 2)]
    assert colours(data.train) == [[0, 0], [1, 3], [0, 4], [1, 5]] and data.train.labels.tolist() == [0, 1, 0, 1]
    save(pa, tmp_path / "data" / "train-0.parquet", [0, 1, 1], [picture((0, 0, 0)), None, picture((1, 0, 0))])
    assert_error(f"cannot read image ROOT/data/train-0.parquet, row 1: it has no bytes{hint}", tmp_path, tmp_path)


def test_a_null_for_a_whole_image(tmp_path, pa):
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    contents = [{"bytes": picture((i, 0, 0)), "path": None} for i in range(4)] + [None]
    save(pa, tmp_path / "train.parquet", [0, 1, 0, 1, 1], contents, kind=kind)
    assert_error("cannot read image ROOT/train.parquet, row 4: it has no bytes .*", tmp_path, tmp_path)


def test_columns_that_cannot_be_told(tmp_path, pa):
    def refused(message, **columns):
        pa.parquet.write_table(pa.table(columns), tmp_path / "train.parquet")
        assert_error(message, tmp_path, tmp_path)

    photo = [picture((0, 0, 0))] * 2
    images = r"ROOT/train.parquet: expected a column of images \(bytes, or a struct with bytes\) called image, .*, "
    labels = r"ROOT/train.parquet: expected a column of labels \(whole numbers or text\) called label, .* or target, "
    refused(images + r"found text \(string\), label \(int64\)", text=["a", "b"], label=[0, 1])
    refused(images + "found .*", a=photo, b=photo, label=[0, 1])
    refused(labels + r"found image \(binary\), label \(double\)", image=photo, label=[0.0, 1.0])
    refused(labels + "found .*", image=photo, one=[0, 1], other=[0, 1])


def test_a_missing_shard_is_named(snacks, pa):
    (snacks / "data" / "train-00000-of-00002.parquet").unlink()
    assert_error("ROOT lacks data/train-00000-of-00002.parquet", snacks, snacks)
    alone = snacks / "data" / "train-00001-of-00002.parquet"  # what is asked for by name need not be whole
    save(pa, alone, [0, 0, 1, 1])
    assert len(load_data(alone).train) == len(load_data(alone).test) == 2


def test_files_of_no_split_beside_others(snacks, pa):
    save(pa, snacks / "data" / "more-0.parquet", [0, 1], metadata=note())
    message = "ROOT/data/more-0.parquet belongs to no split, as other files do: expected a name with .*"
    assert_error(message, snacks, snacks)


def test_two_validation_parts(snacks, pa):
    save(pa, snacks / "data" / "val.parquet", [0, 1], metadata=note())
    assert_error("ROOT has val images under two names, val and validation: keep one of them", snacks, snacks)


def test_two_columns_of_one_name(tmp_path, pa):
    columns = [[picture((0, 0, 0))] * 2, [0, 1], [0, 1]]
    pa.parquet.write_table(pa.table(columns, names=["image", "label", "label"]), tmp_path / "train.parquet")
    assert_error("ROOT/train.parquet has several columns called label", tmp_path, tmp_path)


def test_files_that_are_no_parquet(tmp_path, pa):
    (tmp_path / "train.parquet").write_bytes(b"PAR1 and no more")
    assert_error("ROOT/train.parquet is not a readable parquet file: .*", tmp_path, tmp_path)
    save(pa, tmp_path / "train.parquet", [0, 1, 0, 1], [np.random.default_rng(i).bytes(4000) for i in range(4)])
    content = bytearray((tmp_path / "train.parquet").read_bytes())
    content[200:9000] = bytes(8800)  # the pages; the schema at the end is whole
    (tmp_path / "train.parquet").write_bytes(content)
    assert_error("ROOT/train.parquet is not a readable parquet file: .*", tmp_path, tmp_path)
    save(pa, tmp_path / "only" / "test.parquet", [0, 1])
    assert_error("ROOT/only has parquet files of test, but none of train", tmp_path / "only", tmp_path)


def test_the_fingerprint_knows_the_images(snacks, pa):
    before = load_data(snacks).fingerprint
    assert before.startswith("parquet-") and load_data(snacks).fingerprint == before
    contents = [picture((5, 5, 5)), picture((6, 6, 6))]
    save(pa, snacks / "data" / "test-00000-of-00001.parquet", [2, 0], contents, metadata=note())
    assert load_data(snacks).fingerprint != before


def test_an_image_folder_with_a_note_beside_it_is_still_one(tmp_path, pa):
    for name in ("cat", "dog"):
        for i in range(2):
            paint(tmp_path / "train" / name / f"{i}.png")
    (tmp_path / "train" / "metadata.parquet").write_bytes(b"")
    (tmp_path / "metadata.parquet").write_bytes(b"")
    assert load_data(tmp_path).class_names == ("cat", "dog")


@pytest.mark.parametrize("stray", ["cat/notes.parquet", "train.parquet"])
def test_images_and_parquet_files_in_one_place(tmp_path, pa, stray):
    """Neither replaces the other; an image that is in no folder, such as a logo, is none of the data's."""
    save(pa, tmp_path / stray, [0, 1, 0, 1])
    paint(tmp_path / "logo.png")
    load_data(tmp_path)
    for name in ("cat", "dog"):
        for i in range(2):
            paint(tmp_path / name / "deep" / f"{i}.png")
    message = rf"ROOT holds both images \(cat/deep/.\.png\) and parquet files \({stray}\), expected one of the two"
    assert_error(message, tmp_path, tmp_path)


def test_without_pyarrow_one_line_names_the_extra(tmp_path, monkeypatch):
    (tmp_path / "train.parquet").write_bytes(b"")
    ordinary = builtins.__import__

    def without(name, *rest):
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return ordinary(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    assert_error(r'reading parquet files needs pyarrow: pip install "tinyvit\[parquet\]"', tmp_path, tmp_path)


def test_a_small_file_that_repeats_a_large_image_takes_little_memory(tmp_path):
    """Each row with the bytes of the others; in a process of its own, whose peak is its own."""
    pyarrow, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    content = np.random.default_rng(0).bytes(1_000_000)
    table = pyarrow.table({"image": pyarrow.array([content] * 300), "label": [0, 1] * 150})
    pq.write_table(table, tmp_path / "train.parquet", use_dictionary=True)
    assert (tmp_path / "train.parquet").stat().st_size < 3_000_000
    program = """
import resource, sys
from pathlib import Path
from tinyvit.data.sources.parquet import Shard
shard = Shard(Path(sys.argv[1]))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
images = shard.images()
assert len(images) == 300 and len({id(image) for image in images}) == 1
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    command = [sys.executable, "-c", program, str(tmp_path / "train.parquet")]
    result = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert result.returncode == 0 and int(result.stdout) < 100_000, result


def test_a_column_of_splits_is_refused(pa, tmp_path):
    """Its test rows would be trained on."""
    table = {
        "image": [picture((k, 0, 0)) for k in range(4)],
        "label": [0, 1, 0, 1],
        "split": ["train"] * 2 + ["test"] * 2,
    }
    pa.parquet.write_table(pa.table(table), tmp_path / "a.parquet")
    assert_error("ROOT/a.parquet has a column split, which is not read: .*", tmp_path / "a.parquet", tmp_path)
    (tmp_path / "parts").mkdir()
    for part in ("train", "test"):  # in files of their own it says nothing new
        pa.parquet.write_table(pa.table(table), tmp_path / "parts" / f"{part}.parquet")
    assert len(load_data(tmp_path / "parts").train) == 4
