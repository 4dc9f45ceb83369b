"""Reports and comparisons: what is on the pages, and that a browser shows them."""

import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser

import browser
import numpy as np
import pytest
from PIL import Image
from running import NANO, assert_one_line_error, make_images, tinyvit

import tinyvit as package
from tinyvit import viz
from tinyvit.checkpoints.checkpoint import BEST, describe
from tinyvit.checkpoints.native_file import save
from tinyvit.cli import main
from tinyvit.models.preprocessing import Preprocessing
from tinyvit.viz import svg, watch
from tinyvit.viz.report import write_report
from tinyvit.viz.runs import Run

NAME = "<b>&\"'\x1b[31m"  # of a class


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    make_images(folder / "images", train=12)
    for part in ("train", "test"):
        (folder / "images" / part / "blue").rename(folder / "images" / part / NAME)
    for number, lr in enumerate((0.001, 0.003)):
        options = ["--data", folder / "images", "--out", folder / f"run{number}", "--lr", lr, "--epochs", 2]
        options += ["--no-augment"] * number
        assert tinyvit("train", *NANO, *options).returncode == 0
    return folder


@pytest.fixture(scope="module")
def report(run):
    result = tinyvit("report", run / "run0")
    assert result.returncode == 0, result.stderr
    return run / "run0" / "report.html"


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.open = [], "", []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        self.text += text


def test_the_page_needs_nothing_else_and_escapes_names(report):
    text = report.read_text(encoding="utf-8")
    page = Page(text)
    assert not page.open and len(text) < 5_000_000
    for tag, attributes in page.tags:
        assert tag not in ("iframe", "object", "b")
        for name in ("src", "href"):
            assert attributes.get(name, "data:").startswith("data:")
    assert not re.search(r"url\(|@import|\x1b", text)
    assert "<b>&\"'\\x1b[31m" in page.text


def test_the_numbers_are_those_of_eval(run, report):
    measured = json.loads(tinyvit("eval", run / "run0", "--data", run / "images", "--split", "test", "--json").stdout)
    page = Page(report.read_text(encoding="utf-8")).text
    assert f"top-1{measured['accuracy']:.2%}" in page and "top-5" not in page, "of three classes"
    assert "Of 18 test images of images" in page
    for name, accuracy in measured["per_class"].items():
        shown = re.search(re.escape(name.replace("\x1b", "\\x1b")) + r"(-|[\d.]+%)([\d.]+%)6", page)
        assert shown[2] == f"{accuracy:.2%}"
    for heading in ("Curves", "Confusion", "Calibration", "Attention rollout", "Heads", "Patch filters", "Positions"):
        assert heading in page


def test_what_was_left_out_is_said(run, tmp_path):
    images = shutil.copytree(run / "images", tmp_path / "images")
    bad = images / "test" / "red" / "<00>.png"
    bad.write_bytes(b"nonsense")
    (images / "test" / "red" / "00.png").unlink()
    options = ["report", run / "run1", "--data", images, "--out", tmp_path / "x.html"]
    assert "--skip-corrupt" in assert_one_line_error(tinyvit(*options), 1)
    assert tinyvit(*options, "--skip-corrupt").returncode == 0
    said = f"Of 17 test images of images; left out 1 image that cannot be read; the first is {bad}."
    assert said in Page((tmp_path / "x.html").read_text(encoding="utf-8")).text


def test_a_checkpoint_without_a_run_and_a_data_set_that_is_gone(run, tmp_path):
    best = tmp_path / "weights.safetensors"
    best.write_bytes((run / "run0" / BEST).read_bytes())
    assert tinyvit("report", best).returncode == 0
    page = Page((tmp_path / "weights-report.html").read_text(encoding="utf-8")).text
    assert "A checkpoint, without a record" in page and "Confusion" not in page and "Patch filters" in page
    config = run / "run1" / "config.json"
    kept = config.read_text()
    try:
        config.write_text(kept.replace(str(run / "images"), str(run / "gone")))
        result = tinyvit("report", run / "run1", "--out", tmp_path / "x.html")
        assert result.returncode == 0 and result.stderr.count("\n") == 1
        assert str(run / "gone") in result.stderr and "--data DIR" in result.stderr
        page = Page((tmp_path / "x.html").read_text(encoding="utf-8")).text
        assert "data set cannot be read" in page and "Curves" in page
    finally:
        config.write_text(kept)


def test_bad_usage_writes_nothing(run, tmp_path):
    target = tmp_path / "none" / "x.html"
    assert "no directory" in assert_one_line_error(tinyvit("report", run / "run0", "--out", target), 2)
    missing = tinyvit("report", run / "run0", "--data", tmp_path / "gone", "--out", tmp_path / "x.html")
    assert "no data at" in assert_one_line_error(missing, 1)
    assert "no such run" in assert_one_line_error(tinyvit("report", tmp_path / "gone"), 1)
    assert "given twice" in assert_one_line_error(tinyvit("compare", run / "run0", run / "run0"), 2)
    assert not list(tmp_path.iterdir())


def test_channels_that_do_not_fit(run, tmp_path, capsys):
    model, path = package.create_model("vit_nano_patch8_32", in_chans=1, num_classes=3), tmp_path / "grey.safetensors"
    names = ("red", "green", NAME)
    save(path, model.state_dict(), describe(model.config, names, Preprocessing((0.5,), (0.5,)), {}))
    for command in ("report", "eval"):
        assert main([command, str(path), "--data", str(run / "images")]) == 1
        assert "takes images of 1 channels, those of images have 3" in capsys.readouterr().err
    assert main(["report", str(path)]) == 0


def test_a_hybrid_has_a_report_without_patch_filters(run, tmp_path):
    model = ["--model", "vit_tiny_r_s16_p8_224", "--image-size", 32, "--patch-size", 4]
    train = tinyvit("train", "--data", run / "images", "--out", tmp_path / "run", "--epochs", 1, *model)
    assert train.returncode == 0, train.stderr
    page = Page(write_report(str(tmp_path / "run"), None, None).read_text(encoding="utf-8")).text
    assert "Patch filters" not in page and "Attention rollout" in page


def test_settings_without_effect_are_left_out(run):
    """The rate that muon's AdamW has would be taken for AdamW's own."""
    found = Run.read(run / "run0")
    assert "--lr" in found.settings and "--adam-lr" not in found.settings
    with_muon = replace(found.record, options={**found.record.options, "optimizer": "muon"})
    assert "--adam-lr" in replace(found, record=with_muon).settings
    idle = {"--layer-decay": "1", "--repeats": "1", "--accumulate": "1", "--mixup": "0", "--policy": "none"}
    assert found.settings.items() >= {**idle, "--skip-corrupt": "off", "--patience": "none"}.items()
    assert not found.settings_in_effect.keys() & {*idle, "--skip-corrupt", "--patience"}
    assert found.settings_in_effect.items() >= {"--clip-norm": "1", "--augment": "on"}.items()


@pytest.mark.parametrize("length", [1, 5, 18])
def test_names_of_columns_end_below_the_heading(length):
    chart = svg.matrix("confusion", np.eye(2, dtype=int), ["x" * length] * 2, "true", "predicted")
    heading = int(re.search(r'y="(\d+)"[^>]*>predicted', chart)[1])
    start = int(re.search(r"translate\(\d+ (\d+)\) rotate", chart)[1])
    assert start - 7 * length > heading, "7 pixels a letter, upwards"


@pytest.mark.parametrize("highest", [1.0, 1.5e-4, 2e-7, 3e5, 123456.0])
def test_labels_of_ticks_end_beside_the_heading(highest):
    chart = svg.lines("x", {"x": ((1, 2), (0.0, highest))}, "epoch", "learning rate")
    heading = int(re.search(r"translate\((\d+) \d+\) rotate", chart)[1])
    labels = re.findall(r'x="([\d.]+)"[^>]*"end">([^<]*)<', chart)
    assert labels and all(float(x) - 7.7 * len(text) > heading + 4 for x, text in labels), "7.7 pixels a digit at most"


def test_compare_shows_what_differs(run, tmp_path):
    page = tmp_path / "both.html"
    result = tinyvit("compare", run / "run0", run / "run1", "--out", page)
    assert result.returncode == 0, result.stderr
    rows = {line[:25].strip(): line[25:].split() for line in result.stdout.splitlines()}
    assert rows["--lr"] == ["0.001", "0.003"] and rows["--augment"] == ["on", "off"]
    assert "--weight-decay" not in rows and rows["epochs"] == ["2/2", "2/2"]
    text = Page(page.read_text(encoding="utf-8")).text
    assert "run0 validation" in text and "0.003" in text


@pytest.mark.skipif(browser.CHROMIUM is None, reason="Chromium is not installed")
@pytest.mark.parametrize("width, media", [(390, ""), (794, "print"), (1280, "(prefers-color-scheme:dark)")])
def test_a_browser_shows_the_page(report, tmp_path, width, media):
    found = browser.look(report, tmp_path, width, media)
    assert found["overflow"] <= 0 and found["images"] > 10 and not found["missing"] and not found["console"], found
    assert found["contrast"] >= 4.5 and not found["unequal"], found


@pytest.mark.skipif(browser.CHROMIUM is None, reason="Chromium is not installed")
def test_a_browser_finds_what_is_wrong(tmp_path):
    page = tmp_path / "bad.html"
    page.write_text(
        '<!doctype html><body><p style="width:410px;color:#888">pale</p><img src="data:,">'
        "<script>console.error('wrong')</script></body>"
    )
    found = browser.look(page, tmp_path, 390)
    assert found["overflow"] > 0 and found["missing"] == 1 and found["where"] == "pale"
    assert found["contrast"] == pytest.approx(3.545, abs=0.01)  # of #888 on white
    assert any("wrong" in line for line in found["console"])


# --- in Python --------------------------------------------------------------------------------------------------------


def test_figures_are_arrays_with_pictures(run):
    model = package.load_model(run / "run0")
    image = run / "images" / "test" / "red" / "00.png"
    shapes = {
        "attention": (viz.attention(model, image), (2, 2, 4, 4)),
        "rollout": (viz.rollout(model, Image.open(image)), (4, 4)),
        "filters": (viz.filters(model), (28, 8, 8, 3)),
        "positions": (viz.position_similarity(model), (4, 4, 4, 4)),
        "distance": (viz.attention_distance(model, [image, np.asarray(Image.open(image))]), (2, 2)),
        "predictions": (viz.predictions(model, image), (1, 3)),
        "curves": (viz.curves(run / "run0"), (2, 6)),
        "confusion": (viz.confusion([0, 1, 1], [0, 1, 0], ["a", "b"]), (2, 2)),
        "calibration": (viz.calibration([[0.9, 0.1]], [0]), (15, 3)),
    }
    for name, (figure, shape) in shapes.items():
        assert figure.data.shape == np.asarray(figure).shape == shape, name
        assert Page(figure._repr_html_()).open == [], name
    assert shapes["rollout"][0].picture.size[0] > 512 and shapes["curves"][0].picture is None


def test_training_is_blue_and_validation_orange():
    rows = [dict(epoch=i, train_loss=1, val_loss=2, train_accuracy=0.1, val_accuracy=0.2, lr=0.1) for i in (1, 2)]
    marks = re.findall(r'fill="([^"]*)"><title>(\w+), epoch', viz.curves(rows).html)
    assert set(marks) == {(svg.colour(0), "training"), (svg.colour(1), "validation")}
    assert "\x1b[34m.\x1b[0m training, \x1b[38;5;208mo\x1b[0m validation" in watch.chart(rows, "loss", 60, 9, True)[0]


def test_each_bar_says_how_many_images_it_holds():
    p = np.repeat([[0.97, 0.03], [0.61, 0.39]], [1234, 7], axis=0)
    html = viz.calibration(p, np.zeros(len(p), int)).html
    assert re.findall(r'y="10" text-anchor="middle" font-size="9.5">(\d+)<', html) == ["7", "1234"]


def test_maps_of_heads_are_numbered():
    picture = np.asarray(viz.figures.heads_picture(np.zeros((3, 2, 4, 4))).picture.convert("L"))
    left, top = picture.shape[1] - (2 * 59 - 3), picture.shape[0] - (3 * 59 - 3)  # beside maps of 56 pixels
    assert left > 0 and top > 0
    for number, margin in ((3, picture[top:, :left].T), (2, picture[:top, left:])):
        assert all((part < 99).any() for part in np.array_split(margin, number, axis=1))


def test_dots_of_heads_have_one_colour_and_stand_apart():
    chart = viz.figures.distance_chart(np.full((3, 12), 5.0))
    dots = re.findall(r'<circle cx="([\d.]+)"[^>]*fill="([^"]*)"', chart)
    places = [float(x) for x, _ in dots]
    assert len(set(places)) == 36 and places == sorted(places) and len({colour for _, colour in dots}) == 1


@pytest.mark.parametrize(
    "values, least, within, expected",
    [
        ([0.5, 0.9], 0.2, (0, 1), (0.48, 0.92)),
        ([0.91, 0.92], 0.2, (0, 1), (0.8, 1.0)),  # a small difference stays small
        ([0.5], 0.2, (0, 1), (0.4, 0.6)),
        ([], 0.2, (0, 1), (0.0, 0.2)),
        ([float("nan"), 2.0, 3.0], 0.0, (-9, 9), (1.95, 3.05)),
    ],
)
def test_axes_do_not_exaggerate(values, least, within, expected):
    assert svg.around(values, least, within) == pytest.approx(expected)


@pytest.mark.parametrize(
    "places, unit, labels",
    [
        ([0.5, 1.0, 1.5], "", "0.5 1.0 1.5"),
        ([0.005, 0.01, 0.015], "", "0.005 0.010 0.015"),
        ([0.0, 0.2, 0.4], "%", "0% 20% 40%"),
        ([0.995, 1.0], "%", "99.5% 100.0%"),
        ([0.0, 5e-8, 1e-7], "", "0.0e-7 0.5e-7 1.0e-7"),
        ([0.0, 1e6, 2e6], "", "0e6 1e6 2e6"),
        ([10.0, 20.0], "", "10 20"),
        ([0.25], "", "0.25"),
        ([0.0], "", "0"),
        ([], "", ""),
    ],
)
def test_labels_of_an_axis_have_one_number_of_digits(places, unit, labels):
    assert svg.tick_labels(places, unit) == labels.split()


@pytest.mark.parametrize("low, high", [(0, 1), (0.48, 0.92), (-3, 1e5), (1e-6, 2e-6)])
def test_ticks_are_round_numbers(low, high):
    found = svg.ticks(low, high)
    assert 2 <= len(found) <= 7 and low - 1e-9 <= found[0] and found[-1] <= high * (1 + 1e-9)
    step = found[1] - found[0]
    assert float(f"{step:.0e}") == pytest.approx(step) and f"{step:.0e}"[0] in "125"
