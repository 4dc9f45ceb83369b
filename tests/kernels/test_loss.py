"""Cross-entropy: extreme logits, labels of any kind, and what a caller may do with them."""

import math

import cuda_sim
import numpy as np
import pytest
import torch
import torch.nn.functional as TF
from drawing import LIBRARIES, TOLERANCE, WITH_JAX, host, place, references_only

from tinyvit import functional as F
from tinyvit.engine.tensor import Tensor, grad
from tinyvit.kernels.reference import layers as reference

EXTREME = {
    "masked classes": ([[1.0, -np.inf, 2.0], [-np.inf, 0.5, 0.25]], [2, 1]),
    "the label's class is masked": ([[1.0, -np.inf, 2.0], [-np.inf, 0.5, 0.25]], [1, 1]),
    "the largest numbers": ([[3e38, -3e38, 0.0]], [0]),
    "the largest numbers, another class": ([[3e38, -3e38, 0.0]], [1]),
    "infinity": ([[np.inf, 0.0, 0.0]], [0]),
    "1e4 apart": ([[1e4, 0.0, -1e4]], [2]),
    "everything is masked": ([[-np.inf, -np.inf, -np.inf]], [0]),
    "not a number": ([[np.nan, 0.0, 1.0]], [1]),
}


@pytest.mark.parametrize("labels", ["numbers", "probabilities", "weighted"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("backend", [*WITH_JAX, "numpy reference", "cuda"])
def test_cross_entropy_of_infinite_and_of_the_largest_logits_is_torch_s(backend, smoothing, labels, folder):
    if backend == "cuda" and (labels == "weighted" or cuda_sim.COMPILER is None):
        pytest.skip("the weighted loss has no kernel of its own" if cuda_sim.COMPILER else "no C++ compiler")
    weight = np.array([1.0, 2.0, 0.5], np.float32) if labels == "weighted" else None
    library = "numpy" if backend == "cuda" else backend.partition(" ")[0]
    for name, (logits, numbers) in EXTREME.items():
        logits, targets = np.array(logits, np.float32), np.array(numbers)
        if labels == "probabilities":
            targets = np.eye(3, dtype=np.float32)[numbers] * 0.75 + np.eye(3, dtype=np.float32)[2] * 0.25
        t = torch.tensor(logits, requires_grad=True)
        w = None if weight is None else torch.tensor(weight)
        expected = TF.cross_entropy(t, torch.tensor(targets), weight=w, label_smoothing=smoothing)
        expected.backward()
        if backend == "cuda":
            with cuda_sim.device(folder) as xp:
                run, on_device = cuda_sim.cuda_version(reference.cross_entropy), cuda_sim.guarded(targets)
                parameters = dict(labels=on_device, label_smoothing=smoothing, needs=(True,))
                loss, vjp = run(xp, cuda_sim.guarded(logits), **parameters)
                (gradient,) = vjp(np.ones((), np.float32))
        else:
            x = Tensor(place(logits, library, "float32"), requires_grad=True)
            with references_only(backend == "numpy reference"):
                labelled = LIBRARIES[library].asarray(targets)
                result = F.cross_entropy(x, labelled, weight=weight, label_smoothing=smoothing)
                loss, gradient = result.numpy(), host(grad(result, x))
        assert np.allclose(loss, expected.item(), rtol=1e-6, equal_nan=True), name
        assert np.allclose(gradient, t.grad.numpy(), atol=1e-6, equal_nan=True), name


@pytest.mark.parametrize("name", EXTREME)
@pytest.mark.parametrize("backend", WITH_JAX)
@pytest.mark.parametrize("function", ["softmax", "log_softmax"])
def test_softmax_of_infinite_and_of_the_largest_numbers_is_torch_s(function, backend, name):
    x = np.array(EXTREME[name][0], np.float32)
    t = torch.tensor(x, requires_grad=True)
    expected = getattr(torch, function)(t, -1)
    dy = np.arange(x.size, dtype=np.float32).reshape(x.shape)
    expected.backward(torch.tensor(dy))
    ours = Tensor(place(x, backend, "float32"), requires_grad=True)
    y = getattr(F, function)(ours)
    assert np.allclose(y.numpy(), expected.detach().numpy(), rtol=1e-6, equal_nan=True)
    gradient = host(grad(y, ours, place(dy, backend, "float32")))
    assert np.allclose(gradient, t.grad.numpy(), atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_cross_entropy_of_extreme_logits(dtype):
    x = Tensor(np.array([[1e4, -1e4, 0], [-1e4, 1e4, 1e4]], dtype), requires_grad=True)
    loss = F.cross_entropy(x, np.array([1, 1]))
    assert float(loss) == pytest.approx((2e4 + math.log(2)) / 2, rel=1e-6)
    assert grad(loss, x).tolist() == [[0.5, -0.5, 0.0], [0.0, -0.25, 0.25]]
    perfect = F.cross_entropy(x[:1, :], np.array([0]))
    assert float(perfect) == 0.0 and perfect.dtype == dtype


@pytest.mark.parametrize("integer", [np.uint8, np.int8, np.int16, np.int32, np.int64, np.uint64])
def test_class_numbers_of_any_integer_dtype(integer):
    """More classes than the labels' dtype can count must not make two of them equal."""
    logits = np.random.default_rng(0).standard_normal((3, 300))
    labels = [0, 1, 99]
    expected = TF.cross_entropy(torch.tensor(logits), torch.tensor(labels))
    assert float(F.cross_entropy(logits, np.array(labels, integer))) == pytest.approx(float(expected), rel=1e-12)


def test_one_hot_probabilities_are_class_numbers():
    logits, labels = np.random.default_rng(0).standard_normal((4, 5)), np.array([0, 4, 2, 2])
    for smoothing in (0.0, 0.1):
        losses = [
            float(F.cross_entropy(logits, t, label_smoothing=smoothing))
            for t in (labels, np.eye(5)[labels], Tensor(np.eye(5)[labels]))
        ]
        assert losses == pytest.approx([losses[0]] * 3, rel=1e-14)


def test_labels_may_be_written_over_before_the_gradient_is_taken():
    logits, labels = Tensor(np.eye(3, dtype=np.float32), requires_grad=True), np.array([0, 1, 2])
    loss = F.cross_entropy(logits, labels)
    before = grad(loss, logits, retain_graph=True)
    labels[:] = 0
    assert np.array_equal(grad(loss, logits), before)
