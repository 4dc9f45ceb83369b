"""Averaged weights, held against torch.optim.swa_utils."""

import array_api_strict
import numpy as np
import pytest
import torch
from optimizing import STEPS, error, model_of, parameter

from tinyvit import optim
from tinyvit.engine.tensor import Tensor


@pytest.mark.parametrize("dtype, tolerance", [(np.float64, 1e-10), (np.float32, 1e-5)])
@pytest.mark.parametrize("decay", [0.0, 0.5, 0.99, 0.9999])
@pytest.mark.usefixtures("small_blocks")
def test_ema_agrees_with_torch(decay, dtype, tolerance):
    rng = np.random.default_rng(5)
    model = model_of(
        a=parameter(rng.standard_normal((7, 6)).astype(dtype)),
        b=parameter(np.ones((9, 4), dtype).T),
    )
    reference = torch.nn.Linear(6, 7).double()
    reference.bias = torch.nn.Parameter(torch.tensor(model.b.data, dtype=torch.float64))
    reference.weight.data = torch.tensor(model.a.data, dtype=torch.float64)
    average = torch.optim.swa_utils.AveragedModel(
        reference, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(decay)
    )
    average.update_parameters(reference)  # the first update copies
    ema = optim.EMA(model, decay)
    for _ in range(STEPS):
        for p, r in ((model.a, reference.weight), (model.b, reference.bias)):
            change = rng.standard_normal(p.shape).astype(dtype)
            p.data = p.data + change
            r.data = torch.tensor(p.data, dtype=torch.float64)
        ema.update()
        average.update_parameters(reference)
    state = ema.state_dict()
    assert state["a"].dtype == dtype
    assert error(state["a"], average.module.weight.detach().numpy()) < tolerance
    assert error(state["b"], average.module.bias.detach().numpy()) < tolerance


@pytest.mark.parametrize("skipped, expected", [(None, 4.0), (0.0, 4.0), (1.0, 0.0)])
@pytest.mark.parametrize("xp", [np, array_api_strict])
def test_ema_does_not_follow_a_step_that_was_skipped(xp, skipped, expected):
    model = model_of(p=parameter(xp.zeros(3, dtype=xp.float32)))
    ema = optim.EMA(model, 0.5)
    model.p.data = xp.full(3, 8.0, dtype=xp.float32)
    ema.update(None if skipped is None else xp.asarray(skipped, dtype=xp.float64))
    assert np.array_equal(ema.state_dict()["p"], np.full(3, expected, np.float32))


def test_what_is_frozen_is_not_averaged():
    model = model_of(p=parameter(np.zeros(3)), frozen=Tensor(np.zeros(2)))
    assert list(optim.EMA(model, 0.5).state_dict()) == ["p"]


def test_ema_is_applied_within_its_context_only():
    model = model_of(p=parameter(np.zeros(3)))
    ema = optim.EMA(model, 0.5)
    own = model.p.data = np.full(3, 8.0)
    ema.update()
    for _ in range(2):
        with pytest.raises(KeyError), ema.applied():
            assert np.array_equal(model.p.data, np.full(3, 4.0))
            for refused in (
                ema.update,
                ema.state_dict,
                lambda: ema.applied().__enter__(),
                lambda: ema.load_state_dict({}),
            ):
                with pytest.raises(RuntimeError, match="the averaged ones are applied"):
                    refused()
            raise KeyError("the parameters come back after an error too")
        assert model.p.data is own
    assert np.array_equal(ema.state_dict()["p"], np.full(3, 4.0))


def test_ema_state_continues_bit_for_bit_and_is_checked():
    rng = np.random.default_rng(9)
    model = model_of(p=parameter(rng.standard_normal(5).astype(np.float32)))
    ema, other = optim.EMA(model, 0.9), optim.EMA(model, 0.9)
    model.p.data = rng.standard_normal(5).astype(np.float32)
    ema.update()
    state = ema.state_dict()
    other.load_state_dict(state)
    for e in (ema, other):
        e.update()
    assert ema.state_dict()["p"].tobytes() == other.state_dict()["p"].tobytes() != state["p"].tobytes()
    with pytest.raises(ValueError, match=r"averaged weights: missing p; unexpected q"):
        ema.load_state_dict({"q": state["p"]})
    model.p.data = np.ones(5)
    with pytest.raises(TypeError, match="the average of p is float32, the parameter is float64"):
        ema.update()
