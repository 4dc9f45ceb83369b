"""Cross-entropy with weighted classes: torch's, whole or in shards."""

import array_api_strict
import ml_dtypes
import numpy as np
import pytest
import torch
import torch.nn.functional as TF
from drawing import error
from hypothesis import given
from hypothesis import strategies as st

import tinyvit
from tinyvit import TrainStep, grad, optim
from tinyvit import functional as F
from tinyvit.engine.tensor import Tensor


@st.composite
def batches(draw):
    """Logits (B, C), labels as numbers or (unnormalised) probabilities, weights (C,) of very different sizes."""
    b, c = draw(st.integers(1, 7)), draw(st.integers(1, 6))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    labels = rng.integers(0, c, b) if draw(st.booleans()) else rng.random((b, c))
    return rng.standard_normal((b, c)) * draw(st.sampled_from([1, 30])), labels, 10.0 ** rng.uniform(-2, 2, c)


@given(batches(), st.sampled_from([0.0, 0.1, 1.0]))
def test_weights_count_as_in_torch(batch, smoothing):
    logits, labels, weight = batch
    theirs = torch.tensor(logits, requires_grad=True)
    expected = TF.cross_entropy(theirs, torch.tensor(labels), torch.tensor(weight), label_smoothing=smoothing)
    expected.backward()
    x = Tensor(logits, requires_grad=True)
    loss = F.cross_entropy(x, labels, label_smoothing=smoothing, weight=weight)
    assert float(loss) == pytest.approx(expected.item(), rel=1e-11, abs=1e-13)
    assert error(grad(loss, x), theirs.grad.numpy()) < 1e-11


def test_equal_weights_change_nothing_and_a_class_may_count_for_nothing():
    rng = np.random.default_rng(0)
    logits, labels = rng.standard_normal((6, 3)).astype(np.float32), np.array([0, 1, 2, 2, 2, 0], np.uint8)
    plain = F.cross_entropy(logits, labels)
    weighted = F.cross_entropy(logits, labels, weight=np.full(3, 7.0))
    assert weighted.dtype == np.float32 and float(weighted) == pytest.approx(float(plain), rel=1e-6)
    without = F.cross_entropy(logits, labels, weight=np.array([1, 1, 0]))
    assert float(without) == pytest.approx(float(F.cross_entropy(logits[[0, 1, 5]], labels[[0, 1, 5]])), rel=1e-6)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_many_weights_add_up_in_16_bits(dtype):
    """bfloat16 cannot count to 257."""
    logits, labels = np.zeros((3000, 4), dtype), np.arange(3000) % 4
    for targets in (labels, np.eye(4, dtype=dtype)[labels]):
        loss = F.cross_entropy(logits, targets, weight=np.full(4, 30.0))
        assert loss.dtype == dtype
        assert float(loss) == pytest.approx(np.log(4) * (1 if targets.ndim == 1 else 30), rel=1e-2)
    total = F.weighted_targets(labels, np.full(4, 30.0), like=logits).astype(np.float64).sum()
    assert total == pytest.approx(3000, rel=1e-2)


def test_labels_that_are_no_class_are_refused_in_a_weighted_step_too():
    model = tinyvit.create_model("vit_nano_patch8_32", num_classes=3)
    step = TrainStep(model, optim.SGD(model.parameters(), lr=0.1), class_weights=np.ones(3))
    with pytest.raises(ValueError, match=r"labels must lie in 0 \.\.\. 2, got 1 \.\.\. 99"):
        step(np.zeros((2, 3, 32, 32), np.float32), np.array([1, 99]))


def test_weights_of_any_array_library():
    logits, labels = np.random.default_rng(0).standard_normal((4, 3)), np.array([0, 2, 1, 1])
    expected = float(F.cross_entropy(logits, labels, label_smoothing=0.1, weight=np.array([1.0, 2.0, 3.0])))
    x = array_api_strict.asarray(logits)
    assert float(F.cross_entropy(x, labels, label_smoothing=0.1, weight=np.array([1.0, 2.0, 3.0]))) == pytest.approx(
        expected, rel=1e-12
    )


@pytest.mark.parametrize("weight", [np.ones((2, 2)), np.ones(4), np.ones(())])
def test_weights_must_be_one_per_class(weight):
    for labels in (np.full((2, 3), 1 / 3), np.zeros(2, int)):
        with pytest.raises(ValueError, match="one weight for each of 3 classes"):
            F.cross_entropy(np.zeros((2, 3)), labels, weight=weight)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("n_shards", [1, 2, 5])
def test_a_sharded_step_has_the_whole_batch_s_mean(n_shards, soft):
    """The classes lie apart in the batch, so that each shard's own weights add up to something else."""
    weight = np.array([0.1, 10.0, 1.0, 3.0, 0.5])
    rng = np.random.default_rng(1)
    images, labels = rng.standard_normal((11, 3, 8, 8)), np.sort(rng.integers(0, 5, 11))
    given = np.eye(5)[labels] * 0.7 + np.eye(5)[labels[::-1]] * 0.3 if soft else labels

    def model():
        settings = dict(image_size=8, patch_size=4, embed_dim=16, num_classes=5)
        net = tinyvit.create_model("vit_nano_patch8_32", **settings).to("float64")
        net.head.weight.data = np.random.default_rng(2).standard_normal((5, 16))
        return net

    net = model()
    expected = F.cross_entropy(net(images), given, label_smoothing=0.1, weight=weight)
    logits = torch.tensor(net(images).numpy())
    theirs = TF.cross_entropy(logits, torch.tensor(given), torch.tensor(weight), label_smoothing=0.1)
    assert float(expected) == pytest.approx(float(theirs), rel=1e-11)
    gradients = grad(expected, net.parameters())
    stepped = model()
    before = [p.numpy().copy() for p in stepped.parameters()]
    step = TrainStep(stepped, optim.SGD(stepped.parameters(), lr=1.0), label_smoothing=0.1, threads=1, shards=n_shards,
                     class_weights=weight)  # fmt: skip
    loss = step(images, given)
    assert float(loss) == pytest.approx(float(expected), rel=1e-11)
    moved = np.concatenate([(b - p.numpy()).reshape(-1) for b, p in zip(before, stepped.parameters(), strict=True)])
    assert error(moved, np.concatenate([g.reshape(-1) for g in gradients])) < 1e-9
    hits = int((logits.numpy().argmax(1) == labels).sum())
    assert step.correct == hits, "weights must not change what counts as a hit"
