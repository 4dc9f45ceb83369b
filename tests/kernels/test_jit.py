"""The kernels that numba compiles: accuracy, infinities and NaN, whole steps, and how they come to be used or not.

`test_layers.py` holds them to torch beside the other versions.
"""

import contextlib
import importlib
import math
import os
import subprocess
import sys
import weakref
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as TF
from drawing import check, place, sides, torch_vjp, values
from hypothesis import example, given, settings
from hypothesis import strategies as st
from operations import Example, agrees_with_torch, padded, windows
from PIL import Image
from safetensors.numpy import save_file

pytest.importorskip("numba")

import tinyvit
from tinyvit import kernels, optim
from tinyvit.backend.arrays import numpy_namespace as xp
from tinyvit.kernels import reference
from tinyvit.kernels.jit import compiling, has, image_loops, layers, loops, processor_name, products

OPERATIONS = kernels._merged("cpu", "jit")
GRID = np.concatenate([np.linspace(-12, 12, 40_001), np.geomspace(1e-30, 100, 500), -np.geomspace(1e-30, 100, 500)])
GRID = GRID.astype(np.float32)


@pytest.fixture
def jit(monkeypatch):
    """Within a test these kernels run."""
    monkeypatch.setenv("TINYVIT_JIT", "1")
    kernels._fastest.cache_clear()
    yield
    kernels._fastest.cache_clear()


def noise(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def test_numpy_s_blas_is_found():
    """In NumPy's own wheels for this system; elsewhere its kernels do the products."""
    assert layers.SGEMM or sys.platform == "darwin"


@pytest.mark.parametrize("value, wanted", [("0", False), ("off", False), ("False", False), ("1", True), ("", True)])
def test_the_environment_leaves_them_out(value, wanted):
    assert kernels.jit.wanted({"TINYVIT_JIT": value}) is wanted


def test_exp_is_exact():
    x = np.linspace(-87, 88, 20_001, dtype=np.float32)
    y = np.array([loops.exp(v) for v in x])
    assert np.abs(y / np.exp(x.astype(np.float64)) - 1).max() < 1.2e-7
    assert [loops.exp(np.float32(v)) for v in (-np.inf, -1e30, -100, 0, 100, np.inf)] == [0, 0, 0, 1, np.inf, np.inf]
    assert np.isnan(loops.exp(np.float32(np.nan)))


@pytest.mark.parametrize("needed", [True, False])
def test_gelu_is_exact(needed):
    """Without a gradient it is computed in another way."""
    identity, bias = np.ones((1, 1), np.float32), np.zeros(1, np.float32)
    run = OPERATIONS[reference.linear_gelu]
    y, vjp = run(xp, GRID[:, None], identity, bias, approximate="none", needs=(needed, False, False))
    wide = GRID.astype(np.float64)
    phi = np.array([0.5 * math.erfc(-v * math.sqrt(0.5)) for v in wide])
    slope = phi + wide * np.exp(-0.5 * wide**2) / math.sqrt(2 * math.pi)
    assert (np.abs(y[:, 0] - wide * phi) / np.maximum(np.abs(wide), 1)).max() < (1.5e-7 if needed else 2e-7)
    if needed:
        assert np.abs(vjp(np.ones_like(y))[0][:, 0] - slope).max() < 3e-7


@pytest.mark.parametrize("needed", [True, False])
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_of_large_values(approximate, needed):
    x = np.array([1e4, -1e4, 50.0, -50.0, 0.0, np.nan], np.float32)[:, None]
    identity, bias = np.ones((1, 1), np.float32), np.zeros(1, np.float32)
    run = OPERATIONS[reference.linear_gelu]
    y, vjp = run(xp, x, identity, bias, approximate=approximate, needs=(needed, False, False))
    assert y[:5, 0].tolist() == pytest.approx([1e4, 0, 50, 0, 0], abs=1e-30)
    assert np.isnan(y[5, 0])
    if needed:
        assert vjp(np.ones_like(y))[0][:5, 0].tolist() == pytest.approx([1, 0, 1, 0, 0.5], abs=1e-29)


@pytest.mark.parametrize(
    "openblas, needs", [(True, (1, 1, 1)), (True, (1, 0, 0)), (True, (0, 1, 0)), (False, (1, 1, 1))]
)
def test_gelu_of_a_large_layer(monkeypatch, openblas, needs):
    """By NumPy's BLAS, or through NumPy where that has no known name. What lies between is kept until it is used."""
    monkeypatch.setattr(layers, "SGEMM", layers.SGEMM if openblas else 0)
    x, weight, bias = noise(2900, 256), noise(3072, 256, seed=1) / 16, noise(3072, seed=2)
    dy = noise(2900, 3072, seed=3)
    inputs = [torch.tensor(a).requires_grad_() for a in (x, weight, bias)]
    expected = TF.gelu(TF.linear(*inputs))
    expected.backward(torch.tensor(dy))
    y, vjp = layers.linear_gelu(xp, x, weight, bias, approximate="none", needs=tuple(map(bool, needs)))
    assert np.abs(y - expected.detach().numpy()).max() < 1e-5
    for got, wanted, needed in zip(vjp(dy), inputs, needs, strict=True):
        assert (got is not None) == needed
        assert not needed or np.abs(got - wanted.grad.numpy()).max() < 1e-5 * float(wanted.grad.abs().max())


def test_a_frozen_weight_keeps_no_activations():
    x, weight, bias = noise(100, 64), noise(64, 64, seed=1), noise(64, seed=2)
    alive = weakref.ref(x)
    _, vjp = OPERATIONS[reference.linear](xp, x, weight, bias, needs=(True, False, False))
    del x
    assert alive() is None and vjp(noise(100, 64))[1:] == (None, None)


@pytest.mark.parametrize("tokens, queries", [(65, None), (577, 1), (300, 290)])
def test_attention_over_several_tiles(tokens, queries):
    """More scores than one tile holds, kept for a gradient or not."""
    qkv, dy = noise(2, tokens, 3 * 32), noise(2, queries or tokens, 32, seed=1)
    run, parameters = OPERATIONS[reference.qkv_attention], {"num_heads": 2, "queries": queries}
    wide, vjp = reference.qkv_attention(xp, qkv.astype(np.float64), needs=(True,), **parameters)
    (expected,) = vjp(dy.astype(np.float64))
    y, vjp = run(xp, qkv, needs=(True,), **parameters)
    assert np.abs(y - wide).max() < 1e-6 and np.abs(vjp(dy)[0] - expected).max() < 2e-6
    assert np.abs(run(xp, qkv, needs=(False,), **parameters)[0] - wide).max() < 1e-6


def test_scores_of_thousands_do_not_overflow():
    qkv = 30 * noise(1, 9, 3 * 2 * 16)
    expected, _ = reference.qkv_attention(xp, qkv.astype(np.float64), num_heads=2, needs=(False,))
    y, _ = OPERATIONS[reference.qkv_attention](xp, qkv, num_heads=2, needs=(False,))
    assert np.abs(y - expected).max() < 0.01  # scores are rounded to 1e-4, values reach 100


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["layer_norm", "qkv_attention", "linear", "linear_gelu"])
@pytest.mark.parametrize("tokens", [5, 3 * products.ROWS])
def test_what_is_not_finite_shows_where_the_reference_shows_it(name, bad, tokens):
    """With many tokens in blocks of registers."""
    heads_of = 4 if tokens == 5 else products.COLUMNS
    x = noise(2, tokens, 3 * 2 * heads_of if name == "qkv_attention" else 12)
    x[1, 2, 3] = bad
    weight, bias = noise(products.COLUMNS + 8, 12, seed=1), noise(products.COLUMNS + 8, seed=2)
    inputs, parameters = {
        "layer_norm": ((x, noise(12, seed=3), noise(12, seed=4)), {"eps": 1e-6}),
        "qkv_attention": ((x,), {"num_heads": 2}),
        "linear": ((x, weight, bias), {}),
        "linear_gelu": ((x, weight, bias), {"approximate": "none"}),
    }[name]
    op = getattr(reference, name)
    with np.errstate(all="ignore"):
        expected, _ = op(xp, *inputs, needs=(False,) * len(inputs), **parameters)
    y, _ = OPERATIONS[op](xp, *inputs, needs=(False,) * len(inputs), **parameters)
    assert np.array_equal(np.isfinite(y), np.isfinite(expected))
    assert np.array_equal(np.isnan(y), np.isnan(expected))


@pytest.mark.parametrize("order", ["C", "F"])
def test_adamw_follows_the_reference_in_float64(order):
    arrays = [np.asarray(noise(37, 11, seed=i), order=order) for i in range(4)]
    arrays[3] = np.abs(arrays[3])
    wide = [x.astype(np.float64) for x in arrays]
    settings = dict(lr=0.01, beta1=0.9, beta2=0.99, eps=1e-6, weight_decay=0.1)
    for step in (1, 2, 50):
        assert OPERATIONS[reference.adamw](xp, *arrays, step=step, **settings)[0] is arrays[0]
        reference.adamw(xp, *wide, step=step, **settings)
        assert max(np.abs(a - b).max() for a, b in zip(arrays, wide, strict=True)) < 2e-6


def test_what_was_compiled_before_a_file_changed_is_forgotten(tmp_path, monkeypatch):
    """Also of another directory, and where NUMBA_CACHE_DIR keeps it."""
    monkeypatch.setattr("numba.config.CACHE_DIR", str(tmp_path / "elsewhere"))
    directories = [tmp_path / "a", tmp_path / "b"]
    subpath = compiling._CacheLocator.get_suitable_cache_subpath(str(tmp_path / "b" / "x.py"))
    caches = [tmp_path / "elsewhere" / subpath, *(directory / "__pycache__" for directory in directories)]
    files = [(tmp_path / "a" / "x.py", 300), (tmp_path / "b" / "x.py", 100)]
    for cache in caches:
        cache.mkdir(parents=True)
        files += [(cache / "x.old.nbi", 200), (cache / "x.new.nbi", 400)]
    for file, time in files:
        file.touch()
        os.utime(file, (time, time))
    compiling._forget_older(directories)
    assert [[file.name for file in cache.glob("*.nbi")] for cache in caches] == [["x.new.nbi"]] * 3


@given(data=st.data())
def test_small_products_agree_with_numpy_s_and_write_nothing_else(data):
    """In blocks, or where there are too few rows or columns by OpenBLAS: matrices are parts of larger ones."""
    m, n, k = (data.draw(st.integers(1, most)) for most in (40, 70, 20))
    kind, beta = data.draw(st.sampled_from(["A B", "A^T B", "A B^T"])), data.draw(st.sampled_from([0, 0, 0.5]))
    a = noise(*((k, m + 3) if kind == "A^T B" else (m, k + 3)))
    b = noise(*((n, k + 2) if kind == "A B^T" else (k, n + 2)), seed=1)
    c, scratch = noise(m, n + 5, seed=2), noise(k * n + 7)
    before, room = c.copy(), scratch.copy()
    places = [x for matrix in (a, b, c) for x in (matrix.ctypes.data, matrix.shape[1])]
    if kind == "A B^T":
        beta = 0
        products.small_product_of_transposed(layers.SGEMM, m, n, k, *places, scratch.ctypes.data)
    else:
        products.small_product(layers.SGEMM, kind == "A^T B", m, n, k, *places[:4], beta, *places[4:])
        if beta == 0 and m >= products.ROWS and n >= products.COLUMNS:  # also where OpenBLAS is faster
            right = c.copy()
            products._in_blocks(kind == "A^T B", m, n, k, *places)
            assert np.abs(c - right).max() < 1e-5
    left = a[:, :m].T if kind == "A^T B" else a[:, :k]
    right = b[:, :k].T if kind == "A B^T" else b[:, :n]
    assert np.abs(c[:, :n] - left.astype(np.float64) @ right - beta * before[:, :n]).max() < 1e-5
    assert np.array_equal(c[:, n:], before[:, n:]) and np.array_equal(scratch[k * n :], room[k * n :])


@given(st.integers(0, 3), st.integers(0, 40), st.integers(0, 70), st.integers(8, 40), st.booleans())
def test_products_in_panels_agree_with_numpy_s_and_write_nothing_else(top, more, wider, depth, turned):
    rows, columns = products.ROWS + more, products.COLUMNS + wider
    x, b, start = noise(top + rows + 2, depth), noise(depth, columns, seed=1), noise(columns, seed=2)
    y = noise(len(x), columns, seed=3)
    before, inside = y.copy(), slice(top, top + rows)
    panels = products.panels_of_columns(b.T.copy()) if turned else products.panels_of_rows(b)
    products.multiply(x, panels, start, y, top, top + rows)
    assert np.abs(y[inside] - (x[inside].astype(np.float64) @ b + start)).max() < 2e-5
    assert np.array_equal(y[:top], before[:top]) and np.array_equal(y[top + rows :], before[top + rows :])


@given(st.integers(1, 40), st.integers(1, 8), st.integers(1, 2))
def test_products_of_transposed_rows_are_added(depth, quarters, panels):
    a, b = noise(depth, 4 * quarters), noise(depth, panels * products.COLUMNS, seed=1)
    c = noise(a.shape[1], b.shape[1], seed=2)
    expected = c + a.T.astype(np.float64) @ b
    assert products.can_add(*c.shape) and not products.can_add(len(c) + 1, c.shape[1])
    products.add_transposed(a, b, c)
    assert np.abs(c - expected).max() < 2e-5


@given(
    st.integers(1, 300), st.integers(1, 40) | st.just(2 * products.COLUMNS), st.integers(1, 80) | st.just(52),
    st.integers(0, 7),
)  # fmt: skip
@example(loops._BAND + 1, 2 * products.COLUMNS, 52, 7)  # too few rows for a second band
@settings(max_examples=40)
def test_linear_layers_of_any_size_follow_the_reference_in_float64(rows, inputs, outputs, needed):
    """In bands of rows with panels of the weight, or where there is too little of either by OpenBLAS."""
    needs = tuple(bool(needed & bit) for bit in (1, 2, 4))
    x, weight, bias = noise(rows, inputs), noise(outputs, inputs, seed=1), noise(outputs, seed=2)
    residual, dy = noise(rows, outputs, seed=3), noise(rows, outputs, seed=4)
    for op, inputs_of, needs_of, parameters in (
        (reference.linear, (x, weight, bias), needs, {}),
        (reference.add_linear, (residual, x, weight, bias), (True, *needs), {}),
        (reference.linear_gelu, (x, weight, bias), needs, {"approximate": "none"}),
    ):
        wide = [a.astype(np.float64) for a in inputs_of]
        expected, expected_vjp = op(xp, *wide, needs=needs_of, **parameters)
        y, vjp = OPERATIONS[op](xp, *inputs_of, needs=needs_of, **parameters)
        assert np.abs(y - expected).max() < 3e-5
        if True in needs:
            for got, wanted, needed_one in zip(vjp(dy), expected_vjp(dy.astype(np.float64)), needs_of, strict=True):
                assert (got is not None) == needed_one
                if needed_one:
                    assert np.abs(got - wanted).max() < 2e-4 and got.shape == wanted.shape


def test_a_large_weight_is_left_to_openblas_but_on_zen_4():
    assert products.fits(1000, 512, 512) and products.can_add(512, 512) and not products.can_add(516, 512)
    own = has("avx512f") and processor_name() == "znver4"
    assert products.fits(1000, 513, 512) == own


def test_rows_that_share_sets_of_the_cache_are_copied():
    x, b, start = noise(40, 2048), noise(2048, 70, seed=1), noise(70, seed=2)
    y = np.zeros((40, 70), np.float32)
    products.multiply(x, products.panels_of_rows(b), start, y, 5, 36)
    assert (
        np.abs(y[5:36] - (x[5:36].astype(np.float64) @ b + start)).max() < 3e-4 and not y[:5].any() and not y[36:].any()
    )


def test_long_sums_that_do_not_cancel_keep_their_digits():
    """One after the other they would be off by 3e-6 and 1.1e-5."""
    rng = np.random.default_rng(0)
    x, weight, bias = rng.random((97, 3072), np.float32), rng.random((80, 3072), np.float32), np.zeros(80, np.float32)
    y, _ = OPERATIONS[reference.linear](xp, x, weight, bias, needs=(False,) * 3)
    expected = x.astype(np.float64) @ weight.T
    assert np.abs(y - expected).max() < 1.2e-6 * expected.max()
    x, dy = rng.random((50_000, 32), np.float32), rng.random((50_000, 64), np.float32)
    _, vjp = OPERATIONS[reference.linear](xp, x, weight[:64, :32].copy(), bias[:64], needs=(False, True, False))
    expected = dy.T.astype(np.float64) @ x
    assert np.abs(vjp(dy)[1] - expected).max() < 2e-6 * expected.max()


def test_numbers_in_another_byte_order_are_left_to_numpy():
    x, weight, bias = (noise(*shape).astype(">f4") for shape in ((20, 40), (64, 40), (64,)))
    y, _ = OPERATIONS[reference.linear](xp, x, weight, bias, needs=(False,) * 3)
    assert np.abs(y - (x.astype(np.float64) @ weight.T + bias)).max() < 1e-5


def test_sums_of_many_rows_keep_their_digits():
    """One after the other they would be off by 6e-6 of themselves."""
    x, ones = noise(60_000, 5) + np.float32(1), np.ones((60_000, 5), np.float32)
    expected = x.sum(axis=0, dtype=np.float64)
    totals = np.zeros((4, 5), np.float32)
    loops.add_rows(x, totals[0])
    loops.multiply_and_sum(x, ones, np.empty_like(x), totals[1])
    moments = np.tile(np.float32([-1, 1]), (len(x), 1))  # with which entries of 0 are normalised to 1
    loops.layer_norm_vjp(x, 0 * x, ones[0], moments, np.empty_like(x), totals[2], totals[3])
    assert np.abs(totals / expected - 1).max() < 1e-6


@given(data=st.data())
def test_convolutions_of_many_channels_agree_with_torch(data):
    """In Winograd's way, which fewer channels do not take."""
    draw, pad = data.draw, st.integers(0, 2)
    (top, bottom), (left, right) = padding = (draw(pad), draw(pad)), (draw(pad), draw(pad))
    batch, inputs, outputs = draw(st.integers(1, 5)), draw(st.integers(8, 17)), draw(st.integers(8, 17))
    size = max(3 - top - bottom, draw(st.integers(1, 9))), max(3 - left - right, draw(st.integers(1, 9)))
    example = Example(
        [values(draw, (batch, inputs, *size)), values(draw, (outputs, inputs, 3, 3))],
        lambda x, weight: TF.conv2d(TF.pad(x, (left, right, top, bottom)), weight),
        {"stride": (1, 1), "padding": padding},
    )
    with mock.patch.object(image_loops, "winograd", wraps=image_loops.winograd) as used:
        agrees_with_torch(OPERATIONS[reference.conv2d], example, "numpy", draw)
    assert used.called


@given(data=st.data())
def test_convolutions_of_data_agree_with_torch(data):
    """Of images whose gradient is not wanted."""
    draw = data.draw
    size, kernel, stride, padding = windows(draw)
    x, weight = values(draw, (2, 3, *size)), values(draw, (draw(sides), 3, *kernel))
    expected, dy, (gradient,) = torch_vjp(
        lambda w: TF.conv2d(padded(torch.tensor(x), padding), w, stride=stride), [weight], draw
    )
    inputs = [place(a, "numpy", "float32") for a in (x, weight)]
    with mock.patch.object(image_loops, "convolve", wraps=image_loops.convolve) as used:
        y, vjp = OPERATIONS[reference.conv2d](xp, *inputs, stride=stride, padding=padding, needs=(False, True))
    check(y, expected, "numpy", "float32")
    check(vjp(dy.astype(np.float32))[1], gradient, "numpy", "float32")
    assert used.called


def test_windows_with_more_places_than_a_byte_counts():
    x = np.arange(17 * 17, dtype=np.float32).reshape(1, 1, 17, 17)
    parameters = {"kernel": (17, 17), "stride": (1, 1), "padding": ((0, 0), (0, 0))}
    y, vjp = OPERATIONS[reference.max_pool2d](xp, x, needs=(True,), **parameters)
    assert y.item() == 288 and np.flatnonzero(vjp(np.ones_like(y))[0]) == [288]


def train(steps=3):
    """The losses and weights of a few steps of a small model."""
    model = tinyvit.create_model("vit_micro_patch4_32", depth=2, num_classes=5, drop_path=0.2, seed=0)
    step = tinyvit.TrainStep(model, optim.AdamW(model.parameters(), lr=1e-3), clip_norm=1.0, threads=2)
    images, labels = noise(16, 3, 32, 32), np.arange(16) % 5
    losses = [float(step(images, labels)) for _ in range(steps)]
    return losses, np.concatenate([p.data.ravel() for p in model.parameters()]), tinyvit.predict(model, images)


def test_training_gives_the_same_bits_again_and_numpy_s_to_rounding(jit, monkeypatch):
    first, second = train(), train()
    assert first[0] == second[0]
    assert all(np.array_equal(a, b) for a, b in zip(first[1:], second[1:], strict=True))
    monkeypatch.setenv("TINYVIT_JIT", "0")
    kernels._fastest.cache_clear()
    losses, weights, logits = train()
    assert losses == pytest.approx(first[0], rel=1e-5) and not np.array_equal(weights, first[1])
    assert np.abs(weights - first[1]).max() < 1e-4 and np.abs(logits - first[2]).max() < 1e-3


def test_compiling_is_announced_once_and_works_where_nothing_can_be_kept(capsys, monkeypatch):
    # As where no directory can be written.
    monkeypatch.setattr("numba.core.caching.CompileResultCacheImpl._locator_classes", [])
    monkeypatch.setattr(compiling, "_announce", compiling._Announce())
    compiled = compiling.compiled(compiling.float32, result=compiling.float32)
    assert compiled(lambda x: x + x)(1.5) == 3.0 and compiled(lambda x: x * x)(1.5) == 2.25
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "compiling" in err


@pytest.mark.parametrize("version, used", [("0.61.2", False), ("0.62rc1", True), ("1.0.0", True), ("0+unknown", True)])
def test_an_old_numba_is_left_out_before_its_llvm_ends_the_process(monkeypatch, version, used):
    monkeypatch.setattr("importlib.metadata.version", lambda name: version)
    with (
        contextlib.nullcontext() if used else pytest.warns(UserWarning, match=r"numba 0\.61\.2 is too old, expected 0")
    ):
        assert kernels.jit._installed.__wrapped__() is used


def test_a_numba_that_does_not_work_leaves_numpy_s_kernels(jit, monkeypatch):
    monkeypatch.setitem(sys.modules, "tinyvit.kernels.jit.table", None)
    kernels._merged.cache_clear()
    with pytest.warns(UserWarning, match="numba does not work here"):
        table = kernels._fastest(xp)
    assert table == kernels._merged("cpu")


@pytest.mark.parametrize("value, used", [("1", True), ("0", False)])
def test_numba_is_imported_when_the_first_operation_runs_and_it_is_wanted(value, used):
    program = (
        "import sys, tinyvit, numpy; assert 'numba' not in sys.modules;"
        "tinyvit.functional.gelu(numpy.ones(3, 'f')); print('numba' in sys.modules)"
    )
    environment = os.environ | {"TINYVIT_JIT": value}
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert ran.stdout.strip() == str(used), ran.stderr


def test_a_command_that_predicts_few_pictures_does_not_load_numba(tmp_path):
    weights = tinyvit.create_model("vit_nano_patch8_32", num_classes=3).state_dict()
    save_file(weights, tmp_path / "nano.safetensors")
    Image.new("RGB", (32, 32)).save(tmp_path / "x.png")
    program = (
        "import sys; from tinyvit import cli;"
        "cli.main(['predict', 'nano.safetensors', 'x.png', '--attention', 'looks']); print('numba' in sys.modules)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TINYVIT_JIT"}
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert "%" in ran.stdout and ran.stdout.endswith("False\n"), ran.stderr


def test_many_pictures_are_worth_loading_numba(jit):
    tables = []
    for images in (31, 32):
        with kernels.jit.worth_it_for(images):
            tables.append(kernels.best(reference.linear, xp))
    assert tables[0] is not tables[1] and kernels.best(reference.linear, xp) is tables[1]


def test_the_table_covers_float32_and_what_it_lacks_is_numpy_s(jit):
    cpu = importlib.import_module("tinyvit.kernels.cpu.layers")
    x = noise(2, 5, 12)
    mask = np.ones((5, 5), bool)
    plain, _ = kernels.best(reference.qkv_attention, xp)(xp, x, num_heads=2, mask=mask, needs=(False,))
    assert np.abs(plain - reference.qkv_attention(xp, x, num_heads=2, needs=(False,))[0]).max() < 1e-6
    wide = x.astype(np.float64), np.ones(12), np.zeros(12)
    ours, _ = kernels.best(reference.layer_norm, xp)(xp, *wide, eps=1e-6, needs=(False,) * 3)
    assert np.array_equal(ours, cpu.layer_norm(xp, *wide, eps=1e-6, needs=(False,) * 3)[0])
