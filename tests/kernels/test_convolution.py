"""The convolutional stem's operations: every version of each against torch, and what the public functions refuse."""

import re

import numpy as np
import pytest
import torch
import torch.nn.functional as TF
from drawing import BACKENDS, check, place, shapes, sides, torch_vjp, values
from hypothesis import given
from hypothesis import strategies as st
from operations import Example, checks_of, operations, padded, small, windows

from tinyvit import functional as F
from tinyvit.engine.tensor import Tensor, grad
from tinyvit.kernels.reference import convolution as reference


def conv2d(draw):
    size, kernel, stride, padding = windows(draw)
    batch, inputs, outputs = draw(st.sampled_from([0, 1, 2, 5])), draw(sides), draw(sides)
    return Example(
        [values(draw, (batch, inputs, *size)), values(draw, (outputs, inputs, *kernel))],
        lambda x, weight: TF.conv2d(padded(x, padding), weight, stride=stride),
        {"stride": stride, "padding": padding},
    )


def max_pool2d(draw):
    size, kernel, stride, padding = windows(draw, most=0)
    if draw(st.booleans()):
        padding = tuple(tuple(draw(st.integers(0, k - 1)) for _ in range(2)) for k in kernel)
    kind = draw(st.sampled_from(["grid", "normal"]))  # on the grid entries tie
    return Example(
        [values(draw, (draw(small), draw(small), *size), kind)],
        lambda x: TF.max_pool2d(padded(x, padding, -torch.inf), kernel, stride),
        {"kernel": kernel, "stride": stride, "padding": padding},
    )


def group_norm(draw):
    groups, width = draw(sides), draw(small)
    x = values(draw, (draw(small), groups * width, draw(sides), draw(sides)), "spread")
    eps = draw(st.sampled_from([1e-6, 1e-5, 0.1]))
    return Example(
        [x + draw(st.sampled_from([0, 0, 100])), *(values(draw, (groups * width,)) for _ in range(2))],
        lambda x, weight, bias: torch.group_norm(x, groups, weight, bias, eps),
        {"num_groups": groups, "eps": eps},
    )


def weight_standardize(draw):
    eps = draw(st.sampled_from([1e-8, 1e-5, 0.1]))

    def theirs(weight):
        var, mean = torch.var_mean(weight, dim=(1, 2, 3), keepdim=True, correction=0)
        return (weight - mean) / torch.sqrt(var + eps)

    return Example([values(draw, tuple(draw(sides) for _ in range(4)), "spread")], theirs, {"eps": eps})


def relu(draw):
    return Example([values(draw, draw(shapes()), draw(st.sampled_from(["normal", "grid"])))], TF.relu)


CASES = {f.__name__: f for f in (conv2d, max_pool2d, group_norm, weight_standardize, relu)}


def test_every_operation_has_a_case():
    assert operations(reference) == set(CASES)


test_every_version_agrees_with_torch, test_fewer_gradients_change_nothing = checks_of(reference, CASES)


# --- the public functions ------------------------------------------------------------------------------------------


def same(x, kernel, stride, value=0.0):
    """TensorFlow's padding SAME, as its documentation words it."""
    pads = []
    for n, k, s in zip(x.shape[:1:-1], kernel[::-1], stride[::-1], strict=True):
        total = max(k - s, 0) if n % s == 0 else max(k - n % s, 0)
        pads += [total // 2, total - total // 2]
    return TF.pad(x, pads, value=value)


@pytest.mark.parametrize("backend", BACKENDS)
@given(data=st.data())
def test_padding_as_the_public_functions_spell_it(backend, data):
    """Numbers, pairs and "same", through Tensors and their gradients."""
    draw = data.draw
    size, kernel, stride, _ = windows(draw, most=0)
    both = draw(st.sampled_from([kernel, (3, 3), (2, 2)]))
    x, weight = values(draw, (2, 3, *size)), values(draw, (4, 3, *both))
    tensors = [Tensor(place(a, backend, "float64"), requires_grad=True) for a in (x, weight)]
    y, dy, gradients = torch_vjp(lambda x, w: TF.conv2d(same(x, both, stride), w, stride=stride), [x, weight], draw)
    result = F.conv2d(*tensors, stride=stride, padding="same")
    assert result.shape[2:] == tuple(-(-n // s) for n, s in zip(size, stride, strict=True))
    check(result.data, y, backend, "float64")
    for got, expected in zip(grad(result, tensors, place(dy, backend, "float64")), gradients, strict=True):
        check(got, expected, backend, "float64")
    pooled = F.max_pool2d(tensors[0], both, stride, "same")
    check(pooled.data, TF.max_pool2d(same(torch.tensor(x), both, stride, -torch.inf), both, stride), backend, "float64")
    for padding in (2, (1, 2)):
        expected = TF.conv2d(torch.tensor(x), torch.tensor(weight), stride=stride[0], padding=padding)
        check(F.conv2d(*tensors, stride=stride[0], padding=padding).data, expected, backend, "float64")


def test_group_norm_and_standardization_have_the_defaults_of_the_field():
    rng = np.random.default_rng(0)
    x, weight, bias = rng.standard_normal((2, 6, 3, 3)) * 1e-3, rng.standard_normal(6), rng.standard_normal(6)
    expected = TF.group_norm(torch.tensor(x), 3, torch.tensor(weight), torch.tensor(bias))
    check(F.group_norm(x, 3, weight, bias).data, expected, "numpy", "float64")
    kernel = torch.tensor(x * 0.1)  # variances near timm's epsilon
    normal = TF.batch_norm(kernel.reshape(1, 2, -1), None, None, training=True, eps=1e-8).reshape(kernel.shape)
    check(F.weight_standardize(x * 0.1).data, normal, "numpy", "float64")
    check(F.relu(x).data, torch.tensor(x).relu(), "numpy", "float64")


@pytest.mark.parametrize(
    ("call", "problem"),
    [
        (lambda x, w: F.conv2d(x[0], w), "images (B, C, H, W) and weight (O, C, h, w), got (3, 5, 4) and (2, 3, 3, 3)"),
        (lambda x, w: F.conv2d(x, w[:, :2]), "got (1, 3, 5, 4) and (2, 2, 3, 3)"),
        (lambda x, w: F.conv2d(x[:, :, :2], w), "conv2d finds no place for a kernel (3, 3) in (2, 4) with padding"),
        (lambda x, w: F.conv2d(x, w, stride=0), "stride must be a whole number of at least 1, or two of them, got 0"),
        (lambda x, w: F.conv2d(x, w, padding="valid"), "a whole number of at least 0, or two of them, got 'valid'"),
        (lambda x, w: F.max_pool2d(x[0], 2), "max_pool2d expects x (B, C, H, W), got (3, 5, 4)"),
        (lambda x, w: F.max_pool2d(x, (2, 2, 2)), "a whole number of at least 1, or two of them, got (2, 2, 2)"),
        (lambda x, w: F.max_pool2d(x, 2, 1, 2), "less padding than its kernel (2, 2), got ((2, 2), (2, 2))"),
        (lambda x, w: F.group_norm(x, 2, w[0, :, 0, 0], w[0, :, 0, 0]), "equal size, got 3 channels and 2 groups"),
        (lambda x, w: F.group_norm(x, 3, w[0], w[0, :, 0, 0]), "weight and bias (C,), got"),
        (lambda x, w: F.weight_standardize(w[0]), "weight_standardize expects weight (O, C, h, w), got (3, 3, 3)"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_in_one_line(call, problem):
    with pytest.raises(ValueError, match=re.escape(problem)) as caught:
        call(np.zeros((1, 3, 5, 4)), np.zeros((2, 3, 3, 3)))
    assert "\n" not in str(caught.value)
