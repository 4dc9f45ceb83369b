"""Modules: names, modes, moving, state dicts; and the layers against torch.nn."""

import array_api_strict
import numpy as np
import pytest
import torch
from drawing import TOLERANCE, error

import tinyvit
from tinyvit import nn
from tinyvit.backend import random
from tinyvit.engine.tensor import Tensor, grad


class Toy(nn.Module):
    def __init__(self):
        self.scale = nn.Parameter(np.full((2,), 3.0, np.float32))
        self.layers = [nn.Linear(2, 3), nn.Identity(), nn.Linear(3, 2, bias=False)]
        self.norm = nn.LayerNorm(2)
        self.drop = nn.Dropout(0.5)
        self.nothing = None

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.norm(self.drop(x))


NAMES = ["scale", "layers.0.weight", "layers.0.bias", "layers.2.weight", "norm.weight", "norm.bias"]


def test_names_and_modules():
    toy = Toy()
    assert [name for name, _ in toy.named_parameters()] == NAMES
    assert [id(p) for p in toy.parameters()] == [id(p) for _, p in toy.named_parameters()]
    assert [name for name, _ in toy.named_modules()] == [
        "",
        "layers.0",
        "layers.1",
        "layers.2",
        "norm",
        "drop",
    ]
    assert toy.num_parameters() == 2 + 6 + 3 + 6 + 2 + 2
    with pytest.raises(NotImplementedError, match="Module defines no forward"):
        nn.Module()(1)


def test_modes_and_freezing_reach_all_modules():
    toy = Toy()
    assert all(m.training for _, m in toy.named_modules())
    assert toy.eval() is toy and not any(m.training for _, m in toy.named_modules())
    assert toy.train() is toy and all(m.training for _, m in toy.named_modules())
    x = np.ones((50, 2), np.float32)
    assert np.array_equal(toy.eval()(x).data, toy(x).data) and not np.array_equal(toy.train()(x).data, toy(x).data)
    assert toy.requires_grad_(False) is toy and not toy.eval()(x).requires_grad
    toy.layers[0].requires_grad_()
    assert [n for n, p in toy.named_parameters() if p.requires_grad] == ["layers.0.weight", "layers.0.bias"]
    got = grad(toy(x).sum(), toy.layers[0].parameters())
    assert [g.shape for g in got] == [(3, 2), (3,)]


def test_to_moves_parameters_and_their_gradients():
    toy = Toy().eval()
    toy(np.ones((2, 2), np.float32)).sum().backward()
    before = toy.state_dict()
    assert toy.to(array_api_strict, "float64") is toy
    for name, p in toy.named_parameters():
        assert p.dtype == array_api_strict.float64 and np.array_equal(p.numpy(), before[name])
        assert p.grad is None or p.grad.dtype == array_api_strict.float64
    assert toy.layers[0].weight.grad is not None
    toy.to("cpu").to(np.float32)
    assert all(type(p.data) is np.ndarray and p.dtype == np.float32 for p in toy.parameters())
    for target in ("gpu", "float33", 3, None):
        with pytest.raises((ValueError, TypeError)) as caught:
            toy.to(target)
        assert "\n" not in str(caught.value)
    with pytest.raises(
        ValueError, match='expected "cpu", "cuda", "cuda:N", an array-API namespace or a floating dtype, got'
    ):
        toy.to("int32")


def test_cuda_without_cupy_says_what_to_install():
    try:
        import cupy  # noqa: F401
    except ImportError:
        with pytest.raises(RuntimeError, match=r'device cuda needs CuPy: pip install "tinyvit\[cuda12\]"'):
            Toy().to("cuda")
    else:
        pytest.skip("CuPy is installed")


def test_state_dicts_are_copies_both_ways():
    toy = Toy()
    state = toy.state_dict()
    assert list(state) == NAMES and all(type(x) is np.ndarray for x in state.values())
    state["scale"][:] = 7.0
    assert (toy.scale.data == 3.0).all()
    toy.load_state_dict(state)
    assert (toy.scale.data == 7.0).all()
    state["scale"][:] = 8.0
    assert (toy.scale.data == 7.0).all()
    toy.load_state_dict({name: torch.tensor(x) for name, x in state.items()})  # torch's arrays are arrays
    assert (toy.scale.data == 8.0).all() and type(toy.scale.data) is np.ndarray


def test_a_float64_state_makes_a_float64_module_and_nothing_else_changes_its_dtype():
    toy = Toy()
    state = toy.state_dict()
    for dtype in (np.float16, np.float32, np.int64):
        toy.load_state_dict({name: x.astype(dtype) for name, x in state.items()})
        assert {p.dtype for p in toy.parameters()} == {np.dtype(np.float32)}
    exact = {name: x + 1e-12 for name, x in ((n, v.astype(np.float64)) for n, v in state.items())}
    toy.load_state_dict(exact)
    assert {p.dtype for p in toy.parameters()} == {np.dtype(np.float64)}
    assert all(np.array_equal(p.data, exact[name]) for name, p in toy.named_parameters())
    assert toy.eval()(np.ones((2, 2))).dtype == np.float64
    toy.load_state_dict(state)
    assert {p.dtype for p in toy.parameters()} == {np.dtype(np.float64)}


def test_a_state_that_does_not_fit_names_every_problem_and_changes_nothing():
    toy = Toy()
    before = toy.state_dict()
    state = {name: x.astype(np.float64) + 1 for name, x in before.items()}
    del state["layers.0.bias"], state["norm.bias"]
    state |= {"head.weight": np.ones(3), "scale": np.ones(3), "layers.2.weight": np.ones((3, 2))}
    with pytest.raises(ValueError) as caught:
        toy.load_state_dict(state)
    assert str(caught.value) == (
        "the weights do not fit the model: missing layers.0.bias; missing norm.bias; unexpected head.weight; "
        "scale has shape (3,), expected (2,); layers.2.weight has shape (3, 2), expected (2, 3)"
    )
    with pytest.raises(ValueError) as caught:  # shapes are checked even where names are not
        toy.load_state_dict(state, strict=False)
    assert "missing" not in str(caught.value) and "scale has shape (3,)" in str(caught.value)
    for name, p in toy.named_parameters():
        assert p.dtype == np.float32 and np.array_equal(p.data, before[name])
    toy.load_state_dict({"scale": np.full(2, 9.0, np.float32), "other": np.ones(1)}, strict=False)
    assert (toy.scale.data == 9.0).all() and np.array_equal(toy.norm.weight.data, before["norm.weight"])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_layers_agree_with_torch(dtype):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 3, 6)).astype(np.float32)
    with random.scope(0):
        pairs = [
            (nn.Linear(6, 4), torch.nn.Linear(6, 4)),
            (nn.Linear(6, 4, bias=False), torch.nn.Linear(6, 4, bias=False)),
            (nn.LayerNorm(6), torch.nn.LayerNorm(6, eps=1e-6)),
            (nn.LayerNorm(6, eps=0.1), torch.nn.LayerNorm(6, eps=0.1)),
        ]
    for ours, theirs in pairs:
        ours.load_state_dict({n: rng.standard_normal(p.shape).astype(np.float32) for n, p in ours.named_parameters()})
        ours.to(dtype)
        theirs.double().load_state_dict({n: torch.tensor(v, dtype=torch.float64) for n, v in ours.state_dict().items()})
        a = Tensor(x.astype(dtype), requires_grad=True)
        t = torch.tensor(x, dtype=torch.float64, requires_grad=True)
        y, expected = ours(a), theirs(t)
        weight = rng.standard_normal(y.shape).astype(np.float32)
        assert error(y.data, expected.detach().numpy()) < TOLERANCE[dtype]
        got = grad(y, [a, *ours.parameters()], weight.astype(dtype))
        want = torch.autograd.grad(expected, [t, *theirs.parameters()], torch.tensor(weight, dtype=torch.float64))
        for g, w in zip(got, want, strict=True):
            assert g.dtype == dtype and error(g, w.numpy()) < TOLERANCE[dtype]
    scale = nn.LayerScale(6, 0.25)
    assert np.array_equal(scale(x).data, x * 0.25) and nn.Identity()(x) is x


def test_no_init_gives_zeros_and_keeps_the_places_of_later_draws():
    with random.scope(3):
        first, second = nn.Linear(4, 5), nn.Linear(4, 5)
    assert not np.array_equal(first.weight.data, second.weight.data)
    with random.scope(3):
        with nn.no_init():
            blank = nn.Linear(4, 5)
        again = nn.Linear(4, 5)
    assert not blank.weight.data.any() and blank.weight.dtype == np.float32
    assert np.array_equal(again.weight.data, second.weight.data)


def test_initialisers():
    with random.scope(0):
        normal = nn.normal((200, 300), 0.5)
        cut = nn.truncated_normal((200, 300), 0.5)
        lecun = nn.lecun_normal((200, 3, 10, 10))
        xavier = nn.xavier_uniform((200, 300))
    assert normal.std() == pytest.approx(0.5, rel=0.01) and np.abs(normal).max() > 1.5
    assert np.abs(cut).max() <= 1.0 and cut.std() == pytest.approx(0.5 * 0.8796, rel=0.01)
    assert lecun.std() == pytest.approx((1 / 300) ** 0.5, rel=0.01)
    assert np.abs(xavier).max() == pytest.approx((6 / 500) ** 0.5, rel=0.01)
    for x in (normal, cut, lecun, xavier):
        assert x.dtype == np.float32 and abs(x.mean()) < 0.01 * x.std() * 2


def test_a_parameter_is_a_tensor_and_a_public_one():
    p = nn.Parameter(np.ones(3, np.float32))
    assert isinstance(p, tinyvit.Tensor) and p.requires_grad and p.is_leaf
    assert not nn.Parameter(np.ones(3, np.float32), requires_grad=False).requires_grad
