"""Predictions: how a batch is cut; on a GPU what is kept between calls, how they are read (NumPy stands for CuPy)."""

from __future__ import annotations

import contextlib
import gc
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from reference_models import randomise

from tinyvit import create_model, nn, predict
from tinyvit.backend import arrays, parallel, random
from tinyvit.execution import inference
from tinyvit.kernels import cuda, packed_weights
from tinyvit.models import inspection


class Counting:
    """A `Graphed` that captures nothing."""

    made: list[Counting]

    def __init__(self, function: Any, depends_on: Any, can_retry: Any) -> None:
        self.function, self.calls = function, 0
        Counting.made.append(self)

    def __call__(self, *inputs: np.ndarray) -> Any:
        self.calls += 1
        return self.function(*inputs)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> None:
    Counting.made = []
    for name, stand_in in {
        "is_cupy": lambda x: True,
        "on_host": lambda x: False,
        "on_device_of": lambda x: contextlib.nullcontext(),
        "device_name": lambda x: "cuda:0",
        "start_copy_to_host": lambda x: lambda: x,
    }.items():
        monkeypatch.setattr(arrays, name, stand_in)
    monkeypatch.setattr(cuda, "address", lambda x: x.ctypes.data)
    monkeypatch.setattr(inference, "Graphed", Counting)


class Two(nn.Module):
    def __init__(self) -> None:
        with random.scope(1):
            self.first, self.second, self.double = nn.Linear(3, 3), nn.Linear(3, 2), False

    def forward(self, x: Any) -> Any:
        y = self.second(self.first(arrays.astype(x, self.first.weight.dtype)))
        return y + y if self.double else y


X = np.random.default_rng(0).standard_normal((7, 3)).astype(np.float32)


def exact(model: Two) -> np.ndarray:
    a, b = model.first, model.second
    y = (X @ a.weight.data.T + a.bias.data) @ b.weight.data.T + b.bias.data
    return y * (2 if model.double else 1)


def test_graphs_are_kept_between_calls(device):
    model = Two()
    for calls in (3, 6):
        assert np.allclose(predict(model, X, batch_size=3), exact(model), atol=1e-6)
        assert [graph.calls for graph in Counting.made] == [calls]
    predict(model, X, precision="fp16")
    predict(model, X)
    assert [graph.calls for graph in Counting.made] == [7, 1]
    predict(Two(), X)
    assert len(Counting.made) == 3


@pytest.mark.parametrize("precision, tolerance", [("fp32", 1e-6), ("fp16", 1e-2)])
def test_what_is_kept_follows_the_model(device, precision, tolerance):
    """Weights that change in place or are replaced; layers and settings that are."""
    model, made = Two(), []

    def check() -> None:
        assert np.allclose(predict(model, X, precision=precision), exact(model), atol=tolerance)
        made.append(len(Counting.made))

    check()
    model.train(), check()
    model.first.weight.data = model.first.weight.data * 2
    check()
    model.second.bias.data[:] += 1
    model.second.bias.changed()
    check()
    model.load_state_dict({name: x + 0.5 for name, x in model.state_dict().items()})
    check()
    with random.scope(2):
        model.second = nn.Linear(3, 2)
    check()
    model.double = True
    check()
    assert made == [1, 1, 1, 1, 1, 2, 3]
    model.to("float64")
    if precision == "fp16":
        with pytest.raises(ValueError, match="fp16 expects a float32 model, got float64"):
            predict(model, X.astype(np.float64), precision=precision)
    else:
        assert predict(model, X.astype(np.float64)).dtype == np.float64


def test_what_is_kept_goes_with_the_model(device):
    model = Two()
    predict(model, X, precision="fp16")
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_a_graph_in_use_is_not_given_to_another_call(device):
    model = Two()
    predict(model, X)
    slow = inference.predictions(model, [X[:3], X[3:]])
    first = next(slow)
    predict(model, X)
    assert [graph.calls for graph in Counting.made] == [3, 1]
    assert np.allclose(np.concatenate([first, *slow]), exact(model), atol=1e-6)
    stopped = inference.predictions(model, [X[:3], X[3:]])
    next(stopped)
    stopped.close()
    predict(model, X)
    assert len(Counting.made) == 2  # both were given back


def test_a_batch_is_read_without_waiting_for_the_next(monkeypatch):
    """Its copy into pinned memory has an event of its own."""
    work: list = []

    class OnDevice:
        def __init__(self, x: np.ndarray) -> None:
            self.x, self.shape, self.dtype, self.size = x, x.shape, x.dtype, x.size

        def get(self, out: np.ndarray, blocking: bool) -> None:
            assert not blocking and (out.dtype, out.shape) == (self.dtype, self.shape)
            work.append(lambda: np.copyto(out, self.x))

    class Event:
        def __init__(self) -> None:
            self.end = len(work)

        def synchronize(self) -> None:
            for i in range(self.end):
                work[i]()
                work[i] = lambda: None

    stream = SimpleNamespace(record=Event)
    cupy = SimpleNamespace(cuda=SimpleNamespace(get_current_stream=lambda: stream))
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    pinned = lambda shape, dtype: np.full(shape, np.nan, dtype)
    monkeypatch.setitem(sys.modules, "cupyx", SimpleNamespace(empty_pinned=pinned))
    monkeypatch.setattr(arrays, "is_cupy", lambda x: isinstance(x, OnDevice))
    first = arrays.start_copy_to_host(OnDevice(X))
    work.append(lambda: pytest.fail("waited for the next batch"))
    assert np.array_equal(first(), X)
    work.clear()
    assert np.array_equal(arrays.start_copy_to_host(OnDevice(2 * X))(), 2 * X)


def test_what_lies_on_the_host_is_read_as_it_is():
    assert arrays.start_copy_to_host(X)() is X


def test_a_batch_is_cut_into_shards_of_so_many_tokens_for_every_thread(monkeypatch):
    model = create_model("vit_micro_patch4_32", num_classes=3, depth=1)  # 65 tokens
    plans = []
    run = parallel.run
    monkeypatch.setattr(parallel, "run", lambda plan, function: plans.append(plan) or run(plan, function))
    images = np.zeros((100, 3, 32, 32), np.float32)
    for threads, expected in [(1, 5), (2, 6), (3, 6), (8, 8)]:
        predict(model, images, threads=threads)
        assert len(plans[-1].ranges) == expected
    predict(inspection.Features(model, logits=True), images, threads=1)
    assert len(plans[-1].ranges) == 5
    with pytest.raises(ValueError, match="threads and shards must be at least 1, got 0 and"):
        predict(model, images, threads=0)


@pytest.mark.parametrize("threads", [1, 2])
def test_predicting_on_a_model_in_training_mode_changes_nothing_in_it(threads, monkeypatch):
    """Several threads predict on one model, with shards in threads of their own, while it stays in training mode."""
    monkeypatch.setattr(inference, "SHARD_TOKENS", 20)  # a quarter of the batch
    rates = dict(drop_path=0.5, drop_rate=0.5, attn_drop_rate=0.5, proj_drop_rate=0.5, pos_drop_rate=0.5)
    model = randomise(create_model("vit_micro_patch4_32", image_size=8, num_classes=5, **rates))
    images = np.random.default_rng(0).standard_normal((16, 3, 8, 8)).astype(np.float32)
    expected = predict(model.eval(), images, threads=1)
    model.train().blocks[0].eval()
    modes = [module.training for module in model.modules()]
    seen = []

    def watch(module: nn.Module, args: Any) -> None:
        seen.append(module._training)

    def call(_: int) -> np.ndarray:
        with nn.forward_pre_hook(watch):
            return predict(model, images, threads=threads)

    with ThreadPoolExecutor(4) as pool:
        for scores in pool.map(call, range(8)):
            assert np.array_equal(scores, expected)
    assert {True, False} == set(seen) and modes == [module.training for module in model.modules()]
    assert not np.array_equal(model(images).numpy(), model(images).numpy())


def test_what_is_no_batch_is_refused_with_the_cure():
    model = create_model("vit_nano_patch8_32", num_classes=3)
    for wrong in (["a.png"], "a.png", [np.zeros((3, 32, 32), np.float32)]):
        with pytest.raises(TypeError, match=r"for files and PIL images use tinyvit\.classify"):
            predict(model, wrong)
    with pytest.raises(ValueError, match=r"got one of shape \(3, 32, 32\): use images\[None\]"):
        predict(model, np.zeros((3, 32, 32), np.float32))
    with pytest.raises(
        ValueError, match=r"^expected images \(B, 3, 32, 32\), got \(B, 3, 8, 8\)$"
    ):  # not a shard's size
        predict(model, np.zeros((600, 3, 8, 8), np.float32))


def test_a_change_of_the_weights_shows_in_the_next_output_on_a_cpu():
    model = nn.Linear(4, 2)
    stream = inference.predictions(model, [np.ones((3, 4), np.float32)] * 3)
    first = next(stream)
    model.weight.data = 2 * model.weight.data
    assert np.array_equal(next(stream), 2 * first)


def test_a_weight_is_packed_although_its_packing_is_interrupted_by_a_prediction():
    """As by a signal's handler, which runs in the same thread."""
    weight, calls = np.zeros(3), []

    def pack(array: np.ndarray) -> int:
        calls.append(array)
        return len(calls) if calls[1:] else packed_weights.packed(weight, pack)

    def interrupted() -> None:
        packed_weights.current.set(packed_weights.Packed("int8", {id(weight): None}))
        found.append(packed_weights.packed(weight, pack))

    found: list[int] = []
    thread = threading.Thread(target=interrupted, daemon=True)
    thread.start()
    thread.join(10)
    assert found == [2]
