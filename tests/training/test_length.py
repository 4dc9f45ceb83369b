"""How long a run is: schedules and time budgets."""

import itertools
import json
import math
import signal
import time
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st
from running import NANO, tinyvit
from runs import epochs_done, interrupt_after, metrics, progress

from tinyvit import optim
from tinyvit.training.schedule import RunLength, learning_rate
from tinyvit.training.time_budget import TimeBudget, steps_that_fit


@given(seconds=st.floats(0.01, 1e5), step=st.floats(1e-3, 10), end=st.floats(0, 100), per_epoch=st.integers(1, 10_000))
def test_as_many_steps_as_fit(seconds, step, end, per_epoch):
    def cost(n):
        return n * step + math.ceil(n / per_epoch) * end

    n = steps_that_fit(seconds, step, end, per_epoch)
    assert n == 1 or cost(n) <= seconds * (1 + 1e-9)
    assert cost(n + 1) > seconds * (1 - 1e-9)


@given(
    total=st.integers(10, 10_000),
    per_epoch=st.integers(1, 1000),
    warmup=st.floats(0, 1.5),
    slower=st.floats(0.2, 5),
    end=st.floats(0, 1) | st.none(),
)
def test_the_number_of_steps_is_corrected_to_what_still_fits(total, per_epoch, warmup, slower, end):
    budget = TimeBudget(1000.0, 0.01, 0.1, RunLength.of(total, per_epoch, warmup))
    step, done = math.ceil(total / 10), total // 20
    budget._last = (done, 7.0)
    batch, cost = step % per_epoch, 0.01 * slower
    with mock.patch("tinyvit.training.time_budget.time.monotonic", return_value=1000.0 - 0.9 * total * 0.01):
        plan = budget.correct(step, batch, 7.0 + (step - done) * cost, end)
    ends = end if end is not None else 0.1 * slower

    def needed(steps):
        return steps * cost + math.ceil((batch + steps) / per_epoch) * ends

    left = plan.total_steps - step
    assert left <= 1 or needed(left) <= 0.9 * total * 0.01 * (1 + 1e-9)
    assert needed(left + 1) > 0.9 * total * 0.01 * (1 - 1e-9)
    assert plan.steps_per_epoch == per_epoch
    learning_rate("cosine", 1.0, plan)(step)  # a warm-up longer than the run would be refused


def test_a_run_ends_when_no_other_step_fits():
    budget = TimeBudget(1000.0, 5.0, 2.0, RunLength.of(12, 100, 0.1))
    for now, due in ((990.0, False), (994.0, True)):  # after step 3, where no correction is planned
        with mock.patch("tinyvit.training.time_budget.time.monotonic", return_value=now):
            assert budget.due_after(3) == due
    with mock.patch("tinyvit.training.time_budget.time.monotonic", return_value=994.0):
        assert budget.correct(3, 3, 15.0, None).total_steps == 3


@given(total=st.integers(1, 5000), per_epoch=st.integers(1, 500), warmup=st.floats(0, 20))
def test_warm_up_is_a_share_or_epochs(total, per_epoch, warmup):
    plan = RunLength.of(total, per_epoch, warmup)
    wanted = warmup * total if warmup < 1 else warmup * per_epoch
    assert plan.warmup_steps == min(round(wanted), total - 1)
    for name in ("cosine", "step", "constant"):
        rate = learning_rate(name, 2.0, plan)
        rates = [rate(i) for i in range(total)]
        assert all(0 < r <= 2 * (1 + 1e-9) for r in rates)
        rising = rates[: plan.warmup_steps + 1]
        if name != "step":
            assert rising == sorted(rising) and max(rates) == pytest.approx(rates[plan.warmup_steps])


def test_schedules():
    plan = RunLength.of(90, 10, 0)
    rate = learning_rate("step", 1.0, plan)
    assert [rate(i) for i in (0, 29, 30, 59, 60, 89)] == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    assert {learning_rate("constant", 1.0, plan)(i) for i in range(90)} == {1.0}
    linear = learning_rate("linear", 1.0, plan)
    assert [linear(i) for i in (0, 45, 89)] == pytest.approx([1, 1 / 2, 1 / 90])
    cosine = learning_rate("cosine", 1.0, RunLength.of(90, 10, 2))
    assert [cosine(i) for i in range(90)] == [optim.WarmupCosine(1.0, 90, 20)(i) for i in range(90)]


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes on whenever it is asked, so that steps take the same time on every machine."""
    clock = itertools.count(1000.0, 0.02)
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    return time.monotonic


def test_minutes_fix_the_steps_so_that_the_schedule_ends_then(images, tmp_path, clock):
    out, minutes = tmp_path / "run", 0.1
    begun = clock()
    result = tinyvit("train", "--data", images, "--out", out, *NANO, "--batch-size", "8", "--minutes", minutes)
    took = clock() - begun
    assert result.returncode == 0, result.stderr
    plan = json.loads((out / "config.json").read_text())["plan"]
    last = metrics(out)[-1]
    assert last["step"] == plan["total_steps"] == progress(out / "last.safetensors")["step"] > 18
    assert last["epoch"] == math.ceil(plan["total_steps"] / 9)
    end = optim.WarmupCosine(1e-3, plan["total_steps"], plan["warmup_steps"])(plan["total_steps"] - 1)
    assert last["lr"] == end
    assert " into 0:0" in result.stdout
    assert 0.7 < took / (60 * minutes) < 1.05


def test_a_run_of_some_minutes_keeps_its_steps_when_resumed(images, tmp_path, clock, monkeypatch):
    out = tmp_path / "run"
    arguments = ["train", "--data", images, "--out", out, *NANO, "--batch-size", "8", "--minutes", "0.06"]
    interrupt_after(monkeypatch, 10)
    assert tinyvit(*arguments).returncode == 128 + signal.SIGINT and epochs_done(out) == 1
    plan = json.loads((out / "config.json").read_text())["plan"]
    assert tinyvit(*arguments, "--resume").returncode == 0
    assert json.loads((out / "config.json").read_text())["plan"] == plan
    assert metrics(out)[-1]["step"] == plan["total_steps"]
