"""`tinyvit predict --attention` and `--embed`: where the heat lies, and what is written where."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from running import NANO, count_decoded, make_images, tinyvit

import tinyvit as library
from tinyvit.checkpoints import loading, native_file
from tinyvit.cli import main
from tinyvit.data.image import fit, open_rgb, seen_part
from tinyvit.evaluation import heatmap
from tinyvit.evaluation.export import check_features_path, overlay_paths
from tinyvit.training.config import UsageError

# --- geometry -------------------------------------------------------------------------------------------------


@given(
    st.integers(3, 400), st.integers(3, 400), st.integers(4, 60), st.integers(4, 60),
    st.sampled_from(["center", "squash"]), st.sampled_from([None, 1.0, 0.875, 0.5]),
)  # fmt: skip
def test_the_seen_part_is_where_fit_cuts(height, width, rows, columns, mode, crop_pct):
    """An image that holds each pixel's place in its colours tells where each pixel of the cut came from."""
    ramp = np.zeros((height, width), np.float32)
    for axis, (whole, kept) in enumerate(((height, rows), (width, columns))):
        places = np.arange(whole, dtype=np.float32) + 0.5
        photo = Image.fromarray(ramp + (places[:, None] if axis == 0 else places[None]))
        cut = np.asarray(fit(photo, (rows, columns), crop_pct=crop_pct, crop_mode=mode, interpolation="bilinear"))
        found = cut.mean(axis=1 - axis)  # the place in the image that each row or column shows
        start, stop = seen_part((height, width), (rows, columns), crop_pct=crop_pct, crop_mode=mode)[axis]
        step = (stop - start) / kept
        expected = start + step * (np.arange(kept) + 0.5)
        inner = (found > 2 * step + 1) & (found < whole - 2 * step - 1)  # at the edges, filters lack one side
        assert -1e-6 <= start < stop <= whole + 1e-6
        np.testing.assert_allclose(found[inner], expected[inner], atol=0.1 * max(1, step))


def heat_of(drawn, photo):
    """How hot each pixel became: the colour map's greens grow with the heat, as no other channel does throughout."""
    return np.asarray(drawn, np.float32)[:, :, 1]


@pytest.mark.parametrize("hot", [(0, 0), (2, 1), (3, 3)])
def test_heat_lies_where_it_belongs(hot):
    heat = np.zeros((4, 4))
    heat[hot] = 0.3
    photo = Image.new("RGB", (600, 400), (90, 90, 90))
    drawn = heatmap.draw(photo, heat, ((0, 400), (100, 500)))
    assert drawn.size == photo.size
    warmth = heat_of(drawn, photo)[:, 100:500]
    y, x = np.unravel_index(warmth.argmax(), warmth.shape)
    assert (y // 100, x // 100) == hot
    cells = warmth.reshape(4, 100, 4, 100).mean(axis=(1, 3))
    assert np.unravel_index(cells.argmax(), cells.shape) == hot
    outside = np.asarray(drawn)[:, :100]
    assert outside.max() == 36 == np.asarray(drawn)[:, 500:].min()  # 0.4 of the grey


def test_the_colour_map_grows_lighter():
    colours = np.array(heatmap.palette()).reshape(256, 3)
    lightness = colours @ [0.299, 0.587, 0.114]
    assert np.all(np.diff(lightness) > 0) and lightness[0] < 2 and lightness[-1] > 235


@pytest.mark.parametrize(
    ("size", "expected"), [((32, 32), (256, 256)), ((100, 30), (300, 90)), ((256, 10), (256, 10)), ((1, 1), (256, 256))]
)
def test_small_images_are_enlarged(size, expected):
    drawn = heatmap.draw(Image.new("RGB", size), np.eye(2), ((0, size[1]), (0, size[0])))
    assert drawn.size == expected


def test_even_heat_and_parts_below_a_pixel():
    photo = Image.new("RGB", (1000, 1), "white")
    part = seen_part((1, 1000), (32, 32), crop_pct=0.5)
    assert heatmap.draw(photo, np.full((2, 2), 0.1), part).size == (1000, 1)


# --- names ----------------------------------------------------------------------------------------------------


def test_images_of_one_name_get_names_of_their_own(tmp_path):
    images = ["a/cat.jpg", "b/cat.png", "Cat.jpg", "cat-attention-2.png", "c/cat.gif", "cat-attention.png", "x/.jpg"]
    names = [path.name for path in overlay_paths(tmp_path, images)]
    assert names[:2] == ["cat-attention.png", "cat-attention-2.png"]
    assert len({name.lower() for name in names}) == len(images)


def test_an_image_is_never_overwritten(tmp_path):
    images = [str(tmp_path / "cat.png"), str(tmp_path / "cat-attention.png")]
    with pytest.raises(UsageError, match=r"would overwrite the image .*/cat-attention\.png: choose another"):
        overlay_paths(tmp_path, images)


# --- the command ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A trained run beside its images, and the same model without a head."""
    home = tmp_path_factory.mktemp("home")
    make_images(home / "images", train=8, test=3, noise=60)
    options = [*NANO, "--epochs", "2", "--batch-size", "8"]
    result = tinyvit("train", "--data", home / "images", "--out", home / "run", *options)
    assert result.returncode == 0, result.stderr
    ours = loading.open_checkpoint(home / "run")
    state = {name: x for name, x in ours.state.items() if not name.startswith("head")}
    metadata = native_file.read_metadata(home / "run" / "best.safetensors")
    metadata["config"]["num_classes"], metadata["class_names"] = 0, []
    native_file.save(home / "bare.safetensors", state, metadata)
    Image.effect_noise((90, 180), 80).convert("RGB").save(home / "photo.jpg")
    return home


def test_embed_writes_what_the_model_computes(home, tmp_path, capsys):
    images = [str(home / "photo.jpg"), *map(str, sorted((home / "images" / "test").glob("*/*.png")))]
    assert main(["predict", str(home / "run"), *images, "--embed", str(tmp_path / "f.npz"), "--json"]) == 0
    predictions = json.loads(capsys.readouterr().out)["predictions"]
    found = np.load(tmp_path / "f.npz", allow_pickle=False)
    assert found["features"].dtype == np.float32 and found["features"].shape == (10, 64)
    assert found["paths"].tolist() == images and found["class_names"].tolist() == ["blue", "green", "red"]
    assert str(found["model"]) == str(home / "run")
    model = library.load_model(home / "run")
    mean, std = (np.array(v)[:, None, None] for v in (model.preprocessing.mean, model.preprocessing.std))
    pixels = [np.asarray(fit(open_rgb(image), (32, 32))).transpose(2, 0, 1) for image in images]
    inputs = ((np.stack(pixels) / 255 - mean) / std).astype(np.float32)
    features = library.load_model(home / "run", num_classes=0)(inputs)
    np.testing.assert_allclose(found["features"], features.numpy(), rtol=1e-4, atol=1e-4)
    # the very features behind the probabilities
    logits = found["features"] @ model.head.weight.numpy().T + model.head.bias.numpy()
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    best = [p["classes"][0]["probability"] for p in predictions]
    np.testing.assert_allclose(best, expected.max(axis=1), rtol=1e-4)
    assert [p.name for p in tmp_path.iterdir()] == ["f.npz"]


def test_a_model_without_a_head_embeds_and_looks(home, tmp_path, capsys):
    command = ["predict", str(home / "bare.safetensors"), str(home / "photo.jpg"), "--json"]
    assert main(command) == 1
    assert "no head" in capsys.readouterr().err
    assert main([*command, "--embed", str(tmp_path / "f.npz"), "--attention", str(tmp_path / "new" / "looks")]) == 0
    prediction = json.loads(capsys.readouterr().out)["predictions"][0]
    assert prediction["classes"] == []
    found = np.load(tmp_path / "f.npz")
    assert found["features"].shape == (1, 64) and found["class_names"].tolist() == []
    assert Image.open(tmp_path / "new" / "looks" / "photo-attention.png").size == (2 * 180 + 94, 360)
    assert prediction["attention"] == str(tmp_path / "new" / "looks" / "photo-attention.png")


def test_attention_is_written_for_each_image(home, tmp_path, capsys):
    images = [str(home / "images" / "test" / name / "00.png") for name in ("red", "blue")] + [str(home / "photo.jpg")]
    assert main(["predict", str(home / "run"), *images, "--attention", str(tmp_path), "--top", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = ["00-attention.png", "00-attention-2.png", "photo-attention.png"]
    assert lines[2::3] == [f"  attention in {tmp_path / name}" for name in names]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    drawn = [np.asarray(Image.open(tmp_path / name)) for name in names[:2]]
    assert drawn[0].shape == drawn[1].shape == (256, 2 * 256 + 94, 3) and not np.array_equal(*drawn)
    original = np.asarray(Image.open(images[0]).convert("RGB")).repeat(8, axis=0).repeat(8, axis=1)
    assert np.array_equal(drawn[0][:, :256], original)
    photo = np.asarray(Image.open(tmp_path / names[2]).convert("HSV"))[:, 188:368, 1]  # the overlay alone
    assert photo[:90].max() == photo[270:].max() == 0 < photo[90:270].max(axis=1).min()  # what was cut off is grey


def test_an_image_is_decoded_for_the_model_and_for_the_drawing(home, tmp_path, monkeypatch):
    opened = count_decoded(monkeypatch)
    assert main(["predict", str(home / "run"), str(home / "photo.jpg"), "--attention", str(tmp_path)]) == 0
    assert opened == [str(home / "photo.jpg")] * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--embed", "DIR"], "--embed DIR is a directory, expected the name of a file"),
        (["--embed", "DIR/f.txt"], "--embed DIR/f.txt: expected a name that ends in .npz"),
        (["--embed", "DIR/no/f.npz"], "--embed DIR/no/f.npz: there is no directory DIR/no"),
        (["--attention", "DIR/file"], "--attention DIR/file is a file, expected a directory"),
    ],
)
def test_bad_outputs_are_refused_before_any_work(home, tmp_path, capsys, options, message):
    (tmp_path / "file").write_text("")
    options = [option.replace("DIR", str(tmp_path)) for option in options]
    assert main(["predict", str(home / "run"), str(home / "photo.jpg"), *options]) == 2
    assert capsys.readouterr() == ("", f"tinyvit: error: {message.replace('DIR', str(tmp_path))}\n")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("option", ["--confusion", "--predictions"])
def test_tables_of_eval_are_refused_before_any_work(home, tmp_path, capsys, option):
    for path, message in ((tmp_path, " is a directory"), (tmp_path / "no" / "c.csv", ": there is no directory")):
        assert main(["eval", str(home / "run"), "--data", "no/such/data", option, str(path)]) == 2
        assert f"{option} {path}{message}" in capsys.readouterr().err


def test_features_do_not_replace_the_model(tmp_path):
    (tmp_path / "vit.npz").write_bytes(b"")
    with pytest.raises(UsageError, match=r"vit\.npz would overwrite the model"):
        check_features_path(tmp_path / "vit.npz", tmp_path / "vit.npz")
    check_features_path(tmp_path / "vit.npz", tmp_path)  # features of an earlier time may be replaced


def test_an_image_that_cannot_be_read_leaves_nothing_behind(home, tmp_path, capsys):
    options = ["--embed", str(tmp_path / "f.npz"), "--attention", str(tmp_path / "looks")]
    assert main(["predict", str(home / "run"), str(home / "photo.jpg"), str(tmp_path / "gone.png"), *options]) == 1
    assert "gone.png" in capsys.readouterr().err and list(tmp_path.iterdir()) == []
