"""From a checkpoint of another library to named images, on the command line: names and preprocessing come along."""

import json

import numpy as np
import pytest
from checkpoint_files import write_own
from PIL import Image
from running import assert_one_line_error, make_images, tinyvit
from safetensors.numpy import save_file

import tinyvit as library
from tinyvit.checkpoints.convert import convert
from tinyvit.checkpoints.loading import load_model, open_checkpoint
from tinyvit.data import load_data, read_image

NAMES = ["red", "green", "blue"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of images that are not square, so that it shows how they are cut."""
    folder = make_images(tmp_path_factory.mktemp("data") / "images", train=2, test=4)
    for path in folder.rglob("*.png"):
        with Image.open(path) as photo:
            photo.resize((90, 70)).save(path)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A hub directory of timm with unusual preprocessing."""
    path = tmp_path_factory.mktemp("hub")
    model = library.create_model("vit_nano_patch8_32", num_classes=3)
    rng = np.random.default_rng(0)
    weights = {n: rng.standard_normal(a.shape, np.float32) * 0.3 for n, a in model.state_dict().items()}
    save_file(weights, path / "model.safetensors")
    card = {"architecture": "vit_nano_patch8_32", "num_classes": 3, "label_names": NAMES, "pretrained_cfg": {
        "mean": [0.2, 0.3, 0.4], "std": [0.2, 0.2, 0.3], "crop_pct": 0.5, "crop_mode": "squash",
        "interpolation": "bilinear"}}  # fmt: skip
    (path / "config.json").write_text(json.dumps(card))
    return path


def probabilities(model, paths, *, size=(32, 32)):
    """Found by hand: resized to twice the size whatever the aspect, the middle cut out, normalised."""
    batch = []
    for path in paths:
        with Image.open(path) as photo:
            larger = photo.convert("RGB").resize((2 * size[1], 2 * size[0]), Image.Resampling.BILINEAR)
        pixels = np.asarray(larger)[size[0] // 2 : -size[0] // 2, size[1] // 2 : -size[1] // 2] / 255
        batch.append(((pixels - [0.2, 0.3, 0.4]) / [0.2, 0.2, 0.3]).transpose(2, 0, 1))
    logits = library.predict(model, np.stack(batch).astype(np.float32)).astype(np.float64)
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    return p / p.sum(axis=1, keepdims=True)


def test_predict_prepares_images_as_the_checkpoint_says(checkpoint, images):
    paths = sorted((images / "test" / "red").iterdir())
    result = tinyvit("predict", checkpoint, *paths, "--json", "--top", 3)
    assert result.returncode == 0 and result.stderr == "", result.stderr
    expected = probabilities(load_model(checkpoint), paths)
    for prediction, row in zip(json.loads(result.stdout)["predictions"], expected, strict=True):
        found = {c["name"]: c["probability"] for c in prediction["classes"]}
        np.testing.assert_allclose([found[name] for name in NAMES], row, rtol=1e-4, atol=1e-6)


def test_eval_prepares_images_as_the_checkpoint_says(checkpoint, images):
    result = tinyvit("eval", checkpoint, "--data", images, "--split", "test", "--json")
    assert result.returncode == 0, result.stderr
    scores = json.loads(result.stdout)
    logits = [probabilities(load_model(checkpoint), sorted((images / "test" / n).iterdir())) for n in NAMES]
    hits = [p.argmax(axis=1) == i for i, p in enumerate(logits)]
    assert scores["accuracy"] == np.mean(np.concatenate(hits))
    losses = [-np.log(p[:, i]) for i, p in enumerate(logits)]
    assert scores["loss"] == pytest.approx(np.mean(np.concatenate(losses)), rel=1e-4)


@pytest.mark.parametrize(
    "options", [{}, {"crop_pct": 0.6}, {"crop_mode": "squash"}, {"interpolation": "bilinear", "crop_pct": 1.0}]
)
def test_data_sets_are_cut_like_single_images(images, options):
    data = load_data(images, image_size=72, fit_options=options)
    paths = [path for name in data.class_names for path in sorted((images / "test" / name).iterdir())]
    expected = np.stack([read_image(path, 72, **options) for path in paths])
    np.testing.assert_array_equal(data.test.read(np.arange(len(paths))), expected)
    assert data.train.read(np.arange(2)).shape == (2, 3, 72, 72)


@pytest.mark.parametrize("ending", ["", ".safetensors"])
def test_convert_keeps_names_preprocessing_and_outputs(checkpoint, images, tmp_path, ending):
    path = tmp_path / f"own{ending}"
    result = tinyvit("convert", checkpoint, path, "--to", "tinyvit")
    assert (result.returncode, result.stderr) == (0, "") and str(path) in result.stdout
    before, after = open_checkpoint(checkpoint), open_checkpoint(path)
    assert (after.class_names, after.preprocessing) == (tuple(NAMES), before.preprocessing)
    assert after.config == before.config
    image = next((images / "test" / "blue").iterdir())
    outputs = [tinyvit("predict", p, image, "--json").stdout for p in (checkpoint, path)]
    assert outputs[0] == outputs[1] != ""


@pytest.mark.parametrize("to", ["timm", "huggingface"])
def test_convert_to_other_layouts_and_back(checkpoint, tmp_path, to):
    there, back = tmp_path / "there", tmp_path / "back"
    assert tinyvit("convert", checkpoint, there, "--to", to).returncode == 0
    assert tinyvit("convert", there, back, "--to", "tinyvit").returncode == 0
    before, after = open_checkpoint(checkpoint), open_checkpoint(back)
    assert (after.class_names, after.preprocessing, after.config) == (
        before.class_names,
        before.preprocessing,
        before.config,
    )
    assert before.state.keys() == after.state.keys()
    assert all(np.array_equal(before.state[name], after.state[name]) for name in before.state)


def test_summary_of_a_checkpoint(checkpoint):
    result = tinyvit("summary", checkpoint, "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["parameters"] == load_model(checkpoint).num_parameters()


def test_errors_and_warnings_are_one_line(checkpoint, images, tmp_path):
    image = next((images / "test" / "blue").iterdir())
    message = assert_one_line_error(tinyvit("convert", checkpoint, tmp_path, "--to", "timm"), 1)
    assert "exists already" in message
    message = assert_one_line_error(tinyvit("convert", checkpoint, tmp_path / "x.pth", "--to", "timm"), 1)
    assert "x.pth: expected a new directory, or a file that ends in .safetensors" in message
    message = assert_one_line_error(
        tinyvit("convert", checkpoint, tmp_path / "x.safetensors", "--to", "huggingface"), 1
    )
    assert "the layout huggingface is that of a directory" in message
    message = assert_one_line_error(tinyvit("convert", "vit_tiny_patch16_224", tmp_path / "x", "--to", "timm"), 1)
    assert message.endswith("no such run or checkpoint; it names a model, and weights are wanted")
    message = assert_one_line_error(tinyvit("convert", checkpoint, tmp_path / "x", "--to", "keras"), 2)
    assert "expected tinyvit, timm or huggingface" in message
    message = assert_one_line_error(tinyvit("predict", tmp_path, image), 1)
    assert "not a checkpoint" in message
    state = open_checkpoint(checkpoint).state
    headless = {name: array for name, array in state.items() if not name.startswith("head.")}
    save_file(headless, tmp_path / "vit_nano_patch8_32.safetensors")
    for arguments in (("predict", image), ("eval", "--data", images)):
        command, *rest = arguments
        result = tinyvit(command, tmp_path / "vit_nano_patch8_32.safetensors", *rest)
        assert "the model has no head" in assert_one_line_error(result, 1)
    save_file(state, tmp_path / "mine.safetensors")
    result = tinyvit("predict", tmp_path / "mine.safetensors", image)
    assert result.returncode == 0
    heads, normalised = result.stderr.splitlines()
    assert all(line.startswith("tinyvit: warning: ") for line in (heads, normalised))


def test_one_file_for_timm_keeps_what_its_names_cannot_say(tmp_path):
    """timm reads the weights and passes over the metadata; we find heads and class names there."""
    config = library.ViTConfig(image_size=16, patch_size=8, embed_dim=24, depth=1, num_heads=4, num_classes=2)
    model = library.VisionTransformer(config)
    write_own(model, tmp_path / "own.safetensors", names := ("cat", "dog"))
    convert(tmp_path / "own.safetensors", tmp_path / "timm.safetensors", "timm")
    opened = open_checkpoint(tmp_path / "timm.safetensors")
    assert (opened.config, opened.class_names) == (config, names)


def test_the_number_of_heads_can_be_given_where_the_warning_asks_for_it(tmp_path, images):
    model = library.create_model("vit_nano_patch8_32", num_classes=3, num_heads=4).eval()
    rng = np.random.default_rng(0)
    model.load_state_dict({n: rng.standard_normal(a.shape, np.float32) * 0.3 for n, a in model.state_dict().items()})
    path = tmp_path / "vit_mine_patch8.safetensors"
    save_file(model.state_dict(), path)
    image = sorted((images / "test" / "red").iterdir())[0]
    guessed = tinyvit("predict", path, image, "--json")
    assert guessed.returncode == 0 and "1 are assumed: give num_heads (--num-heads)" in guessed.stderr
    found = tinyvit("predict", path, image, "--json", "--num-heads", 4)
    assert found.returncode == 0 and found.stderr == "" and found.stdout != guessed.stdout
    assert tinyvit("convert", path, tmp_path / "run", "--to", "tinyvit", "--num-heads", 4).returncode == 0
    expected = library.load_model(tmp_path / "run")
    assert expected.config.num_heads == 4
    x = rng.standard_normal((2, 3, 32, 32), np.float32)
    assert np.array_equal(library.predict(expected, x), library.predict(model, x))
    assert tinyvit("summary", path, "--num-heads", 4).stderr == ""
    assert_one_line_error(tinyvit("predict", path, image, "--num-heads", 7), 1)


def test_the_number_of_heads_that_a_checkpoint_records_cannot_be_changed(checkpoint, images, tmp_path):
    run, hugging, data = tmp_path / "run", tmp_path / "hugging", ["--data", images]
    convert(checkpoint, run, "tinyvit")
    convert(checkpoint, hugging, "huggingface")
    image, new = images / "test" / "red" / "00.png", tmp_path / "new"
    runs = [("eval", run, *data), ("predict", run, image), ("export", run, new), ("convert", run, new, "--to", "timm"),
            ("summary", run), ("train", *data, "--out", new, "--init", run)]  # fmt: skip
    for command in (*runs, ("summary", checkpoint), ("summary", hugging)):
        message = assert_one_line_error(tinyvit(*command, "--num-heads", 8), 1)
        assert "its model has 2 attention heads, not 8: leave num_heads (--num-heads) out" in message
    assert not new.exists()
    for path in (run, checkpoint, hugging):
        assert library.load_model(path, num_heads=2).config == library.load_model(path).config
