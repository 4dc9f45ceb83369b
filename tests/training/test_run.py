"""Runs: what they write, and trouble on the way."""

import json
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest
from running import COMMAND, NANO, assert_one_line_error, environment, tinyvit
from runs import KEYS, OPTIONS, assert_evaluated_as_recorded, assert_same_run, metrics, progress
from safetensors.numpy import load_file

from tinyvit.evaluation.metrics import Scores
from tinyvit.training.progress import Progress
from tinyvit.training.run import train
from tinyvit.training.run_directory import curves_png
from tinyvit.training.trainer import Trainer, TrainError


def test_a_run_writes_what_the_contract_says(unbroken, images):
    out, printed = unbroken
    assert {path.name for path in out.iterdir()} == {
        "config.json", "metrics.jsonl", "last.safetensors", "best.safetensors", "curves.png"
    }  # fmt: skip
    rows = metrics(out)
    assert [list(row) for row in rows] == [KEYS] * 4
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4]
    assert [row["step"] for row in rows] == [9, 18, 27, 36]
    assert all(0 <= row[key] <= 1 for row in rows for key in ("train_accuracy", "val_accuracy", "val_top5"))
    assert all(row["val_top5"] == 1 for row in rows), "three classes: the true one is always among five"
    assert rows == sorted(rows, key=lambda row: row["seconds"]) and rows[0]["seconds"] > 0

    config = json.loads((out / "config.json").read_text())
    assert config["options"]["batch_size"] == 8 and config["options"]["lr"] == 1e-3
    assert config["class_names"] == ["blue", "green", "red"]
    assert config["config"]["num_classes"] == 3 and config["config"]["embed_dim"] == 64
    assert config["data"]["train"] == 72 and config["data"]["test"] == 18
    assert config["plan"] == {"total_steps": 36, "steps_per_epoch": 9, "warmup_steps": 4}
    assert len(config["mean"]) == len(config["std"]) == 3
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")

    lines = printed.splitlines()
    assert len(lines) == 7, printed  # what is trained and where, four epochs, the best
    assert " cores, " in lines[1]
    best = max(row["val_accuracy"] for row in rows)
    assert f"{best:.2%}" in lines[-1] and str(out / "best.safetensors") in lines[-1]


@pytest.mark.parametrize("epochs", [1, 2, 3, 40])
def test_epochs_in_curves_are_whole_numbers(monkeypatch, epochs):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, file, **options: drawn.append(figure))
    values = dict.fromkeys(("train_loss", "val_loss", "train_accuracy", "val_accuracy"), 0.5)
    curves_png.__wrapped__([{"epoch": 1 + i, **values} for i in range(epochs)], "", "")
    for axes in drawn[0].axes:
        ticks = axes.get_xticks()
        assert len(ticks) and all(tick == round(tick) for tick in ticks)


def test_best_holds_the_averaged_weights_of_the_best_epoch(unbroken):
    out, _ = unbroken
    where = progress(out / "last.safetensors")
    rows = metrics(out)
    ranking = [(row["val_accuracy"], -row["val_loss"]) for row in rows]
    assert where["best_epoch"] == 1 + ranking.index(max(ranking))
    last, best = load_file(out / "last.safetensors"), load_file(out / "best.safetensors")
    assert best.keys() == {name for name in last if not name.startswith(("optimizer.", "ema."))}
    if where["best_epoch"] == 4:
        assert all(np.array_equal(array, last[f"ema.{name}"]) for name, array in best.items())
    assert any(not np.array_equal(array, last[name]) for name, array in best.items())


def test_eval_finds_the_accuracy_that_training_recorded(unbroken, images):
    assert_evaluated_as_recorded(unbroken[0], images)


def test_another_seed_gives_other_weights(unbroken, images, tmp_path):
    arguments = [option if option != "3" else "4" for option in OPTIONS]
    assert tinyvit("train", "--data", images, "--out", tmp_path / "run", *arguments).returncode == 0
    ours, theirs = (load_file(run / "last.safetensors")["head.weight"] for run in (tmp_path / "run", unbroken[0]))
    assert not np.array_equal(ours, theirs)


def test_a_loss_that_is_not_finite_stops_the_run(images, tmp_path):
    out = tmp_path / "run"
    arguments = ["--optimizer", "sgd", "--lr", "1e30", "--warmup", "0", "--clip-norm", "0", "--schedule", "constant"]
    result = tinyvit("train", "--data", images, "--out", out, *NANO, *arguments, "--weight-decay", "0")
    message = assert_one_line_error(result, 1)
    assert "at step " in message and "learning rate 1e+30" in message
    assert str(out / "last.safetensors") in message
    assert all(np.all(np.isfinite(array)) for array in load_file(out / "last.safetensors").values())


NEVER = property(lambda self: 1e9, lambda self, value: None)  # for Trainer.read_every: seconds until numbers are read


def test_numbers_read_late_from_a_device_are_the_same(images, tmp_path, monkeypatch):
    """Whether each step is read at once or, as from a device, many of them later."""
    given = dict(data=str(images), model="vit_nano_patch8_32", batch_size=8, epochs=2, device="cpu", seed=3)
    train({**given, "out": str(tmp_path / "at_once")})
    monkeypatch.setattr(Trainer, "read_every", NEVER, raising=False)
    train({**given, "out": str(tmp_path / "late")})
    assert_same_run(tmp_path / "at_once", tmp_path / "late")


def test_a_loss_read_late_names_its_step(images, tmp_path, monkeypatch):
    given = dict(data=str(images), model="vit_nano_patch8_32", batch_size=8, epochs=2, device="cpu", seed=3)
    messages = []
    for late in (False, True):
        if late:
            monkeypatch.setattr(Trainer, "read_every", NEVER, raising=False)
        with np.errstate(all="ignore"), pytest.raises(TrainError) as caught:
            wild = {"optimizer": "sgd", "lr": 1e30, "warmup": 0.0, "clip_norm": 0.0}
            train({**given, **wild, "out": str(tmp_path / str(late))})
        messages.append(str(caught.value).partition(" (")[0])
    assert messages[0] == messages[1] and "at step 2" in messages[0]


@pytest.mark.skipif(sys.platform == "win32", reason="limits a file's size with setrlimit")
def test_a_full_disk_ends_the_run_in_one_line(images, tmp_path):
    import resource

    out = tmp_path / "run"
    result = subprocess.run(
        [*COMMAND, "train", "--data", images, "--out", out, *NANO], capture_output=True, text=True, env=environment(),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
    )  # fmt: skip
    assert str(out / "last.safetensors") in assert_one_line_error(result, 1)
    assert not [path for path in out.iterdir() if path.suffix in (".tmp", ".safetensors")]


def test_images_that_cannot_be_read(images, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(images, damaged)
    broken = damaged / "train" / "red" / "07.png"
    broken.write_bytes(broken.read_bytes()[:200])
    arguments = ["train", "--data", damaged, "--out", tmp_path / "run", *NANO, "--epochs", "1"]
    message = assert_one_line_error(tinyvit(*arguments), 1)
    assert "07.png" in message and "--skip-corrupt" in message
    result = tinyvit(*arguments, "--skip-corrupt")
    assert result.returncode == 0, result.stderr
    assert "71 training" in result.stdout and "07.png" in result.stdout


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_precision_that_costs_time_is_named(images, tmp_path, precision):
    command = ["train", "--data", images, *NANO, "--epochs", 1, "--device", "cpu", "--precision", precision]
    second_line = tinyvit(*command, "--out", tmp_path / "run").stdout.splitlines()[1]
    assert ("fp16 on " in second_line and "slower than fp32" in second_line) is (precision == "fp16")


def test_training_works_outside_the_main_thread(images, tmp_path):
    given = {"data": str(images), "out": str(tmp_path / "run"), "model": "vit_nano_patch8_32", "epochs": 1}
    thread = threading.Thread(target=train, args=(given,))
    thread.start()
    thread.join(60)
    assert metrics(tmp_path / "run")[0]["epoch"] == 1


def test_between_equal_accuracies_the_loss_decides():
    def scores(loss):
        return Scores(("a", "b"), np.array([0, 0]), np.array([[0.0, 1.0], [loss, loss], [0, 1], [1, 1]]))

    progress = Progress(best_accuracy=0.5, best_loss=1.0, best_epoch=1)
    assert [progress.improved_by(scores(loss)) for loss in (0.9, 1.0, 1.1)] == [True, False, False]
