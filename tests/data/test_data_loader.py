"""The loader: every image once, an order that only the seed and the epoch decide, and no thread left behind."""

import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyvit.data import Augment, DataError, Loader
from tinyvit.data.splits import ArraySplit


def numbered(count):
    """Images that hold their own number, which is their label too."""
    numbers = np.arange(count)
    return ArraySplit(np.broadcast_to(numbers.astype(np.uint8)[:, None, None, None], (count, 1, 2, 2)), numbers, [])


def as_is(images, labels, rng):
    return images, labels


def with_noise(images, labels, rng):
    return images + rng.random(images.shape), labels


def batches(loader, *args):
    return [(np.asarray(images), labels.tolist()) for images, labels in loader.epoch(*args)]


def threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("tinyvit-loader")]


@given(
    count=st.integers(0, 40),
    batch_size=st.integers(1, 12),
    shuffle=st.booleans(),
    drop_last=st.booleans(),
    seed=st.integers(0, 2**32),
    epoch=st.integers(0, 1000),
)
def test_every_image_comes_once(count, batch_size, shuffle, drop_last, seed, epoch):
    loader = Loader(numbered(count), batch_size, transform=as_is, seed=seed, shuffle=shuffle, drop_last=drop_last)
    result = batches(loader, epoch)
    assert len(result) == len(loader)
    seen = [label for _, labels in result for label in labels]
    assert len(set(seen)) == len(seen) == (count // batch_size * batch_size if drop_last else count)
    assert shuffle or seen == list(range(len(seen)))
    for images, labels in result:
        assert images[:, 0, 0, 0].tolist() == labels
        assert len(labels) == batch_size or (labels is result[-1][1] and not drop_last)


@given(seed=st.integers(0, 2**32), epoch=st.integers(0, 100), first=st.integers(0, 8))
def test_a_batch_depends_on_seed_epoch_and_number(seed, epoch, first):
    loader = Loader(numbered(50), 8, transform=with_noise, seed=seed)
    whole, rest = (
        batches(loader, epoch),
        batches(Loader(numbered(50), 8, transform=with_noise, seed=seed), epoch, first),
    )
    assert len(rest) == max(0, 7 - first)
    for (images, labels), (again, labels_again) in zip(whole[first:], rest, strict=True):
        assert np.array_equal(images, again) and labels == labels_again


def test_epochs_and_seeds_differ():
    orders = [
        [
            label
            for _, labels in batches(Loader(numbered(60), 60, transform=as_is, seed=seed), epoch)
            for label in labels
        ]
        for seed, epoch in [(0, 0), (0, 1), (1, 0), (1, 1)]
    ]
    assert len({tuple(order) for order in orders}) == 4


def test_the_batches_of_all_epochs_and_seeds_get_different_random_numbers():
    blank = ArraySplit(np.zeros((64, 1, 2, 2), np.uint8), np.zeros(64, np.int64), [])
    loaders = [Loader(blank, 8, transform=with_noise, seed=seed) for seed in (0, 1)]
    images = [images for loader in loaders for epoch in (0, 1) for images, _ in batches(loader, epoch)]
    assert len({array.tobytes() for array in images}) == len(images) == 32


def test_random_reads_are_for_training_only():
    class Recorded(ArraySplit):
        def read(self, indices, rng=None):
            drawn.append(rng is not None)
            return super().read(indices)

    split = numbered(8)
    for shuffle in (True, False):
        drawn: list[bool] = []
        batches(Loader(Recorded(split.images, split.labels, []), 4, transform=as_is, shuffle=shuffle), 0)
        assert drawn == [shuffle] * 2


def test_next_batches_are_prepared_meanwhile():
    done = []

    def slow(images, labels, rng):
        done.append(len(done))
        return images, labels

    iterator = Loader(numbered(40), 4, transform=slow).epoch(0)
    next(iterator)
    deadline = time.monotonic() + 10
    while len(done) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert len(done) == 3  # two ahead, and no more than that
    iterator.close()


def test_an_error_in_the_thread_comes_up():
    class Torn(ArraySplit):
        def read(self, indices, rng=None):
            if 9 in indices:
                raise DataError("cannot read image 9.png")
            return super().read(indices)

    split = numbered(20)
    loader = Loader(Torn(split.images, split.labels, []), 4, transform=as_is, shuffle=False)
    seen = []
    with pytest.raises(DataError, match=r"cannot read image 9\.png"):
        for _, labels in loader.epoch(0):
            seen += labels.tolist()
    assert seen == list(range(8)) and not threads()


def test_stopping_early_leaves_no_thread():
    for _ in Loader(numbered(400), 4, transform=as_is).epoch(0):
        assert threads()
        break
    assert not threads()


def test_interpreter_leaves_with_an_unfinished_epoch():
    program = """
import numpy as np, time
from tinyvit.data import Loader
from tinyvit.data.splits import ArraySplit
def slow(images, labels, rng):
    time.sleep(0.05)
    return images, labels
split = ArraySplit(np.zeros((1000, 1, 2, 2), np.uint8), np.zeros(1000, int), [])
iterator = Loader(split, 2, transform=slow).epoch(0)
next(iterator)
print("left")
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout, result.stderr) == (0, "left\n", "")


def test_batch_size_must_be_positive():
    with pytest.raises(ValueError, match="batch size 0 given, expected at least 1"):
        Loader(numbered(3), 0, transform=as_is)


def test_batches_are_prepared_fast():
    rng = np.random.default_rng(0)
    split = ArraySplit(rng.integers(0, 256, (2560, 3, 32, 32), dtype=np.uint8), np.zeros(2560, np.int64), [])
    transform = Augment((0.5,) * 3, (0.2,) * 3, flip=True, padding=4)
    start = time.process_time()
    for images, _ in Loader(split, 128, transform=transform).epoch(0):
        assert images.shape == (128, 3, 32, 32)
    assert (time.process_time() - start) / 20 < 0.02  # seconds of one core a batch; 0.001 where it was written


def test_a_loader_says_how_it_is_iterated():
    split = ArraySplit(np.zeros((4, 3, 2, 2), np.uint8), np.zeros(4, np.int64), [])
    with pytest.raises(TypeError, match=r"use loader\.epoch\(0\)"):
        iter(Loader(split, 2, transform=lambda images, labels, rng: (images, labels)))
    with pytest.raises(TypeError, match="Loader expects a transform such as default_augment"):
        Loader(split, 2)
