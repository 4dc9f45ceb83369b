"""k-NN and linear probes: against a plain loop, torch's optimizer, and through the command line."""

import json

import drawing  # noqa: F401  (one thread for torch)
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from running import NANO, make_images, tinyvit

import tinyvit as library
from tinyvit.checkpoints import loading, native_file
from tinyvit.checkpoints.checkpoint import Checkpoint
from tinyvit.cli import main
from tinyvit.data import Data, load_data
from tinyvit.data.augment import normalise
from tinyvit.data.splits import ArraySplit
from tinyvit.evaluation import probe
from tinyvit.evaluation.metrics import cross_entropies
from tinyvit.models.preprocessing import Preprocessing

seeds = st.integers(0, 2**32 - 1)


def clouds(seed, count, dim, classes, spread=1.0):
    """Features around a centre a class, some of them on other scales than others."""
    rng = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(classes), rng.integers(classes, size=count - classes)])
    centres = rng.standard_normal((classes, dim))
    features = centres[labels] + spread * rng.standard_normal((count, dim))
    return features * 10.0 ** rng.integers(-1, 2, dim) + rng.standard_normal(dim), labels


# --- nearest neighbours ---------------------------------------------------------------------------------------


@given(seeds, st.integers(1, 30), st.integers(1, 7), st.integers(1, 6), st.integers(1, 40), st.booleans())
def test_votes_agree_with_a_plain_loop(seed, k, dim, classes, count, small):
    rng = np.random.default_rng(seed)
    train, test = rng.standard_normal((count, dim)), rng.standard_normal((5, dim))
    labels = rng.integers(classes, size=count)
    k = min(k, count)
    before, probe.MEMORY = probe.MEMORY, 1 if small else probe.MEMORY  # one test feature at a time
    try:
        votes = probe.nearest_neighbours(train, labels, test, classes, k=k, temperature=0.5)
    finally:
        probe.MEMORY = before
    for feature, found in zip(test, votes, strict=True):
        cosines = [float(feature @ x / np.sqrt(feature @ feature) / np.sqrt(x @ x)) for x in train]
        expected = np.zeros(classes)
        for i in sorted(range(count), key=lambda i: -cosines[i])[:k]:
            expected[labels[i]] += np.exp(cosines[i] / 0.5)
        if len(set(np.round(cosines, 9))) == count:  # else ties may fall either way
            np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_a_feature_of_zeros_harms_nothing():
    train, test = np.zeros((3, 2), np.float32), np.zeros((1, 2), np.float32)
    votes = probe.nearest_neighbours(train, np.array([0, 1, 1]), test, 2, k=3)
    np.testing.assert_allclose(votes, [[1, 2]])


# --- the linear classifier ------------------------------------------------------------------------------------


def torch_fit(x, labels, classes, l2):
    """The same problem by torch's L-BFGS in float64."""
    x, labels = torch.tensor(x, dtype=torch.float64), torch.tensor(labels)
    weights = torch.zeros(x.shape[1] + 1, classes, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weights], max_iter=2000, tolerance_grad=1e-10, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        logits = x @ weights[:-1] + weights[-1]
        loss = torch.nn.functional.cross_entropy(logits, labels) + l2 / 2 * (weights[:-1] ** 2).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weights.detach().numpy()


@pytest.mark.parametrize("l2", [1.0, 1e-2, 1e-4])
@pytest.mark.parametrize(("count", "dim", "classes"), [(40, 3, 2), (100, 12, 5), (20, 30, 4)])
def test_the_fit_agrees_with_torch(count, dim, classes, l2):
    x, labels = clouds(count + dim, count, dim, classes)
    x = (x - x.mean(axis=0)) / x.std(axis=0)
    ours, theirs = probe.fit_softmax(x, labels, classes, l2, tolerance=1e-5), torch_fit(x, labels, classes, l2)
    ours_loss, least = (penalised(x, labels, w, l2) for w in (ours, theirs))
    assert -1e-9 < ours_loss - least < 5e-6
    if l2 >= 1e-2:  # below, the bottom is too flat to say where it is
        ours, theirs = (probe.logits_of(x, w - w.mean(axis=1, keepdims=True)) for w in (ours, theirs))
        np.testing.assert_allclose(ours, theirs, atol=5e-3)


def penalised(x, labels, weights, l2):
    return cross_entropies(probe.logits_of(x, weights), labels).mean() + l2 / 2 * (weights[:-1] ** 2).sum()


def test_float32_ends_near_float64():
    x, labels = clouds(0, 300, 20, 4, spread=3.0)
    x = (x - x.mean(axis=0)) / x.std(axis=0)
    wide = probe.fit_softmax(x, labels, 4, 1e-2, tolerance=1e-6)
    narrow = probe.fit_softmax(x.astype(np.float32), labels, 4, 1e-2, tolerance=1e-6)
    np.testing.assert_allclose(narrow, wide, atol=1e-3)


def test_minimise_finds_the_bottom_of_an_ill_conditioned_bowl():
    scales, bottom = 10.0 ** np.arange(-2, 3), np.arange(5.0)

    def bowl(x):
        return 0.5 * float(scales @ (x - bottom) ** 2), scales * (x - bottom)

    found = probe.minimise(bowl, np.zeros(5), tolerance=1e-9)
    np.testing.assert_allclose(found, bottom, atol=1e-6)


def test_the_penalty_is_chosen_by_what_is_held_out():
    """Where features say nothing, the strongest penalty is best; where they say all, a weak one."""
    rng = np.random.default_rng(0)
    noise, labels = rng.standard_normal((120, 40)), rng.integers(3, size=120)
    assert probe.linear(noise, labels, noise, 3)[1] == 1.0
    x, labels = clouds(1, 300, 8, 3, spread=0.05)
    logits, l2 = probe.linear(x[:200], labels[:200], x[200:], 3)
    assert l2 < 1e-2 and np.array_equal(logits.argmax(axis=1), labels[200:])
    assert cross_entropies(logits, labels[200:]).mean() < 0.05


def test_a_constant_feature_and_a_class_of_one_image():
    x, labels = clouds(2, 30, 4, 2, spread=0.1)
    x = np.concatenate([x, np.full((30, 1), 7.0)], axis=1)
    labels[0], labels[labels == 0] = 2, 1  # class 2 has one image, class 0 none
    logits, _ = probe.linear(x, labels, x, 3)
    assert np.isfinite(logits).all()
    only = np.arange(3)
    logits, l2 = probe.linear(x[:3], only, x[:3], 3)
    assert l2 == 1e-3 and np.array_equal(logits.argmax(axis=1), only)


# --- the command ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A run on red, green and blue, and images of two other classes."""
    home = tmp_path_factory.mktemp("home")
    make_images(home / "images", train=8, test=3, noise=60)
    make_images(home / "other", train=10, test=4, noise=60, seed=1)
    for split in ("train", "test"):
        (home / "other" / split / "green").rename(home / "other" / split / "grass")
        (home / "other" / split / "red").rename(home / "other" / split / "rose")
    options = [*NANO, "--epochs", "2", "--batch-size", "8"]
    result = tinyvit("train", "--data", home / "images", "--out", home / "run", *options)
    assert result.returncode == 0, result.stderr
    return home


def scores(capsys, *arguments):
    assert main(["eval", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_knn_of_other_classes_agrees_with_a_calculation_by_hand(home, capsys):
    found = scores(capsys, home / "run", "--data", home / "other", "--probe", "knn")
    model, data = library.load_model(home / "run", num_classes=0), load_data(home / "other")
    mean, std = (np.array(v)[:, None, None] for v in (model.preprocessing.mean, model.preprocessing.std))
    pixels = (split.read(np.arange(len(split))) for split in (data.train, data.test))
    train, test = (model(((x / 255 - mean) / std).astype(np.float32)).numpy() for x in pixels)
    votes = probe.nearest_neighbours(train, data.train.labels, test, 3, k=20)
    assert found["accuracy"] == np.mean(votes.argmax(axis=1) == data.test.labels) > 0.8
    assert found["top5"] == 1.0 and found["probe"] == "knn" and found["k"] == 20 and found["loss"] is None
    assert list(found["per_class"]) == ["blue", "grass", "rose"]


def test_linear_of_other_classes(home, capsys):
    found = scores(capsys, home / "run", "--data", home / "other", "--probe", "linear")
    assert found == scores(capsys, home / "run", "--data", home / "other", "--probe", "linear")
    assert found["probe"] == "linear" and found["l2"] in probe.PENALTIES
    assert found["accuracy"] > 0.8 and 0 < found["loss"] < 0.7
    assert main(["eval", str(home / "run"), "--data", str(home / "other"), "--probe", "linear"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"test split of other, linear probe (l2 {found['l2']:g}): 12 images"
    assert lines[1] == f"accuracy {found['accuracy']:.2%}   loss {found['loss']:.4f}"


def test_a_model_without_a_head_is_probed(home, tmp_path, capsys):
    ours = loading.open_checkpoint(home / "run")
    metadata = native_file.read_metadata(home / "run" / "best.safetensors")
    metadata["config"]["num_classes"], metadata["class_names"] = 0, []
    state = {name: x for name, x in ours.state.items() if not name.startswith("head")}
    native_file.save(tmp_path / "bare.safetensors", state, metadata)
    for kind in ("knn", "linear"):
        arguments = ("--data", home / "other", "--probe", kind)
        assert scores(capsys, tmp_path / "bare.safetensors", *arguments) == scores(capsys, home / "run", *arguments)


def test_a_distilled_models_features_are_probed(monkeypatch):
    """Those that `features` and --embed give: the class token's, without the distillation token's."""
    model = library.create_model("vit_nano_patch8_32", distilled=True, num_classes=0).eval()
    rng = np.random.default_rng(0)
    splits = [ArraySplit(rng.integers(0, 256, (n, 3, 32, 32), dtype=np.uint8), np.arange(n) % 2, []) for n in (8, 5)]
    data = Data("noise", *splits, ("a", "b"), (0.5,) * 3, (0.2,) * 3, (32, 32), 3, "noise")
    seen = []
    original = probe.nearest_neighbours
    monkeypatch.setattr(probe, "nearest_neighbours", lambda *a, **k: (seen.append(a), original(*a, **k))[1])
    checkpoint = Checkpoint("", model.config, {}, (), Preprocessing((0.4,) * 3, (0.3,) * 3))
    probe.probe("knn", checkpoint, model, data)
    for split, features in zip(splits, (seen[0][0], seen[0][2]), strict=True):
        images = normalise(split.images, *checkpoint.preprocessing.statistics)
        assert np.allclose(features, model.features(images).numpy(), atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--probe", "tree"], "--probe: expected knn or linear, got 'tree'"),
        (
            ["--probe", "knn", "--split", "train"],
            "--probe learns from the training split, expected --split test, got train",
        ),
    ],
)
def test_bad_usage(options, message, capsys):
    assert main(["eval", "run", "--data", "shapes", *options]) == 2
    assert capsys.readouterr().err == f"tinyvit: error: {message}\n"
