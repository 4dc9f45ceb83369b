"""Random numbers are functions of (seed, step, place, sample), whatever else happens."""

import itertools
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyvit.backend import random


def masks(seed, step=0, first=0, samples=6, shape=(3, 5), n=2):
    with random.scope(seed, step, first):
        return [random.keep_mask(0.4, samples, shape) for _ in range(n)]


def test_each_of_seed_step_and_place_changes_the_draw_and_nothing_else_does():
    first, second = masks(1)
    assert np.array_equal(first, masks(1)[0]) and np.array_equal(second, masks(1)[1])
    for other in (second, masks(2)[0], masks(1, step=1)[0]):
        assert 0.2 < (first != other).mean() < 0.8
    np.random.seed(7)  # NumPy's hidden stream has no part in it, and is left alone
    expected = np.random.random()
    np.random.seed(7)
    with random.scope(3):
        random.generator().random()
        random.keep_mask(0.5, 2, (2,))
    assert np.random.random() == expected


@given(
    cuts=st.lists(st.integers(0, 13), max_size=5),
    shape=st.lists(st.sampled_from([1, 2, 3, 7, 8, 9, 17]), max_size=3).map(tuple),
    drop=st.floats(0, 1),
)
def test_a_batch_cut_into_shards_gets_the_same_masks(cuts, shape, drop):
    with random.scope(5, 2):
        whole = random.keep_mask(drop, 13, shape)
    assert whole.shape == (13, *shape) and whole.dtype == bool
    bounds = [0, *sorted(cuts), 13]
    parts = []
    for start, stop in itertools.pairwise(bounds):
        with random.scope(5, 2, start):
            parts.append(random.keep_mask(drop, stop - start, shape))
    assert np.array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize("drop", [0.0, 1e-3, 0.3, 0.5, 0.99, 1.0])
def test_the_share_that_is_kept(drop):
    with random.scope(0):
        kept = random.keep_mask(drop, 1000, (31, 7))
    assert abs(kept.mean() - (1 - drop)) <= 5 * np.sqrt(drop * (1 - drop) / kept.size)
    if 0.1 < drop < 0.9:  # samples and positions are independent of each other
        x = kept.reshape(1000, -1) - (1 - drop)
        for a, b in ((x[:-1], x[1:]), (x[:, :-1], x[:, 1:]), (x[:, :-8], x[:, 8:])):
            assert abs((a * b).mean()) < 5 * drop * (1 - drop) / np.sqrt(a.size)


def test_empty_draws():
    with random.scope(0):
        assert random.keep_mask(0.5, 0, (3,)).shape == (0, 3)
        assert random.keep_mask(0.5, 3, (0, 2)).shape == (3, 0, 2)
        assert random.keep_mask(0.5, 3, ()).shape == (3,)


def test_scopes_nest_and_belong_to_their_thread():
    outer = masks(1)
    with random.scope(1):
        first = random.keep_mask(0.4, 6, (3, 5))
        masks(2)
        second = random.keep_mask(0.4, 6, (3, 5))
    assert np.array_equal(first, outer[0]) and np.array_equal(second, outer[1])
    results = {}

    def work(seed):
        results[seed] = masks(seed, n=20)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for seed, got in results.items():
        assert all(np.array_equal(a, b) for a, b in zip(got, masks(seed, n=20), strict=True))


def test_outside_every_scope_draws_differ():
    assert not np.array_equal(random.keep_mask(0.5, 4, (50,)), random.keep_mask(0.5, 4, (50,)))
    assert random.generator().random() != random.generator().random()


@pytest.mark.parametrize("name", ["seed", "step", "first_sample"])
def test_negative_numbers_are_refused(name):
    with (
        pytest.raises(ValueError, match=f"{name} must not be negative, got -1"),
        random.scope(**{"seed": 0, name: -1}),
    ):
        pass
