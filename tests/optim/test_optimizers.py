"""Optimizers, parameter groups and clipping, held against torch.optim."""

import math
import tracemalloc
import types

import array_api_compat.numpy as numpy_namespace
import array_api_strict
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optimizing import STEPS, error, model_of, parameter

from tinyvit import kernels, optim
from tinyvit.engine import ops
from tinyvit.engine.tensor import Tensor
from tinyvit.kernels import reference
from tinyvit.kernels.cpu import optimizers

CASES = {
    "sgd": (optim.SGD, torch.optim.SGD, {}),
    "momentum": (optim.SGD, torch.optim.SGD, {"momentum": 0.9}),
    "nesterov": (optim.SGD, torch.optim.SGD, {"momentum": 0.8, "nesterov": True}),
    "adam": (optim.Adam, torch.optim.Adam, {}),
    "adamw": (optim.AdamW, torch.optim.AdamW, {}),
}
SHAPES = st.lists(
    st.lists(st.integers(1, 6), max_size=4).map(tuple) | st.sampled_from([(1, 300), (300, 1)]),
    min_size=2,
    max_size=4,
)
LAYOUTS = {
    "C": lambda x: x.copy(),
    "F": lambda x: x.T.copy().T,
    "strided": lambda x: np.stack([x, x], axis=-1)[..., 0],
    "reversed": lambda x: x[::-1].copy()[::-1] if x.ndim else x.copy(),
}


def hyper_parameters(draw, name):
    options = {"lr": draw(st.floats(1e-4, 0.1)), "weight_decay": draw(st.sampled_from([0.0, 0.05, 0.3]))}
    if name in ("momentum", "nesterov"):
        options["momentum"] = draw(st.floats(0.01, 0.99))
    if name.startswith("adam"):
        options["betas"] = (draw(st.floats(0.0, 0.99)), draw(st.floats(0.5, 0.999)))
        options["eps"] = draw(st.sampled_from([1e-8, 1e-3]))
    return options


@pytest.mark.parametrize("dtype, tolerance", [(np.float64, 1e-10), (np.float32, 1e-5)])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("small_blocks")
@settings(max_examples=6)  # of 20 steps, for each optimizer and precision
@given(data=st.data())
def test_steps_agree_with_torch(name, dtype, tolerance, data):
    """Two groups, a schedule, gradients that are missing now and then, any memory layout. torch computes in float64."""
    ours, theirs, fixed = CASES[name]
    options = fixed | hyper_parameters(data.draw, name)
    shapes, layout = data.draw(SHAPES), LAYOUTS[data.draw(st.sampled_from(list(LAYOUTS)))]
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    start = [rng.standard_normal(shape).astype(dtype) for shape in shapes]
    params = [parameter(layout(x)) for x in start]
    references = [torch.nn.Parameter(torch.tensor(x, dtype=torch.float64)) for x in start]
    scale, decay = 0.3, 0.02
    opt = ours([{"params": params[:1], "lr_scale": scale, "weight_decay": decay}, {"params": params[1:]}], **options)
    reference = theirs([{"params": references[:1], "weight_decay": decay}, {"params": references[1:]}], **options)
    for step in range(STEPS):
        opt.lr = options["lr"] * (1 - step / STEPS)
        for group, factor in zip(reference.param_groups, (scale, 1.0), strict=True):
            group["lr"] = opt.lr * factor
        for i, (p, r) in enumerate(zip(params, references, strict=True)):
            g = rng.standard_normal(p.shape).astype(dtype)
            missing = (i + step) % 7 == 0
            p.grad = None if missing else layout(g)
            r.grad = None if missing else torch.tensor(g, dtype=torch.float64)
        opt.step()
        reference.step()
    for p, r in zip(params, references, strict=True):
        assert p.dtype == dtype
        assert error(p.data, r.detach().numpy()) < tolerance


@pytest.mark.parametrize("name", CASES)
def test_array_api_alone_gives_the_same(name):
    """The reference arithmetic under array_api_strict, which has the standard's functions and no others."""
    ours, _, fixed = CASES[name]
    rng = np.random.default_rng(3)
    start = [rng.standard_normal(shape) for shape in [(4, 5), (), (3,)]]
    gradients = [[rng.standard_normal(x.shape) for x in start] for _ in range(STEPS)]
    results = []
    for asarray in (np.array, array_api_strict.asarray):
        params = [parameter(asarray(x)) for x in start]
        opt = ours(params, lr=0.02, weight_decay=0.1, **fixed)
        for gs in gradients:
            for p, g in zip(params, gs, strict=True):
                p.grad = asarray(g)
            optim.clip_grad_norm(params, 0.5)
            opt.step()
        assert all(type(p.data) is type(asarray(0.0)) for p in params)
        results.append([np.asarray(p.data) for p in params])
    for a, b in zip(*results, strict=True):
        assert error(a, b) < 1e-13


@pytest.mark.parametrize("op", [reference.sgd, reference.adamw, reference.lerp, reference.sum_of_squares])
def test_numpy_arrays_get_the_kernel(op):
    assert kernels.best(op, numpy_namespace) is getattr(optimizers, op.__name__)


@pytest.mark.parametrize("name", CASES)
def test_a_step_updates_in_place_without_large_temporaries(name):
    ours, _, fixed = CASES[name]
    values = np.ones((1000, 1000), np.float32)  # 4 MB
    p = parameter(values)
    decay = 0.0 if name == "adam" else 0.1  # Adam's L2 makes a new gradient
    opt = ours([p], lr=0.1, weight_decay=decay, **fixed)
    p.grad = np.ones_like(values)
    tracemalloc.start()
    opt.step()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert p.data is values
    assert np.all(values < 1)
    assert peak < 4 * optimizers.BLOCK * 2


def test_a_step_invalidates_graphs_that_saved_the_old_values():
    p = parameter(np.ones(3))
    loss = ops.sum(ops.multiply(p, p))
    opt = optim.SGD([p], lr=0.1)
    p.grad = np.ones(3)
    opt.step()
    with pytest.raises(RuntimeError, match="changed in place"):
        loss.backward()


def test_a_step_leaves_the_gradient_alone_and_zero_grad_drops_it():
    rng = np.random.default_rng(0)
    for name, (ours, _, fixed) in CASES.items():
        p = parameter(rng.standard_normal((5, 7)))
        g = rng.standard_normal((5, 7))
        p.grad, before = g, g.copy()
        opt = ours([p], lr=0.1, weight_decay=0.1, **fixed)
        opt.step()
        assert np.array_equal(g, before), name
        opt.zero_grad()
        assert p.grad is None


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", CASES)
def test_a_restored_state_continues_bit_for_bit(name, dtype):
    ours, _, fixed = CASES[name]
    rng = np.random.default_rng(1)
    start = [rng.standard_normal(shape).astype(dtype) for shape in [(3, 4), (5,), ()]]
    gradients = [[rng.standard_normal(x.shape).astype(dtype) for x in start] for _ in range(20)]

    def run(params, opt, chosen):
        for gs in chosen:
            for p, g in zip(params, gs, strict=True):
                p.grad = np.asarray(g)
            opt.step()

    whole = [parameter(x.copy()) for x in start]
    opt = ours(whole, lr=0.01, weight_decay=0.1, **fixed)
    run(whole, opt, gradients[:8])
    halves = [parameter(p.data.copy()) for p in whole]
    state = opt.state_dict()
    run(whole, opt, gradients[8:])  # must not change what state_dict gave

    other = ours(halves, lr=0.5, weight_decay=0.1, **fixed)
    other.load_state_dict(state)
    kept = {key: value.copy() for key, value in state.items()}
    run(halves, other, gradients[8:])  # nor must the one that loaded it
    assert all(np.array_equal(state[key], kept[key]) for key in state)
    for a, b in zip(whole, halves, strict=True):
        assert a.data.tobytes() == b.data.tobytes()
    assert all(np.array_equal(value, other.state_dict()[key]) for key, value in opt.state_dict().items())


def test_state_dict_is_flat_and_counts_steps_per_parameter():
    params = [parameter(np.ones((2, 3), np.float32)), parameter(np.ones(4, np.float32))]
    opt = optim.AdamW(params, lr=0.25)
    params[1].grad = np.ones(4, np.float32)
    opt.step()
    state = opt.state_dict()
    assert {key: (value.dtype.name, value.shape) for key, value in state.items()} == {
        "lr": ("float64", ()), "steps": ("int64", (2,)),
        "0.m": ("float32", (2, 3)), "0.v": ("float32", (2, 3)), "1.m": ("float32", (4,)), "1.v": ("float32", (4,)),
    }  # fmt: skip
    assert state["steps"].tolist() == [0, 1]


def test_loading_another_state_names_every_problem_and_changes_nothing():
    opt = optim.AdamW([parameter(np.ones((2, 3))), parameter(np.ones(4))], lr=0.1)
    state = opt.state_dict()
    del state["0.v"]
    state |= {"lr": np.array(7.0), "2.m": np.ones(1), "1.m": np.ones(5), "1.v": np.ones(4, np.float32)}
    with pytest.raises(ValueError) as caught:
        opt.load_state_dict(state)
    assert str(caught.value) == (
        "optimizer state: 1.m is float64 (5,), expected float64 (4,); 1.v is float32 (4,), expected float64 (4,); "
        "missing 0.v; unexpected 2.m"
    )
    assert opt.lr == 0.1


P = parameter(np.ones((2, 3)))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: optim.SGD([P], lr=-1), "lr must be a number of at least 0, got -1"),
        (lambda: optim.SGD([P], lr=math.nan), "lr must be a number of at least 0, got nan"),
        (lambda: optim.SGD([P], lr=math.inf), "lr must be a number of at least 0, got inf"),
        (lambda: optim.SGD([P], lr="1"), "lr must be a number of at least 0, got '1'"),
        (lambda: optim.SGD([P], lr=1, momentum=-0.1), "momentum must be a number of at least 0, got -0.1"),
        (lambda: optim.SGD([P], lr=1, weight_decay=-1), "weight_decay must be a number of at least 0, got -1"),
        (lambda: optim.SGD([P], lr=1, nesterov=True), "nesterov expects a momentum above 0, got 0.0"),
        (lambda: optim.AdamW([P], betas=(0.9, 1.0)), "betas[1] must be a number of at least 0 and below 1, got 1.0"),
        (lambda: optim.AdamW([P], betas=0.9), "betas must be two numbers, got 0.9"),
        (lambda: optim.Adam([P], eps=-1e-8), "eps must be a number of at least 0, got -1e-08"),
        (lambda: optim.Adam([]), "an optimizer expects at least one parameter, got none"),
        (lambda: optim.Adam([{"params": []}]), "an optimizer expects at least one parameter, got none"),
        (lambda: optim.Adam([P, P]), "parameters 0 and 1 are one and the same"),
        (lambda: optim.Adam([{"params": [P]}, {"params": [P]}]), "parameters 0 and 1 are one and the same"),
        (lambda: optim.Adam([{"params": [P], "lr": 1}]), "a group has params, weight_decay, lr_scale, muon, got lr"),
        (lambda: optim.Adam([{"params": [P], "lr_scale": -1}]), "lr_scale must be a number of at least 0, got -1"),
        (lambda: optim.Adam([Tensor(np.ones(2, int))]), "parameter 0 must be floating, got int64"),
        (lambda: optim.clip_grad_norm([P], -1), "max_norm must be a number of at least 0, got -1"),
        (lambda: optim.EMA(model_of(p=P), 1.0), "decay must be a number of at least 0 and below 1, got 1.0"),
        (lambda: optim.Step(0.1, 0), "step_size must be at least 1, got 0"),
        (lambda: optim.WarmupCosine(0.1, 10, 11), "warmup_steps must be between 0 and total_steps = 10, got 11"),
    ],
)  # fmt: skip
def test_bad_arguments(make, message):
    with pytest.raises((ValueError, TypeError)) as caught:
        make()
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "gradient, message",
    [
        (np.ones((3, 2)), "the gradient of parameter 1 has shape (3, 2), the parameter has (2, 3)"),
        (np.ones((2, 3), np.float32), "the gradient of parameter 1 is float32, the parameter is float64"),
        (
            array_api_strict.ones((2, 3)),
            "the gradient of parameter 1 is of array_api_strict._array_object, the parameter of numpy",
        ),
    ],
)
def test_a_gradient_that_does_not_fit_stops_the_step_before_it_changes_anything(gradient, message):
    params = [parameter(np.ones(2)), parameter(np.ones((2, 3)))]
    params[0].grad, params[1].grad = np.ones(2), gradient
    opt = optim.AdamW(params)
    with pytest.raises((ValueError, TypeError)) as caught:
        opt.step()
    assert str(caught.value) == message
    assert np.array_equal(params[0].data, np.ones(2)) and opt.state_dict()["steps"].tolist() == [0, 0]


def test_a_model_that_changed_its_dtype_is_noticed():
    p = parameter(np.ones(2))
    opt = optim.AdamW([p])
    p.data, p.grad = np.ones(2, np.float32), np.ones(2, np.float32)
    with pytest.raises(TypeError, match="the optimizer's m of parameter 0 is float64, the parameter is float32"):
        opt.step()


def test_param_groups_spare_vectors_tokens_and_position_embeddings():
    shapes = {
        "cls_token": (1, 1, 8), "dist_token": (1, 1, 8), "reg_token": (1, 4, 8), "pos_embed": (1, 5, 8),
        "patch_embed.proj.weight": (8, 3, 4, 4), "patch_embed.proj.bias": (8,), "blocks.0.norm1.weight": (8,),
        "blocks.0.attn.qkv.weight": (24, 8), "blocks.0.attn.qkv.bias": (24,), "blocks.0.ls1.gamma": (8,),
        "head.weight": (10, 8), "head.bias": (10,),
    }  # fmt: skip
    named = {name: parameter(np.ones(shape)) for name, shape in shapes.items()}
    model = types.SimpleNamespace(named_parameters=lambda: named.items())
    decayed, spared = optim.param_groups(model, 0.05)
    names = {id(p): name for name, p in named.items()}
    assert [names[id(p)] for p in decayed["params"]] == [
        "patch_embed.proj.weight",
        "blocks.0.attn.qkv.weight",
        "head.weight",
    ]
    assert len(spared["params"]) == len(shapes) - 3
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.05, 0.0)
    optim.AdamW([decayed, spared], lr=0.1)
    for name in names.values():
        named[name].requires_grad = name == "head.bias"
    (only,) = optim.param_groups(model, 0.05)
    assert only == {"params": [named["head.bias"]], "weight_decay": 0.0, "lr_scale": 1.0}


@pytest.mark.parametrize("dtype, tolerance", [(np.float64, 1e-10), (np.float32, 1e-5)])
@pytest.mark.usefixtures("small_blocks")
@given(
    shapes=SHAPES,
    layout=st.sampled_from(list(LAYOUTS)),
    scale=st.floats(1e-6, 1e6),
    limit=st.floats(1e-3, 1e3),
)
def test_clipping_agrees_with_torch(dtype, tolerance, shapes, layout, scale, limit):
    rng = np.random.default_rng(len(shapes))
    params = [parameter(np.zeros(shape, dtype)) for shape in shapes]
    references = [torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for shape in shapes]
    for p, r in zip(params[1:], references[1:], strict=True):  # the first has no gradient
        p.grad = LAYOUTS[layout]((scale * rng.standard_normal(p.shape)).astype(dtype))
        r.grad = torch.tensor(p.grad.copy(), dtype=torch.float64)
    before = [p.grad for p in params[1:]]
    norm = optim.clip_grad_norm(params, math.inf)
    assert all(p.grad is g for p, g in zip(params[1:], before, strict=True))
    assert optim.clip_grad_norm(params, limit) == norm
    assert isinstance(norm, float)
    rounding = 1e-12 if dtype == np.float64 else 1e-6  # float32's products, summed in float64
    assert norm == pytest.approx(float(torch.nn.utils.clip_grad_norm_(references, limit)), rel=rounding)
    for p, r in zip(params[1:], references[1:], strict=True):
        assert p.grad.dtype == dtype
        assert error(p.grad, r.grad.numpy()) < tolerance


def test_the_norm_of_tiny_float32_gradients_does_not_vanish():
    p = parameter(np.zeros(10_000, np.float32))
    p.grad = np.full(10_000, 1e-25, np.float32)
    assert optim.clip_grad_norm([p], 1.0) == pytest.approx(1e-23, rel=1e-6, abs=0)


def test_the_norm_of_large_float32_gradients_does_not_overflow():
    p = parameter(np.zeros(10_000, np.float32))
    p.grad = np.full(10_000, 1e30, np.float32)
    assert optim.clip_grad_norm([p], 1.0) == pytest.approx(1e32, rel=1e-6)
    assert np.allclose(p.grad, 0.01)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_norm_that_is_not_finite_is_reported_and_nothing_scaled(bad):
    params = [parameter(np.zeros(3)), parameter(np.zeros(2))]
    params[0].grad, params[1].grad = np.array([1.0, bad, 3.0]), np.array([5.0, 6.0])
    norm = optim.clip_grad_norm(params, 1.0)
    assert math.isnan(norm) if math.isnan(bad) else norm == math.inf
    assert np.array_equal(params[0].grad, [1.0, bad, 3.0], equal_nan=True)
    assert np.array_equal(params[1].grad, [5.0, 6.0])
