"""The speed run trains a recipe, measures its last weights, and PyTorch follows it step by step."""

import json

import cifar10_speedrun
import numpy as np
import pytest
from running import make_images

from tinyvit.training import recipes


def test_a_run_beside_torch(tmp_path, monkeypatch, capsys):
    options = dict(
        model="vit_nano_patch8_32",
        epochs=2,
        batch_size=8,
        optimizer="muon",
        clip_norm=0.0,
        flip="alternate",
        image_size=32,
    )
    recipe = recipes.Recipe("tiny", options, "any", "none")
    monkeypatch.setattr("tinyvit.training.config.read_recipe", lambda name: recipe)
    monkeypatch.setattr("tinyvit.training.run.read_recipe", lambda name: recipe)
    images = make_images(tmp_path / "images", train=12, test=6)
    target = tmp_path / "out.json"
    cifar10_speedrun.main(
        ["--recipe", "finetune", "--data", str(images), "--seeds", "0", "1", "--torch", "--json", str(target),
         "--plot", str(tmp_path / "out.png")]
    )  # fmt: skip
    result = json.loads(target.read_text())
    accuracies = [run["accuracy"] for run in result["runs"]]
    assert result["mean"] == pytest.approx(np.mean(accuracies)) and result["spread"] == pytest.approx(
        np.std(accuracies, ddof=1)
    )
    for run in result["runs"]:
        assert run["torch"]["steps"] == run["steps"] > 0
        assert run["torch"]["accuracy"] == pytest.approx(run["accuracy"], abs=0.1)
        assert run["flops"] > 0 and run["curve"][-1][1] == run["accuracy"]
    assert (tmp_path / "out.png").stat().st_size > 1000 and "mean" in capsys.readouterr().out
