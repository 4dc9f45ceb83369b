"""Operations that have a name of torch's or timm's have their arguments and meaning."""

import inspect

import numpy as np
import pytest
import torch
import torch.nn.functional as TF
from drawing import error

from tinyvit import Tensor
from tinyvit import functional as F
from tinyvit.engine.tensor import grad

SAME_POSITION = [  # of torch's arguments, which ours have at the same place
    ("linear", ["input", "weight", "bias"]),
    ("gelu", ["input", "approximate"]),
    ("softmax", ["input", "dim"]),
    ("log_softmax", ["input", "dim"]),
    ("relu", ["input"]),
    ("dropout", ["input", "p", "training"]),
    ("conv2d", ["input", "weight", "bias", "stride", "padding"]),
    ("max_pool2d", ["input", "kernel_size", "stride", "padding"]),
    ("group_norm", ["input", "num_groups", "weight", "bias", "eps"]),
    ("cross_entropy", ["input", "target"]),
    ("mse_loss", ["input", "target"]),
]
OUR_NAME = {"input": "x", "dim": "axis"}


@pytest.mark.parametrize("name, arguments", SAME_POSITION)
def test_positional_arguments_are_torch_s(name, arguments):
    ours = inspect.signature(getattr(F, name)).parameters.values()
    positional = [p.name for p in ours if p.kind is p.POSITIONAL_OR_KEYWORD]
    if name == "cross_entropy":  # torch's third, weight, is refused there
        assert positional == ["logits", "labels", "label_smoothing", "weight"]
    elif name == "mse_loss":
        assert len(positional) == 2
    else:
        assert positional == [OUR_NAME.get(a, a) for a in arguments]
    theirs = {"conv2d": arguments, "max_pool2d": arguments}.get(name)  # torch's are built in
    if theirs is None:
        theirs = (
            list(inspect.signature(getattr(TF, name)).parameters) if name != "linear" and name != "gelu" else arguments
        )
    assert theirs[: len(arguments)] == arguments


def test_defaults_are_torch_s():
    x = np.random.default_rng(0).standard_normal((2, 4, 8, 8)).astype(np.float32)
    weight, bias = x[:, :, :3, :3], np.array([1.0, -2.0], np.float32)
    t = torch.tensor(x)
    for ours, theirs in (
        (F.max_pool2d(x, 2), TF.max_pool2d(t, 2)),
        (F.max_pool2d(x, (2, 3)), TF.max_pool2d(t, (2, 3))),
        (F.max_pool2d(x, 3, 2, 1), TF.max_pool2d(t, 3, 2, 1)),
        (F.softmax(x, dim=1), TF.softmax(t, dim=1)),
        (F.log_softmax(x, dim=0), TF.log_softmax(t, dim=0)),
        (F.conv2d(x, weight, bias, 2, 1), TF.conv2d(t, torch.tensor(weight), torch.tensor(bias), 2, 1)),
    ):
        assert ours.shape == tuple(theirs.shape) and error(ours.numpy(), theirs.numpy()) < 1e-6
    with pytest.raises(ValueError, match=r"conv2d expects a bias of shape \(2,\), got \(3,\)"):
        F.conv2d(x, weight, np.ones(3, np.float32))


def test_a_bias_of_a_convolution_learns():
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(shape) for shape in ((2, 3, 5, 4), (6, 3, 2, 2), (6,))]
    ours = [Tensor(a, requires_grad=True) for a in arrays]
    theirs = [torch.tensor(a, requires_grad=True) for a in arrays]
    expected = torch.autograd.grad(TF.conv2d(*theirs).sin().sum(), theirs)
    y = F.conv2d(*ours)
    for g, want in zip(grad(y, ours, np.cos(y.numpy())), expected, strict=True):
        assert error(g, want.numpy()) < 1e-12


def test_what_torch_has_at_another_place_is_given_by_name():
    a = np.ones((2, 3), np.float32)
    with pytest.raises(TypeError, match="positional arguments"):
        F.mse_loss(a, a, "sum")
    with pytest.raises(
        TypeError, match=r"takes label_smoothing, a number, as its third argument, got ndarray: use weight="
    ):
        F.cross_entropy(a, np.array([0, 1]), np.ones(3, np.float32))


def test_mse_loss_agrees_with_torch():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 3, 4, 5))
    x, target = Tensor(a, requires_grad=True), Tensor(b, requires_grad=True)
    loss = F.mse_loss(x, target)
    t, u = (torch.tensor(v, requires_grad=True) for v in (a, b))
    expected = TF.mse_loss(t, u)
    assert float(loss) == pytest.approx(expected.item(), rel=1e-12)
    for g, want in zip(grad(loss, [x, target]), torch.autograd.grad(expected, [t, u]), strict=True):
        assert error(g, want.numpy()) < 1e-12
    with pytest.raises(ValueError, match=r"mse_loss expects x and target of one shape, got \(3, 4, 5\) and \(4, 5\)"):
        F.mse_loss(a, b[0])


def test_a_module_s_mode_is_not_assumed_by_drop_path():
    """timm's `drop_path` drops nothing unless it is given training=True: whoever calls ours says which."""
    with pytest.raises(TypeError, match="training"):
        F.drop_path(np.ones((2, 3), np.float32), 0.5)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x: F.cross_entropy(x, [0, 1]), "labels must be an array or a Tensor, got list; use numpy.asarray"),
        (lambda x: F.linear([[1.0]], x), "expected a Tensor or an array, got list; use numpy.asarray"),
        (lambda x: F.layer_norm(x, 3, x), "expected a Tensor or an array, got int; use numpy.asarray"),
        (lambda x: F.attention(x, None, x), "expected a Tensor or an array, got NoneType; use numpy.asarray"),
    ],
)
def test_what_is_no_array_is_named(call, message):
    with pytest.raises(TypeError) as caught:
        call(np.ones((2, 3), np.float32))
    assert str(caught.value) == message


def test_normalized_shape_is_refused_by_its_name():
    x, w = np.ones((2, 32)), np.ones(32)
    for call in (lambda: F.layer_norm(x, (32,), w, w), lambda: F.rms_norm(x, [32], w)):
        with pytest.raises(TypeError, match=r"takes no normalized_shape, got .32,?.: .*_norm\(x, weight.* last axis"):
            call()
