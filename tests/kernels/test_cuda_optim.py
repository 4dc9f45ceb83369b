"""The optimizer's CUDA kernels, run on the CPU, against its reference in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import array_api_compat.numpy as numpy_namespace
import cuda_sim
import numpy as np
import pytest
from cublas_sim import CuBLASLt
from cuda_sim import SCALARS, cuda_version, decode, encode, error, guarded

from tinyvit import kernels, nn, optim
from tinyvit.backend import cuda_graph
from tinyvit.execution.precision import LossScale
from tinyvit.kernels import reference
from tinyvit.kernels.cuda import muon, optimizers

pytestmark = pytest.mark.skipif(cuda_sim.COMPILER is None, reason="no C++ compiler")

ADAM = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8}


@pytest.mark.parametrize("decoupled", [True, False], ids=["adamw", "adam"])
@pytest.mark.parametrize("scalar, copied", [("float", "float"), ("float", "bf16"), ("f16", "f16"), ("bf16", "float")])
def test_adamw_and_adam_of_many_parameters(folder, scalar, copied, decoupled):
    """Smaller and larger than a piece, clipped, each with its own decay and rate; a low-precision copy of some."""
    rng, sizes = np.random.default_rng(1), [1, 0, 7, optimizers.PIECE, 2 * optimizers.PIECE + 5, 64]
    right = [[rng.standard_normal(n), np.zeros(n), np.zeros(n)] for n in sizes]
    scales, decays = [1.0, 1.0, 0.5, 1.0, 2.0, 1.0], [0.0, 0.1, 0.1, 0.0, 0.05, 0.1]
    with cuda_sim.device(folder, seed=2) as xp:
        ours = [[guarded(x.astype(np.float32)) for x in row] for row in right]
        copies = [None if n == 7 else xp.empty(n, SCALARS[copied]) for n in sizes]
        state = optimizers.UpdateState(xp)
        for step in (1, 2):
            gradients = [encode(rng.standard_normal(n), scalar) for n in sizes]
            norm = math.sqrt(sum((decode(g) ** 2).sum() for g in gradients))
            limit = norm / 3 if step == 1 else 2 * norm
            factor = limit / (norm + 1e-6) if step == 1 else 1.0
            state.begin(0.01 * step, step - 1)
            p, m, v = zip(*ours, strict=True)
            options = {"lr_scales": scales, "weight_decays": decays, "max_norm": limit, "rounded": copies}
            options |= {"steps": [step] * len(sizes), "decoupled": decoupled, **ADAM}
            update = cuda_version(reference.update_adamw)
            got, results = update(xp, p, [guarded(g) for g in gradients], m, v, state=state, **options)
            assert all(
                new is old
                for result, row in zip(results, ours, strict=True)
                for new, old in zip(result, row, strict=True)
            )
            assert [state.get("gradient_scale"), got] == pytest.approx([factor, norm], rel=1e-12)
            for row, g, scale, decay in zip(right, gradients, scales, decays, strict=True):
                options = {"lr": 0.01 * step * scale, "weight_decay": decay * decoupled, "step": step, **ADAM}
                g = decode(g) * factor + (0 if decoupled else decay * row[0])
                reference.adamw(numpy_namespace, row[0], g, *row[1:], **options)
    for row, exact, copy in zip(ours, right, copies, strict=True):
        for actual, x in zip(row, exact, strict=True):
            assert error(actual, x) < 2e-6
        assert copy is None or np.array_equal(copy, encode(row[0].astype(np.float64), copied))


def update_ones(xp: Any, gradient: np.ndarray, **options: Any) -> tuple[optimizers.UpdateState, np.ndarray]:
    """One step for one parameter of ones; the state and the parameter."""
    p, m, v = ([guarded(np.full(3, x, np.float32))] for x in (1, 0, 0))
    state = optimizers.UpdateState(xp)
    state.begin(0.1, 0)
    options |= {"steps": [1], "lr_scales": [1.0], "weight_decays": [0.0], "decoupled": True, **ADAM}
    optimizers.update_adamw(xp, p, [guarded(gradient)], m, v, state=state, **options)
    return state, p[0]


def test_a_gradient_that_is_not_finite_is_not_scaled(folder):
    with cuda_sim.device(folder) as xp:
        state, _ = update_ones(xp, np.array([1.0, np.inf, 0.0], np.float32), max_norm=1.0)
        assert state.get("norm") == np.inf and state.get("gradient_scale") == 1.0 and state.get("step") == 1


@pytest.mark.parametrize("good, expected", [(0, (1024.0, 1)), (1999, (2048.0, 0)), (None, (512.0, 0))])
def test_loss_scale_on_the_device(folder, good, expected):
    """It does what precision.LossScale does, and a gradient that overflowed changes nothing else."""
    gradient = encode(np.array([3.0, 4.0, 0.0]) * 1024, "f16")
    if good is None:
        gradient[2] = np.inf
    scale, right = (LossScale(np.zeros(1, np.float32)) for _ in "12")
    for x in (scale, right):
        x.value[...], x.good[...] = 1024, good or 0
    with cuda_sim.device(folder) as xp:
        state, p = update_ones(xp, gradient, max_norm=1.0, loss_scale=scale)
        right.update(np.float64(np.inf if good is None else 5.0))
        assert (scale.value, scale.good) == (right.value, right.good) == expected
        assert state.get("step") == (good is not None)
    if good is None:
        assert np.array_equal(p, np.ones(3)) and state.get("skip") == 1.0
    else:
        assert state.get("norm") == 5.0 and state.get("gradient_scale") == pytest.approx(1 / 5.000001 / 1024)
        assert p == pytest.approx(np.array([0.9, 0.9, 1.0]), rel=1e-6)


@pytest.mark.parametrize("skipped", [None, 0.0, 1.0])
def test_averages_of_many_parameters(folder, skipped):
    rng, sizes = np.random.default_rng(1), [1, 0, 7, 2 * optimizers.PIECE + 5, 64]
    a, b = ([rng.standard_normal(n).astype(np.float32) for n in sizes] for _ in "12")
    with cuda_sim.device(folder, seed=2) as xp:
        ours = [guarded(x) for x in a]
        flag = None if skipped is None else np.array(skipped)
        update = cuda_version(reference.update_average)
        update(xp, ours, [guarded(x) for x in b], state=optimizers.UpdateState(xp), weight=0.25, skipped=flag)
    for actual, x, y in zip(ours, a, b, strict=True):
        assert np.allclose(actual, x if skipped else x + 0.25 * (y - x), rtol=0, atol=1e-6)


def test_a_captured_step_keeps_its_table(driver, folder):
    """Its addresses reach the device after the capture; a later step in single launches does not write over them."""
    with cuda_sim.device(folder) as xp:
        table = optimizers.Table(xp)
        eager, *_ = table.fill([3], p=[16], lr_scale=[1.0])
        again, *_ = table.fill([3], p=[16], lr_scale=[1.0])
        assert again is eager
        with cuda_graph.capture() as waiting:
            captured, count, pieces = table.fill([3], p=[16], lr_scale=[1.0])
            assert captured is not eager and (captured == 0xFF).all() and (count, pieces) == (1, 1)
        for work in waiting:
            work()
        assert np.array_equal(captured, eager)
        later, *_ = table.fill([3], p=[32], lr_scale=[1.0])
        assert later is not captured and np.array_equal(captured, eager) and not np.array_equal(later, eager)


def test_a_capture_that_fails_leaves_no_table(driver, folder):
    """What was to be copied behind it never is."""
    with cuda_sim.device(folder) as xp:
        table = optimizers.Table(xp)
        eager, *_ = table.fill([3], p=[16])
        with cuda_graph.capture():
            table.fill([3], p=[16])
        assert table.fill([3], p=[16])[0] is eager and (eager != 0xFF).any()


@pytest.mark.parametrize("make", [optim.AdamW, optim.Adam])
def test_the_optimizer_updates_all_parameters_together(folder, make):
    """What these and EMA do on a GPU: the same as one parameter after the other, also where a run is continued."""

    def run(steps: int, state: dict | None = None, start: list | None = None) -> tuple[list, dict, list]:
        rng = np.random.default_rng(3)
        parameters = [nn.Parameter(x.copy()) for x in (start or [np.ones((5, 7), np.float32), np.ones(3, np.float32)])]
        model = SimpleNamespace(named_parameters=lambda: enumerate(parameters))
        groups = [{"params": parameters[:1], "lr_scale": 0.5}, {"params": parameters[1:], "weight_decay": 0.0}]
        opt, ema = make(groups, lr=0.1, weight_decay=0.1), optim.EMA(model, 0.9)
        if state:
            opt.load_state_dict(state)
        for i in range(steps):
            opt.lr = 0.1 / (i + 1)
            for p in parameters:
                p.grad = rng.standard_normal(p.shape).astype(np.float32)
            optim.clip_grad_norm(parameters, 1.5)
            opt.step()
            ema.update()
        on_device = reference.update_adamw in kernels._fastest(numpy_namespace)
        assert isinstance(opt._state, optimizers.UpdateState) == on_device
        return [p.data for p in parameters], opt.state_dict(), list(ema.state_dict().values())

    def both(*arguments: Any) -> list:
        expected = run(*arguments)
        with cuda_sim.everything_on_device(folder):
            ours = run(*arguments)
        assert list(ours[1]["steps"]) == list(expected[1]["steps"]) and ours[1]["lr"] == expected[1]["lr"]
        for x, y in zip([*ours[0], *ours[2]], [*expected[0], *expected[2]], strict=True):
            assert error(x, y.astype(np.float64)) < 1e-6
        return expected

    parameters, state, _ = both(3)
    both(2, state, parameters)


@pytest.mark.parametrize("library", [CuBLASLt(), None], ids=["cublaslt", "cupys product"])
@pytest.mark.parametrize("scalar, limit", [("float", 1.0), ("f16", math.inf)])
def test_muon(folder, scalar, limit, library):
    """Matrices wide, tall and square, alone or several of a shape, a convolution, and AdamW for the rest; clipped."""
    rng, shapes = np.random.default_rng(0), [(3,), (6, 9), (9, 6), (5000,), (6, 9), (4, 3, 3, 3), (7, 7), (70, 64)]
    state = [[rng.standard_normal(shape), np.zeros(shape), np.zeros(shape) if len(shape) == 1 else None]
             for shape in shapes]  # fmt: skip
    scales, decays = [0.1, *[1.0] * 5, 0.5, 1.0], [0.0, *[0.1] * 7]
    options = {"lr_scales": scales, "weight_decays": decays, "momentum": 0.9, "max_norm": limit, **ADAM}
    right, exact = [list(row) for row in state], reference.UpdateState(numpy_namespace)
    with cuda_sim.device(folder, seed=3, library=library) as xp:
        ours = [[None if x is None else guarded(x.astype(np.float32)) for x in row] for row in state]
        copies = [xp.empty(shape, SCALARS[scalar]) for shape in shapes]
        on_device = optimizers.UpdateState(xp)
        for step in (1, 2, 3):
            gradients = [encode(rng.standard_normal(shape), scalar) for shape in shapes]
            for update, namespace, rows, numbers, grads, more in (
                (reference.update_muon, numpy_namespace, right, exact, [decode(g) for g in gradients], {}),
                (cuda_version(reference.update_muon), xp, ours, on_device, [guarded(g) for g in gradients],
                 {"rounded": copies}),
            ):  # fmt: skip
                numbers.begin(0.02 * step, step - 1)
                columns = zip(*rows, strict=True)
                p, m, v = columns
                norm, new = update(namespace, p, grads, m, v, state=numbers, steps=[step] * len(p), **options, **more)
                assert norm == pytest.approx(math.sqrt(sum((decode(g) ** 2).sum() for g in gradients)))
                rows[:] = [[*row, *[None] * (3 - len(row))] for row in new]
    for row, expected, copy in zip(ours, right, copies, strict=True):
        for actual, x in zip(row, expected, strict=True):
            assert x is None if actual is None else error(actual, x) < 5e-6
        assert np.array_equal(copy, encode(row[0].astype(np.float64), scalar))


def test_muon_skips_a_gradient_that_overflowed(folder):
    p, m = guarded(np.ones((2, 3), np.float32)), guarded(np.zeros((2, 3), np.float32))
    scale = LossScale(np.zeros(1, np.float32))
    with cuda_sim.device(folder, library=CuBLASLt()) as xp:
        state = optimizers.UpdateState(xp)
        state.begin(0.1, 0)
        options = {"lr_scales": [1.0], "weight_decays": [0.1], "momentum": 0.9, "max_norm": 1.0, **ADAM}
        gradient = [guarded(np.full((2, 3), np.inf, np.float16))]
        muon.update_muon(xp, [p], gradient, [m], [None], state=state, steps=[1], loss_scale=scale, **options)
        assert state.get("skip") == 1.0 and state.get("step") == 0
    assert (p == 1).all() and not m.any()


def test_what_cannot_be_updated_together_is_updated_alone(folder):
    def run(make: Callable, dtype: Any = np.float32) -> np.ndarray:
        p = nn.Parameter(np.ones(5, dtype))
        opt = make([p])
        p.grad = np.arange(5, dtype=dtype)
        opt.step()
        return p.data

    for arguments in (
        (lambda p: optim.Adam(p, weight_decay=0.1), np.float64),
        (lambda p: optim.SGD(p, 0.1),),
        (optim.AdamW, np.float64),
    ):
        expected = run(*arguments)
        with cuda_sim.everything_on_device(folder):
            assert np.allclose(run(*arguments), expected, rtol=1e-6)
            with cuda_graph.capture(), pytest.raises(cuda_graph.NotCapturable):
                run(*arguments)


def test_the_count_of_steps_is_read_once_and_is_that_of_a_state_that_was_loaded(folder, monkeypatch):
    read, get = [], optimizers.UpdateState.get
    monkeypatch.setattr(optimizers.UpdateState, "get", lambda self, name: read.append(name) or get(self, name))
    parameters = [nn.Parameter(np.ones(3, np.float32)) for _ in range(4)]
    opt = optim.AdamW(parameters)
    with cuda_sim.everything_on_device(folder):
        for _ in range(2):
            for p in parameters:
                p.grad = np.ones(3, np.float32)
            opt.step()
        read.clear()
        state = opt.state_dict()
        assert list(state["steps"]) == [2] * 4 and read == ["step"]
        opt.step()
        opt.load_state_dict(state | {"steps": np.full(4, 7)})
        assert list(opt.state_dict()["steps"]) == [7] * 4
