"""Calls that are captured and replayed: on the CPU with a stand-in for CuPy's streams, on a GPU with CuPy itself."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import threading
import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import capture_sim
import cuda_sim
import numpy as np
import pytest
from cublas_sim import CuBLASLt
from on_gpu import needs_gpu

import tinyvit
from tinyvit import functional as F
from tinyvit import kernels, nn, optim
from tinyvit.backend import cuda_graph, random
from tinyvit.backend.cuda_graph import Graphed, Results
from tinyvit.kernels import reference
from tinyvit.kernels.cuda import cublas


@pytest.fixture
def adding(driver: capture_sim.Driver) -> Iterator[tuple[Graphed, np.ndarray, list]]:
    """total += x, twice x; the function, what it writes into, and how often Python ran it and the host its share."""
    total, counts, surroundings = np.zeros(()), [0, 0], [()]

    def function(x: np.ndarray) -> Results:
        counts[0] += 1
        twice = cuda_sim.empty(x.size, float)
        driver.launch(lambda: np.add(total, x.sum(), out=total))
        driver.launch(lambda: np.multiply(x, 2, out=twice))
        return (twice,)

    def count() -> None:
        counts[1] += 1

    yield Graphed(function, lambda: surroundings[0], count), total, [counts, surroundings]


def test_the_first_call_is_run_the_second_captured_and_the_others_replayed(driver, adding):
    graphed, total, (counts, _) = adding
    results = [graphed(np.full(3, float(i)))[0] for i in range(5)]
    assert [list(r) for r in results] == [[2.0 * i] * 3 for i in range(5)]  # copies: no replay writes over another's
    assert total == 3 * (0 + 1 + 2 + 3 + 4)
    assert counts == [2, 3] and driver.replays == 4 and graphed.reason is None


def test_another_shape_runs_in_single_launches_and_leaves_the_graph(driver, adding):
    graphed, total, (counts, _) = adding
    for size in (4, 4, 4, 3, 4):
        assert list(graphed(np.ones(size))[0]) == [2.0] * size
        assert (graphed.reason is not None) == (counts[0] + driver.replays == 1 or size == 3)
    assert counts[0] == 3 and driver.replays == 3 and total == 19
    graphed(np.ones(3)), graphed(np.ones(3)), graphed(np.ones(3))
    assert counts[0] == 5 and driver.replays == 5  # the new shape came twice in a row: it has the graph now


def test_a_graph_is_not_used_with_other_arrays_than_it_was_captured_with(driver, adding):
    graphed, total, (counts, surroundings) = adding
    for place in (1, 1, 1, 2, 2, 2):
        surroundings[0] = place
        graphed(np.ones(2))
    assert counts[0] == 4 and driver.replays == 4 and total == 12


def test_what_cannot_be_captured_runs_in_single_launches_and_says_so_once(driver):
    calls = []

    def function(x: np.ndarray) -> Results:
        if driver.captured is not None:
            raise NotImplementedError("cuBLAS calls are not supported during capture\nand so on")
        calls.append(x)
        return (x + 1,)

    graphed = Graphed(function)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(4):
            assert list(graphed(np.zeros(2))[0]) == [1.0, 1.0]
    assert len(calls) == 4 and len(caught) == 1 and driver.replays == 0
    assert graphed.reason == "NotImplementedError: cuBLAS calls are not supported during capture"
    assert graphed.reason in str(caught[0].message)


def test_a_failure_keeps_graphs_from_calls_of_its_kind_alone(driver):
    """A device too full for one shape is not too full for another; each reason is told once."""
    attempts = []

    def function(x: np.ndarray) -> Results:
        if driver.captured is not None:
            attempts.append(x.size)
            cuda_sim.empty(x.size, float)
            if x.size > 3:
                raise MemoryError("out of memory")
        return (x + 1,)

    graphed = Graphed(function)
    with pytest.warns(UserWarning, match="without CUDA graphs: MemoryError: out of memory") as caught:
        for size in (4, 4, 4, 5, 5, 5, 3, 3, 3, 4, 4):
            assert list(graphed(np.zeros(size))[0]) == [1.0] * size
            assert graphed.reason is None or size > 3 or not driver.replays
    assert attempts == [4, 5, 3] and driver.replays == 2 and len(caught) == 1
    assert graphed.reason == "MemoryError: out of memory"
    assert driver.held() == [3 * 8]  # what failed holds nothing


@pytest.mark.parametrize("can_retry", [True, False, None])
def test_a_call_that_finds_no_memory_beside_a_graph_takes_that_of_the_graph(driver, can_retry):
    calls = []

    def function(x: np.ndarray) -> Results:
        calls.append(x.size)
        if x.size > 5 or (x.size == 3 and driver.held()):
            raise MemoryError
        return (cuda_sim.empty(x.size, float),)

    graphed = Graphed(function) if can_retry is None else Graphed(function, can_retry=lambda: can_retry)
    can_retry = bool(can_retry)  # not unless that is said
    graphed(np.ones(4)), graphed(np.ones(4))
    assert driver.held() == [4 * 8]
    with contextlib.nullcontext() if can_retry else pytest.raises(MemoryError):
        graphed(np.ones(3))
    assert bool(driver.held()) != can_retry
    with pytest.raises(MemoryError):  # there is nothing more to give
        graphed(np.ones(6))
    assert calls == [4, 4, 3, *[3] * can_retry, 6]


def test_memory_that_a_capture_has_used_is_not_given_back_to_make_room(driver):
    """A pool of CuPy's own would, and the graph would write into what others have."""

    def function(x: np.ndarray) -> Results:
        if driver.captured is not None:
            cuda_sim.empty(600, np.uint8)
            return (cuda_sim.empty(700, np.uint8),)
        return (x,)

    driver.room, graphed = 1000, Graphed(function)
    with pytest.warns(UserWarning, match="no memory for a graph: out of memory"):
        graphed(np.zeros(1)), graphed(np.zeros(1))
    assert graphed.reason == "NotCapturable: no memory for a graph: out of memory"
    assert driver.room == 1000 and not driver.held()


def test_work_behind_a_replay_that_fails_waits_for_what_it_did(driver, adding):
    graphed, *_ = adding
    graphed(np.ones(2)), graphed(np.ones(2))
    graphed._graph._inputs = [np.ones(3)]  # so that it fails on its way
    driver.waited.clear()
    with pytest.raises(ValueError):
        graphed(np.ones(2))
    assert driver.waited == [graphed._graph._stream, driver.current]


def test_one_thread_at_a_time_uses_the_stream_of_graphs(driver, adding):
    adding[0](np.ones(2)), adding[0](np.ones(2))
    begun, go_on = threading.Event(), threading.Event()

    def function(x: np.ndarray) -> Results:
        if driver.captured is not None:
            begun.set()
            assert go_on.wait(30)
        return (x,)

    capturing = Graphed(function)
    capturing(np.ones(2))
    threads = [threading.Thread(target=graphed, args=(np.ones(2),)) for graphed in (capturing, adding[0])]
    threads[0].start()
    assert begun.wait(30)
    threads[1].start()
    threads[1].join(0.2)
    assert threads[1].is_alive() and driver.replays == 1
    go_on.set()
    for thread in threads:
        thread.join()
    assert driver.replays == 3 and capturing.reason is None


def test_room_for_cublas_is_no_graphs(driver):
    """It is made for the stream of all graphs when the first of them is captured, and outlives that."""
    pool = capture_sim.Pool(driver, driver.memory)
    try:
        with cuda_graph.capture(), driver.using_allocator(pool.malloc):
            assert cublas._workspace(cuda_sim.Namespace(), 0, -1).nbytes == cublas.WORKSPACE
    finally:
        cublas._workspaces.clear()
    assert not pool.total_bytes()


def test_the_memory_of_a_graph_is_given_back_when_another_takes_its_place(driver, adding):
    graphed, *_ = adding
    for size in (4, 4, 4, 3, 3, 3):
        graphed(np.ones(size))
    assert len(driver.pools) == 2 and driver.held() == [3 * 8]
    kept = graphed._graph._outputs
    graphed(np.ones(5)), graphed(np.ones(5))
    assert driver.held() == [3 * 8, 5 * 8]  # its block cannot go while somebody holds a piece of it
    del kept
    graphed(np.ones(6)), graphed(np.ones(6))  # it goes before the next capture at the latest
    assert driver.held() == [6 * 8] and not cuda_graph._left


def test_the_memory_of_a_graph_is_given_back_with_it(driver):
    def function(x: np.ndarray) -> Results:
        return (cuda_sim.empty(x.size, float),)

    graphed = Graphed(function)
    graphed(np.ones(3)), graphed(np.ones(3))
    assert driver.held() == [3 * 8]
    del graphed
    assert not driver.held()

    holder = SimpleNamespace(graphed=Graphed(function))
    holder.itself = holder  # so that it waits for a collection
    holder.graphed(np.ones(3)), holder.graphed(np.ones(3))
    del holder
    other = Graphed(function)
    other(np.ones(4)), other(np.ones(4))
    assert driver.held() == [4 * 8] and not cuda_graph._left


@pytest.mark.skipif(cuda_sim.COMPILER is None, reason="no C++ compiler")
@pytest.mark.parametrize("make", [optim.AdamW, optim.Muon])
def test_a_step_of_the_kernels_replays_like_single_launches(driver, folder, monkeypatch, make):
    """Dropout masks, clipping, updates and EMA: other masks, learning rates and gradients each time, the same bits.

    Also though what the step needed first is memory of what it needs last, as activations are of the optimizer's.
    """
    monkeypatch.setattr(np_namespace(), "empty", cuda_sim.empty)

    def run(wrap: Callable) -> list[np.ndarray]:
        parameters = [nn.Parameter(np.ones(shape, np.float32)) for shape in ((5, 8), (3,))]
        model = SimpleNamespace(named_parameters=lambda: enumerate(parameters))
        groups = [{"params": parameters[:1], "muon": make is optim.Muon}, *parameters[1:]]
        opt, ema, masks = make(groups, weight_decay=0.1), optim.EMA(model, 0.9), []

        def step(a: np.ndarray, b: np.ndarray, number: np.ndarray) -> Results:
            with random.scope(5, number):
                mask = kernels.best(reference.dropout_mask, np_namespace())(
                    np_namespace(), a, drop=0.4, shape=(8,), draw=random.draw()
                )
            activation = cuda_sim.empty(1 << 12, np.uint8)
            address, size = activation.ctypes.data, activation.nbytes
            driver.launch(lambda: ctypes.memset(address, 0, size))  # a table of zeros updates nothing
            del activation
            for p, g in zip(parameters, (a, b), strict=True):
                p.grad = g
            norm = opt.update(1.5)
            ema.update()
            opt.zero_grad()
            return mask, norm

        call_step = wrap(step, opt)
        rng = np.random.default_rng(0)
        for i in range(6):
            opt.lr = 0.1 / (i + 1)
            a, b = (rng.standard_normal(p.shape).astype(np.float32) for p in parameters)
            masks.append(call_step(a, b, np.array(i, np.int64))[0])
            if i == 3:  # an evaluation, or a checkpoint
                opt.load_state_dict(opt.state_dict())
        assert all((x != y).any() for x, y in itertools.pairwise(masks))
        return [*masks, *(p.data for p in parameters), *ema.state_dict().values(), *opt.state_dict().values()]

    with cuda_sim.everything_on_device(folder, library=CuBLASLt()):
        expected = run(lambda step, opt: step)
        assert driver.replays == 0
        # load_state_dict puts other arrays into the optimizer, so that the graph is captured anew
        addresses = lambda opt: tuple(x.ctypes.data for x in opt.arrays())
        ours = run(lambda step, opt: Graphed(step, lambda: addresses(opt), opt.begin_update))
        assert driver.replays == 4
    for actual, right in zip(ours, expected, strict=True):
        assert np.array_equal(actual, right)


def np_namespace() -> Any:
    import array_api_compat.numpy

    return array_api_compat.numpy


@pytest.mark.parametrize("masked", [False, True])
def test_dropout_takes_its_step_from_an_array(masked):
    """The same masks, whether the step is a number or an array."""
    x = np.ones((40, 6), np.float32)

    def drop(step: Any) -> np.ndarray:
        with random.scope(3, step):
            return (F.dropout(x, 0.5) if masked else F.drop_path(x, 0.5, training=True)).data

    assert np.array_equal(drop(7), drop(np.array(7))) and not np.array_equal(drop(7), drop(np.array(9)))


# --- on a GPU -------------------------------------------------------------------------------------------------------


@needs_gpu
@pytest.mark.parametrize(
    "precision, make", [("fp32", optim.AdamW), ("bf16", optim.Muon), ("fp16", optim.Muon), ("bf16", optim.Adam)]
)
def test_steps_on_a_gpu_replay_like_single_launches(precision, make):
    """The same bits, dropout, a falling learning rate, averages and a short batch included."""
    if cublas.library() is None:
        pytest.skip("nvmath-python is not installed")
    drops = dict(drop_path=0.2, proj_drop_rate=0.1, attn_drop_rate=0.1)

    def run(captured: bool) -> list[np.ndarray]:
        with random.scope(1):
            model = tinyvit.create_model("vit_micro_patch4_32", depth=2, num_classes=10, **drops).to("cuda")
        groups = optim.param_groups(model, 0.1, adam_lr_scale=0.1 if make is optim.Muon else None)
        opt, ema = make(groups), optim.EMA(model, 0.9)
        step = tinyvit.TrainStep(model, opt, clip_norm=1.0, ema=ema, seed=2, precision=precision)
        if not captured:
            step.graph._capture = lambda *_: False
        rng, numbers = np.random.default_rng(0), []
        for i in range(8):
            n = 16 if i != 5 else 7
            opt.lr = 1e-3 / (i + 1)
            loss = step(rng.standard_normal((n, 3, 32, 32), np.float32), rng.integers(0, 10, n))
            numbers.append((float(loss), step.grad_norm, step.correct))
            assert (step.graph.reason is None) == (captured and i not in (0, 5))
        return [np.array(numbers), *model.state_dict().values(), *ema.state_dict().values()]

    for ours, right in zip(run(True), run(False), strict=True):
        assert np.array_equal(ours, right)
