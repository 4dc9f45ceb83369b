"""Fine-tuning by the command: frozen parts, new heads, stored features, early stopping, preprocessing."""

import json
import shutil
import time
from types import SimpleNamespace

import numpy as np
import pytest
from running import NANO, assert_one_line_error, count_decoded, start, stop_when, tinyvit
from runs import assert_evaluated_as_recorded, assert_same_weights, epochs_done, finetune, images, metrics, model
from safetensors.numpy import load_file, save_file

import tinyvit as package
from tinyvit import TrainStep, optim
from tinyvit.checkpoints import loading
from tinyvit.checkpoints.checkpoint import BEST
from tinyvit.checkpoints.convert import convert
from tinyvit.checkpoints.loading import open_checkpoint
from tinyvit.checkpoints.native_file import read, save
from tinyvit.models.inspection import Features
from tinyvit.optim.param_groups import layer_number
from tinyvit.training.build import keeps_head
from tinyvit.training.finetune import Head, class_weights, freeze, init_head

# --- the command --------------------------------------------------------------------------------------------------


def test_a_run_keeps_what_is_frozen(trained, tmp_path):
    finetune(trained, tmp_path / "a", "--freeze", 1, "--layer-decay", 0.7, "--head-lr", 0.01, "--head-init", "normal")
    before, after = (load_file(run / "best.safetensors") for run in (trained / "run", tmp_path / "a"))
    for name in before:
        assert np.array_equal(before[name], after[name]) == (layer_number(name, 2) <= 1), name
    options = json.loads((tmp_path / "a" / "config.json").read_text())["options"]
    given = {"freeze": 1, "layer_decay": 0.7, "head_lr": 0.01, "head_init": "normal"}
    assert {name: options[name] for name in given} == given


def test_the_number_of_heads_can_be_given(trained, tmp_path):
    """Of a model by name, and of a checkpoint that does not say how many it has."""
    weights = tmp_path / "vit_other_patch8_32.safetensors"
    save_file(load_file(trained / "run" / BEST), weights)
    for number, begin in enumerate((["--model", "vit_nano_patch8_32"], ["--init", weights])):
        out = tmp_path / f"run{number}"
        result = tinyvit("train", "--data", trained / "other", "--out", out, "--epochs", 1, *begin, "--num-heads", 4)
        assert result.returncode == 0 and not result.stderr, result.stderr
        assert json.loads((out / "config.json").read_text())["config"]["num_heads"] == 4


def with_classes(trained, path, names, **metadata):
    """The run's weights under other class names, the head's rows as they are."""
    tensors, recorded = read(trained / "run" / BEST)
    path.mkdir()
    save(path / BEST, tensors, recorded | {"class_names": names} | metadata)
    return tensors


def untouched(trained, out, init, epochs=1):
    """The weights of a run at a learning rate of nothing, and what it printed."""
    result = tinyvit("train", "--data", trained / "other", "--init", init, "--epochs", epochs, "--out", out,
                     "--lr", 1e-30, "--weight-decay", 0)  # fmt: skip
    assert result.returncode == 0, result.stderr
    return load_file(out / BEST), result.stdout


def test_the_head_of_the_same_classes_is_kept_in_whatever_order(trained, tmp_path):
    old = with_classes(trained, tmp_path / "init", ["red", "azure", "green"])
    new, printed = untouched(trained, tmp_path / "a", tmp_path / "init")
    assert "its head kept" in printed
    assert np.allclose(new["head.weight"], old["head.weight"][[1, 2, 0]], rtol=1e-5) and old["head.weight"].any()
    assert np.allclose(new["head.bias"], old["head.bias"][[1, 2, 0]], rtol=1e-5)
    new, printed = untouched(trained, tmp_path / "b", trained / "run")
    assert "a new head for 3 classes" in printed and np.abs(new["head.weight"]).max() < 1e-20
    assert "resized" not in printed


def test_resized_weights_are_told(trained, tmp_path):
    sizes = ["--image-size", 24, "--patch-size", 6]
    result = tinyvit("train", "--data", trained / "other", "--init", trained / "run", "--epochs", 1, *sizes,
                     "--out", tmp_path / "a")  # fmt: skip
    assert "run resized from 4x4 patches of 8x8 pixels to 4x4 patches of 6x6 pixels, " in result.stdout


@pytest.mark.parametrize("names", [["0", "1", "2"], ["LABEL_0", "LABEL_1", "LABEL_2"]])
def test_made_up_names_are_nobodys_classes(trained, tmp_path, names):
    """A checkpoint that numbers its classes, as ours and as another library's, beside a folder of the same names."""
    with_classes(trained, tmp_path / "known", names)
    with_classes(trained, tmp_path / "numbered", names, names_known=False)
    convert(tmp_path / "known", tmp_path / "timm", "timm")
    convert(tmp_path / "known", tmp_path / "hf", "huggingface")
    convert(tmp_path / "timm", tmp_path / "back", "tinyvit")
    known = {path.name: open_checkpoint(path).names_known for path in tmp_path.iterdir()}
    assert known == {"known": True, "numbered": False, "timm": False, "hf": False, "back": False}
    image_folder = SimpleNamespace(class_names=tuple(names))
    assert keeps_head(open_checkpoint(tmp_path / "known"), image_folder)
    assert not keeps_head(open_checkpoint(tmp_path / "numbered"), image_folder)


@pytest.mark.parametrize(
    ("options", "status", "named"),
    [
        (["--freeze", "99"], 2, "0 to 2 blocks to freeze, got 99"),
        (["--freeze", "head"], 2, "expected all-but-head or a number of blocks, got 'head'"),
        (["--freeze", "-1"], 2, "expected all-but-head or a number of blocks"),
        (["--layer-decay", "0"], 2, "--layer-decay: expected a number above 0 and at most 1, got '0'"),
        (["--layer-decay", "1.5"], 2, "at most 1"),
        (["--head-lr", "0"], 2, "--head-lr: expected a number above 0"),
        (["--head-init", "ones"], 2, "expected zeros or normal"),
        (["--no-augment", "--erasing", "0.2"], 2, "--erasing 0.2 varies training images, and --no-augment leaves"),
        (
            ["--freeze", "all-but-head", "--flip", "alternate"],
            2,
            "--freeze all-but-head, unless with --augment, leaves",
        ),
        (["--adam-lr", "0.01"], 2, "--adam-lr 0.01 is for --optimizer muon"),
    ],
)
def test_nonsense_is_refused_in_one_line(trained, tmp_path, options, status, named):
    result = tinyvit("train", "--data", trained / "other", "--init", trained / "run", "--out", tmp_path / "a", *options)
    assert named in assert_one_line_error(result, status)
    assert not (tmp_path / "a").exists()


def test_a_toml_file_says_the_same(trained, tmp_path):
    lines = ['freeze = "all-but-head"', "layer-decay = 1", "head_lr = 1e-2", 'class-weights = "balanced"']
    (tmp_path / "o.toml").write_text("\n".join([*lines, "augment = true"]))
    finetune(trained, tmp_path / "a", "--config", tmp_path / "o.toml", "--freeze", 1, epochs=1)
    options = json.loads((tmp_path / "a" / "config.json").read_text())["options"]
    given = {"freeze": 1, "layer_decay": 1.0, "head_lr": 0.01, "class_weights": "balanced", "augment": True}
    given["patience"] = None
    assert {name: options[name] for name in given} == given
    refused = {
        "freeze = true": "expected one value",
        'freeze = "all"': "expected all-but-head",
        "patience = 0": "at least 1",
    }
    source = ["--data", trained / "other", "--init", trained / "run"]
    for line, named in refused.items():
        (tmp_path / "o.toml").write_text(line)
        result = tinyvit("train", *source, "--config", tmp_path / "o.toml")
        assert named in assert_one_line_error(result, 2)


def test_a_head_has_a_rate_of_its_own_without_init_too(trained, tmp_path):
    options = [*NANO, "--head-lr", 0.01, "--epochs", 1]
    result = tinyvit("train", "--data", trained / "other", *options, "--out", tmp_path / "b")
    assert result.returncode == 0, result.stderr


# --- features that are computed once ------------------------------------------------------------------------------


@pytest.mark.parametrize("overrides", [{}, {"distilled": True}, {"representation_size": 8}, {"global_pool": "avg"},
                                       {"distilled": True, "representation_size": 8, "drop_rate": 0.3}])  # fmt: skip
def test_the_head_on_features_is_the_model(overrides):
    """Three steps on features end where three steps on images do, and so do evaluations."""
    weights = []
    for on_features in (False, True):
        net = model(**overrides).to("float64")
        init_head(net, "normal", seed=1)
        freeze(net, "all-but-head")
        x = images().astype(np.float64)
        inputs, part = (package.predict(Features(net, distilled=True), x), Head(net)) if on_features else (x, net)
        step = TrainStep(part, optim.AdamW(optim.param_groups(net, 0.05), lr=0.01), threads=1, shards=2, seed=5)
        for _ in range(3):
            step(inputs, np.arange(6) % 5)
        assert np.allclose(package.predict(part, inputs), package.predict(net, x), rtol=1e-10, atol=1e-12)
        weights.append(net.state_dict())
    assert [id(p) for p in Head(net).parameters()] == [id(p) for p in net.parameters() if p.requires_grad]
    plain, ours = weights
    assert all(np.allclose(plain[name], ours[name], rtol=1e-9, atol=1e-12) for name in plain)


def test_a_run_computes_features_once(trained, tmp_path, monkeypatch):
    """Every image goes once through the blocks, whatever the epochs; augmentation asks for them every time."""
    from tinyvit.models import vit
    from tinyvit.training.run import train

    seen = []
    original = vit.VisionTransformer.head_tokens

    def counted(self, x):
        seen.append(len(x))
        return original(self, x)

    monkeypatch.setattr(vit.VisionTransformer, "head_tokens", counted)
    source = {"data": str(trained / "other"), "init": str(trained / "run")}
    given = source | {"epochs": 3, "freeze": "all-but-head", "threads": 1, "device": "cpu"}  # a graph calls no Python
    train(given | {"out": str(tmp_path / "a")})
    assert sum(seen) == 72 + 18
    seen.clear()
    train(given | {"out": str(tmp_path / "b"), "augment": True, "batch_size": 9})
    assert sum(seen) == 3 * (72 + 18)


def test_the_seconds_of_a_run_count_its_features(trained, tmp_path, monkeypatch):
    """And are not taken for those of steps where the length is corrected."""
    from tinyvit.training import run, time_budget

    original, correct, of_steps = run.with_features, time_budget.TimeBudget.correct, []
    monkeypatch.setattr(run, "with_features", lambda *given: (time.sleep(1), original(*given))[1])
    monkeypatch.setattr(
        time_budget.TimeBudget, "correct", lambda *given: (of_steps.append(given[3]), correct(*given))[1]
    )
    run.train({"data": str(trained / "other"), "init": str(trained / "run"), "freeze": "all-but-head", "minutes": 0.05,
               "out": str(tmp_path / "a")})  # fmt: skip
    first, *_, last = (row["seconds"] for row in metrics(tmp_path / "a"))
    assert first > 1 and of_steps and all(0 < seconds < last - 1 for seconds in of_steps)


def test_the_weights_to_begin_with_are_read_once(trained, tmp_path, monkeypatch):
    from tinyvit.training.run import train

    opened = []
    original = loading.read_checkpoint
    monkeypatch.setattr(loading, "read_checkpoint", lambda path: (opened.append(path), original(path))[1])
    train({"data": str(trained / "other"), "init": str(trained / "run"), "freeze": "all-but-head", "minutes": 0.01,
           "out": str(tmp_path / "a")})  # fmt: skip
    assert len(opened) == 1


def test_a_run_on_features_decodes_each_image_once(trained, tmp_path, monkeypatch):
    """And those of the test part not at all, where there is a validation part."""
    from tinyvit.training.run import train

    image_folder = tmp_path / "images"
    shutil.copytree(trained / "other", image_folder)
    shutil.copytree(image_folder / "test", image_folder / "val")
    opened = count_decoded(monkeypatch)
    given = {"data": str(image_folder), "init": str(trained / "run"), "epochs": 2, "freeze": "all-but-head"}
    train(given | {"out": str(tmp_path / "a")})
    assert len(opened) == len(set(opened)) == 72 + 18 and not any("test" in path.parts for path in opened)


@pytest.mark.parametrize(("every", "saves"), [(1e9, 2), (0.0, 6)])
def test_short_epochs_are_not_all_saved(trained, tmp_path, monkeypatch, every, saves):
    """The start and the end are, and the best weights are those of the best epoch."""
    from tinyvit.training import build, run_directory
    from tinyvit.training.run import train

    written = []
    monkeypatch.setattr(build, "SAVE_FEATURE_RUNS_EVERY", every)
    monkeypatch.setattr(run_directory, "save", lambda path, *what: (written.append(path.name), save(path, *what)))
    train({"data": str(trained / "other"), "init": str(trained / "run"), "freeze": "all-but-head", "epochs": 5,
           "optimizer": "sgd", "lr": 3.0, "out": str(tmp_path / "a")})  # fmt: skip
    assert written.count("last.safetensors") == saves and written[-1] == "last.safetensors"
    assert 1 <= written.count(BEST) <= saves - 1
    assert len(metrics(tmp_path / "a")) == 5
    assert_evaluated_as_recorded(tmp_path / "a", trained / "other")


def test_a_failed_run_on_features_leaves_its_best_weights(trained, tmp_path, monkeypatch):
    from tinyvit.training import build, trainer
    from tinyvit.training.run import train

    check = trainer.Trainer.check_finite
    monkeypatch.setattr(build, "SAVE_FEATURE_RUNS_EVERY", 1e9)

    def broken(self, *what):
        check(self, *((np.nan, 1) if self.progress.epoch == 2 else what))

    monkeypatch.setattr(trainer.Trainer, "check_finite", broken)
    with pytest.raises(trainer.TrainError, match="the loss is nan"):
        train({"data": str(trained / "other"), "init": str(trained / "run"), "freeze": "all-but-head", "epochs": 5,
               "out": str(tmp_path / "a")})  # fmt: skip
    assert open_checkpoint(tmp_path / "a" / BEST).state["head.weight"].any()


def test_a_run_on_features_is_evaluated_as_any_other(trained, tmp_path):
    options = ["--freeze", "all-but-head", "--lr", 0.01, "--ema", 0.5]
    printed = finetune(trained, tmp_path / "a", *options, epochs=6)
    assert "computing the features of 90 images once" in printed and ", 195 of them learn)" in printed
    assert_evaluated_as_recorded(tmp_path / "a", trained / "other")
    before, after = (load_file(run / "best.safetensors") for run in (trained / "run", tmp_path / "a"))
    assert {name for name in before if not np.array_equal(before[name], after[name])} == {"head.weight", "head.bias"}
    assert json.loads((tmp_path / "a" / "config.json").read_text())["options"]["augment"] is False


@pytest.mark.parametrize(
    ("options", "epochs"),
    [(["--freeze", "all-but-head"], 30), (["--freeze", 1, "--class-weights", "balanced", "--ema", 0.9], 6)],
)
def test_a_killed_run_goes_on_to_the_same_bits(trained, tmp_path, options, epochs):
    options = [*options, "--patience", 9, "--batch-size", 9]
    finetune(trained, tmp_path / "a", *options, epochs=epochs)
    source = ["--data", trained / "other", "--init", trained / "run"]
    process = start("train", *source, "--epochs", epochs, "--out", tmp_path / "b", *options)
    stop_when(process, lambda: epochs_done(tmp_path / "b") >= 1)
    result = tinyvit("train", "--out", tmp_path / "b", "--resume")
    assert result.returncode == 0, result.stderr
    assert_same_weights(tmp_path / "a", tmp_path / "b")


def test_minutes_count_features_in(trained, tmp_path):
    out = tmp_path / "a"
    result = tinyvit("train", "--data", trained / "other", "--init", trained / "run", "--freeze", "all-but-head",
                     "--minutes", 0.04, "--out", out)  # fmt: skip
    assert result.returncode == 0, result.stderr
    config = json.loads((out / "config.json").read_text())
    assert metrics(out)[-1]["step"] == config["plan"]["total_steps"]


# --- early stopping, weighted classes -----------------------------------------------------------------------------


def test_patience_ends_a_run_that_gets_no_better(trained, tmp_path):
    """A learning rate of nothing: the first epoch stays the best."""
    options = ["--lr", 1e-30, "--weight-decay", 0, "--no-augment"]
    printed = finetune(trained, tmp_path / "a", "--patience", 2, *options, epochs=50)
    assert (
        epochs_done(tmp_path / "a") == 3 and "stopping early: 2 epochs without a better validation accuracy" in printed
    )
    again = tinyvit("train", "--out", tmp_path / "a", "--resume")
    assert "is finished, after 24 steps: nothing was changed" in again.stdout
    printed = finetune(trained, tmp_path / "b", "--patience", 50, epochs=2)
    assert "stopping early" not in printed


def test_class_weights_balance():
    labels = np.array([0] * 90 + [1] * 9 + [2])
    weights = class_weights(labels, 4)
    assert weights.dtype == np.float32 and np.allclose(weights[:3] * [90, 9, 1], 25)
    assert np.isfinite(weights).all(), "a class without images has some weight, too"


def test_weighted_classes_reach_the_steps(trained, tmp_path):
    """Eight of ten images are red; weighted, the gradients cancel in a head of zeros, so its bias stays small."""
    image_folder = tmp_path / "images"
    shutil.copytree(trained / "other", image_folder)
    for name in ("azure", "green"):
        for path in sorted((image_folder / "train" / name).iterdir())[3:]:
            path.unlink()
    biases = {}
    for how in ("none", "balanced"):
        out = tmp_path / how
        options = ["--freeze", "all-but-head", "--batch-size", 30, "--epochs", 1, "--optimizer", "sgd"]
        options += ["--label-smoothing", 0, "--class-weights", how]
        result = tinyvit("train", "--data", image_folder, "--init", trained / "run", *options, "--out", out)
        assert result.returncode == 0, result.stderr
        biases[how] = load_file(out / "last.safetensors")["head.bias"]
    assert biases["none"].max() > 0.005 and np.abs(biases["balanced"]).max() < 1e-3 * biases["none"].max()


# --- what the checkpoint brings -----------------------------------------------------------------------------------


def test_dropout_is_as_the_run_says_whatever_the_checkpoint_had(trained, tmp_path):
    _, metadata = read(trained / "run" / BEST)
    rates = {"attn_drop_rate": 0.3, "drop_rate": 0.3, "pos_drop_rate": 0.3, "proj_drop_rate": 0.3, "drop_path": 0.3}
    with_classes(trained, tmp_path / "init", ["red", "azure", "green"], config=metadata["config"] | rates)
    untouched(trained, tmp_path / "a", tmp_path / "init")
    config = read(tmp_path / "a" / BEST)[1]["config"]
    assert {name: config[name] for name in rates} == dict.fromkeys(rates, 0.0)


def test_a_run_of_rectangles_and_its_weights_under_another_path(trained, tmp_path):
    result = tinyvit("train", "--data", trained / "other", "--init", trained / "run", "--image-size", "16x32",
                     "--epochs", 1, "--out", tmp_path / "a")  # fmt: skip
    assert result.returncode == 0 and "images of 16x32" in result.stdout, result.stderr
    assert open_checkpoint(tmp_path / "a").config.image_size == (16, 32)
    again = ["train", "--out", tmp_path / "a", "--resume", "--image-size", "16x32", "--init"]
    result = tinyvit(*again, trained / "images" / ".." / "run")
    assert "is finished" in result.stdout, result.stderr
    assert "was started with --init" in assert_one_line_error(tinyvit(*again, tmp_path), 2)


# --- how images are prepared ------------------------------------------------------------------------------------


def test_a_fine_tuned_run_prepares_images_as_its_weights_were_used_to(trained, tmp_path):
    tensors, metadata = read(trained / "run" / BEST)
    unusual = {"crop_pct": 0.5, "crop_mode": "squash", "interpolation": "nearest", "mean": [0.1] * 3, "std": [0.7] * 3}
    (tmp_path / "odd").mkdir()
    save(tmp_path / "odd" / BEST, tensors, metadata | unusual)
    options = ["--init", tmp_path / "odd", "--epochs", 2]
    result = tinyvit("train", "--data", trained / "other", *options, "--out", tmp_path / "a")
    assert result.returncode == 0, result.stderr
    ours = open_checkpoint(tmp_path / "a")
    assert ours.preprocessing == open_checkpoint(tmp_path / "odd").preprocessing
    assert ours.preprocessing.crop_pct == 0.5
    assert_evaluated_as_recorded(tmp_path / "a", trained / "other")
    shutil.rmtree(tmp_path / "odd")
    assert "finished" in tinyvit("train", "--out", tmp_path / "a", "--resume").stdout
