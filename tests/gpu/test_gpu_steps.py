"""Whole training steps and predictions on a GPU: CUDA graphs beside single launches, and both beside the CPU."""

from __future__ import annotations

import contextlib
import gc
import os
import re
import warnings
import weakref

import numpy as np
import pytest
from on_gpu import HAS_GPU, PRECISIONS, difference

import tinyvit
from tinyvit import optim
from tinyvit.backend import arrays, cuda_graph, devices
from tinyvit.backend.cuda_graph import Graphed
from tinyvit.execution import inference
from tinyvit.kernels.cuda import cublas

if not HAS_GPU:
    pytest.skip("CuPy finds no GPU", allow_module_level=True)
pytestmark = pytest.mark.gpu

SMALL = {"depth": 3, "num_classes": 10}
DROPS = {"drop_path": 0.2, "proj_drop_rate": 0.1, "attn_drop_rate": 0.1, "pos_drop_rate": 0.1}


@pytest.fixture(autouse=True)
def needs_cublaslt():
    if cublas.library() is None:
        pytest.skip(cublas.missing())


def make_model(device: str = "cuda", name: str = "vit_tiny_patch4_32", **drops: float) -> tinyvit.VisionTransformer:
    """A model whose head is not zero; two that are made alike are alike."""
    model = tinyvit.create_model(name, seed=1, **SMALL, **drops)
    state = model.state_dict()
    head = np.random.default_rng(0).standard_normal(state["head.weight"].shape)
    model.load_state_dict({**state, "head.weight": (0.02 * head).astype(np.float32)})
    return model.to(device)


def make_step(precision: str = "fp32", device: str = "cuda", drops: dict | None = None, **options) -> tinyvit.TrainStep:
    model = make_model(device, **(drops or {}))
    optimizer = optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    options = {"clip_norm": 1.0, "label_smoothing": 0.1, "ema": optim.EMA(model, 0.9), "seed": 5} | options
    return tinyvit.TrainStep(model, optimizer, precision=precision, **options)


def batch(size: int = 64, seed: int = 0) -> tuple:
    rng = np.random.default_rng(seed)
    move = devices.mover("cuda")
    return move(rng.standard_normal((size, 3, 32, 32), np.float32)), move(rng.integers(0, 10, size))


def state(step: tinyvit.TrainStep) -> list[np.ndarray]:
    """Weights, their averages and the optimizer's state."""
    parts = (step.model, step.ema, step.optimizer)
    return [np.asarray(x) for part in parts for x in part.state_dict().values()]


@contextlib.contextmanager
def single_launches():
    """Within this context nothing is captured."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Graphed, "_capture", lambda *_: False)
        patch.setattr(inference, "_kept", weakref.WeakKeyDictionary())  # no graphs of earlier calls
        yield


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_graphs_and_single_launches_give_the_same_bits(precision, accumulate):
    """Of weights, averages, optimizer, losses and norms: dropout, a falling rate and a short batch included."""
    replayed, single = (make_step(precision, drops=DROPS, accumulate=accumulate) for _ in "12")
    for i in range(9):
        images, labels = batch(64 if i != 6 else 40, seed=i)
        for step in (replayed, single):
            step.optimizer.lr = 1e-3 / (i + 1)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="the GPU runs without CUDA graphs")
            loss = replayed(images, labels)
        assert (replayed.graph.reason is None) == (i not in (0, 6))
        with single_launches():
            expected = single(images, labels)
        assert float(loss) == float(expected)
        assert (replayed.grad_norm, replayed.correct) == (single.grad_norm, single.correct)
    assert all(np.array_equal(a, b) for a, b in zip(state(replayed), state(single), strict=True))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_graph_copies_nothing_from_the_host(precision):
    step = make_step(precision, drops=DROPS)
    for i in range(3):
        step(*batch(seed=i))
    described = step.graph._graph._graph.debug_dot_str(1)
    assert "KERNEL" in described
    assert not re.search(r"Host ?to ?Device|HtoD|H2D", described, re.IGNORECASE)


@pytest.mark.parametrize("precision, limit", [("fp32", 1e-5), ("tf32", 1e-3), ("bf16", 1e-2), ("fp16", 1e-2)])
def test_steps_are_the_cpus(precision, limit):
    """Clipped AdamW of all parameters with their average: three steps, against the CPU in float32."""
    on_gpu, on_cpu = make_step(precision), make_step("fp32", "cpu")
    for i in range(3):
        images, labels = batch(seed=i)
        loss = float(on_gpu(images, labels))
        expected = float(on_cpu(arrays.to_numpy(images), arrays.to_numpy(labels)))
        assert loss == pytest.approx(expected, rel=limit)
        assert on_gpu.grad_norm == pytest.approx(on_cpu.grad_norm, rel=10 * limit)
    for part in ("model", "ema"):
        ours, right = getattr(on_gpu, part).state_dict(), getattr(on_cpu, part).state_dict()
        for name, x in right.items():
            assert np.abs(ours[name] - x).max() < 3 * 2e-3, name  # three steps change no entry by more than 1e-3 each
            if precision == "fp32" and "qkv.bias" not in name:  # the gradient of the keys' bias is only rounding
                assert difference(ours[name], x) < 2e-2, name


@pytest.mark.parametrize("name", ["vit_tiny_patch4_32", "cct_2_3x2_32"])
@pytest.mark.parametrize("precision, limit", [("fp32", 1e-4), ("bf16", 2e-2)])
def test_steps_with_muon_are_the_cpus(name, precision, limit):
    """Clipped; matrices through products of many at a time, in a graph from the second step on; convolutions, too."""

    def losses(device: str, precision: str) -> list[float]:
        model = make_model(device, name)
        optimizer = optim.Muon(optim.param_groups(model, 0.05, adam_lr_scale=0.1))
        step = tinyvit.TrainStep(model, optimizer, clip_norm=1.0, precision=precision)
        found = [float(step(*(x if device == "cuda" else arrays.to_numpy(x) for x in batch(seed=i)))) for i in range(4)]
        assert device == "cpu" or step.graph.reason is None
        return found

    assert losses("cuda", precision) == pytest.approx(losses("cpu", "fp32"), rel=limit)


def test_dropout_differs_between_replays_and_repeats_with_the_seed():
    def losses() -> list[float]:
        step = make_step(drops=DROPS, ema=None)
        step.optimizer.lr = 0.0
        images, labels = batch()
        found = [float(step(images, labels)) for _ in range(6)]
        assert step.graph.reason is None
        return found

    first = losses()
    assert len(set(first)) == 6 and losses() == first


def test_a_learning_rate_reaches_the_next_replay():
    step, (images, labels) = make_step(ema=None), batch()
    step.optimizer.lr = 0.0
    name = "blocks.0.mlp.fc1.weight"
    before = step.model.state_dict()[name]
    for _ in range(3):
        step(images, labels)
    assert np.array_equal(step.model.state_dict()[name], before)
    step.optimizer.lr = 1e-2
    step(images, labels)
    assert step.graph.reason is None
    assert 1e-3 < np.abs(step.model.state_dict()[name] - before).max() < 2e-2


def test_weights_that_are_loaded_reach_a_captured_step():
    step, (images, labels) = make_step("bf16"), batch()
    for _ in range(3):
        step(images, labels)
    step.model.load_state_dict({name: 0 * x for name, x in step.model.state_dict().items()})
    assert float(step(images, labels)) == pytest.approx(np.log(10), abs=1e-3)


def test_an_overflow_halves_the_scale_and_changes_nothing_else():
    step, (images, labels) = make_step("fp16"), batch()
    for _ in range(3):
        step(images, labels)
    before, scale = state(step), step.loss_scale
    step(images * 1e6, labels)
    assert step.graph.reason is None and step.loss_scale == scale / 2
    assert all(np.array_equal(a, b) for a, b in zip(state(step), before, strict=True))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_precision_learns(precision):
    """Ten classes that differ by their mean image."""
    rng = np.random.default_rng(3)
    means = rng.standard_normal((10, 3, 32, 32)).astype(np.float32)
    step = make_step(precision, label_smoothing=0.0)
    losses = []
    for _ in range(20):
        labels = rng.integers(0, 10, 128)
        images = means[labels] + rng.standard_normal((128, 3, 32, 32), np.float32)
        losses.append(float(step(*map(devices.mover("cuda"), (images, labels)))))
    assert losses[0] > 2.2 and losses[-1] < 0.2


@pytest.mark.parametrize("precision, limit", [("fp32", 1e-5), ("tf32", 3e-3), ("bf16", 3e-2), ("fp16", 5e-3)])
def test_predictions(precision, limit):
    """Captured they are those of single launches, bit for bit, and the CPU's to rounding."""
    model, on_cpu = make_model(), make_model("cpu")
    images, _ = batch(7 * 32 + 5)
    right = tinyvit.predict(on_cpu, arrays.to_numpy(images), batch_size=64)
    captured = tinyvit.predict(model, images, batch_size=32, precision=precision)
    with single_launches():
        alone = tinyvit.predict(model, images, batch_size=32, precision=precision)
    assert difference(captured, right) < limit
    assert captured.tobytes() == alone.tobytes()


@pytest.mark.skipif(
    int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")) > 1, reason="reads the GPU's free memory: run it with -n 0"
)
def test_memory_is_stable_and_given_back():
    """A hundred replays, with evaluations and short batches between them, take no more memory; all of it comes back."""
    import cupy

    def free() -> int:
        gc.collect()
        cuda_graph._give_back()
        cupy.get_default_memory_pool().free_all_blocks()
        cupy.cuda.Device().synchronize()
        return cupy.cuda.runtime.memGetInfo()[0]

    def train(steps: int) -> list[int]:
        step, used = make_step("bf16", drops=DROPS), []
        images, labels = batch(256)
        for i in range(steps):
            step(images, labels)
            if i % 20 == 10:
                step(images[:100], labels[:100])
                with step.ema.applied():
                    tinyvit.predict(step.model, images, batch_size=64)
            if i >= 30:
                cupy.cuda.Device().synchronize()
                used.append(cupy.cuda.runtime.memGetInfo()[0])
        return used

    train(40)  # compiled kernels, cuBLASLt's libraries and workspaces stay for the life of the process
    before = free()
    used = train(120)
    assert used[0] - used[-1] < 64 << 20
    assert before - free() < 64 << 20
