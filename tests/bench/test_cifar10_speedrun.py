"""The speed run trains a recipe, measures its last weights, and PyTorch follows it step by step."""

import json

import cifar10_speedrun
import numpy as np
import pytest
import torch
from reference_models import torch_twin
from running import make_images

import tinyvit
from tinyvit import optim
from tinyvit.data import Augment, policies
from tinyvit.training import recipes
from tinyvit.training.config import RATES, TrainConfig


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
        ["--recipe", "shapes", "--data", str(images), "--seeds", "0", "1", "--torch", "--json", str(target),
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


@pytest.mark.parametrize("name", ["cifar10-gpu-1min", "cifar10-gpu-best"])
def test_the_first_steps_of_a_gpu_recipe_have_torch_s_losses(name):
    """In float32 and without drop path, on images that need no data set."""
    o = TrainConfig(**recipes.read_recipe(name).options)
    model = tinyvit.create_model(o.model, num_classes=10)
    twin = torch_twin(model).float()
    own, names = dict(twin.named_parameters()), {id(p): name for name, p in model.named_parameters()}
    muon = o.optimizer == "muon"
    decay = RATES[o.optimizer][1] if o.weight_decay is None else o.weight_decay
    groups = optim.param_groups(model, decay, adam_lr_scale=o.adam_lr / o.lr if muon else None)
    others = []
    for group in groups:
        kind = cifar10_speedrun.torch_muon() if group.get("muon") else torch.optim.AdamW
        others.append(kind([own[names[id(p)]] for p in group["params"]], weight_decay=group["weight_decay"]))
        others[-1].param_groups[0]["lr"] = o.lr * group.get("lr_scale", 1.0)
    optimizer = (optim.Muon if muon else optim.AdamW)(groups, lr=o.lr)
    step = tinyvit.TrainStep(model, optimizer, clip_norm=o.clip_norm or None, label_smoothing=o.label_smoothing)
    augment = Augment(
        (0.5,) * 3, (0.25,) * 3, flip=True, padding=4, policy=policies.parse(o.policy), erasing=o.erasing,
        mixup=o.mixup, cutmix=o.cutmix, num_classes=10,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    for _ in range(3):
        images, labels = augment(rng.integers(0, 256, (2, 3, 32, 32), dtype=np.uint8), rng.integers(0, 10, 2), rng)
        logits = twin(torch.from_numpy(np.ascontiguousarray(images)))
        loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels), label_smoothing=o.label_smoothing)
        assert float(step(images, labels)) == pytest.approx(loss.item(), rel=2e-5)
        twin.zero_grad()
        loss.backward()
        if o.clip_norm:
            torch.nn.utils.clip_grad_norm_(twin.parameters(), o.clip_norm)
        for other in others:
            other.step()
