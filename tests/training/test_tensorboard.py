"""What TensorBoard reads of a run."""

import sys

import pytest
from runs import KEYS, metrics
from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

from tinyvit.cli import main
from tinyvit.training.run import train
from tinyvit.training.tensorboard import open_log


def read(run):
    """(step, value) of each figure by its name."""
    found = EventAccumulator(str(run), size_guidance={SCALARS: 0}).Reload()
    return {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def test_a_log_has_every_step_and_the_figures_of_metrics_jsonl(images, tmp_path):
    given = {"data": str(images), "model": "vit_nano_patch8_32", "batch_size": 8, "epochs": 2, "device": "cpu"}
    train({**given, "out": str(tmp_path / "run"), "log": "tensorboard", "schedule": "constant", "warmup": 0.0})
    found, rows = read(tmp_path / "run"), metrics(tmp_path / "run")
    assert set(found) == {"step/loss", "step/lr", *(f"epoch/{key}" for key in KEYS if key not in ("epoch", "step"))}
    for name in KEYS[2:]:
        assert found[f"epoch/{name}"] == [(row["step"], pytest.approx(row[name], rel=1e-6)) for row in rows]
    steps, losses = zip(*found["step/loss"], strict=True)
    assert steps == tuple(range(1, 19))
    assert sum(losses[:9]) / 9 == pytest.approx(rows[0]["train_loss"], rel=1e-6)
    assert [lr for _, lr in found["step/lr"]] == pytest.approx([1e-3] * 18)


def test_a_resumed_run_replaces_what_came_after_its_checkpoint(tmp_path):
    for done, value in ((0, 1.0), (3, 2.0)):
        with open_log("tensorboard", tmp_path, done) as log:
            for step in range(done + 1, done + 6):
                log("step", step, {"loss": value})
    assert read(tmp_path) == {"step/loss": [(1, 1.0), (2, 1.0), (3, 1.0), *((step, 2.0) for step in range(4, 9))]}


def test_without_tensorboard(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    assert main(["train", "--log", "tensorboard"]) == 2
    assert capsys.readouterr().err == (
        'tinyvit: error: --log tensorboard needs TensorBoard: pip install "tinyvit[tensorboard]"\n'
    )
