"""Names for single images: the same from files, PIL images and arrays, and as the model's own preprocessing says."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from running import NANO, assert_one_line_error, environment, make_images, tinyvit

import tinyvit as package
from tinyvit.data.augment import normalise
from tinyvit.data.image import read_image
from tinyvit.evaluation.metrics import EvaluationError


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("classify")
    images = make_images(home / "images", train=8, test=3)
    result = tinyvit("train", "--data", images, *NANO, "--epochs", 1, "--batch-size", 8, "--out", home / "run")
    assert result.returncode == 0, result.stderr
    return home


def test_files_images_and_arrays_are_one(home):
    model = package.load_model(home / "run")
    files = sorted((home / "images" / "test").glob("*/*.png"))
    found = package.classify(model, files, top=3)
    pixels = [np.asarray(Image.open(file).convert("RGB")) for file in files]
    assert package.classify(model, pixels, top=3) == found
    assert package.classify(model, [Image.fromarray(x) for x in pixels], top=3) == found
    alone = package.classify(model, str(files[0]), top=3)
    assert [name for name, _ in alone] == [name for name, _ in found[0]]
    assert [p for _, p in alone] == pytest.approx([p for _, p in found[0]], rel=1e-5)
    inputs = np.stack([read_image(file, 32) for file in files])
    logits = package.predict(model, normalise(inputs, model.preprocessing.mean, model.preprocessing.std)).astype(float)
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    for pairs, share in zip(found, shares, strict=True):
        assert [name for name, _ in pairs] == [model.class_names[k] for k in np.argsort(-share)]
        assert [p for _, p in pairs] == pytest.approx(np.sort(share)[::-1], rel=1e-5)
    grey = np.zeros((20, 30), np.uint8)
    assert package.classify(model, grey) == package.classify(model, np.stack([grey] * 3, axis=2))
    assert package.classify(model, []) == []


def test_an_image_is_turned_as_its_exif_says_however_it_comes(home, tmp_path):
    model = package.load_model(home / "run")
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3)).astype(np.uint8)
    exif = Image.Exif()
    exif[0x112] = 6
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    upright = package.classify(model, Image.fromarray(np.rot90(pixels, -1).copy()), top=3)
    assert upright == package.classify(model, tmp_path / "a.png", top=3)
    assert upright == package.classify(model, Image.open(tmp_path / "a.png"), top=3)


def test_what_is_no_image_is_refused(home):
    model = package.load_model(home / "run")
    for wrong in (np.zeros((3, 32, 32), np.float32), np.zeros((2, 3, 32, 32), np.uint8), 5):
        with pytest.raises(TypeError, match="expected a path, a PIL image or a uint8 array"):
            package.classify(model, wrong)
    with pytest.raises(EvaluationError, match="classify needs a model with class names"):
        package.classify(package.create_model("vit_nano_patch8_32"), "a.png")


def test_predict_takes_all_images_of_a_directory(home, tmp_path):
    folder = home / "images" / "test"
    result = tinyvit("predict", home / "run", folder, folder / "red" / "00.png", "--json")
    shown = [prediction["image"] for prediction in json.loads(result.stdout)["predictions"]]
    assert shown == [*map(str, sorted(folder.glob("*/*.png"))), str(folder / "red" / "00.png")]
    assert "holds no images" in assert_one_line_error(tinyvit("predict", home / "run", tmp_path), 1)


def test_names_that_the_encoding_lacks_or_a_terminal_obeys_are_escaped(home, tmp_path):
    path = tmp_path / "\u732b\x1b[31m.png"
    Image.new("RGB", (32, 32)).save(path)
    command = [sys.executable, "-m", "tinyvit", "predict", str(home / "run"), str(path)]
    plain = subprocess.run(command, capture_output=True, env=environment() | {"PYTHONIOENCODING": "cp1252"})
    assert plain.returncode == 0 and b"\x1b" not in plain.stdout and rb"\u732b\x1b[31m.png" in plain.stdout, plain
    found = subprocess.run([*command, "--json"], capture_output=True, env=environment() | {"PYTHONIOENCODING": "ascii"})
    assert json.loads(found.stdout.decode("ascii"))["predictions"][0]["image"] == str(path)


def test_an_interrupt_while_modules_are_imported_is_one_line():
    program = """
import sys
class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == "tinyvit.cli":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupt())
from tinyvit.__main__ import run
assert "numpy" not in sys.modules and "typing" not in sys.modules
run()
"""
    result = subprocess.run([sys.executable, "-S", "-c", program], capture_output=True, text=True, env=environment())
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "tinyvit: interrupted\n")


def test_eval_writes_predictions_and_their_confusion(home, tmp_path):
    import csv

    confusion, predictions = tmp_path / "confusion.csv", tmp_path / "predictions.csv"
    options = ["--split", "test", "--confusion", confusion, "--predictions", predictions, "--json"]
    result = tinyvit("eval", home / "run", "--data", home / "images", *options)
    scores = json.loads(result.stdout)
    with open(predictions, newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["image", "true class", "predicted class", "probability"] and len(rows) == scores["images"] == 9
    assert sum(true == guess for _, true, guess, _ in rows) / 9 == pytest.approx(scores["accuracy"])
    files = [home / "images" / "test" / image.split("test/")[1] for image, *_ in rows]
    for (*_, guess, probability), best in zip(
        rows, package.classify(package.load_model(home / "run"), files), strict=True
    ):
        assert (guess, pytest.approx(float(probability), abs=1e-6)) == best[0]
    with open(confusion, newline="") as file:
        (corner, *names), *table = csv.reader(file)
    assert (corner, names) == ("true class", ["blue", "green", "red"])
    for true, *counts in table:
        assert list(map(int, counts)) == [sum(row[1:3] == [true, guess] for row in rows) for guess in names]


def test_corrupt_images_are_left_out_where_that_is_asked(home, tmp_path):
    """The others keep their names, features and overlays."""
    folder = shutil.copytree(home / "images" / "test", tmp_path / "photos")
    bad = folder / "blue" / "01.png"  # the second of nine by name
    bad.write_bytes(b"nonsense")
    predict = ["predict", home / "run", folder]
    message = assert_one_line_error(tinyvit(*predict), 1)
    assert str(bad) in message and "--skip-corrupt" in message
    whole = json.loads(tinyvit("predict", home / "run", home / "images" / "test", "--json").stdout)["predictions"]
    likeliest = [each["classes"][0] for each in whole if not each["image"].endswith("blue/01.png")]
    result = tinyvit(*predict, "--skip-corrupt", "--json", "--embed", tmp_path / "e.npz", "--attention", tmp_path / "a")
    found = json.loads(result.stdout)
    assert found["skipped"] == [str(bad)]
    for each, expected in zip(found["predictions"], likeliest, strict=True):
        assert each["classes"][0] == {"name": expected["name"], "probability": pytest.approx(expected["probability"])}
    names = [each["image"] for each in found["predictions"]]
    assert str(bad) not in names and np.load(tmp_path / "e.npz")["paths"].tolist() == names
    assert [Path(each["attention"]).exists() for each in found["predictions"]] == 8 * [True]
    assert f"left out 1 image that cannot be read; the first is {bad}" in tinyvit(*predict, "--skip-corrupt").stdout
    missing = [*predict[:2], home / "images" / "test" / "red" / "00.png", "typo.png", "--skip-corrupt"]
    assert "typo.png: no such file" in assert_one_line_error(tinyvit(*missing), 1)
    alone = assert_one_line_error(tinyvit("predict", home / "run", bad, "--skip-corrupt"), 1)
    assert alone.startswith(f"cannot read image {bad}: "), "the one that there is"
    both = assert_one_line_error(tinyvit("predict", home / "run", bad, bad, "--skip-corrupt"), 1)
    assert both == f"none of the 2 images can be read, the first is {bad}"


def test_eval_says_what_it_left_out(home, tmp_path):
    folder = shutil.copytree(home / "images", tmp_path / "labelled")
    bad = folder / "test" / "red" / "00.png"
    bad.write_bytes(b"nonsense")
    measure = ["eval", home / "run", "--data", folder, "--split", "test", "--skip-corrupt"]
    found = json.loads(tinyvit(*measure, "--json").stdout)
    assert found["images"] == 8 and found["skipped"] == [str(bad)]
    assert tinyvit(*measure, "--predictions", tmp_path / "p.csv").returncode == 0
    rows = (tmp_path / "p.csv").read_text().splitlines()[1:]  # images of this size are decoded once and kept
    assert {row.split(",")[0] for row in rows} == {str(path) for path in folder.glob("test/*/*.png")} - {str(bad)}
    assert f"left out 1 image that cannot be read; the first is {bad}" in tinyvit(*measure).stdout
    (folder / "train" / "red" / "00.png").write_bytes(b"nonsense")  # a probe learns from these
    found = json.loads(tinyvit(*measure, "--probe", "knn", "--json").stdout)
    assert found["skipped"] == [str(folder / "train" / "red" / "00.png"), str(bad)]
    assert "skipped" not in json.loads(tinyvit(*measure[:-1], "--json", "--data", home / "images").stdout)
