"""Tar archives in webdataset's layout: read as a folder of the same images; what is wrong is named."""

import io
import json
import re
import tarfile

import numpy as np
import pytest
from pictures import assert_error, colours, picture
from PIL import Image
from running import NANO

from tinyvit.cli import main
from tinyvit.data import DataError, Loader, default_augment, load_data
from tinyvit.data.sources import tar_shards
from tinyvit.data.splits import UNCOUNTED, FileSplit, left_out


def pack(path, members):
    """An archive of (name, content); a content may be a TarInfo for a member of another kind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            if isinstance(content, tarfile.TarInfo):
                tar.addfile(content)
                continue
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(content), 0.5
            tar.addfile(info, io.BytesIO(content))
    return path


def sample(key, label, colour, size=(8, 8)):
    return [(f"{key}.png", picture(colour, size=size)), (f"{key}.cls", f"{label}\n".encode())]


def shard(path, labels, **how):
    """Image i of class k has the colour (k, i, 0)."""
    return pack(path, [member for i, k in enumerate(labels) for member in sample(f"{i:04d}", k, (k, i, 0), **how)])


@pytest.fixture
def shards(tmp_path):
    shard(tmp_path / "pets-train-000.tar", [0, 1, 0])
    shard(tmp_path / "pets-train-001.tar", [10, 9, 1, 10, 9])
    shard(tmp_path / "pets-val-000.tar", [9, 1, 9, 1])
    return tmp_path


def test_shards_parts_and_order(shards):
    data = load_data(shards)
    assert data.class_names == ("0", "1", "9", "10") and data.image_size == (8, 8) and data.test_name == "val"
    assert colours(data.train) == [[0, 0], [1, 1], [0, 2], [10, 0], [9, 1], [1, 2], [10, 3], [9, 4]]
    assert data.train.labels.tolist() == [0, 1, 0, 3, 2, 1, 3, 2] and data.test.labels.tolist() == [2, 1, 2, 1]
    (shards / "classes.txt").write_text("\n".join(f"pet {i}" for i in range(11)))
    assert load_data(shards).class_names == ("pet 0", "pet 1", "pet 9", "pet 10")
    named = load_data(shards / "pets-train-{000..001}.tar", val_fraction=0.5)
    assert named.name == "pets-train-{000..001}.tar" and len(named.train) + len(named.test) == 8
    for split in (named.train, named.test):
        assert [named.class_names[label] for label in split.labels] == [f"pet {k}" for k, _ in colours(split)]
    assert len(load_data(shards / "pets-val-000.tar").train) == 2


def test_batches_are_those_of_a_folder(tmp_path):
    """With random crops, shuffled, from the middle of an epoch on; the images are decoded when they are read."""
    members = []
    rng = np.random.default_rng(0)
    for i in range(12):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 255, (70, 90, 3), np.uint8)).save(file, "png")
        part, label = ("train", i // 4) if i < 9 else ("test", i - 9)
        label = i // 3 if part == "train" else label
        (tmp_path / "folder" / part / f"c{label}").mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / part / f"c{label}" / f"{i:02d}.png").write_bytes(file.getvalue())
        members.append((part, [(f"{i:02d}.cls", f"c{label}".encode()), (f"{i:02d}.png", file.getvalue())]))
    for part in ("train", "test"):
        pack(tmp_path / "shards" / part / "0.tar", [m for p, both in members for m in both if p == part])
    folder, shards = (load_data(tmp_path / kind, image_size=72) for kind in ("folder", "shards"))
    assert shards.class_names == folder.class_names and shards.mean == folder.mean
    assert isinstance(shards.train, FileSplit)
    batches = [
        list(Loader(data.train, 4, transform=default_augment(data), seed=3).epoch(1, first_batch=1))
        for data in (folder, shards)
    ]
    for (images, labels), (expected, expected_labels) in zip(*batches, strict=True):
        np.testing.assert_array_equal(images, expected)
        np.testing.assert_array_equal(labels, expected_labels)


def test_what_belongs_together(tmp_path):
    """Members in any order, in folders, with endings in capitals; hidden ones and other ones are passed over."""
    folder = tarfile.TarInfo("./a")
    folder.type = tarfile.DIRTYPE
    members = [
        ("./a", folder),
        ("./a/1.JPG", picture((0, 0, 0), "JPEG")),
        ("b/1.webp", picture((9, 9, 9), "webp")),
        ("b/._1.png", b"macOS"),
        ("b/1.cls", b"dog"),
        ("./a/1.txt", b"a caption"),
        ("notes.json", b'{"made": 1999}'),
        ("./a/1.cls", "\ufeff cat \n".encode()),
        ("../../2.jpeg", picture((0, 0, 0), "JPEG")),
        ("../../2.cls", b"cat"),
        ("/3.png", picture((0, 0, 0))),
        ("/3.left.png", b"another view"),
        ("/3.cls", b"dog"),
    ]
    data = load_data(pack(tmp_path / "a.tar", members), val_fraction=0.5)
    assert data.class_names == ("cat", "dog") and len(data.train) == len(data.test) == 2
    assert not (tmp_path.parent.parent / "2.jpeg").exists()


@pytest.mark.parametrize(
    ("notes", "expected"),
    [
        ([{"label": 1, "class": "ant"}, {"label": 0, "class": "zebra"}], ("0", "1")),
        ([{"label": "ant", "class": 3}, {"label": "zebra"}], ("ant", "zebra")),
        ([{"class": "ant"}, {"class": 7}], ("7", "ant")),
    ],
)
def test_json(tmp_path, notes, expected):
    members = []
    for i in range(4):
        members += [(f"{i}.json", json.dumps(notes[i % 2]).encode()), (f"{i}.png", picture((i, 0, 0)))]
    assert load_data(pack(tmp_path / "a.tar", members)).class_names == expected


GOOD = [member for i in range(4) for member in sample(f"g{i}", i % 2, (i, 0, 0))]
HINT = r" \(--skip-corrupt leaves such images out\)"


def link(name, kind=tarfile.SYMTYPE):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, "/etc/passwd"
    return name, info


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.cls", b"-1")], "a.cls: it holds '-1', expected the number of a class .*"),
        ([("a.png", b"")], "a.png: it has no class: expected a.cls or a.json beside it"),
        ([("a.cls", b"1")], r"a.cls: there is no image a.jpg \(.png, .webp, …\)"),
        ([("a.heic", b""), ("a.json", b'{"label": 1}')], r"a.json: there is no image a.jpg \(.png, .webp, …\)"),
        ([("a.1.png", b""), ("a.1.cls", b"1")], r"a.1.png: there is no image a.jpg \(.png, .webp, …\)"),
        ([("a.png", b""), ("a.jpg", b""), ("a.cls", b"1")], "a.jpg: it is the second image of a"),
        ([("a.png", b""), ("a.cls", b"1"), ("a.cls", b"0")], "a.cls: it is the second .cls of a"),
        ([*sample("g0", 1, (0, 0, 0))], "g0.png: it is the second image of g0"),
        ([link("a.png"), ("a.cls", b"1")], "a.png: it is a link, expected a regular file"),
        ([link("a.png", tarfile.LNKTYPE)], "a.png: it is a link, expected a regular file"),
        ([link("a.png", tarfile.FIFOTYPE)], "a.png: it is a pipe, expected a regular file"),
        ([("a.png", b""), ("a.cls", b"")], "a.cls: it holds '', expected the number of a class from 0 on, or its .*"),
        ([("a.png", b""), ("a.cls", b"-1")], "a.cls: it holds '-1', expected the number of a class .*"),
        ([("a.png", b""), ("a.cls", b"1\n2")], r"a.cls: it holds '1\\n2', expected the number of a class .*"),
        ([("a.png", b""), ("a.cls", b"\xff")], "a.cls: it is not UTF-8 text"),
        ([("a.png", b""), ("a.cls", b"1" * 5000)], "a.cls: it has 5000 bytes, at most 1000 are read"),
        ([("a.png", b""), ("a.json", b"{")], "a.json: it is not JSON: .*"),
        ([("a.png", b""), ("a.json", b"[" * 99999)], "a.json: it is nested too deeply"),
        ([("a.png", b""), ("a.json", b"[1]")], "a.json: it holds a list, expected an object"),
        ([("a.png", b""), ("a.json", b"{}")], "a.json: there is no class"),
        ([("a.png", b""), ("a.json", b'{"label": null}')], "a.json: label is None, expected a whole number .*"),
        ([("a.png", bytes(3000)), ("a.cls", b"1")], "a.png: it has 3000 bytes, at most 2000 are read"),
    ],
)
def test_members_that_cannot_be_used(tmp_path, monkeypatch, members, message):
    monkeypatch.setattr(tar_shards, "LARGEST_IMAGE", 2000)
    source = pack(tmp_path / "a.tar", [*GOOD, *members])
    assert_error(f"ROOT/a.tar, {message}{HINT}", source, tmp_path)
    data = load_data(source, val_fraction=0.5, skip_corrupt=True)
    assert sorted(map(tuple, colours(data.train) + colours(data.test))) == [(i, 0) for i in range(4)]
    assert len(data.train.skipped) == 1 and data.train.skipped[0].startswith(f"{source}, ")


def test_corrupt_images_are_named(tmp_path):
    source = pack(tmp_path / "a.tar", [*GOOD, ("a.png", b"no image"), ("a.cls", b"1")])
    what = f"cannot read image ROOT/a.tar, a.png: not an image that Pillow knows{HINT}"
    assert_error(what, source, tmp_path, val_fraction=0.01)
    data = load_data(source, skip_corrupt=True)
    assert data.train.skipped + data.test.skipped == [f"{source}, a.png"]


def test_a_damaged_archive(shards, tmp_path):
    content = (shards / "pets-train-001.tar").read_bytes()
    (shards / "pets-train-001.tar").write_bytes(content[:18000])
    cut = r"ROOT/pets-train-001.tar: it is cut off.*" + HINT
    assert_error(cut, shards, tmp_path)
    data = load_data(shards, skip_corrupt=True)
    assert colours(data.train)[:3] == [[0, 0], [1, 1], [0, 2]] and len(data.train) == 7
    archive, image = data.train.skipped
    assert re.fullmatch(r"an unknown number of images of .*pets-train-001.tar \(it is cut off.*\)", archive)
    assert left_out([archive]) == f"left out {archive}" and "0004.png (it has no class" in image
    assert left_out([archive, image]) == f"left out 1 image that cannot be read; the first is {image}; and {archive}"
    assert "; and an unknown number of images of a, and of 2 more archives" in left_out([image, *3 * [f"{UNCOUNTED}a"]])
    (shards / "pets-train-001.tar").write_bytes(b"\x1f\x8b" + content)
    assert_error("ROOT/pets-train-001.tar: it is compressed: decompress it" + HINT, shards, tmp_path)
    pack(shards / "pets-train-001.tar", [("notes.txt", b"")])
    assert_error("ROOT/pets-train-001.tar: it has no images with a class beside them, .*" + HINT, shards, tmp_path)


def test_images_that_were_trained_on_are_never_validation(tmp_path, capsys):
    """A part is drawn by class and number: where one image more or less cannot be told, it is another part."""
    source, out = tmp_path / "shards", tmp_path / "run"
    shard(source / "1.tar", [0, 1] * 10)
    whole = shard(source / "0.tar", [0, 1] * 10).read_bytes()
    bad = whole.replace(b"IDAT", b"idat", 1)  # an image of the training part

    def tinyvit(*words):
        main([*map(str, words), "--data", str(source), "--skip-corrupt"])
        return capsys.readouterr()

    def measured(run, content, *words):
        (source / "0.tar").write_bytes(content)
        return tinyvit("eval", out / run, "--json", *words)

    def train(run):
        tinyvit("train", *NANO, "--epochs", 1, "--batch-size", 8, "--out", out / run)

    train("whole")
    assert json.loads(measured("whole", whole).out)["splits"].keys() == {"train", "val"}
    assert json.loads(measured("whole", bad, "--split", "train").out)["images"] == 35
    for run, content in {"label": whole.replace(b"0\n", b"\xff\n", 1), "cut": whole[:9000]}.items():
        for part in ("train", "val"):
            refusal = measured("whole", content, "--split", part).err
            assert re.search(r"shards has \d+ images to draw a part from, the model's run had 40: which of", refusal)
        assert json.loads(measured("whole", content).out)["splits"].keys() == {"train and val"}
        train(run)
        known = json.loads(measured(run, content, "--split", "val").out)
        assert known["images"] > 1 and len(known["skipped"]) == 1 and "0.tar" in known["skipped"][0]
        assert json.loads(measured(run, content).out)["skipped"] == known["skipped"]
        assert "the model's run had" in measured(run, whole, "--split", "val").err


def test_an_archive_that_shrinks_while_it_is_read(tmp_path):
    source = shard(tmp_path / "a.tar", [0, 1] * 4, size=(80, 80))
    data = load_data(source, image_size=80)
    source.write_bytes(source.read_bytes()[:700])
    with pytest.raises(DataError, match=r"cannot read image .*a.tar, 000.\.png: it has become shorter since"):
        data.train.read(np.arange(len(data.train)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\nb\na\n", "ROOT/classes.txt, line 3 is 'a', expected the name of a class, each once"),
        ("a\n\nb\n", "ROOT/classes.txt, line 2 is '', expected the name of a class, each once"),
        ("\ufeffa\nb\nc\n", "ROOT/classes.txt names 3 classes, but there are images of class 10"),
    ],
)
def test_names_that_cannot_be_used(shards, tmp_path, text, message):
    (shards / "classes.txt").write_text(text, encoding="utf-8")
    assert_error(message, shards, tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pets-train-{000..002}.tar", r"no data at ROOT/pets-train-002.tar, one of 3 files that .* names"),
        ("pets-train-{0..999999999}.tar", "ROOT/.* has the range 0..999999999, expected 1 to 100000 files .*"),
        ("pets-{0..9999}-{0..9999}.tar", "ROOT/.* has the range 0..9999, expected 1 to 100000 files .*"),
        ("pets-train-{001..000}.tar", "ROOT/.* has the range 001..000, expected 1 to .*"),
        ("pets-{train,val}-000.tar", "ROOT/.* has braces in which no range of numbers stands: expected .*"),
    ],
)
def test_patterns_that_cannot_be_used(shards, tmp_path, name, message):
    assert_error(message, shards / name, tmp_path)


def test_places_with_something_else(shards, tmp_path):
    (shards / "pets-train-002.tar.gz").write_bytes(b"")
    assert_error("ROOT/pets-train-002.tar.gz is compressed: decompress it .*", shards, tmp_path)
    (shards / "pets-train-002.tar.gz").rename(shards / "pets-train.parquet")
    message = r"ROOT holds both parquet files \(pets-train.parquet\) and tar files \(pets-train-000.tar\), expected .*"
    assert_error(message, shards, tmp_path)


def test_training_and_eval_from_the_command_line(tmp_path, capsys):
    source, out = tmp_path / "shards", tmp_path / "run"
    shard(source / "train-0.tar", [0, 1] * 6)
    shard(source / "train-1.tar", [1, 0] * 6)
    shard(source / "test-0.tar", [0, 1])
    options = [*NANO, "--epochs", 1, "--batch-size", 8, "--out", out]
    assert main(list(map(str, ["train", "--data", source, *options]))) == 0
    capsys.readouterr()
    assert main(["eval", str(out), "--data", str(source / "train-{0..1}.tar"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 24
    (source / "train-1.tar").write_bytes((source / "train-1.tar").read_bytes()[:5000])
    assert main(["eval", str(out), "--data", str(source)]) == 1
    assert "train-1.tar: it is cut off" in capsys.readouterr().err
