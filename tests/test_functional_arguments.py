"""What functional's operations take and refuse."""

import array_api_strict
import numpy as np
import pytest
import torch
import torch.nn.functional as TF
from drawing import (
    check,
    torch_vjp,
)

from tinyvit import functional as F
from tinyvit.engine.tensor import Tensor, grad


@pytest.mark.parametrize("bias", [True, False])
def test_patch_embed_is_a_strided_convolution(bias):
    """Rectangular images and patches, more than three channels."""
    rng = np.random.default_rng(0)
    images, weight, b = (
        rng.standard_normal((2, 5, 6, 12)),
        rng.standard_normal((7, 5, 3, 4)),
        rng.standard_normal(7),
    )
    inputs = [images, weight, b if bias else None]

    def theirs(x, w, b):
        return TF.conv2d(x, w, b, stride=(3, 4)).flatten(2).transpose(1, 2)

    rng_draw = lambda strategy: 5
    y, dy, gradients = torch_vjp(theirs, inputs, rng_draw)
    tensors = [None if x is None else Tensor(x, requires_grad=True) for x in inputs]
    result = F.patch_embed(*tensors)
    check(result.data, y, "numpy", "float64")
    for got, expected in zip(grad(result, [t for t in tensors if t is not None], dy), gradients, strict=False):
        check(got, expected, "numpy", "float64")


MLP = [np.ones(shape) for shape in ((2, 3), (4, 3), 4, (3, 4), 3)]


def test_odd_arguments():
    x = Tensor(np.array([-1.0, 2.0]), requires_grad=True)
    assert grad(F.relu(x), x, np.array([np.inf, np.inf])).tolist() == [0, np.inf]  # no NaN where nothing passed
    assert F.dropout(Tensor(np.array(2.0)), 0.5).item() in (0, 4)
    assert F.patchify(np.zeros((1, 3, 4, 4)), 2).shape == (1, 4, 12)
    for call, message in (
        (lambda: F.patchify(np.zeros((1, 3, 4, 4)), (0, 2)), "patch_size must be a whole number of at least 1"),
        (lambda: F.add_drop_path(np.zeros((1, 3)), np.zeros((2, 3)), 0.1, True), r"got \(1, 3\), \(2, 3\)"),
        (lambda: F.linear(np.zeros((2, 0)), np.zeros((3, 0))), r"got \(2, 0\) and \(3, 0\)"),
        (
            lambda: F.add_linear(np.zeros((1, 3)), np.zeros((2, 4)), np.zeros((3, 4))),
            r"\(2, 3\), got \(1, 3\)",
        ),
        (lambda: F.mlp(*MLP[:3], MLP[1], MLP[2]), r"mlp expects weight2 \(out, 4\) .* got \(4, 3\) and \(4,\)"),
        (lambda: F.mlp(*MLP[:4], np.ones(4)), r"bias2 \(out,\), got \(3, 4\) and \(4,\)"),
        (lambda: F.mlp(*MLP, residual=np.ones((1, 3))), r"mlp expects residual \(2, 3\), got \(1, 3\)"),
        (lambda: F.mlp(MLP[0], np.ones((0, 3)), np.ones(0), np.ones((3, 0)), MLP[4]), r"weight2 \(out, hidden\)"),
        (lambda: F.mlp(*MLP, approximate="erf"), "gelu expects approximate"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_functions_take_arrays_and_tensors_and_pass_their_options_on():
    rng = np.random.default_rng(0)
    x, w, b = rng.standard_normal((2, 3)), rng.standard_normal((4, 3)), rng.standard_normal(4)
    tx = torch.tensor(x)
    for ours, theirs in [
        (F.linear(x, w, b), TF.linear(tx, torch.tensor(w), torch.tensor(b))),
        (F.add_drop_path(x, x, 1.0, True), tx),
        (F.add_drop_path(x, x, 0.9, False), 2 * tx),
        (F.add_linear(x @ w.T, x, w, b), 2 * tx @ torch.tensor(w).T + torch.tensor(b)),
        (
            F.linear_gelu(x, w, b, "tanh"),
            TF.gelu(TF.linear(tx, torch.tensor(w), torch.tensor(b)), approximate="tanh"),
        ),
        (
            F.mlp(x, w, b, w.T, x[0], "tanh", x),
            tx + TF.gelu(TF.linear(tx, *map(torch.tensor, (w, b))), approximate="tanh") @ torch.tensor(w) + tx[0],
        ),
        (
            F.layer_norm(x, w[0], w[1], 0.5),
            TF.layer_norm(tx, (3,), torch.tensor(w[0]), torch.tensor(w[1]), 0.5),
        ),
        (F.layer_norm(x, w[0], w[1]), TF.layer_norm(tx, (3,), torch.tensor(w[0]), torch.tensor(w[1]), 1e-6)),
        (F.gelu(x), TF.gelu(tx)),
        (F.gelu(x, "tanh"), TF.gelu(tx, approximate="tanh")),
        (F.softmax(x), tx.softmax(-1)),
        (F.softmax(x, 0), tx.softmax(0)),
        (F.log_softmax(x, axis=0), tx.log_softmax(0)),
    ]:
        assert isinstance(ours, Tensor) and not ours.requires_grad
        check(ours.data, theirs, "numpy", "float64")


A4 = np.ones((1, 2, 3, 4), np.float32)
X = np.ones((2, 3), np.float32)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: F.linear(X, X.T), "linear expects x (..., in) and weight (out, in), got (2, 3) and (3, 2)"),
        (lambda: F.linear(X, X, X[0]), "linear expects a bias of shape (2,), got (3,)"),
        (
            lambda: F.linear(X, X.astype(np.float64)),
            "linear expects arrays of one dtype, got float32 and float64; use astype",
        ),
        (
            lambda: F.linear(X, array_api_strict.ones((2, 3), dtype=array_api_strict.float32)),
            "linear expects arrays of one library, got numpy and array_api_strict",
        ),
        (
            lambda: F.layer_norm(X, X[0], X[:, 0]),
            "layer_norm expects x (..., D), weight and bias (D,), got (2, 3), (3,) and (2,)",
        ),
        (lambda: F.gelu(X, "erf"), 'gelu expects approximate "none" or "tanh", got \'erf\''),
        (
            lambda: F.attention(A4, A4, A4[:, :, :2]),
            "attention expects q (B, H, N, D), k (B, H, M, D) and v (B, H, M, E), "
            "got (1, 2, 3, 4), (1, 2, 3, 4) and (1, 2, 2, 4)",
        ),
        (
            lambda: F.attention(A4, A4, A4, mask=np.zeros((3, 3))),
            "attention expects a mask of booleans or of dtype float32, got float64",
        ),
        (
            lambda: F.attention(A4, A4, A4, mask=np.zeros((3, 3), int)),
            "attention expects a mask of booleans or of dtype float32, got int64",
        ),
        (
            lambda: F.attention(A4, A4, A4, mask=np.zeros((5, 1, 3, 3), bool)),
            "attention expects a mask that broadcasts to (1, 2, 3, 3), got (5, 1, 3, 3)",
        ),
        (lambda: F.attention(A4, A4, A4, dropout=1.5), "a dropout probability must lie in 0 ... 1, got 1.5"),
        (
            lambda: F.qkv_attention(A4[0], 3),
            "qkv_attention expects (B, N, 3 * num_heads * D), got (2, 3, 4) with 3 heads",
        ),
        (lambda: F.patchify(A4, (2, 2)), "image size 3x4 is not divisible by patch size 2"),
        (lambda: F.patchify(A4, (3, 3)), "image size 3x4 is not divisible by patch size 3"),
        (lambda: F.patchify(A4, (2, 4)), "image size 3x4 is not divisible by patch size 2x4"),
        (lambda: F.patchify(X, (1, 1)), "expected images (B, C, H, W), got shape (2, 3)"),
        (
            lambda: F.patch_embed(A4, A4[:, :1]),
            "patch_embed expects images (B, C, H, W) and weight (O, C, h, w), got (1, 2, 3, 4) and (1, 1, 3, 4)",
        ),
        (lambda: F.dropout(X, -0.1), "a dropout probability must lie in 0 ... 1, got -0.1"),
        (lambda: F.cross_entropy(X, np.array([0, 3])), "labels must lie in 0 ... 2, got 0 ... 3"),
        (lambda: F.cross_entropy(X, np.array([-1, 0])), "labels must lie in 0 ... 2, got -1 ... 0"),
        (
            lambda: F.cross_entropy(X, np.array([0])),
            "cross_entropy expects class numbers (2,) or probabilities (2, 3), got int64 labels of shape (1,)",
        ),
        (
            lambda: F.cross_entropy(X, np.ones(2, np.float32)),
            "cross_entropy expects class numbers (2,) or probabilities (2, 3), got float32 labels of shape (2,)",
        ),
        (
            lambda: F.cross_entropy(X, np.ones((2, 3))),
            "cross_entropy expects probabilities of dtype float32, got float64",
        ),
        (
            lambda: F.cross_entropy(X[:0], np.ones(0, int)),
            "cross_entropy expects logits (B, C) with at least one entry, got (0, 3)",
        ),
        (
            lambda: F.cross_entropy(X, np.array([0, 1]), label_smoothing=1.5),
            "label_smoothing must lie in 0 ... 1, got 1.5",
        ),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(make, message):
    with pytest.raises((TypeError, ValueError)) as caught:
        make()
    assert str(caught.value) == message


def test_what_gets_no_gradient_may_not_ask_for_one():
    x, asks = np.ones((1, 1, 2, 2)), Tensor(np.ones((2, 2)), requires_grad=True)
    with pytest.raises(ValueError, match="an attention mask must not require a gradient"):
        F.attention(x, x, x, mask=asks)
    with pytest.raises(ValueError, match="labels must not require a gradient"):
        F.cross_entropy(np.ones((2, 2)), asks)
    assert F.cross_entropy(np.ones((2, 2)), asks.detach()).shape == ()
