"""Checkpoints: whole or not at all, exact, and refused in one line when something is wrong with them."""

import re
import subprocess
import sys

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import tinyvit
from tinyvit.checkpoints.checkpoint import BEST, LAST, CheckpointError, describe
from tinyvit.checkpoints.loading import load_model, open_checkpoint
from tinyvit.checkpoints.native_file import read, read_metadata, save, write_safetensors
from tinyvit.data import Data
from tinyvit.evaluation.metrics import EvaluationError, labels_for
from tinyvit.files.atomic import atomic_write, write_text
from tinyvit.models.preprocessing import Preprocessing

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.2, 0.3)


def make_model(**overrides):
    return tinyvit.create_model("vit_nano_patch8_32", num_classes=3, **overrides)


def metadata_of(model):
    return describe(model.config, ("cat", "dog", "owl"), Preprocessing(MEAN, STD), {"val_fraction": 0.1, "seed": 0})


def write_run(directory, *, best=None, last=None):
    """A run directory with these models' weights."""
    directory.mkdir(exist_ok=True)
    if best is not None:
        save(directory / BEST, best.state_dict(), metadata_of(best))
    if last is not None:
        training = {"optimizer.0.m": np.ones(3, np.float32), "ema.head.bias": np.ones(3, np.float32)}
        save(directory / LAST, last.state_dict() | training, metadata_of(last))
    return directory


def assert_same_weights(model, expected):
    state = model.state_dict()
    assert state.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(state[name], array, err_msg=name)


def in_subprocess(code, *arguments):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


# --- writing --------------------------------------------------------------------------------------------------


ARRAYS = hnp.arrays(
    st.sampled_from([np.float32, np.float64, np.int64, np.uint8]), hnp.array_shapes(min_dims=0, max_dims=3, min_side=0)
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(tensors=st.dictionaries(st.from_regex(r"[a-z][a-z.]{0,8}", fullmatch=True), ARRAYS, max_size=4), value=JSON)
def test_save_and_read_are_inverse(tmp_path_factory, tensors, value):
    path = tmp_path_factory.mktemp("save") / "x.safetensors"
    transposed = {name: array.T for name, array in tensors.items()}  # mostly not contiguous
    save(path, transposed, {"value": value})
    back, metadata = read(path)
    assert metadata == {"value": value} == read_metadata(path)
    assert back.keys() == transposed.keys()
    for name, array in transposed.items():
        assert back[name].dtype == array.dtype
        np.testing.assert_array_equal(back[name], array)
    assert list(path.parent.iterdir()) == [path]


def test_files_of_the_same_values_have_the_same_bytes(tmp_path):
    """The safetensors library orders the metadata at random, anew in each process."""
    names = [f"{i}é" for i in range(12)]
    write_safetensors(tmp_path / "a", {"w": np.arange(3.0)}, dict.fromkeys(names, "x"))
    header = (tmp_path / "a").read_bytes()[8:].split(b"}")[0].decode()
    assert re.findall(r"\d+é", header) == sorted(names)
    assert load_file(tmp_path / "a")["w"].tolist() == [0, 1, 2]


def test_an_error_while_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(RuntimeError, match="half way"), atomic_write(path) as beside:
        beside.write_text("ne")
        raise RuntimeError("half way")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_process_killed_while_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    killed = """
import os, signal, sys
from tinyvit.files.atomic import atomic_write
with atomic_write(sys.argv[1]) as beside:
    beside.write_text("ne")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert in_subprocess(killed, path).returncode == -9
    assert path.read_text() == "old"
    write_text(path, "new")
    assert path.read_text() == "new"
    left = [file.name for file in tmp_path.iterdir() if file != path]
    assert len(left) == 1 and re.fullmatch(r"\.a\.txt\.\d+\.tmp", left[0]), "hidden, and named for the killed process"


@pytest.mark.skipif(sys.platform == "win32", reason="limits a file's size with setrlimit")
def test_a_full_disk_leaves_the_old_file_and_names_it(tmp_path):
    path = tmp_path / "a.safetensors"
    save(path, {"x": np.arange(3)}, {"is": "old"})
    full = """
import resource, sys
import numpy as np
from tinyvit.checkpoints.native_file import save
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
try:
    save(sys.argv[1], {"x": np.zeros(100_000)}, {"is": "new"})
except OSError as error:
    assert error.filename == sys.argv[1], error.filename
    sys.exit(7)
"""
    result = in_subprocess(full, path)
    assert result.returncode == 7, result.stderr
    assert read(path)[1] == {"is": "old"}
    assert list(tmp_path.iterdir()) == [path]


def test_a_place_that_cannot_be_written_is_reported_under_its_own_name(tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("")
    for path in (tmp_path / "gone" / "a.safetensors", tmp_path / "taken"):
        with pytest.raises(OSError, match="could not write") as caught:
            save(path, {"x": np.zeros(1)}, {})
        assert caught.value.filename == str(path)
    assert [p.name for p in tmp_path.iterdir()] == ["taken"]


def test_files_are_as_readable_as_any_other(tmp_path):
    ordinary = tmp_path / "ordinary"
    ordinary.write_text("")
    save(tmp_path / "a.safetensors", {"x": np.zeros(1)}, {})
    assert (tmp_path / "a.safetensors").stat().st_mode == ordinary.stat().st_mode


# --- loading --------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path):
    """A run directory with two different models."""
    return write_run(tmp_path / "run", best=make_model(seed=1), last=make_model(seed=2))


def test_a_run_opens_its_best_weights_and_else_its_last(run):
    best, last = make_model(seed=1).state_dict(), make_model(seed=2).state_dict()
    assert_same_weights(load_model(run), best)
    assert_same_weights(load_model(str(run)), best)
    assert_same_weights(load_model(run / LAST), last)
    assert_same_weights(load_model(run / BEST), best)
    (run / BEST).unlink()
    assert_same_weights(load_model(run), last)


def test_a_loaded_model_is_in_eval_mode_and_gives_the_same_logits(run):
    original = make_model(seed=1).eval()
    model = tinyvit.load_model(run)
    assert not any(module.training for _, module in model.named_modules())
    assert model.config == original.config
    images = np.random.default_rng(0).standard_normal((2, 3, 32, 32), dtype=np.float32)
    np.testing.assert_array_equal(model(images).numpy(), original(images).numpy())


def test_a_file_is_enough_by_itself(run, tmp_path):
    alone = tmp_path / "copy.safetensors"
    alone.write_bytes((run / BEST).read_bytes())
    checkpoint = open_checkpoint(alone)
    assert checkpoint.class_names == ("cat", "dog", "owl")
    assert (checkpoint.preprocessing.statistics, checkpoint.config.image_size) == ((MEAN, STD), (32, 32))
    assert checkpoint.split == {"val_fraction": 0.1, "seed": 0}
    assert_same_weights(load_model(alone), make_model(seed=1).state_dict())


def test_overrides(run):
    assert load_model(run, drop_path=0.2).config.drop_path == 0.2
    full, headless = load_model(run), load_model(run, num_classes=0)
    images = np.random.default_rng(0).standard_normal((2, 3, 32, 32), dtype=np.float32)
    features = headless(images).numpy()
    assert features.shape == (2, 64)
    logits = features @ full.head.weight.numpy().T + full.head.bias.numpy()
    np.testing.assert_allclose(logits, full(images).numpy(), rtol=1e-5, atol=1e-5)
    with pytest.raises(TypeError, match="patchsize"):
        load_model(run, patchsize=4)
    other = load_model(run, num_classes=5)
    assert not other(images).numpy().any() and other(images).shape == (2, 5)
    np.testing.assert_array_equal(other.norm.weight.numpy(), full.norm.weight.numpy())
    with pytest.raises(CheckpointError, match=r"blocks\.0\.mlp\.fc1\.weight has shape"):
        load_model(run, mlp_ratio=4.0)


def test_rectangles_float64_and_every_part_of_the_model_survive(tmp_path):
    model = make_model(image_size=(16, 24), patch_size=(8, 4), distilled=True, reg_tokens=2, init_values=0.1, seed=3)
    model.to("float64")
    write_run(tmp_path / "run", best=model)
    loaded = load_model(tmp_path / "run")
    assert loaded.config == model.config
    assert_same_weights(loaded, model.state_dict())
    assert {array.dtype for array in loaded.state_dict().values()} == {np.dtype(np.float64)}


# --- refusing -------------------------------------------------------------------------------------------------


def rewrite(path, change):
    """Rewrite a checkpoint with `change(tensors, metadata)` applied."""
    tensors, metadata = read(path)
    change(tensors, metadata)
    save(path, tensors, metadata)


def set_nan(tensors, metadata):
    tensors["blocks.0.mlp.fc1.weight"][3, 4] = np.nan


def set_infinite(tensors, metadata):
    tensors["head.bias"][0] = np.inf


def drop_key(tensors, metadata):
    del tensors["cls_token"]


def add_key(tensors, metadata):
    tensors["blocks.9.norm1.weight"] = np.zeros(3)


def change_shape(tensors, metadata):
    tensors["pos_embed"] = np.zeros((1, 5, 64), np.float32)


def unknown_field(tensors, metadata):
    metadata["config"]["flavour"] = "sweet"


def impossible_config(tensors, metadata):
    metadata["config"]["num_heads"] = 7


def no_config(tensors, metadata):
    del metadata["config"]


def config_of_wrong_type(tensors, metadata):
    metadata["config"] = [1]


def classes_of_wrong_type(tensors, metadata):
    metadata["class_names"] = None


def too_few_classes(tensors, metadata):
    del metadata["class_names"][0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_nan, "blocks.0.mlp.fc1.weight holds values that are not finite"),
        (set_infinite, "head.bias holds values that are not finite"),
        (drop_key, "missing cls_token"),
        (add_key, "unexpected blocks.9.norm1.weight"),
        (change_shape, "pos_embed has shape (1, 5, 64), expected (1, 17, 64)"),
        (unknown_field, "flavour"),
        (impossible_config, "num_heads 7"),
        (no_config, "config"),
        (config_of_wrong_type, "describes no model"),
        (classes_of_wrong_type, "describes no model"),
        (too_few_classes, "2 names for 3 classes"),
    ],
)
def test_weights_and_metadata_that_do_not_fit_are_refused(run, change, message):
    rewrite(run / BEST, change)
    with pytest.raises(CheckpointError) as caught:
        load_model(run)
    assert message in str(caught.value)
    assert str(run / BEST) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_metadata_of_another_writer_is_refused(run):
    tensors = load_file(run / BEST)
    for metadata in (None, {}, {"format": "pt"}, {"tinyvit": "{"}, {"tinyvit": "3"}):
        save_file(tensors, run / BEST, metadata=metadata)
        with pytest.raises(CheckpointError, match="metadata"):
            load_model(run)


def test_paths_that_hold_no_checkpoint(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "folder.safetensors").mkdir()
    for name in ("absent", "empty", "notes.txt", "folder.safetensors"):
        with pytest.raises(CheckpointError) as caught:
            load_model(tmp_path / name)
        assert name in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("kept", [0, 1, 7, 8, 100, 0.5, 0.999])
def test_truncated_files_are_refused(run, kept):
    whole = (run / BEST).read_bytes()
    (run / BEST).write_bytes(whole[: kept if isinstance(kept, int) else int(kept * len(whole))])
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        load_model(run)


def test_a_class_name_that_a_model_has_twice_decides_nothing(tmp_path):
    model = make_model()
    names = ("crane", "owl", "crane")  # a bird and a machine, as in ImageNet
    save(tmp_path / BEST, model.state_dict(), describe(model.config, names, Preprocessing(MEAN, STD), {}))
    checkpoint, labels = open_checkpoint(tmp_path), np.array([0, 1, 2])
    assert labels_for(checkpoint, labels, names).tolist() == [0, 1, 2]
    assert labels_for(checkpoint, labels[:1], ("owl",)).tolist() == [1]
    with pytest.raises(EvaluationError, match="class 'crane' is the name of several classes"):
        labels_for(checkpoint, labels[:2], ("crane", "owl"))


def test_a_model_trained_in_python_is_saved_and_opened(tmp_path):
    images = Data("d", None, None, ("a", "b"), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), (32, 32), 3, "x", {"crop_pct": 0.9})
    model = tinyvit.create_model("vit_nano_patch8_32", num_classes=2)
    for path in (tmp_path / "m.safetensors", tmp_path / "directory"):
        tinyvit.save_model(model, path, images)
        again = tinyvit.load_model(path)
        assert again.class_names == ("a", "b") and again.config == model.config
        assert (again.preprocessing.mean, again.preprocessing.crop_pct) == ((0.1, 0.2, 0.3), 0.9)
        for name, array in model.state_dict().items():
            assert np.array_equal(again.state_dict()[name], array)
    tinyvit.save_model(again, tmp_path / "m.safetensors")  # as it was loaded
    assert tinyvit.load_model(tmp_path / "m.safetensors").class_names == ("a", "b")
    with pytest.raises(ValueError, match=r"data set that it learned \(data=\.\.\.\), or set model.preprocessing = "):
        tinyvit.save_model(model, tmp_path / "n.safetensors")
    model.preprocessing = tinyvit.models.preprocessing.Preprocessing(MEAN, STD)  # as the message says
    tinyvit.save_model(model, tmp_path / "m.safetensors")
    assert tinyvit.load_model(tmp_path / "m.safetensors").preprocessing == model.preprocessing
    with pytest.raises(ValueError, match="3 outputs, the data 2 classes"):
        tinyvit.save_model(tinyvit.create_model("vit_nano_patch8_32", num_classes=3), tmp_path / "n", images)
    with pytest.raises(FileExistsError, match="directory exists already: choose another name"):
        tinyvit.save_model(model, tmp_path / "directory", images)
    with pytest.raises(ValueError, match=r"a file that ends in .safetensors, or a new directory, got .*m.pth"):
        tinyvit.save_model(model, tmp_path / "m.pth", images)
    model.head = tinyvit.nn.Linear(64, 7)  # what load_model would refuse
    with pytest.raises(ValueError, match=r"head.weight has shape \(7, 64\), expected \(2, 64\).*reset_classifier"):
        tinyvit.save_model(model, tmp_path / "n.safetensors", images)
    with pytest.raises(TypeError, match="expects a model of create_model or load_model, got Linear"):
        tinyvit.save_model(model.head, tmp_path / "n.safetensors", images)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["directory", "m.safetensors"]
