"""Batches on the device that trains: data that stays there, and images that are moved there, with the same bits."""

import json
import signal
import threading
from dataclasses import replace

import array_api_strict
import numpy as np
import pytest
from drawing import BACKENDS, LIBRARIES
from running import make_images
from safetensors.numpy import load_file

from tinyvit import TrainStep, create_model, optim
from tinyvit.backend import arrays, devices
from tinyvit.data import Augment, Data, Loader, load_data, resident
from tinyvit.data.splits import RESIDENT_SHARE, ArraySplit, FileSplit
from tinyvit.evaluation.metrics import evaluate

AUGMENT = Augment((0.4,) * 3, (0.2,) * 3, flip=True, padding=3, erasing=0.5, mixup=0.4, cutmix=1.0, num_classes=3)


def data(count=40, side=8, **changes):
    rng = np.random.default_rng(0)
    splits = [
        ArraySplit(rng.integers(0, 256, (n, 3, side, side), dtype=np.uint8), rng.integers(0, 3, n), [])
        for n in (count, 10)
    ]
    return replace(Data("few", *splits, ("a", "b", "c"), (0.5,) * 3, (0.2,) * 3, (side, side), 3, "few-1"), **changes)


def on(backend):
    """The backend as a device's name."""
    return {"numpy": "cpu", "cupy": "cuda"}.get(backend, LIBRARIES[backend])


def host(batches):
    return [[arrays.to_numpy(x) for x in batch] for batch in batches]


@pytest.mark.parametrize("backend", BACKENDS)
def test_batches_are_the_same_wherever_they_are_made(backend):
    data_set, xp = data(), LIBRARIES[backend]
    expected = host(Loader(data_set.train, 16, transform=AUGMENT, seed=3).epoch(2))
    there = resident(data_set, on(backend))
    assert arrays.namespace(there.train.images) is arrays.namespace(there.test.images) is xp
    assert arrays.dtype_name(there.train.images.dtype) == "uint8"  # a quarter of float32's room
    for loader in (
        Loader(there.train, 16, transform=AUGMENT, seed=3),  # all images lie there
        Loader(data_set.train, 16, transform=AUGMENT, seed=3, device=on(backend)),  # each batch is moved
    ):
        got = list(loader.epoch(2))
        assert all(arrays.namespace(x) is xp for batch in got for x in batch)
        for theirs, ours in zip(expected, host(got), strict=True):
            for a, b in zip(theirs, ours, strict=True):
                assert a.dtype == b.dtype and np.abs(a - b).max() < 1e-5
                assert backend == "cupy" or a.tobytes() == b.tobytes()


@pytest.mark.parametrize("backend", BACKENDS)
def test_training_and_evaluation_from_resident_data(backend):
    """The same weights and scores as from the host's."""
    results = []
    for device, where in (("cpu", "numpy"), (on(backend), backend)):
        data_set = resident(data(), device)
        model = create_model("vit_nano_patch8_32", image_size=8, patch_size=4, num_classes=3)
        model.to(LIBRARIES[where], "float64")
        step = TrainStep(model, optim.SGD(model.parameters(), lr=0.1), threads=1)
        for images, labels in Loader(data_set.train, 16, transform=AUGMENT, device=device, drop_last=True).epoch(0):
            loss = step(images, labels)
        names, labels = data_set.class_names, data_set.test.labels
        scores = evaluate(model, data_set.test, labels, names, Augment(data_set.mean, data_set.std), threads=1)
        results.append((float(loss), scores.loss, scores.accuracy, model.state_dict()["head.bias"]))
    for a, b in zip(*results, strict=True):
        assert np.abs(a - b).max() < 1e-6  # the images themselves are float32


def test_what_does_not_fit_stays_on_the_host(monkeypatch):
    data_set = data()
    size = data_set.train.images.nbytes
    for free, stays in ((size / RESIDENT_SHARE, False), (size / RESIDENT_SHARE - 1, True)):
        monkeypatch.setattr(devices, "free_memory", lambda device, free=free: free)
        there = resident(data_set, array_api_strict)
        assert (there.train is data_set.train) == stays
        assert there.test is not data_set.test  # smaller, and looked at by itself
    assert resident(data_set, "cpu") is data_set


def test_validation_images_of_their_own_are_moved_and_test_images_are_not():
    data_set = data()
    there = resident(replace(data_set, val=data_set.test), array_api_strict)
    assert there.test is data_set.test and not arrays.on_host(there.val.images) and there.validation is there.val


def test_files_are_read_on_the_host_and_moved_as_bytes(tmp_path):
    folder = make_images(tmp_path / "images", size=80)
    data_set = load_data(folder, image_size=72)
    assert isinstance(data_set.train, FileSplit) and resident(data_set, array_api_strict).train is data_set.train
    seen = []

    def transform(images, labels, rng):
        seen.append((type(images).__module__, arrays.dtype_name(images.dtype)))
        return AUGMENT(images, labels, rng)

    expected = host(Loader(data_set.train, 16, transform=AUGMENT).epoch(0))
    got = host(Loader(data_set.train, 16, transform=transform, device=array_api_strict).epoch(0))
    assert set(seen) == {("array_api_strict._array_object", "uint8")}
    for theirs, ours in zip(expected, got, strict=True):
        assert all(a.tobytes() == b.tobytes() for a, b in zip(theirs, ours, strict=True))


def test_a_part_of_a_resident_split():
    there = resident(data(), array_api_strict).train
    part = there.take(np.array([5, 2]))
    assert np.array_equal(arrays.to_numpy(part.images), data().train.images[[5, 2]]) and len(part) == 2


def test_evaluation_reads_a_batch_when_the_next_one_is_under_way(monkeypatch):
    """And stops when asked to, without leaving the loader's thread behind."""
    from tinyvit.evaluation import metrics as module

    monkeypatch.setattr(module, "BATCH_SIZE", 4)
    data_set = resident(data(), array_api_strict)
    model = create_model("vit_nano_patch8_32", image_size=8, patch_size=4, num_classes=3).to(array_api_strict)
    forward, events, to_numpy = model.forward, [], arrays.to_numpy
    model.forward = lambda images: events.append("computed") or forward(images)

    def read(x):
        if not arrays.on_host(x):
            events.append("read")
        return to_numpy(x)

    monkeypatch.setattr(arrays, "to_numpy", read)
    given = (data_set.test, data_set.test.labels, data_set.class_names, Augment(data_set.mean, data_set.std))
    assert evaluate(model, *given) is not None
    assert events == ["computed", "computed", "read", "computed", "read", "read"]
    assert evaluate(model, *given, stop=lambda: True) is None
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("tinyvit-loader")]


@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if backend != "numpy"])
def test_a_run_on_a_device_is_a_run_on_the_host(backend, tmp_path, monkeypatch):
    """All of `tinyvit train`: batches, steps, averages, evaluations, checkpoints, a stop and going on."""
    from tinyvit.training import run as train_module
    from tinyvit.training import trainer

    data_set = make_images(tmp_path / "images", size=24)
    given = dict(data=str(data_set), model="vit_nano_patch8_32", image_size=24, batch_size=16, epochs=2, ema=0.9)
    given |= dict(mixup=0.4, dropout=0.1, drop_path=0.1, optimizer="sgd", lr=0.01, seed=3)
    train_module.train({**given, "device": "cpu", "out": str(tmp_path / "host")})
    monkeypatch.setattr(train_module, "pick_device", lambda name: on(backend))
    monkeypatch.setattr(devices, "pick_device", lambda name: on(backend))
    asked = []

    class Once:
        def __enter__(self):
            return lambda: asked.append(None) or (signal.SIGINT if len(asked) == 6 else None)

        def __exit__(self, *error):
            return False

    monkeypatch.setattr(train_module, "stop_on_signals", Once)
    out = str(tmp_path / "device")
    with pytest.raises(trainer.Stopped):
        train_module.train({**given, "out": out})
    train_module.train({"out": out}, resume=True)
    for name in ("last.safetensors", "best.safetensors"):
        host_file, device_file = (load_file(tmp_path / run / name) for run in ("host", "device"))
        assert host_file.keys() == device_file.keys()
        for key, x in host_file.items():
            assert np.abs(x - device_file[key]).max() < 1e-4 * max(1, np.abs(x).max()), key
    host_rows, device_rows = (
        [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("host", "device")
    )
    for ours, theirs in zip(device_rows, host_rows, strict=True):
        for key in ("epoch", "step", "lr", "train_accuracy", "val_accuracy"):
            assert ours[key] == theirs[key]
        for key in ("train_loss", "val_loss"):
            assert ours[key] == pytest.approx(theirs[key], abs=1e-4)
