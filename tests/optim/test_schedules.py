"""Learning-rate schedules, held against torch.optim.lr_scheduler."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tinyvit import optim

STEPS = 50


def torch_rates(make, lr, steps):
    opt = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    schedule = make(opt)
    rates = []
    for _ in range(steps):
        rates.append(opt.param_groups[0]["lr"])
        opt.step()
        schedule.step()
    return rates


@given(lr=st.floats(1e-5, 1.0), final=st.floats(0, 1e-5), warmup=st.integers(1, 30), rest=st.integers(2, 40))
def test_warmup_cosine_agrees_with_torch(lr, final, warmup, rest):
    def make(opt):
        rise = torch.optim.lr_scheduler.LinearLR(opt, start_factor=1 / (warmup + 1), total_iters=warmup)
        fall = torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=rest, eta_min=final)
        return torch.optim.lr_scheduler.SequentialLR(opt, [rise, fall], milestones=[warmup])

    schedule = optim.WarmupCosine(lr, warmup + rest, warmup, final_lr=final)
    steps = warmup + rest + 1
    rates = [schedule(step) for step in range(steps)]
    assert rates == pytest.approx(torch_rates(make, lr, steps), rel=1e-10, abs=1e-16)
    assert schedule(steps + 100) == final and schedule(warmup) == lr
    assert all(a < b for a, b in itertools.pairwise(rates[: warmup + 1]))


def test_cosine_without_warmup_agrees_with_torch():
    rates = [optim.WarmupCosine(0.3, STEPS)(step) for step in range(STEPS)]
    expected = torch_rates(lambda opt: torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=STEPS), 0.3, STEPS)
    assert rates == pytest.approx(expected, rel=1e-10)
    assert optim.WarmupCosine(0.3, 4, 4)(4) == 0.0


@given(lr=st.floats(1e-5, 1.0), size=st.integers(1, 20), gamma=st.floats(0.1, 1.0))
def test_step_agrees_with_torch(lr, size, gamma):
    expected = torch_rates(lambda opt: torch.optim.lr_scheduler.StepLR(opt, size, gamma), lr, STEPS)
    assert [optim.Step(lr, size, gamma)(step) for step in range(STEPS)] == pytest.approx(expected, rel=1e-10)
