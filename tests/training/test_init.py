"""`tinyvit train --init`: which weights a run begins with."""

import json
import math
import shutil

import numpy as np
import pytest
from running import NANO, assert_one_line_error, make_images, start, stop_when, tinyvit
from runs import epochs_done, finetune, metrics
from safetensors.numpy import load_file

QUIET = ["--lr", 1e-12, "--weight-decay", 0, "--label-smoothing", 0, "--no-augment"]  # what begins stays as it is


def best(run):
    return load_file(run / "best.safetensors")


def test_a_run_begins_where_another_ended(trained, tmp_path):
    options = ["--init", trained / "run", "--epochs", 1, *QUIET]
    result = tinyvit("train", "--data", trained / "images", *options, "--out", tmp_path / "a")
    assert result.returncode == 0, result.stderr
    before, after = best(trained / "run"), best(tmp_path / "a")
    assert before.keys() == after.keys()
    assert all(np.allclose(before[name], after[name], atol=1e-8) for name in before)
    assert metrics(tmp_path / "a")[0]["val_accuracy"] == max(row["val_accuracy"] for row in metrics(trained / "run"))


def test_other_classes_get_a_head_of_zeros(trained, tmp_path):
    finetune(trained, tmp_path / "a", *QUIET, epochs=1)
    before, after = best(trained / "run"), best(tmp_path / "a")
    for name in before:
        expected = np.zeros_like(before[name]) if name.startswith("head.") else before[name]
        assert np.allclose(after[name], expected, atol=1e-8), name
    assert metrics(tmp_path / "a")[0]["val_loss"] == pytest.approx(math.log(3), abs=1e-5)


def test_the_images_are_scaled_as_the_weights_are_used_to(trained, tmp_path):
    dark = make_images(tmp_path / "dark", noise=40, seed=1)
    result = tinyvit("train", "--data", dark, "--init", trained / "run", "--epochs", 1, *QUIET, "--out", tmp_path / "a")
    assert result.returncode == 0, result.stderr
    before, after = (json.loads((run / "config.json").read_text()) for run in (trained / "run", tmp_path / "a"))
    assert "mean" in json.dumps(before)
    assert (
        {k: before[k] for k in before if k in ("mean", "std", "preprocessing")}
        == {k: after[k] for k in after if k in ("mean", "std", "preprocessing")}
        != {}
    )


def test_a_killed_run_goes_on_without_the_weights_it_began_with(trained, tmp_path):
    shutil.copytree(trained / "run", tmp_path / "base")
    out = tmp_path / "a"
    process = start("train", "--data", trained / "images", "--init", tmp_path / "base", "--epochs", 8, "--out", out)
    stop_when(process, lambda: epochs_done(out) >= 2)
    shutil.rmtree(tmp_path / "base")
    result = tinyvit("train", "--out", out, "--resume")
    assert result.returncode == 0, result.stderr
    assert [row["epoch"] for row in metrics(out)] == list(range(1, 9))


def test_what_cannot_begin_a_run_is_refused_in_one_line(trained, tmp_path):
    data = ["train", "--data", trained / "images", "--out", tmp_path / "a"]
    both = tinyvit(*data, "--init", trained / "run", *NANO)
    assert both.returncode == 2 and "exclude each other" in both.stderr and both.stderr.count("\n") == 1
    # Pairs of options are judged before the data, which is not even there, and a recipe by its own name.
    nowhere = ["train", "--data", tmp_path / "nowhere", "--out", tmp_path / "a"]
    assert "--freeze 1 keeps weights" in assert_one_line_error(tinyvit(*nowhere, "--freeze", 1), 2)
    both = tinyvit(*nowhere, "--recipe", "keras-cifar10", "--init", trained / "run")
    assert "--recipe keras-cifar10 and --init" in assert_one_line_error(both, 2)
    missing = tinyvit(*data, "--init", tmp_path / "nothing")
    assert missing.returncode == 1 and "nothing" in missing.stderr and missing.stderr.count("\n") == 1
    assert not (tmp_path / "a").exists()
