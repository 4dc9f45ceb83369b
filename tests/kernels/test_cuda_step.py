"""Whole training steps and predictions through the CUDA kernels' own sources, run on the CPU launch by launch.

NumPy's arrays stand for CuPy's (`cuda_sim`), a stand-in for cuBLASLt. Graphs are in test_graph.py.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cuda_sim
import numpy as np
import pytest
from cublas_sim import CuBLASLt

import tinyvit
from tinyvit import functional as F
from tinyvit import optim
from tinyvit.backend import arrays, cuda_graph, random
from tinyvit.engine.tensor import Tensor, grad
from tinyvit.kernels import cuda

pytestmark = pytest.mark.skipif(cuda_sim.COMPILER is None, reason="no C++ compiler")

CONFIG = dict(image_size=8, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=5)
DROPS = dict(drop_path=0.3, proj_drop_rate=0.2, attn_drop_rate=0.2, pos_drop_rate=0.1)


@pytest.fixture
def device(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A context in which models of NumPy arrays take the ways of a GPU's, in single launches."""

    def context(library: Any = None) -> Any:
        monkeypatch.setattr(arrays, "is_cupy", lambda x: type(x) is np.ndarray)
        monkeypatch.setattr(arrays, "on_host", lambda x: False)
        monkeypatch.setattr(arrays, "on_device_of", lambda x: contextlib.nullcontext())
        monkeypatch.setattr(arrays, "device_name", lambda x: "cuda:0")
        monkeypatch.setattr(arrays, "start_copy_to_host", lambda x: lambda: x)
        monkeypatch.setattr(cuda_graph.Graphed, "_capture", lambda *_: False)
        return cuda_sim.everything_on_device(folder, library=library, multiprocessors=2)

    yield context
    monkeypatch.undo()


def train(steps: int = 3, **options: Any) -> tuple[list[float], list[float], dict, Any]:
    """Losses and norms of some steps, with the weights, their average and the step itself in the end."""
    drops = options.pop("drops", {})
    with random.scope(1):
        model = tinyvit.create_model("vit_tiny_patch16_224", **CONFIG, **drops)
    opt = optim.AdamW(model.parameters(), weight_decay=0.05, eps=1e-3)
    ema = optim.EMA(model, 0.7)
    step = tinyvit.TrainStep(model, opt, clip_norm=0.5, label_smoothing=0.1, ema=ema, seed=3, **options)
    rng, losses, norms = np.random.default_rng(0), [], []
    for i in range(steps):
        opt.lr = 0.01 / (i + 1)
        batch = 3 if i < steps - 1 else 2
        images, labels = rng.standard_normal((batch, 3, 8, 8), np.float32), rng.integers(0, 5, batch)
        losses.append(float(step(images, labels)))
        norms.append(step.grad_norm)
    return losses, norms, model.state_dict() | {f"ema.{k}": v for k, v in ema.state_dict().items()}, step


def compare(ours: tuple, right: tuple, tolerance: float) -> None:
    assert ours[0] == pytest.approx(right[0], rel=tolerance) and ours[1] == pytest.approx(right[1], rel=10 * tolerance)
    for name, x in right[2].items():
        assert np.abs(ours[2][name] - x).max() < tolerance * max(1, np.abs(x).max()), name
    assert list(ours[3].optimizer.state_dict()["steps"]) == list(right[3].optimizer.state_dict()["steps"])
    assert ours[3].correct == right[3].correct


@pytest.mark.parametrize("drops", [{}, DROPS], ids=["plain", "dropout"])
def test_a_step_is_the_cpus(device, drops):
    """Also its dropout: the masks are the same bits."""
    right = train(drops=drops)
    with device(CuBLASLt()):
        ours = train(drops=drops)
    compare(ours, right, 2e-5)


def test_a_step_in_parts_and_without_cublas(device):
    right = train(accumulate=2, drops=DROPS)
    with device():
        ours = train(accumulate=2, drops=DROPS)
    compare(ours, right, 2e-5)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_of_16_bits(device, accumulate):
    """Float16 copies that the optimizer writes, gradients as they come, a loss scale that never leaves the device."""
    right = train(drops=DROPS)
    with device(CuBLASLt()):
        ours = train(drops=DROPS, precision="fp16", accumulate=accumulate)
        assert ours[3].loss_scale == 2**16 and ours[3].precision.is_current()
        copies = ours[3].precision.rounded()
        for p in ours[3].model.parameters():
            assert np.array_equal(copies[id(p)], p.data.astype(np.float16))
    compare(ours, right, 2e-2)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_copy_of_a_step_goes_on_by_itself(device, precision):
    """Also after a step that overflowed, which the device alone counts."""
    with device(CuBLASLt()):
        *_, step = train(steps=1, precision=precision)
        images, labels = np.ones((2, 3, 8, 8), np.float32), np.array([0, 1])
        if precision == "fp16":
            step(np.full_like(images, 6e4), labels)
        twin, before = copy.deepcopy(step), step.model.state_dict()
        losses = [float(twin(images, labels)) for _ in range(2)]
        assert all(np.array_equal(x, before[name]) for name, x in step.model.state_dict().items())
        assert losses == [float(step(images, labels)) for _ in range(2)]
        for ours, theirs in ((twin.model, step.model), (twin.ema, step.ema), (twin.optimizer, step.optimizer)):
            expected = theirs.state_dict()
            assert all(np.array_equal(x, expected[name]) for name, x in ours.state_dict().items())


def test_an_overflow_skips_the_step_and_halves_the_loss_scale(device):
    with device(CuBLASLt()):
        *_, step = train(steps=2, precision="fp16")
        before, averages = [p.data.copy() for p in step.model.parameters()], step.ema.state_dict()
        step(np.full((3, 3, 8, 8), 6e4, np.float32), np.array([0, 1, 2]))
        assert not np.isfinite(step.grad_norm) and step.loss_scale == 2**15
        assert all(np.array_equal(p.data, x) for p, x in zip(step.model.parameters(), before, strict=True))
        assert all(np.array_equal(x, averages[name]) for name, x in step.ema.state_dict().items())
        assert list(step.optimizer.state_dict()["steps"]) == [2] * len(before)
        step(np.ones((3, 3, 8, 8), np.float32), np.array([0, 1, 2]))
        assert step.optimizer.state_dict()["steps"][0] == 3
        assert not any(np.array_equal(x, averages[name]) for name, x in step.ema.state_dict().items() if "head" in name)
        assert not any(np.array_equal(p.data, x) for p, x in zip(step.parameters[-2:], before[-2:], strict=True))


def test_weights_that_are_replaced_between_steps_reach_the_copies(device):
    with device(CuBLASLt()):
        *_, step = train(steps=2, precision="fp16")
        assert step.precision.is_current()
        step.model.load_state_dict({name: 0 * x + 0.5 for name, x in step.model.state_dict().items()})
        assert not step.precision.is_current()
        with step.precision.applied():
            assert all((p.data == 0.5).all() and p.dtype == np.float16 for p in step.model.parameters())


def test_predictions_are_the_cpus(device):
    model = tinyvit.create_model("vit_tiny_patch16_224", **CONFIG)
    model.head.weight.data = np.random.default_rng(0).standard_normal(model.head.weight.shape).astype(np.float32)
    images = np.random.default_rng(1).standard_normal((9, 3, 8, 8)).astype(np.float32)
    right = tinyvit.predict(model, images, batch_size=2)
    with device(CuBLASLt()):
        for precision, tolerance in (("fp32", 1e-5), ("fp16", 0.1)):
            assert np.abs(tinyvit.predict(model, images, batch_size=2, precision=precision) - right).max() < tolerance


def test_addresses_name_what_a_graph_works_on(device):
    with device():
        *_, step = train(steps=1)
        before = step._graph_key()
        assert step._graph_key() == before
        assert cuda.address(step.parameters[0].data) in before[-1]
        step.parameters[0].data = step.parameters[0].data.copy()
        assert step._graph_key() != before
        for name, value in (
            ("class_weights", np.ones(5, np.float32)),
            ("class_weights", np.ones(5, np.float32)),
            ("optimizer", optim.SGD(step.parameters, 0.1)),
            ("optimizer", optim.SGD(step.parameters, 0.2)),
            ("ema", optim.EMA(step.model, 0.5)),
            ("ema", optim.EMA(step.model, 0.5)),
        ):
            owner = step._differentiate if name == "class_weights" else step
            before, replaced = step._graph_key(), getattr(owner, name)  # which lives on, and keeps its address
            setattr(owner, name, value)
            assert step._graph_key() != before, (name, replaced)


def test_the_second_step_finds_what_the_first_one_did(device):
    """So that it can be captured: the same arrays and settings, also in 16 bits and after weights were replaced."""
    with device(CuBLASLt()):
        *_, step = train(steps=1, precision="fp16")
        kinds = []
        step.graph = lambda *inputs: (kinds.append(step._graph_key()), step._compute(*inputs))[1]
        images, labels = np.ones((2, 3, 8, 8), np.float32), np.array([0, 1])
        for i in range(4):
            step(images, labels)
            if i == 1:
                step.model.load_state_dict({name: 0 * x + 0.5 for name, x in step.model.state_dict().items()})
        assert kinds[0] == kinds[1] != kinds[2] == kinds[3]


def test_sums_that_were_put_off_are_there_when_somebody_reads_them(folder):
    """Gradients of biases, whose arrays are NaN here until a pass fills all of them at its end."""
    values = [np.random.default_rng(i).standard_normal(n, np.float32) for i, n in enumerate(((3, 6), (6, 6), 6, 6))]
    cases = [  # what goes into some layers, and their biases
        lambda x, a, b: (x, a, b),  # the gradients are read by nobody before the end
        lambda x, a, b: (x, a * 2, b),  # by another operation
        lambda x, a, b: (x, a, a, b),  # added up
        lambda x, a, b: (x + F.layer_norm(a, b, b), a),  # added within layer norm's kernel
        lambda x, a, b: (x + a, b),  # the sums for what was repeated, in another shape
        lambda x, a, b: (x, *(a, b) * 20),  # more than one launch takes
    ]

    def gradients(parts: Callable[..., tuple[Tensor, ...]]) -> list[np.ndarray]:
        x, weight, a, b = leaves = [Tensor(v, requires_grad=True) for v in values]
        y, *biases = parts(x, a, b)
        for bias in biases:
            y = F.layer_norm(F.gelu(F.linear(y, weight, bias)), *values[2:])
        found = grad(y, leaves, values[0], retain_graph=True)
        ready: dict[int, np.ndarray] = {}
        grad(y, leaves, values[0], ready=lambda place, g: ready.update({place: g.copy()}))
        return found + [ready[place] for place in range(4)]

    for parts in cases:
        right = gradients(parts)
        with cuda_sim.everything_on_device(folder, library=CuBLASLt()):
            ours = gradients(parts)
        for x, y in zip(ours, right, strict=True):
            assert cuda_sim.error(x, y) < 1e-4
