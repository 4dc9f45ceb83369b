"""Cutting batches into shards, running them on threads, and counting the cores there are."""

import contextvars
import itertools
import os
import signal
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from threadpoolctl import threadpool_info, threadpool_limits

from tinyvit.backend import parallel


@given(samples=st.integers(0, 300), threads=st.integers(1, 9), n=st.none() | st.integers(1, 12))
def test_a_plan_covers_the_batch_once_in_even_shards(samples, threads, n):
    plan = parallel.plan(samples, threads, n)
    assert plan.ranges[0][0] == 0 and plan.ranges[-1][1] == samples
    assert all(a[1] == b[0] for a, b in itertools.pairwise(plan.ranges))
    sizes = {stop - start for start, stop in plan.ranges}
    assert max(sizes) - min(sizes) <= 1 and (min(sizes) >= 1 or samples == 0)
    assert len(plan.ranges) == max(1, min(n or threads, samples))
    assert plan.workers == min(threads, len(plan.ranges))
    assert 1 <= plan.workers * plan.blas_threads <= threads


def test_threads_default_to_the_cores_there_are():
    assert parallel.plan(1000).workers == len(parallel.plan(1000).ranges) == parallel.available_cores() >= 1
    for bad in ({"threads": 0}, {"shards": 0}, {"threads": -1}):
        with pytest.raises(ValueError, match="threads and shards must be at least 1"):
            parallel.plan(10, **bad)


def blas_threads():
    return [m["num_threads"] for m in threadpool_info() if m["user_api"] == "blas"]


def test_results_come_in_order_from_the_planned_threads():
    variable = contextvars.ContextVar("variable")
    variable.set("the caller's")
    names, limits = set(), []

    def work(start, stop):
        names.add(threading.current_thread().name)
        limits.append(blas_threads())
        assert variable.get() == "the caller's"
        variable.set(start)  # stays in this shard
        time.sleep(0.02 * (5 - start))  # the first takes longest
        return start, stop

    with threadpool_limits(3, user_api="blas"):
        for threads, expected in ((1, 1), (2, 2)):
            names.clear()
            assert list(parallel.run(parallel.plan(5, threads, 5), work)) == [(i, i + 1) for i in range(5)]
            assert len(names) == expected
            variable.set("the caller's")
        assert set(itertools.chain(*limits)) == {1}
        assert set(blas_threads()) <= {3}


@pytest.mark.parametrize("threads", [1, 2])
def test_an_exception_comes_out_as_it_is_and_the_blas_keeps_its_threads(threads):
    class Special(Exception):
        pass

    error, done = Special("one line"), []

    def work(start, stop):
        if start == 1:
            raise error
        done.append(start)
        return start

    with threadpool_limits(3, user_api="blas"):
        with pytest.raises(Special) as caught:
            list(parallel.run(parallel.plan(50, threads, 50), work))
        assert caught.value is error
        assert set(blas_threads()) <= {3}
        assert list(parallel.run(parallel.plan(2, threads, 2), lambda start, stop: start)) == [0, 1]
    if threads == 1:
        assert done == [0]


@pytest.mark.parametrize("abandon", ["closed", "broken off"])
def test_a_run_that_is_not_finished_gives_the_blas_its_threads_back(abandon):
    with threadpool_limits(3, user_api="blas"):
        results = parallel.run(parallel.plan(4, 2, 4), lambda start, stop: start)
        assert next(results) == 0
        if abandon == "closed":
            results.close()
        else:
            del results
        assert set(blas_threads()) <= {3}


@pytest.mark.parametrize(
    "files, cores",
    [
        ({}, None),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu.max": "200000 100000\n"}, 2),
        ({"cpu.max": "150000 100000\n"}, 1),
        ({"cpu.max": "50000 100000\n"}, 1),
        (
            {
                "cpu.max": "1600000 100000\n",
                "cpu/cpu.cfs_quota_us": "100000",
                "cpu/cpu.cfs_period_us": "100000",
            },
            16,
        ),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4),
        ({"cpu/cpu.cfs_quota_us": "400000\n"}, None),
        ({"cpu.max": ""}, None),
        ({"cpu.max": "many 100000\n"}, None),
    ],
)
def test_cores_that_a_container_allows(tmp_path, files, cores):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert parallel.cgroup_cores(tmp_path) == cores


def test_overlapping_runs_of_any_thread_limit_blas_and_leave_it_as_it_was():
    entered, limits = threading.Barrier(2), []

    def go(seconds):
        def work(start, stop):
            entered.wait()
            limits.append(blas_threads())
            time.sleep(seconds)

        list(parallel.run(parallel.Shards(((0, 1),), 1, 1), work))

    with threadpool_limits(2, user_api="blas"):
        before = blas_threads()
        threads = [threading.Thread(target=go, args=(seconds,)) for seconds in (0.0, 0.1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert blas_threads() == before
    assert set(itertools.chain(*limits)) == {1}


def test_runs_within_runs_end(tmp_path):
    """As where a model asks another one for predictions: the threads of a pool must not wait for each other."""

    def outer(start, stop):
        met.wait(10)  # both threads of the pool are taken
        inner = parallel.run(parallel.plan(2, threads=2), lambda start, stop: stop)
        return [*inner, *parallel.each(abs, [-1, -2], [1 << 20, 1 << 20])]

    met, results = threading.Barrier(2), []
    plan = parallel.plan(2, threads=2)
    thread = threading.Thread(target=lambda: results.extend(parallel.run(plan, outer)), daemon=True)
    thread.start()
    thread.join(30)
    assert results == [[1, 2, 1, 2]] * 2


def test_a_limit_holds_for_plans_and_for_each_and_ends_with_its_context():
    def used():
        items = list(range(8))
        return len(set(parallel.each(lambda _: (time.sleep(0.02), threading.get_ident())[1], items, [1 << 20] * 8)))

    usual = parallel.plan(64).workers
    with parallel.limit(3):
        assert parallel.plan(64).workers == 3
        assert used() == 3
        with parallel.limit(None):
            assert parallel.plan(64).workers == 3
        with parallel.limit(1):
            assert parallel.plan(64).workers == used() == 1
    assert parallel.plan(64).workers == usual
    with pytest.raises(ValueError, match="at least 1, got 0"), parallel.limit(0):
        pass


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_has_threads_of_its_own():
    cut = parallel.plan(2, 2)
    list(parallel.run(cut, lambda start, stop: time.sleep(0.05)))
    child = os.fork()
    if not child:
        signal.alarm(10)
        os._exit(int([*parallel.run(cut, lambda start, stop: start)] != [0, 1]))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
