"""A linear layer with GELU in one kernel for Hopper, the way back through an MLP, the trial, and when they run."""

from __future__ import annotations

import warnings

import array_api_compat.numpy as numpy_namespace
import cuda_sim
import numpy as np
import pytest
from cublas_sim import CuBLASLt
from cuda_checks import TOLERANCE, check, draw
from cuda_sim import decode, encode, error

from tinyvit import Tensor, grad
from tinyvit import functional as F
from tinyvit.backend import cuda_graph
from tinyvit.kernels import cuda, reference
from tinyvit.kernels.cuda import comparison, linear, linear_gelu_sm90a, linear_gelu_trial, trial

pytestmark = pytest.mark.skipif(cuda_sim.COMPILER is None, reason="no C++ compiler")

HOPPER = {"capability": 90, "shared_limit": 227 << 10, "multiprocessors": 2}
RIGHT = {"forward": None, "backward": None, "mlp": None}


@pytest.fixture
def launched(folder, monkeypatch):
    """The launches of the kernel for Hopper, which is used for any number of rows and without a trial."""
    launches = []

    def launch(*arguments):
        launches.append("forward" if arguments[5] is None else "backward")
        original(*arguments)

    original = linear_gelu_sm90a._launch
    monkeypatch.setattr(linear_gelu_sm90a, "_launch", launch)
    monkeypatch.setattr(linear_gelu_sm90a, "LEAST_ROWS", 1)
    monkeypatch.setattr(linear_gelu_sm90a, "_verdicts", {})
    monkeypatch.setattr(linear_gelu_sm90a, "_try", lambda *_: RIGHT)
    return launches


SHAPES = [  # scalar, rows, inner, columns, shared memory, columns of a block, blocks for the same columns, GELU
    ("bf16", 1, 64, 64, 227, 64, 1, "tanh"),
    ("f16", 300, 64, 192, 227, 192, 2, "none"),  # two tiles for the first warpgroups, the last of 44 rows
    ("bf16", 260, 192, 128, 40, 64, 1, "none"),  # two parts of the columns, two tiles for the first warpgroup
    ("f16", 129, 256, 64, 227, 64, 1, "tanh"),
    ("bf16", 65, 384, 128, 227, 128, 1, "none"),
]


@pytest.mark.parametrize("scalar, rows, inner, columns, limit, shared, workers, approximate", SHAPES)
def test_forward_and_backward(folder, launched, scalar, rows, inner, columns, limit, shared, workers, approximate):
    machine = HOPPER | {"shared_limit": limit << 10}
    x, bias, weight = draw(0, (rows, inner)), draw(1, (columns,)), draw(2, (columns, inner)) / inner**0.5
    inputs = [x, weight, bias]
    check(folder, "linear_gelu", scalar, inputs, {"approximate": approximate}, library=CuBLASLt(), **machine)
    assert launched == ["forward"] * 2
    with cuda_sim.device(folder, **machine):
        assert linear_gelu_sm90a.plan(rows, inner, columns, False)[:3:2] == (shared, workers)

    dy, following = draw(3, (rows, inner)), draw(4, (inner, columns)) / inner**0.5
    hidden = draw(5, (rows, columns)) * 2
    arrays = [encode(a, scalar) for a in (dy, following, hidden, bias)]
    dy, following, hidden, bias = (decode(a) for a in arrays)
    y = Tensor(hidden + bias, requires_grad=True)
    right = grad(F.gelu(y, approximate), y, dy @ following)
    results = []
    for seed in (0, 1):
        with cuda_sim.device(folder, seed, **machine) as xp:
            dx, partial = linear_gelu_sm90a.backward(xp, *map(cuda_sim.guarded, arrays), approximate)
            results.append((dx.copy(), partial.copy()))
    (dx, partial), again = results
    assert error(decode(dx), right) < TOLERANCE[scalar]
    assert np.abs(partial.sum(axis=0) - right.sum(axis=0)).max() < 2e-5 * np.abs(right).sum(axis=0).max()
    assert np.array_equal(dx, again[0]) and np.array_equal(partial, again[1])


def test_infinities_stay_in_their_columns(folder, launched):
    x, weight, hidden, bias = np.ones((3, 64)), np.ones((64, 64)), np.zeros((3, 64)), np.zeros(64)
    bias[7] = -np.inf
    arrays = [encode(a, "f16") for a in (x, weight, hidden, bias)]
    with cuda_sim.device(folder, **HOPPER) as xp:
        x, weight, hidden, bias = map(cuda_sim.guarded, arrays)
        y, _ = linear_gelu_sm90a.forward(xp, x, weight, bias, "none", False)
        bias[7] = np.inf
        dx, partial = linear_gelu_sm90a.backward(xp, x, weight, hidden, bias, "none")
    assert np.isnan(y).any(axis=0).tolist() == [i == 7 for i in range(64)]  # -infinity times 0, as in torch
    assert np.isfinite(np.delete(dx, 7, axis=1)).all() and np.isfinite(np.delete(partial, 7, axis=1)).all()
    assert np.array_equal(partial[0], dx.astype(np.float32).sum(axis=0), equal_nan=True)


# --- within an MLP ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize(
    "scalar, rows, inner, hidden, approximate", [("f16", 70, 64, 128, "none"), ("bf16", 9, 192, 64, "tanh")]
)
def test_an_mlp_has_one_kernel_each_way(folder, launched, scalar, rows, inner, hidden, approximate, residual):
    shapes = (1, rows, inner), (1, rows, inner), (hidden, inner), (hidden,), (inner, hidden), (inner,)
    inputs = [draw(i, shape) / (shape[-1] ** 0.5 if len(shape) == 2 else 1) for i, shape in enumerate(shapes)]
    inputs[0] = inputs[0] if residual else None
    check(folder, "mlp", scalar, inputs, {"approximate": approximate}, library=CuBLASLt(), **HOPPER)
    assert launched == ["forward", "backward"] * 2


MLPS = [  # scalar, rows, width, hidden numbers, blocks, GELU
    ("bf16", 300, 64, 128, 2, "none"),  # two tiles for the first block, the last of 44 rows
    ("f16", 70, 192, 256, 2, "tanh"),
    ("f16", 129, 128, 64, 1, "none"),  # one chunk of hidden numbers
    ("bf16", 1, 192, 320, 2, "none"),
    ("f16", 65, 64, 704, 1, "none"),  # more chunks than fit
]


@pytest.mark.parametrize("scalar, rows, width, hidden, blocks, approximate", MLPS)
def test_a_whole_mlp_for_predictions(folder, launched, monkeypatch, scalar, rows, width, hidden, blocks, approximate):
    shapes = (1, rows, width), (1, rows, width), (hidden, width), (hidden,), (width, hidden), (width,)
    inputs = [encode(draw(i, s) / (s[-1] ** 0.5 if len(s) == 2 else 1), scalar) for i, s in enumerate(shapes)]
    options = {"approximate": approximate, "needs": (False,) * 6}
    right, _ = reference.mlp(numpy_namespace, *map(decode, inputs), **options)
    usual, calls, results = linear_gelu_sm90a.mlp, [], []
    monkeypatch.setattr(linear_gelu_sm90a, "mlp", lambda *given: calls.append(0) or usual(*given))
    for seed in (0, 1):
        with cuda_sim.device(folder, seed, **HOPPER | {"multiprocessors": blocks}) as xp:
            results.append(linear.mlp(xp, *map(cuda_sim.guarded, inputs), **options)[0].copy())
    assert error(decode(results[0]), right) < TOLERANCE[scalar] and np.array_equal(*results)
    assert len(calls) == 2 and not launched


NEEDED = {"x": "x", "the first layer": "weight1 bias1", "the second": "weight2 bias2", "a weight": "weight1", "": ""}


@pytest.mark.parametrize("needed", NEEDED)
def test_an_mlp_computes_no_gradient_that_is_not_wanted(folder, launched, needed, monkeypatch):
    names = ["x", "weight1", "bias1", "weight2", "bias2", "residual"]
    shapes = (5, 64), (128, 64), (128,), (64, 128), (64,), (5, 64)
    inputs = {name: draw(i, s).astype(np.float16) for i, (name, s) in enumerate(zip(names, shapes, strict=True))}
    products = []
    for name in ("input_gradient", "weight_gradient"):
        usual = getattr(linear, name)
        monkeypatch.setattr(linear, name, lambda *a, name=name, usual=usual: products.append(name) or usual(*a))

    def gradients(wanted):
        leaves = {name: Tensor(x, requires_grad=name in wanted) for name, x in inputs.items()}
        y = F.mlp(**leaves)
        return grad(y, [leaves[name] for name in wanted], draw(9, y.shape).astype(np.float16)) if wanted else []

    wanted = NEEDED[needed].split()
    with cuda_sim.everything_on_device(folder, **HOPPER):
        found = gradients(wanted)
        assert launched == ["forward"] * bool(wanted) + ["backward"] * (needed not in ("the second", ""))
        weights = [name for name in wanted if "weight" in name]
        assert products == ["weight_gradient"] * len(weights) + ["input_gradient"] * ("x" in wanted)
        every = dict(zip(names, gradients(names), strict=True))
    assert all(np.array_equal(g, every[name]) for g, name in zip(found, wanted, strict=True))


def test_a_graph_that_is_kept_gives_the_same_gradients_again(folder, launched):
    with cuda_sim.everything_on_device(folder, **HOPPER):
        x, *layers = (draw(i, s).astype(np.float16) for i, s in enumerate(((4, 64), (64, 64), 64, (64, 64), 64)))
        leaf = Tensor(x, requires_grad=True)
        loss = F.mlp(leaf, *layers, residual=leaf)
        first, again = (grad(loss, leaf, np.ones_like(x), retain_graph=True) for _ in range(2))
    assert launched == ["forward", "backward", "backward"] and np.array_equal(first, again)


# --- when it runs -----------------------------------------------------------------------------------------------------


def test_which_layers_take_it(folder, launched):
    def takes(rows=8, inner=64, columns=128, dtype=np.float16, name="forward", **machine):
        with cuda_sim.device(folder, **HOPPER | machine):
            return linear_gelu_sm90a.takes(np.broadcast_to(dtype(0), (rows, inner)), columns, "none", name)

    with cuda_graph.capture():
        assert not takes()  # nothing can be tried now
    assert takes() and takes(inner=384) and takes(columns=64)
    with cuda_graph.capture():
        assert takes() and not takes(columns=192)
    assert not any(map(takes, (8,) * 3, (448, 72, 64), (128, 128, 72)))
    assert not takes(dtype=np.float32) and not takes(capability=80) and not takes(capability=100)
    assert takes(name="mlp", inner=192) and not takes(name="mlp", inner=256)
    assert takes(rows=(1 << 24) - 128) and not takes(rows=(1 << 24) - 127)  # places are numbers of 32 bits
    assert not takes(rows=6_000_000, inner=384, columns=64)


@pytest.mark.parametrize("problem", ["it is slower: 9 us beside 8", "y differs"])
def test_a_trial_decides(folder, monkeypatch, problem):
    """The other kernels run where they are faster, without a word, or where this one is wrong, with a warning."""
    tried = []
    monkeypatch.setattr(trial, "verdicts", lambda *request: (tried.append(request), {**RIGHT, "backward": problem})[1])
    monkeypatch.setattr(linear_gelu_sm90a, "LEAST_ROWS", 1)
    monkeypatch.setattr(linear_gelu_sm90a, "_verdicts", {})
    with warnings.catch_warnings(record=True) as caught, cuda_sim.device(folder, **HOPPER):
        warnings.simplefilter("always")
        for _ in range(2):
            rows = np.zeros((8, 64), np.float16)
            assert linear_gelu_sm90a.takes(rows, 128, "none")
            assert not linear_gelu_sm90a.takes(rows, 128, "none", "backward")
    assert [str(w.message) for w in caught] == [
        "linear_gelu's backward kernel for Hopper is not used for layers of 64 to 128: y differs "
        "(TINYVIT_WGMMA=0 does not try it)"
    ] * ("differs" in problem)
    ((module, names, request, sources),) = tried
    assert module == linear_gelu_trial.__name__ and names == (*RIGHT,) and cuda.source("linear_gelu_sm90a") in sources
    assert request == {"scalar": "f16", "inner": 64, "columns": 128, "approximate": "none"}


FAULTS = ["", "y", "what is kept", "y without what is kept", "dx", "a sum", "an MLP", "it is slower", "now and then"]


@pytest.mark.parametrize("fault", FAULTS)
def test_the_trial_finds_faults(folder, monkeypatch, fault):
    """Each in one row or column; cuBLASLt's stand-in and the kernels for every GPU stand for Hopper's."""
    calls = []

    def forward(xp, rows, weight, bias, approximate, recording):
        calls.append(recording)
        y, hidden, _ = linear.gelu_of_product(xp, rows, weight, bias, approximate, True)
        if fault == ("y" if recording else "y without what is kept"):
            y[-1] *= 1.05
        if fault == "what is kept":
            hidden[70] *= 1.05
        if fault == "now and then" and len(calls) == 2:  # y of the second run
            y.view(np.uint16)[0, 0] ^= 1
        return y, hidden

    def backward(xp, dy, weight, hidden, bias, approximate):
        dx, _ = linear.gelu_gradient(xp, hidden, bias, linear.input_gradient(xp, dy, weight), approximate)
        sums = dx.astype(np.float32).sum(axis=0)
        if fault == "dx":
            dx[5] *= 1.05
        if fault == "a sum":
            sums[3] += 1e-4 * np.abs(dx[:, 3].astype(np.float32)).sum()
        return dx, sums[None]

    def mlp(xp, residual, rows, weight1, bias1, weight2, bias2, approximate):
        between, _, _ = linear.gelu_of_product(xp, rows, weight1, bias1, approximate, False)
        y = linear.product(xp, between, weight2, bias2, residual)
        y[9] *= 1.05 if fault == "an MLP" else 1
        return y

    monkeypatch.setattr(linear_gelu_sm90a, "mlp", mlp)
    monkeypatch.setattr(linear_gelu_sm90a, "forward", forward)
    monkeypatch.setattr(linear_gelu_sm90a, "backward", backward)
    monkeypatch.setattr(linear_gelu_trial, "BYTES", 2 * 64 * 256)
    monkeypatch.setattr(linear_gelu_sm90a, "LEAST_ROWS", 1)
    times = iter([98e-6 if fault == "it is slower" else 9e-5, 1e-4] * 28)
    monkeypatch.setattr(comparison, "seconds", lambda run: next(times))
    with cuda_sim.device(folder, **HOPPER | {"multiprocessors": 1}) as xp:
        found = dict(linear_gelu_trial.problems(xp, scalar="f16", inner=64, columns=64, approximate="none"))
    named = {
        "": "",
        "an MLP": "y differs",
        "it is slower": "it is slower: 98 us beside 100",
        "now and then": "y is not the same twice",
    }
    wrong = {"dx": {"backward"}, "a sum": {"backward"}, "an MLP": {"mlp"}, "it is slower": {*RIGHT}}.get(
        fault, {"forward"}
    )
    for name, problem in found.items():
        expected = named.get(fault, f"{fault} differs") if name in wrong else ""
        assert (problem or "").startswith(expected) and bool(problem) == bool(expected)
