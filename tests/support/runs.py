"""Shared by the tests of training runs: a run that uses all options, and comparisons of run directories."""

import contextlib
import itertools
import json
import signal

import numpy as np
import pytest
from running import NANO, tinyvit
from safetensors import safe_open
from safetensors.numpy import load_file

from tinyvit import create_model
from tinyvit.errors import Stopped
from tinyvit.training import run
from tinyvit.training.trainer import Trainer

KEYS = ["epoch", "step", "train_loss", "train_accuracy", "val_loss", "val_accuracy", "val_top5", "lr"]
KEYS += ["images_per_second", "seconds"]
TIMES = ("images_per_second", "seconds")
# Everything that has a state or draws random numbers is on; 72 images make 9 steps an epoch.
OPTIONS = [*NANO, "--epochs", "4", "--batch-size", "8", "--ema", "0.9", "--dropout", "0.1", "--drop-path", "0.1"]
OPTIONS += ["--mixup", "0.4", "--cutmix", "1", "--seed", "3", "--accumulate", "2"]


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def epochs_done(run):
    path = run / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def without_times(rows):
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def progress(path):
    with safe_open(path, framework="numpy") as file:
        return json.loads(file.metadata()["tinyvit"])["progress"]


def snapshot(run):
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in run.iterdir()}


def assert_same_weights(a, b):
    """The two runs have the same bits in every array."""
    for name in ("last.safetensors", "best.safetensors"):
        left, right = load_file(a / name), load_file(b / name)
        assert left.keys() == right.keys()
        for key, array in left.items():
            assert array.tobytes() == right[key].tobytes(), f"{name}: {key} differs"


def assert_same_run(a, b):
    """The two runs have the same weights and the same metrics, times aside."""
    assert_same_weights(a, b)
    assert without_times(metrics(a)) == without_times(metrics(b))
    assert sorted(path.name for path in a.iterdir()) == sorted(path.name for path in b.iterdir())


def interrupt_after(monkeypatch, steps):
    """Let training stop as by Ctrl-C after so many steps, once."""
    original, asked = Trainer.train_epoch, []

    def train_epoch(self, stop):
        def stop_once():
            if not asked and self.progress.step >= steps:
                asked.append(True)
                return signal.SIGINT
            return stop()

        return original(self, stop_once)

    monkeypatch.setattr(Trainer, "train_epoch", train_epoch)


def train_with_stops(monkeypatch, given, asked):
    """Train to the end, stopped whenever a start has been asked so many times; how many stops there were."""

    @contextlib.contextmanager
    def stop_on_signals():
        times = itertools.count(1)
        yield lambda: signal.SIGINT if next(times) >= asked else None

    monkeypatch.setattr(run, "stop_on_signals", stop_on_signals)
    for stops in itertools.count():
        with contextlib.suppress(Stopped):
            run.train(given, resume=stops > 0)
            return stops


def assert_evaluated_as_recorded(run, data):
    """`eval` finds what the best epoch recorded of the validation images, the test part of `data`."""
    best = max(metrics(run), key=lambda row: (row["val_accuracy"], -row["val_loss"]))
    scores = json.loads(tinyvit("eval", run, "--data", data, "--split", "test", "--json").stdout)
    assert scores["accuracy"] == best["val_accuracy"]
    assert scores["loss"] == pytest.approx(best["val_loss"], rel=1e-5)


def model(depth=3, **overrides):
    """A small model."""
    overrides = dict(image_size=8, patch_size=4, embed_dim=16, num_classes=5, depth=depth) | overrides
    return create_model("vit_nano_patch8_32", **overrides)


def images(n=6, seed=0):
    return np.random.default_rng(seed).standard_normal((n, 3, 8, 8)).astype(np.float32)


def finetune(trained, out, *options, epochs=2):
    source = ["--data", trained / "other", "--init", trained / "run"]
    result = tinyvit("train", *source, "--epochs", epochs, "--out", out, *options)
    assert result.returncode == 0, result.stderr
    return result.stdout
