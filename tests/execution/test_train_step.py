"""TrainStep against the loop that it abbreviates, whatever the shards and threads; and predict."""

import contextlib
import math
import weakref
from unittest import mock

import array_api_strict
import numpy as np
import pytest
from drawing import BACKENDS, LIBRARIES, error, references_only
from on_gpu import needs_gpu
from threadpoolctl import threadpool_info, threadpool_limits

import tinyvit
from tinyvit import TrainStep, optim, predict
from tinyvit import functional as F
from tinyvit.backend import arrays, devices, random
from tinyvit.distributed import Group
from tinyvit.engine.tensor import Tensor

RATES = dict(drop_path=0.3, drop_rate=0.2, attn_drop_rate=0.2, proj_drop_rate=0.2, pos_drop_rate=0.1)


def nano(dtype="float32", **overrides):
    overrides = dict(image_size=8, patch_size=4, embed_dim=16, num_classes=5) | overrides
    model = tinyvit.create_model("vit_nano_patch8_32", **overrides).to(dtype)
    rng = np.random.default_rng(0)
    model.head.weight.data = (rng.standard_normal(model.head.weight.shape) * 0.2).astype(dtype)
    return model


def batch(n=11, dtype="float32", seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, 3, 8, 8)).astype(dtype), rng.integers(0, 5, n)


def test_an_optimizer_of_some_parameters_leaves_the_others_alone():
    model = nano()
    before = model.state_dict()
    TrainStep(model, optim.AdamW(model.head.parameters()))(*batch())
    assert all(p.grad is None for p in model.parameters())
    changed = {name for name, array in model.state_dict().items() if not np.array_equal(array, before[name])}
    assert changed == {"head.weight", "head.bias"}


def weights(model):
    return np.concatenate([p.numpy().reshape(-1) for p in model.parameters()])


def train(n_steps=3, dtype="float64", rates=None, labels=None, opt=optim.AdamW, **options):
    model = nano(dtype, **(rates or {}))
    step = TrainStep(model, opt(model.parameters(), lr=0.01), **options)
    losses = []
    for i in range(n_steps):
        x, y = batch(dtype=dtype, seed=i)
        losses.append(step(x, y if labels is None else labels(y)))
    return step, losses, weights(model)


def test_a_step_keeps_no_gradients():
    """They are as large as the model, and would add to the memory that the next step needs most of."""
    model = nano()
    opt = optim.AdamW(model.parameters(), lr=0.01)
    found, update = [], opt.update
    opt.update = lambda *args: (found.extend(weakref.ref(p.grad) for p in model.parameters()), update(*args))[1]
    TrainStep(model, opt, threads=1)(*batch())
    assert found and not any(ref() is not None for ref in found)


# --- the loop -----------------------------------------------------------------------------------------------------


def by_hand(n_steps=3, rates=None, smoothing=0.0, clip=None, labels=lambda y: y):
    model = nano("float64", **(rates or {}))
    opt = optim.AdamW(model.parameters(), lr=0.01)
    losses, norms, hits = [], [], []
    for i in range(n_steps):
        x, y = batch(dtype="float64", seed=i)
        with random.scope(7, i):
            logits = model(x)
        loss = F.cross_entropy(logits, labels(y), label_smoothing=smoothing)
        loss.backward()
        norms.append(optim.clip_grad_norm(model.parameters(), math.inf if clip is None else clip))
        opt.step()
        opt.zero_grad()
        losses.append(float(loss))
        hits.append(int((logits.data.argmax(axis=1) == y).sum()))
    return losses, norms, hits, weights(model)


@pytest.mark.parametrize("threads, n_shards", [(1, 1), (1, 3), (2, None), (2, 5), (4, 4), (2, 50)])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_is_the_four_lines_it_abbreviates(threads, n_shards, accumulate):
    """With dropout: its masks know neither shards nor threads. More shards than images are fine."""
    losses, norms, hits, expected = by_hand(rates=RATES, smoothing=0.1, clip=0.5)
    step, got, trained = train(
        rates=RATES, label_smoothing=0.1, clip_norm=0.5, threads=threads, shards=n_shards, accumulate=accumulate, seed=7
    )  # fmt: skip
    assert [float(x) for x in got] == pytest.approx(losses, rel=1e-12)
    assert error(trained, expected) < 1e-10
    assert step.correct == hits[-1] and step.grad_norm == pytest.approx(norms[-1], rel=1e-10)
    assert type(step.correct) is int and type(step.grad_norm) is float and step.step_index == 3


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("threads, n_shards", [(1, 1), (2, 2), (2, 3)])
def test_loss_and_weights_keep_the_model_s_dtype(dtype, threads, n_shards):
    step, losses, trained = train(dtype=dtype, threads=threads, shards=n_shards)
    assert all(x.dtype == dtype and x.shape == () and not x.requires_grad for x in losses)
    assert trained.dtype == dtype
    assert all(p.grad is None for p in step.model.parameters())


def test_a_step_and_its_graph_go_with_the_last_reference():
    """Without waiting for a collection, as the next step needs the graph's memory."""
    model = nano()
    graph = weakref.ref(TrainStep(model, optim.SGD(model.parameters(), lr=0.1)).graph)
    assert graph() is None


@pytest.mark.parametrize(
    "part, again",
    [("forward", True), ("update", False), ("forward in a group", False), ("forward with a buffer", False)],
)
def test_what_a_step_without_memory_has_done_is_not_done_twice(monkeypatch, part, again):
    """Before the update nothing is lost; but the others of a group wait for each of its sums once."""
    model = nano()
    step = TrainStep(model, optim.SGD(model.parameters(), lr=0.1), threads=1)
    step(*batch())
    failing = (step.optimizer, "_update") if part == "update" else (model, "forward")
    monkeypatch.setattr(*failing, mock.Mock(side_effect=MemoryError))
    if part != "update":
        step.group = type("Two", (Group,), {"size": 2})() if "group" in part else step.group
        model.register_buffer("mean", np.zeros(1)) if "buffer" in part else None  # a module may change it
    with pytest.raises(MemoryError):
        step(*batch())
    assert step.graph._can_retry() is again


def test_the_same_settings_give_the_same_bits_on_any_number_of_threads():
    runs = [train(4, "float32", RATES, threads=threads, shards=4, seed=1) for threads in (1, 2, 4, 2, 1)]
    for _, losses, trained in runs[1:]:
        assert [x.item() for x in losses] == [x.item() for x in runs[0][1]]
        assert trained.tobytes() == runs[0][2].tobytes()
    assert train(4, "float32", RATES, threads=1, shards=4, seed=2)[2].tobytes() != runs[0][2].tobytes()


@pytest.mark.parametrize("n_shards", [1, 2, 3, 5])
def test_dropout_masks_do_not_depend_on_shards(n_shards):
    """Each image's loss alone: an image whose masks changed would be far off."""
    losses = train(1, rates=RATES, threads=1, shards=n_shards, seed=3)[1]
    assert float(losses[0]) == pytest.approx(float(train(1, rates=RATES, threads=1, shards=1, seed=3)[1][0]), rel=1e-12)
    other = train(1, rates=RATES, threads=1, shards=n_shards, seed=4)[1][0]
    assert abs(float(other) - float(losses[0])) > 1e-4


def test_the_step_index_is_what_dropout_derives_from():
    """An interrupted run that sets it goes on as if nothing had happened."""
    _, _, expected = train(3, rates=RATES, opt=optim.SGD, threads=1)
    model = nano("float64", **RATES)
    for i in range(3):
        step = TrainStep(model, optim.SGD(model.parameters(), lr=0.01), threads=1)
        step.step_index = i
        step(*batch(dtype="float64", seed=i))
    assert np.array_equal(weights(model), expected)


@pytest.mark.parametrize("threads, n_shards", [(1, 1), (2, 3)])
def test_probabilities_as_labels(threads, n_shards):
    def soft(y):
        return 0.9 * np.eye(5)[y] + 0.02

    losses, _, hits, expected = by_hand(labels=soft)
    for dtype in (np.float64, np.float32):
        step, got, trained = train(
            labels=lambda y, d=dtype: soft(y).astype(d), threads=threads, shards=n_shards, seed=7
        )
        tolerance = 1e-10 if dtype is np.float64 else 1e-6
        assert error([float(x) for x in got], losses) < tolerance
        assert error(trained, expected) < 100 * tolerance
        assert step.correct == hits[-1]
    for integer in (np.uint8, np.int32):
        assert error(train(labels=lambda y, d=integer: y.astype(d), seed=7)[2], by_hand()[3]) < 1e-10


def test_the_norm_is_that_before_clipping_and_nan_where_one_gradient_is():
    free, _, _ = train(1, threads=1)
    clipped, _, _ = train(1, threads=1, clip_norm=free.grad_norm / 4)
    assert clipped.grad_norm == pytest.approx(free.grad_norm)
    model = nano()
    step = TrainStep(model, optim.SGD(model.parameters(), lr=0.0), threads=1)
    assert math.isnan(step.grad_norm) and step.correct == 0
    x, y = batch()
    model.cls_token.data[...] = np.nan  # its gradient is the first of many, or the last
    with np.errstate(all="ignore"):
        step(x, y)
    assert math.isnan(step.grad_norm)


def test_frozen_parameters_stay_and_averages_follow():
    model = nano()
    model.blocks[0].requires_grad_(False)
    frozen, free = model.blocks[0].state_dict(), model.blocks[1].state_dict()
    ema = optim.EMA(model, 0.5)
    opt = optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    start = model.state_dict()
    TrainStep(model, opt, ema=ema, threads=2)(*batch())
    assert all(np.array_equal(x, frozen[name]) for name, x in model.blocks[0].state_dict().items())
    assert not all(np.array_equal(x, free[name]) for name, x in model.blocks[1].state_dict().items())
    end = model.state_dict()
    assert error(ema.state_dict()["head.bias"], (start["head.bias"] + end["head.bias"]) / 2, 1e-3) < 1e-6


def test_a_step_switches_training_on():
    model = nano(**RATES).eval()
    TrainStep(model, optim.SGD(model.parameters(), lr=0.1), threads=1)(*batch())
    assert model.training and model.blocks[1].drop_path.training


def blas_threads():
    return {m["num_threads"] for m in threadpool_info() if m["user_api"] == "blas"}


@pytest.mark.parametrize("threads", [1, 2])
def test_a_failing_shard_changes_nothing(threads):
    model = nano()
    before = weights(model)
    step = TrainStep(model, optim.SGD(model.parameters(), lr=0.1), threads=threads, shards=3)
    x, y = batch()
    with threadpool_limits(3, user_api="blas"):
        with pytest.raises(ValueError, match=r"labels must lie in 0 ... 4, got . ... 9"):
            step(x, np.where(np.arange(11) == 10, 9, y))
        with pytest.raises(ValueError, match=r"expected images \(B, 3, 8, 8\), got"):
            step(x[:, :2], y)
        assert blas_threads() <= {3}
        assert step.step_index == 0 and np.array_equal(weights(model), before)
        step(x, y)
    assert step.step_index == 1 and not np.array_equal(weights(model), before)


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda step: step(batch(3)[0], batch(4)[1]),
            "expected as many labels as images and at least one, got 3 and 4",
        ),
        (lambda step: step(*batch(0)), "expected as many labels as images and at least one, got 0 and 0"),
        (
            lambda step: TrainStep(step.model, step.optimizer, accumulate=0),
            "accumulate must be at least 1, got 0",
        ),
        (
            lambda step: TrainStep(step.model, step.optimizer, clip_norm=0),
            "clip_norm must be positive, got 0",
        ),
        (
            lambda step: TrainStep(step.model.requires_grad_(False), step.optimizer),
            "a training step needs an optimizer of parameters that require a gradient",
        ),
        (
            lambda step: (step.model.reset_classifier(3), TrainStep(step.model, step.optimizer)),
            "the optimizer holds 2 parameters that are not the model's: make it after the model's last change, such as "
            "a new head",
        ),
        (lambda step: predict(step.model, batch()[0], batch_size=0), "batch_size must be at least 1, got 0"),
    ],
)
def test_bad_arguments(make, message):
    model = nano()
    with pytest.raises(ValueError) as caught:
        make(TrainStep(model, optim.SGD(model.parameters(), lr=0.1)))
    assert str(caught.value) == message


@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if backend != "numpy"])
def test_a_step_in_another_array_library(backend):
    """The whole step needs nothing beyond the standard, with arrays of either library as input."""
    x, y = batch(6, "float64")
    xp, results = LIBRARIES[backend], []
    for library, images, labels in [
        (None, x, y),
        (xp, x, y),
        (xp, xp.asarray(x), xp.asarray(y)),
        (xp, xp.asarray(x), xp.asarray(np.eye(5)[y])),
    ]:
        model = nano("float64", **RATES)
        if library is not None:
            model.to(library)
        step = TrainStep(model, optim.AdamW(model.parameters(), lr=0.01), clip_norm=0.1, accumulate=2, threads=1)
        loss = step(images, labels)
        assert library is None or type(loss.data) is type(library.asarray(0.0))
        results.append((float(loss), step.correct, step.grad_norm, weights(model), predict(model, images)))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert error(b, a, floor=1e-2) < 1e-10


@contextlib.contextmanager
def reading_forbidden():
    """Within this context an array of array_api_strict is like one on a device whose values nobody may wait for."""

    def refuse(self, *_, **__):
        raise AssertionError("a value was read from the device")

    array = type(array_api_strict.asarray(0.0))
    names = ("__bool__", "__float__", "__int__", "__index__", "__complex__", "__array__", "__dlpack__", "__buffer__")
    before = {name: getattr(array, name) for name in names if hasattr(array, name)}
    for name in before:
        setattr(array, name, refuse)
    try:
        yield
    finally:
        for name, method in before.items():
            setattr(array, name, method)


@pytest.mark.parametrize("opt", [optim.AdamW, optim.SGD])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_on_a_device_reads_nothing_back(opt, accumulate):
    """Clipping, averages and dropout included; the batch may come from the host. What it brought is read afterwards."""
    x, y = batch(dtype="float64")
    model = nano("float64", **RATES).to(array_api_strict)
    step = TrainStep(
        model, opt(model.parameters(), lr=0.01), clip_norm=0.1, ema=optim.EMA(model, 0.9), accumulate=accumulate, seed=7
    )
    with reading_forbidden():
        with pytest.raises(AssertionError, match="was read"):
            float(array_api_strict.asarray(1.0))
        losses = [step(x, y), step(array_api_strict.asarray(x), array_api_strict.asarray(y))]
        result = step.result
    host = nano("float64", **RATES)
    expected = TrainStep(
        host,
        opt(host.parameters(), lr=0.01),
        clip_norm=0.1,
        ema=optim.EMA(host, 0.9),
        accumulate=accumulate,
        threads=1,
        seed=7,
    )
    assert [float(z) for z in losses] == pytest.approx([float(expected(x, y)) for _ in range(2)], rel=1e-10)
    assert error(weights(model), weights(host), floor=1e-2) < 1e-10
    assert (step.correct, step.grad_norm) == (expected.correct, pytest.approx(expected.grad_norm, rel=1e-9))
    assert int(result.correct) == step.correct and float(result.loss) == float(losses[1])


@needs_gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_step_on_a_gpu_waits_for_nothing(precision):
    """CuPy itself tells of each time that it waits, and of each array that goes to the host."""
    import cupyx

    model = nano(**RATES).to("cuda")
    opt = optim.AdamW(model.parameters(), lr=0.01)
    step = TrainStep(model, opt, clip_norm=0.1, ema=optim.EMA(model, 0.9), precision=precision)
    x, y = (devices.mover("cuda")(a) for a in batch())
    for _ in range(3):  # compiles, captures
        step(x, y)
    with pytest.warns(UserWarning, match="allow_synchronize"), cupyx.allow_synchronize(False):
        losses = [step(x, y) for _ in range(3)]
    assert all(math.isfinite(float(loss)) for loss in losses) and step.step_index == 6


def test_an_update_that_fails_leaves_no_gradients(monkeypatch):
    model = nano()
    step = TrainStep(model, optim.SGD(model.parameters(), lr=0.1))
    monkeypatch.setattr(step.optimizer, "update", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        step(*batch())
    assert all(p.grad is None for p in model.parameters())


# --- predict ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("batch_size", [1, 4, 256])
def test_predict_is_the_forward_pass_in_evaluation_mode(batch_size, threads):
    model = nano("float64", **RATES)
    x, _ = batch(11, "float64")
    expected = model.eval()(x).numpy()
    for training in (True, False):
        model.train(training)
        model.blocks[0].eval()  # a part that its owner keeps in evaluation mode
        scores = predict(model, x, batch_size, threads)
        assert type(scores) is np.ndarray and scores.dtype == np.float64
        assert error(scores, expected) < 1e-12
        assert model.training == model.blocks[1].attn.training == training and not model.blocks[0].training
    assert predict(model, Tensor(x), threads=1).shape == (11, 5)


def test_predict_without_images_gives_no_rows_and_an_error_restores_the_mode():
    model = nano()
    empty = predict(model, np.zeros((0, 3, 8, 8), np.float32))
    assert empty.shape == (0, 5) and empty.dtype == np.float32
    with pytest.raises(ValueError, match="expected images"):
        predict(model, np.zeros((2, 3, 9, 8), np.float32))
    assert model.training and model.blocks[0].training


def test_predict_reads_a_batch_when_the_next_one_is_under_way(monkeypatch):
    model = nano().to(array_api_strict)
    forward, events, to_numpy = model.forward, [], arrays.to_numpy
    model.forward = lambda images: events.append("computed") or forward(images)
    monkeypatch.setattr(arrays, "to_numpy", lambda x: events.append("read") or to_numpy(x))
    scores = predict(model, array_api_strict.asarray(batch(5)[0]), batch_size=2)
    assert scores.shape == (5, 5)
    assert events == ["computed", "computed", "read", "computed", "read", "read"]


def test_predict_records_nothing():
    model = nano()
    recorded = []
    forward = model.forward
    model.forward = lambda images: recorded.append(out := forward(images)) or out
    predict(model, batch()[0], threads=2)
    assert len(recorded) == 2 and not any(t.requires_grad for t in recorded)


def test_kernels_and_references_train_alike():
    kernels = train(3, "float32", RATES, opt=optim.SGD, threads=1, seed=5)
    with references_only():
        references = train(3, "float32", RATES, opt=optim.SGD, threads=1, seed=5)
    assert error(kernels[2], references[2]) < 1e-6
    assert [float(x) for x in kernels[1]] == pytest.approx([float(x) for x in references[1]], rel=1e-5)


def test_lists_and_models_are_refused_with_the_cure():
    model = nano()
    images, labels = batch()
    ema = optim.EMA(model, 0.5)
    step = TrainStep(model, optim.SGD(model.parameters(), lr=0.1), threads=1)
    with pytest.raises(TypeError, match=r"labels must be an array or a Tensor, got list; use numpy\.asarray"):
        step(images, labels.tolist())
    with pytest.raises(TypeError, match=r"update takes no model: .* use ema\.update\(\)"):
        ema.update(model)


def test_a_step_trains_every_part_that_is_not_frozen():
    """Also if only a part of the model was put into evaluation mode."""
    model = nano(**RATES)
    model.blocks[0].eval()
    TrainStep(model, optim.SGD(model.parameters(), lr=0.1), threads=1)(*batch())
    assert all(module.training for module in model.modules())
