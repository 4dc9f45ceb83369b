"""Mixed precision: 16-bit products over float32 masters, and the scale of a float16 loss."""

import functools
import json
import math
import sys
from unittest import mock

import array_api_strict
import numpy as np
import pytest
import torch
from drawing import BACKENDS, LIBRARIES, error
from hypothesis import given
from hypothesis import strategies as st
from on_gpu import needs_gpu
from running import assert_one_line_error, make_images, tinyvit
from runs import assert_same_weights, train_with_stops
from safetensors.numpy import load_file

from tinyvit import TrainStep, create_model, nn, optim, predict
from tinyvit.backend import arrays
from tinyvit.execution.precision import LossScale, Precision
from tinyvit.kernels.cuda import cublas

HALF = {"bf16": "bfloat16", "fp16": "float16"}
ROUNDING = {"bf16": 2.0**-8, "fp16": 2.0**-11}  # relative, of one number
CARRIERS = [backend for backend in BACKENDS if backend != "array_api_strict"]  # libraries that have 16 bits
RATES = dict(drop_path=0.3, drop_rate=0.2, attn_drop_rate=0.2, proj_drop_rate=0.2, pos_drop_rate=0.1)


@pytest.fixture(autouse=True)
def no_overflow():
    """A scale that these models' gradients bear at once, unless a test sets another."""
    with mock.patch.object(LossScale, "START", 2.0**10):
        yield


def nano(backend="numpy", dtype="float32", **overrides):
    overrides = dict(image_size=8, patch_size=4, embed_dim=16, num_classes=5, init_values=0.5) | overrides
    model = create_model("vit_nano_patch8_32", **overrides)
    rng = np.random.default_rng(0)
    model.head.weight.data = (rng.standard_normal(model.head.weight.shape) * 0.2).astype(np.float32)
    model.cls_token.data = rng.standard_normal(model.cls_token.shape).astype(np.float32)  # zeros enlarge rounding
    return model.to(LIBRARIES[backend], dtype)


def batch(n=11, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, 3, 8, 8)).astype(np.float32), rng.integers(0, 5, n)


def weights(model):
    return np.concatenate([p.numpy().reshape(-1) for p in model.parameters()])


class Recording(optim.SGD):
    """Keeps the gradients that the last update is given, without their scale, and their dtypes."""

    def update(self, max_norm, loss_scale, *more):
        scale = 1.0 if loss_scale is None else float(loss_scale.value)
        gradients = [slot.parameter.grad for slot in self._slots]
        self.dtypes = {arrays.dtype_name(g.dtype) for g in gradients}
        numbers = [arrays.to_numpy(g).reshape(-1).astype(np.float32) for g in gradients]
        self.gradients = np.concatenate(numbers) / np.float32(scale)
        return super().update(max_norm, loss_scale, *more)


def gradient(precision, backend="numpy", rates=None, threads=1, n_shards=1, model=None):
    """Loss, norm and gradient of one step."""
    model = nano(backend, **(rates or {})) if model is None else model
    opt = Recording([p for p in model.parameters() if p.requires_grad], lr=0.0)
    step = TrainStep(model, opt, threads=threads, shards=n_shards, seed=5, precision=precision)
    loss = float(step(*batch()))
    assert backend == "cupy" or opt.dtypes == {"float32"}  # a GPU's, of one sum, stay as they are
    return loss, step.grad_norm, opt.gradients


# --- what is computed -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", CARRIERS)
@pytest.mark.parametrize("rates", [None, RATES], ids=["plain", "dropout"])
@pytest.mark.parametrize("precision", HALF)
def test_the_gradient_is_float32_s_to_the_rounding_of_16_bits(precision, rates, backend):
    loss, norm, expected = gradient("fp32", rates=rates)
    got_loss, got_norm, got = gradient(precision, backend, rates)
    difference = np.linalg.norm(got - expected) / np.linalg.norm(expected)
    assert ROUNDING[precision] / 50 < difference < 5 * ROUNDING[precision]  # it is rounded, and no more than that
    assert got_loss == pytest.approx(loss, rel=2 * ROUNDING[precision]) and got_loss != loss
    assert got_norm == pytest.approx(norm, rel=5 * ROUNDING[precision])


@pytest.mark.parametrize("precision", HALF)
def test_shards_add_up_in_float32_and_threads_change_no_bit(precision):
    whole = gradient(precision)[2]
    parts = [gradient(precision, threads=threads, n_shards=3) for threads in (1, 2, 3)]
    assert np.linalg.norm(parts[0][2] - whole) < 3 * ROUNDING[precision] * np.linalg.norm(whole)
    for other in parts[1:]:
        assert other[0] == parts[0][0] and other[2].tobytes() == parts[0][2].tobytes()


@pytest.mark.parametrize("backend", CARRIERS)
@pytest.mark.parametrize("precision", HALF)
def test_updates_below_a_copy_s_last_digit_are_kept_in_the_masters(precision, backend):
    model = nano(backend)
    before = {name: p.copy() for name, p in model.state_dict().items()}
    step = TrainStep(model, optim.SGD(model.parameters(), lr=1e-5), precision=precision)
    step(*batch())
    after = model.state_dict()
    changed = {name: after[name] != before[name] for name in after}
    before_copies, after_copies = (
        {name: arrays.astype(x, HALF[precision]) for name, x in state.items()} for state in (before, after)
    )
    assert all(x.dtype == np.float32 for x in after.values())
    assert changed["norm.weight"].any()  # of ones, where 16 bits have gaps of 1/128 or 1/1024
    assert np.array_equal(before_copies["norm.weight"], after_copies["norm.weight"])
    for _ in range(30):
        step(*batch())
    last = model.state_dict()["norm.weight"]
    assert np.abs(last - before["norm.weight"]).max() > 10 * np.abs(after["norm.weight"] - before["norm.weight"]).max()


@functools.cache
def losses(precision, backend="numpy"):
    model = nano(backend)
    groups = optim.param_groups(model, 0.05)
    step = TrainStep(model, optim.AdamW(groups, lr=3e-3), clip_norm=1.0, ema=optim.EMA(model, 0.9), precision=precision)
    return [float(step(*batch(32, seed=i % 4))) for i in range(40)]


@pytest.mark.parametrize("backend", CARRIERS)
@pytest.mark.parametrize("precision", HALF)
def test_training_goes_as_in_float32(precision, backend):
    expected, got = losses("fp32"), losses(precision, backend)
    assert expected[-1] < 0.5 * expected[0]
    assert np.abs(np.array(got) - expected).max() < 20 * ROUNDING[precision]


@pytest.mark.parametrize("backend", CARRIERS)
@pytest.mark.parametrize("precision", HALF)
def test_predict_rounds_and_leaves_the_masters_alone(precision, backend):
    model = nano(backend)
    x, _ = batch()
    before, expected = weights(model), predict(nano(), x)
    scores = predict(model, x, batch_size=4, precision=precision)
    assert scores.dtype == np.float32 and np.array_equal(weights(model), before)
    assert 1e-6 < error(scores, expected) < 4 * ROUNDING[precision]
    with pytest.raises(ValueError, match="expected images"):
        predict(model, x[:, :2], precision=precision)
    assert np.array_equal(weights(model), before)


class Shifted(nn.Module):
    def __init__(self):
        self.linear, self.shift = nn.Linear(3, 2), nn.Buffer(np.ones(2, np.float32))

    def forward(self, x):
        return self.linear(arrays.astype(x, self.linear.weight.dtype)) + self.shift


@pytest.mark.parametrize("precision", HALF)
def test_predict_writes_nothing_into_the_model_meanwhile(precision):
    """So another thread may use the model; its floating buffers are rounded with the weights."""
    model, seen = Shifted(), []

    def watch(module, _):
        if isinstance(module, Shifted):
            tensors = (module.linear.weight, module.shift, model.linear.weight, model.shift)
            seen.append([t.dtype.itemsize for t in tensors])

    with nn.forward_pre_hook(watch):
        predict(model, np.ones((4, 3), np.float32), precision=precision, threads=1)
    assert seen == [[2, 2, 4, 4]]


@pytest.mark.parametrize("precision", HALF)
def test_frozen_parameters_run_in_16_bits_too(precision):
    model = nano()
    model.blocks[0].requires_grad_(False)
    reference = nano()
    reference.blocks[0].requires_grad_(False)
    expected, got = gradient("fp32", model=reference)[2], gradient(precision, model=model)[2]
    assert np.linalg.norm(got - expected) < 5 * ROUNDING[precision] * np.linalg.norm(expected)


@needs_gpu
def test_tf32_rounds_products():
    if cublas.library() is None:
        pytest.skip("nvmath-python is not installed")
    expected, got = gradient("fp32", "cupy")[2], gradient("tf32", "cupy")[2]
    assert 1e-6 < np.linalg.norm(got - expected) / np.linalg.norm(expected) < 2.0**-8


# --- the scale of a float16 loss --------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@given(norms=st.lists(st.sampled_from([1.0, 0.0, 1e30, np.inf, np.nan]), max_size=12))
def test_the_scale_goes_as_torch_s(backend, norms):
    xp = LIBRARIES[backend]
    with mock.patch.object(LossScale, "GROW_AFTER", 3):
        ours = LossScale(xp.asarray(np.zeros(1, np.float32)))
        scale, growth = torch.tensor(ours.START), torch.tensor(0, dtype=torch.int32)
        for norm in norms:
            finite = bool(np.isfinite(norm))
            torch._amp_update_scale_(scale, growth, torch.tensor(float(not finite)), 2.0, 0.5, 3)
            assert ours.update(xp.asarray(norm, dtype=xp.float64)) == finite
            state = ours.state_dict()
            assert (float(state["loss_scale"]), int(state["good_steps"])) == (float(scale), int(growth))


def test_the_scale_has_limits(monkeypatch):
    monkeypatch.delattr(arrays.numpy_namespace, "clip")  # CuPy's waits twice for the device
    scale = LossScale(np.zeros(1, np.float32))
    for _ in range(40):
        scale.update(np.inf)
    assert float(scale.value) == 1.0
    with mock.patch.object(LossScale, "GROW_AFTER", 1):
        for _ in range(40):
            scale.update(1.0)
    assert float(scale.value) == LossScale.LARGEST and np.isfinite(np.float32(LossScale.LARGEST))


@pytest.mark.parametrize("backend", CARRIERS)
def test_the_scale_saves_small_gradients_and_is_taken_out_again(backend):
    """A head that is sure of the right class: the others' probabilities are below float16's smallest number."""

    def sure(backend="numpy"):
        model = nano(backend)
        model.head.bias.data = arrays.convert(np.array([21.0, 0, 0, 0, 0], np.float32), model.head.bias.data)
        return model

    def of_class_0(precision, backend, scale=None):
        model = sure(backend)
        step = TrainStep(model, Recording(model.parameters(), lr=0.0), threads=1, precision=precision)
        if scale is not None:
            step._scale.value[...] = scale
        step(batch()[0], np.zeros(11, np.int64))
        return step.optimizer.gradients

    expected = of_class_0("fp32", "numpy")
    assert 0 < np.abs(expected).max() < 2.0**-25
    assert not of_class_0("fp16", backend, scale=1.0).any()
    got = of_class_0("fp16", backend, scale=2.0**16)
    assert np.linalg.norm(got - expected) < 0.05 * np.linalg.norm(expected)  # the logits, about 20, have gaps of 1/64


@pytest.mark.parametrize("backend", CARRIERS)
def test_a_gradient_that_overflows_changes_nothing_but_the_scale(backend):
    def make(scale):
        model = nano(backend)
        opt, ema = optim.AdamW(model.parameters(), lr=0.01), optim.EMA(model, 0.5)
        step = TrainStep(model, opt, clip_norm=0.5, ema=ema, precision="fp16")
        step._scale.value[...] = scale
        return model, opt, ema, step

    def everything(model, opt, ema, step):
        parts = {"": model.state_dict(), "optimizer.": opt.state_dict(), "ema.": ema.state_dict()}
        return {prefix + name: x for prefix, state in parts.items() for name, x in state.items()}

    parts = make(2.0**24)
    step, before, skipped = parts[3], everything(*parts), 0
    while True:
        loss = float(step(*batch()))
        assert np.isfinite(loss)
        if np.isfinite(step.grad_norm):
            break
        skipped += 1
        assert step.loss_scale == 2.0 ** (24 - skipped)
        after = everything(*parts)
        assert all(np.array_equal(before[name], after[name]) for name in before)
    assert skipped > 3 and step.step_index == skipped + 1
    fresh = make(step.loss_scale)
    fresh[3](*batch())
    expected, got = everything(*fresh), everything(*parts)
    assert all(expected[name].tobytes() == got[name].tobytes() for name in expected)


def test_a_step_in_16_bits_reads_only_whether_it_overflowed():
    """Nothing else is turned into a Python number: the step's own numbers stay arrays."""
    model = nano()
    step = TrainStep(model, optim.SGD(model.parameters(), lr=0.01), precision="fp16")
    with mock.patch.object(LossScale, "update", return_value=False) as update:
        step(*batch())
    assert update.call_count == 1 and np.array_equal(weights(model), weights(nano()))


@pytest.mark.parametrize("precision", HALF)
def test_an_interrupted_run_goes_on_with_the_same_bits(precision, tmp_path, monkeypatch):
    """With a scale that is halved and doubled on the way."""
    from tinyvit.training.run import train

    monkeypatch.setattr(LossScale, "START", 2.0**20)
    monkeypatch.setattr(LossScale, "GROW_AFTER", 4)
    images = make_images(tmp_path / "images")
    given = dict(data=str(images), model="vit_nano_patch8_32", batch_size=8, epochs=2, device="cpu", ema=0.9)
    given["precision"] = precision
    train({**given, "out": str(tmp_path / "whole")})
    assert train_with_stops(monkeypatch, {**given, "out": str(tmp_path / "parts")}, asked=5) >= 3
    assert_same_weights(tmp_path / "whole", tmp_path / "parts")
    for name in ("last.safetensors", "best.safetensors"):
        saved = load_file(tmp_path / "whole" / name)
        weights = [x for key, x in saved.items() if not key.startswith(("optimizer.", "ema.", "step."))]
        assert {x.dtype for x in weights} == {np.dtype(np.float32)}
    scales = load_file(tmp_path / "whole" / "last.safetensors").keys() & {"step.loss_scale", "step.good_steps"}
    assert len(scales) == (2 if precision == "fp16" else 0)
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert config["options"]["precision"] == precision and config["device"] == "cpu"


# --- errors -----------------------------------------------------------------------------------------------------------

TF32_ON_CPU = "precision tf32 is a GPU's, and the model is on a CPU: expected fp32"


@pytest.mark.parametrize(
    "name, model, message",
    [
        ("bf16", lambda: nano(dtype="float64"), "precision bf16 expects a float32 model, got float64"),
        ("tf32", nano, TF32_ON_CPU),
        ("fp16", lambda: nano().to(array_api_strict), "precision fp16: unknown dtype 'float16'"),
    ],
)
def test_precisions_that_cannot_be(name, model, message):
    model = model()
    for make in (
        lambda: Precision(name, model.parameters()),
        lambda: TrainStep(model, optim.SGD(model.parameters(), lr=0.1), precision=name),
        lambda: predict(model, batch()[0], precision=name),
    ):
        with pytest.raises(ValueError) as caught:
            make()
        assert str(caught.value).startswith(message)


def test_arrays_that_cannot_be_changed_train_in_fp32_only():
    model = nano().to(pytest.importorskip("jax.numpy"))
    with pytest.raises(ValueError, match="precision bf16 rounds weights in place"):
        TrainStep(model, optim.SGD(model.parameters(), lr=0.1), precision="bf16")


def test_bf16_without_ml_dtypes(monkeypatch):
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    for lacks, words in (
        ("", "precision bf16: bfloat16 needs ml_dtypes: pip"),
        ("X", "needs X or, slower than fp32, ml_dtypes"),
    ):
        monkeypatch.setattr("tinyvit.kernels.jit.missing", lambda lacks=lacks: lacks)
        monkeypatch.setattr("tinyvit.kernels.bf16.available", lambda: False)
        with pytest.raises(ValueError, match=words):
            Precision("bf16", nano().parameters())
    Precision("fp16", nano().parameters())


def test_a_write_into_a_weight_is_seen_by_the_next_step():
    model = create_model("vit_nano_patch8_32", num_classes=10)
    rng = np.random.default_rng(0)
    model.head.weight.data = rng.standard_normal((10, 64)).astype(np.float32)
    step = TrainStep(model, optim.SGD(model.parameters(), 0.0), precision="fp16")
    images, labels = rng.standard_normal((4, 3, 32, 32)).astype(np.float32), np.arange(4)
    assert abs(float(step(images, labels).data) - math.log(10)) > 0.1
    model.head.weight.data[...] = 0.0
    assert float(step(images, labels).data) == pytest.approx(math.log(10), rel=1e-5)


def test_a_state_for_another_precision():
    model = nano()
    step = TrainStep(model, optim.SGD(model.parameters(), lr=0.1))
    assert step.state_dict() == {} and step.loss_scale == 1.0
    with pytest.raises(ValueError, match="precision fp32 has no state, got loss_scale"):
        step.load_state_dict({"loss_scale": np.float32(2)})
    step = TrainStep(model, optim.SGD(model.parameters(), lr=0.1), precision="fp16")
    with pytest.raises(ValueError, match="missing loss_scale"):
        step.load_state_dict({})


def test_the_command_line(tmp_path):
    images = make_images(tmp_path / "images")
    common = ["--data", images, "--model", "vit_nano_patch8_32", "--epochs", 1, "--device", "cpu"]
    message = assert_one_line_error(tinyvit("train", *common, "--precision", "tf32", "--out", tmp_path / "a"), 1)
    assert message == f"{TF32_ON_CPU}, bf16 or fp16"
    message = assert_one_line_error(tinyvit("train", *common, "--precision", "half"), 2)
    assert message == "--precision: expected fp32, tf32, bf16 or fp16, got 'half'"
    assert tinyvit("train", *common, "--precision", "bf16", "--out", tmp_path / "b").returncode == 0
    scores = [
        json.loads(
            tinyvit("eval", tmp_path / "b", "--data", images, "--split", "test", "--json", "--precision", name).stdout
        )["loss"]
        for name in ("fp32", "bf16")
    ]
    assert scores[0] != scores[1] and scores[1] == pytest.approx(scores[0], rel=0.02)
    recorded = json.loads((tmp_path / "b" / "metrics.jsonl").read_text())["val_loss"]
    assert recorded == pytest.approx(scores[1], rel=1e-6)  # a run evaluates as it trains


def test_precisions_that_are_not_known(monkeypatch):
    monkeypatch.setattr("tinyvit.kernels.int8.available", lambda: False)
    model = nano()
    known = "expected a precision of fp32, tf32, bf16, fp16"
    monkeypatch.setattr("tinyvit.kernels.jit._installed", lambda: False)
    needs = 'numba 0.62 or newer (pip install "tinyvit[jit]")'
    for name, of_training, of_predictions in (
        ("half", f"{known}, got 'half'", f"{known}, int8, got 'half'"),
        *(
            (
                wrong,
                f"{known}, got '{wrong}'; did you mean {right}?",
                f"{known}, int8, got '{wrong}'; did you mean {right}?",
            )
            for wrong, right in (("BF16", "bf16"), ("bfloat16", "bf16"), ("fp-16", "fp16"), ("TF32", "tf32"))
        ),
        (
            "int8",
            f"{known}, got 'int8': it is for predictions alone, train in bf16 or fp32",
            f"precision int8 needs {needs}: expected fp32, bf16 or fp16",
        ),
    ):
        with pytest.raises(ValueError) as caught:
            TrainStep(model, optim.SGD(model.parameters(), lr=0.1), precision=name)
        assert str(caught.value) == of_training
        with pytest.raises(ValueError) as caught:
            predict(model, batch()[0], precision=name)
        assert str(caught.value) == of_predictions
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with pytest.raises(
        ValueError, match=r"bf16 on a CPU needs numba .* or, slower than fp32, ml_dtypes .*: expected fp32 or fp16"
    ):
        predict(model, batch()[0], precision="bf16")
    with pytest.raises(ValueError, match="precision int8 is for models on a CPU: --device cpu, or model"):
        predict(nano().to(array_api_strict), batch()[0], precision="int8")
    with pytest.raises(ValueError, match="precision int8 expects a float32 model, got float64"):
        predict(nano(dtype="float64"), batch()[0], precision="int8")
