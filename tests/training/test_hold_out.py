"""Images held out of a data set that has a test part of its own."""

import json
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from running import NANO, assert_one_line_error, make_images, tinyvit

from tinyvit.data import DataError, load_data
from tinyvit.data.image import open_rgb, to_array
from tinyvit.data.splits import draw_share, hold_out


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.floats(0.01, 0.99), st.integers(0, 9))
def test_each_class_gives_its_share(labels, share, seed):
    labels = np.array(labels)
    drawn = draw_share(labels, share, seed)
    for label in np.unique(labels):
        count, held = np.sum(labels == label), np.sum(drawn[labels == label])
        assert held == min(max(round(count * share), 1), count - 1)
    assert np.array_equal(drawn, draw_share(labels, share, seed))


@pytest.mark.parametrize("size", [None, 70])
def test_training_and_held_out_images_are_the_training_images(tmp_path, size):
    """Of images that are kept in memory, and of files."""
    whole = load_data(make_images(tmp_path / "images", train=10, test=3), image_size=size)
    data = hold_out(whole, 0.3, 5)
    assert whole.own_test and whole.validation is whole.test
    assert data.validation is data.val and data.test is whole.test
    assert np.bincount(data.train.labels).tolist() == [7] * 3 and np.bincount(data.val.labels).tolist() == [3] * 3
    pixels = [split.read(np.arange(len(split))) for split in (whole.train, data.train, data.val)]
    known = [image.tobytes() for image in pixels[0]]
    labels = {image: label for image, label in zip(known, whole.train.labels, strict=True)}
    parts = [(p.tobytes(), label) for part, split in zip(pixels[1:], (data.train, data.val), strict=True)
             for p, label in zip(part, split.labels, strict=True)]  # fmt: skip
    assert sorted(p for p, _ in parts) == sorted(known) and all(labels[p] == label for p, label in parts)
    other = hold_out(whole, 0.3, 6).val
    assert not np.array_equal(other.read(np.arange(9)), pixels[2])
    bad = [tmp_path / "images" / "train" / name for name in ("green/00.png", "red/03.png", "red/07.png")]
    held = [path for path in bad if to_array(open_rgb(path)).tobytes() in {image.tobytes() for image in pixels[2]}]
    for path in bad:  # images that become unreadable move no others
        path.write_bytes(b"nonsense")
    damaged = hold_out(load_data(tmp_path / "images", image_size=size, skip_corrupt=True), 0.3, 5)
    assert len(damaged.train) + len(damaged.val) == 27 and damaged.drawn_from == 30
    if size is None:
        assert damaged.val.skipped == [str(path) for path in held] and 0 < len(held) < 3
    assert sorted(damaged.train.skipped + damaged.val.skipped) == sorted(map(str, bad))
    for split, before in ((damaged.train, pixels[1]), (damaged.val, pixels[2])):
        assert {image.tobytes() for image in split.read(np.arange(len(split)))} <= {image.tobytes() for image in before}


def test_one_image_a_class_cannot_be_held_out(tmp_path):
    data = load_data(make_images(tmp_path / "images", train=1, test=1))
    with pytest.raises(DataError, match="none can be held out"):
        hold_out(data, 0.5, 0)


def test_the_test_part_is_left_for_the_end(tmp_path):
    """A run that holds images out never sees the test part: what it records are scores of those held out."""
    images = make_images(tmp_path / "images", train=20, test=5)
    command = ["train", "--data", images, *NANO, "--epochs", 2, "--val-fraction", 0.25, "--out", tmp_path / "run"]
    result = tinyvit(*command)
    assert result.returncode == 0, result.stderr
    assert "45 training and 15 validation images" in result.stdout
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["data"] | {"train": 45, "val": 15, "test": 15} == config["data"]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(row["val_accuracy"] * 15 == pytest.approx(round(row["val_accuracy"] * 15)) for row in rows)
    scores = json.loads(tinyvit("eval", tmp_path / "run", "--data", images, "--split", "test", "--json").stdout)
    assert scores["accuracy"] * 15 == pytest.approx(round(scores["accuracy"] * 15))
    assert min(abs(scores["loss"] - row["val_loss"]) for row in rows) > 1e-6, "the test part has other images"
    best = max(rows, key=lambda row: (row["val_accuracy"], -row["val_loss"]))

    def measured(*options):
        return tinyvit("eval", tmp_path / "run", "--data", images, "--json", *options)

    found = json.loads(measured().stdout)["splits"]
    assert {name: part["images"] for name, part in found.items()} == {"train": 45, "val": 15, "test": 15}
    assert found["val"]["accuracy"] == best["val_accuracy"]
    (images / "train" / "red" / "00.png").unlink()
    message = "train has 59 images to draw a part from, the model's run had 60"
    assert message.removeprefix("train") in assert_one_line_error(measured("--split", "val"), 1)
    assert json.loads(measured().stdout)["splits"].keys() == {"train and val", "test"}
    assert "finished" in tinyvit("train", "--out", tmp_path / "run", "--resume", "--val-fraction", 0.25).stdout
    refused = tinyvit("train", "--out", tmp_path / "run", "--resume", "--val-fraction", 0.5)
    assert "--val-fraction 0.25, not --val-fraction 0.5" in refused.stderr


def test_a_validation_part_beside_a_test_part_chooses(tmp_path):
    """In folders and tables alike; the test part is what `eval` reads."""
    images = make_images(tmp_path / "images", train=8, test=2)
    make_images(tmp_path / "more", train=8, test=3, seed=1)
    before = load_data(images)
    (tmp_path / "more" / "test").rename(images / "val")
    paths = [path.relative_to(tmp_path) for path in sorted(images.glob("*/*/*.png"))]
    lines = [f"{path},{path.parent.name},{path.parent.parent.name}" for path in paths]
    (tmp_path / "list.csv").write_text("\n".join(["path,label,split", *lines]))
    for src in (images, tmp_path / "list.csv"):
        data = load_data(src)
        assert (len(data.train), len(data.test), len(data.val)) == (24, 6, 9) and data.own_test
        assert np.array_equal(data.test.read(np.arange(6)), before.test.read(np.arange(6)))
        assert data.fingerprint != before.fingerprint and data.validation is data.val
    result = tinyvit("train", "--data", images, *NANO, "--epochs", 1, "--out", tmp_path / "run")
    assert "24 training and 9 validation images" in result.stdout, result.stderr


def test_a_validation_part_is_not_thrown_away(tmp_path):
    images = make_images(tmp_path / "images", train=4, test=2)
    shutil.copytree(images / "test", images / "val")
    result = tinyvit("train", "--data", images, *NANO, "--val-fraction", 0.25, "--out", tmp_path / "run")
    expected = "--val-fraction 0.25 holds out images, but images has validation images of its own: leave the option out"
    assert assert_one_line_error(result, 2) == expected and not (tmp_path / "run").exists()


def test_a_folder_without_a_test_part_is_divided_once(tmp_path):
    """--val-fraction and --seed decide its test part, for `eval` too, and are recorded when they were not given."""
    images = make_images(tmp_path / "images", train=20, test=1) / "train"
    assert not load_data(images).own_test
    for name, given_share, sizes in (("a", [], (54, 6)), ("b", ["--val-fraction", 0.25, "--seed", 5], (45, 15))):
        result = tinyvit("train", "--data", images, *NANO, "--epochs", 1, *given_share, "--out", tmp_path / name)
        assert "{} training and {} validation".format(*sizes) in result.stdout, result.stderr
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert (config["data"]["train"], config["data"]["val"]) == sizes
        assert config["options"]["val_fraction"] == config["split"]["val_fraction"] == (given_share or [0, 0.1])[1]
        scores = json.loads(tinyvit("eval", tmp_path / name, "--data", images, "--split", "val", "--json").stdout)
        row = json.loads((tmp_path / name / "metrics.jsonl").read_text())
        assert scores["accuracy"] == row["val_accuracy"] and scores["loss"] == pytest.approx(row["val_loss"], rel=1e-5)
