"""Modules: names, modes, moving, state dicts; and the layers against torch.nn."""

import threading

import array_api_strict
import numpy as np
import pytest
import torch
from drawing import TOLERANCE, error

import tinyvit
from tinyvit import functional as F
from tinyvit import nn, optim
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
    assert [name for name, _ in toy.named_modules()] == ["", "layers.0", "layers.1", "layers.2", "norm", "drop"]
    assert toy.num_parameters() == 2 + 6 + 3 + 6 + 2 + 2
    assert list(toy.modules()) == [module for _, module in toy.named_modules()]
    with pytest.raises(NotImplementedError, match="Module defines no forward"):
        nn.Module()(1)


def test_parameters_and_modules_in_lists_and_tuples_are_found():
    toy = nn.Module()
    toy.scales = [nn.Parameter(np.ones(2, np.float32)), (nn.Linear(2, 1, bias=False), [nn.Parameter(np.ones(1))])]
    assert list(toy.state_dict()) == ["scales.0", "scales.1.1.0", "scales.1.0.weight"]
    toy.requires_grad_(False)
    assert not any(p.requires_grad for p in toy.parameters()) and len(toy.parameters()) == 3


def test_shared_parameters_and_modules_come_once_but_keep_their_names():
    """As in torch: an optimizer sees a tied weight once, the state dict has both names."""
    toy, theirs = nn.Module(), torch.nn.Module()
    for module, layer in ((toy, nn.Linear(3, 3)), (theirs, torch.nn.Linear(3, 3))):
        module.first, module.second, module.tied = layer, layer, layer.weight
    assert [n for n, _ in toy.named_parameters()] == [n for n, _ in theirs.named_parameters()] == ["tied", "first.bias"]
    assert [n for n, _ in toy.named_modules()] == [n for n, _ in theirs.named_modules()] == ["", "first"]
    assert list(toy.state_dict()) == list(theirs.state_dict())
    assert toy.num_parameters() == 12


def test_apply_reaches_children_first():
    toy, theirs = (
        library.Sequential(library.Linear(2, 2), library.Sequential(library.ReLU(), library.Dropout(0.1)))
        for library in (nn, torch.nn)
    )
    seen, expected = [], []
    assert toy.apply(lambda module: seen.append(type(module).__name__)) is toy
    theirs.apply(lambda module: expected.append(type(module).__name__))
    assert seen == expected


def test_the_tree_is_shown():
    toy = Toy()
    toy.layers = [nn.Linear(2, 2), nn.Linear(2, 2), nn.Sequential(nn.GELU(), nn.Dropout(0.5))]
    assert (
        repr(toy)
        == """\
Toy(
  scale: (2,)
  (layers.0) to (layers.1): 2 x Linear(weight: (2, 2), bias: (2,))
  (layers.2): Sequential(
    (0): GELU(approximate='none')
    (1): Dropout(p=0.5)
  )
  (norm): LayerNorm(eps=1e-06, weight: (2,), bias: (2,))
  (drop): Dropout(p=0.5)
)"""
    )
    assert repr(tinyvit.create_model("vit_tiny_patch4_32")).count("\n") < 40


# --- buffers --------------------------------------------------------------------------------------------------------


class Normalised(nn.Module):
    def __init__(self):
        self.mean = nn.Buffer(np.full(2, 0.5, np.float32))
        self.register_buffer("count", np.array([3]))
        self.linear = nn.Linear(2, 2)

    def forward(self, x):
        return self.linear(x - self.mean)


def test_buffers_are_saved_and_moved_but_do_not_learn():
    model = Normalised()
    assert [name for name, _ in model.named_buffers()] == ["mean", "count"]
    assert [name for name, _ in model.named_parameters()] == ["linear.weight", "linear.bias"]
    assert list(model.state_dict()) == ["mean", "count", "linear.weight", "linear.bias"]
    model.mean = Tensor(np.zeros(2, np.float32))  # stays a buffer, as in torch
    model.count = model.count.data + 2**40
    assert isinstance(model.mean, nn.Buffer) and not model.mean.requires_grad
    model.to(array_api_strict, "float64")
    assert model.mean.dtype == array_api_strict.float64 and model.count.dtype == array_api_strict.int64
    other = Normalised()
    other.load_state_dict(model.state_dict())
    assert int(other.count) == 3 + 2**40 and other.mean.dtype == np.float64
    x = np.random.default_rng(0).standard_normal((3, 2))
    assert np.array_equal(other(x).numpy(), other.linear(x).numpy())
    with pytest.raises(ValueError, match="missing mean; missing count"):
        other.load_state_dict(other.linear.state_dict())


# --- assigning and changing parameters --------------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["+= 1", "-= 2.5", "*= Tensor(ones * 3)", "/= np.float64(4)", "+= ones * 2", "*= p"])
def test_arithmetic_in_place_keeps_the_parameter(change):
    """The model, its state dict, its optimizer and a gradient still belong to the same parameter, as in torch."""
    model, theirs = nn.Linear(3, 2), torch.nn.Linear(3, 2)
    theirs.load_state_dict({name: torch.tensor(x) for name, x in model.state_dict().items()})
    opt, their_opt = optim.SGD(model.parameters(), lr=0.1), torch.optim.SGD(theirs.parameters(), lr=0.1)
    before, array = model.weight, model.weight.data
    x = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
    model(x).sum().backward()
    theirs(torch.tensor(x)).sum().backward()
    ones = np.ones((1, 3), np.float32)
    with tinyvit.no_grad():
        exec(f"model.weight {change}", {"model": model, "Tensor": Tensor, "ones": ones, "np": np, "p": model.weight})
    ones = torch.tensor(ones)
    with torch.no_grad():
        exec(
            f"model.weight {change}",
            {"model": theirs, "Tensor": lambda x: x, "ones": ones, "np": np, "p": theirs.weight},
        )
    assert model.weight is before and model.weight.data is array and model.weight.grad is not None
    opt.step()
    their_opt.step()
    for name, value in theirs.state_dict().items():
        np.testing.assert_allclose(model.state_dict()[name], value.numpy(), rtol=1e-6, atol=1e-7)


def test_arithmetic_in_place_is_refused_where_a_gradient_is_recorded():
    model = nn.Linear(3, 2)
    weight = model.weight.numpy().copy()
    with pytest.raises(RuntimeError, match=r"cannot be changed in place; do it under tinyvit.no_grad\(\)"):
        model.weight *= 0.5
    assert np.array_equal(model.weight.numpy(), weight) and len(model.parameters()) == 2
    model.requires_grad_(False)
    model.weight *= 0.5
    assert np.array_equal(model.weight.numpy(), weight * 0.5)
    with pytest.raises(RuntimeError, match="cannot be changed in place"):
        model.weight += Tensor(np.ones(3, np.float32), requires_grad=True)


def test_a_backward_pass_notices_a_change_in_place():
    model = nn.Linear(3, 2)
    y = model(Tensor(np.ones((1, 3), np.float32), requires_grad=True))
    with tinyvit.no_grad():
        model.weight += 1
    with pytest.raises(RuntimeError, match="was changed in place after the forward pass"):
        y.sum().backward()


@pytest.mark.parametrize("value", [Tensor(np.ones((2, 3), np.float32)), np.ones((2, 3)), 1.0, nn.Identity()])
def test_only_a_parameter_takes_the_place_of_a_parameter(value):
    model = nn.Linear(3, 2)
    with pytest.raises(TypeError, match=r"weight is a parameter of Linear .* assign nn.Parameter\(...\)"):
        model.weight = value
    with pytest.raises(TypeError, match="weight is a parameter"):
        model.weight @= np.ones((3, 3), np.float32)
    assert len(model.parameters()) == 2
    model.weight = nn.Parameter(Tensor(np.full((2, 3), 2.0, np.float32)))
    assert (model.state_dict()["weight"] == 2).all()
    model.bias = None
    assert list(model.state_dict()) == ["weight"]


def test_only_a_module_takes_the_place_of_a_module():
    model = tinyvit.create_model("vit_nano_patch8_32")
    with pytest.raises(TypeError, match="norm is a module of VisionTransformer and cannot become a function"):
        model.norm = F.layer_norm
    model.norm = nn.Identity()


# --- evaluation mode --------------------------------------------------------------------------------------------------


def test_evaluating_writes_nothing_and_holds_in_its_own_thread():
    toy, seen = Toy(), []
    toy.norm.eval()
    x = np.ones((50, 2), np.float32)
    entered, left = threading.Event(), threading.Event()

    def other():
        with nn.evaluating():
            entered.set()
            left.wait(10)
            seen.append([toy.training, np.array_equal(toy(x).data, toy(x).data)])

    thread = threading.Thread(target=other)
    thread.start()
    entered.wait(10)
    assert toy.training and not toy.norm.training and not np.array_equal(toy(x).data, toy(x).data)
    left.set()
    thread.join()
    assert seen == [[False, True]]
    with nn.evaluating():
        toy.train()  # holds after the context
        assert not toy.training and not toy.drop.training
    assert toy.training and toy.norm.training


def test_a_pre_hook_sees_every_call_in_its_context():
    toy, seen = nn.Sequential(nn.Linear(2, 3), nn.GELU()), []
    x = np.ones((1, 2), np.float32)
    with nn.forward_pre_hook(lambda module, args: seen.append((module, args[0].shape))):
        toy(x)
    toy(x)
    assert seen == [(toy, (1, 2)), (toy[0], (1, 2)), (toy[1], (1, 3))]


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
    with pytest.raises(TypeError):
        nn.Linear(3, 4, True, None)  # torch has a device there
    scale = nn.LayerScale(6, 0.25)
    assert np.array_equal(scale(x).data, x * 0.25) and nn.Identity()(x) is x


def test_containers_are_torch_s():
    layers = [nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)]
    model, theirs = nn.Sequential(*layers), torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU())
    theirs.append(torch.nn.Linear(3, 1))
    assert list(model) == layers and len(model) == 3 and model[-1] is layers[-1] and model[:2] == layers[:2]
    assert list(model.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict({name: torch.tensor(x) for name, x in model.state_dict().items()})
    x = np.random.default_rng(0).standard_normal((4, 2)).astype(np.float32)
    assert error(model(x).numpy(), theirs(torch.tensor(x)).detach().numpy()) < 1e-6
    model[-1] = nn.Identity()
    assert model(x).shape == (4, 3) and len(model) == 3 and len(model.parameters()) == 2
    several = nn.ModuleList(layers).append(nn.Linear(1, 1))
    assert [name for name, _ in several.named_modules()] == ["", "0", "1", "2", "3"]
    with pytest.raises(NotImplementedError, match="ModuleList defines no forward"):
        several(x)


@pytest.mark.parametrize(
    "arguments",
    [
        dict(kernel_size=3),
        dict(kernel_size=(2, 3), stride=2, padding=1),
        dict(kernel_size=3, padding="same", bias=False),
    ],
)
def test_conv2d_agrees_with_torch(arguments):
    model, theirs = nn.Conv2d(3, 5, **arguments), torch.nn.Conv2d(3, 5, **arguments)
    model.load_state_dict({name: p.detach().numpy() for name, p in theirs.named_parameters()})
    x = np.random.default_rng(0).standard_normal((2, 3, 8, 9)).astype(np.float32)
    y, expected = model(x), theirs(torch.tensor(x))
    assert error(y.numpy(), expected.detach().numpy()) < 1e-5
    got = grad(y.sum(), model.parameters())
    for g, w in zip(got, torch.autograd.grad(expected.sum(), list(theirs.parameters())), strict=True):
        assert error(g, w.numpy()) < 1e-5


def test_embedding_agrees_with_torch():
    model, theirs = nn.Embedding(5, 3), torch.nn.Embedding(5, 3)
    model.load_state_dict({"weight": theirs.weight.detach().numpy()})
    index = np.array([[0, 4, 4], [1, 0, 2]])
    weight = np.random.default_rng(0).standard_normal((2, 3, 3)).astype(np.float32)
    y, expected = model(index), theirs(torch.tensor(index))
    assert np.array_equal(y.numpy(), expected.detach().numpy())
    got = grad(y, model.weight, weight)
    want = torch.autograd.grad(expected, theirs.weight, torch.tensor(weight))[0]
    assert error(got, want.numpy()) < 1e-6
    with pytest.raises(IndexError, match=r"Embedding expects indices in 0 ... 4, got -1 ... 2"):
        model(np.array([-1, 2]))
    with pytest.raises(TypeError, match="Embedding expects whole numbers, got float64"):
        model(np.array([1.0]))


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
        normal = nn.init.normal((200, 300), 0.5)
        cut = nn.init.truncated_normal((200, 300), 0.5)
        lecun = nn.init.lecun_normal((200, 3, 10, 10))
        xavier = nn.init.xavier_uniform((200, 300))
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
