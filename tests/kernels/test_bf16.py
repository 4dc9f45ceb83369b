"""Linear layers that round their operands to bfloat16, on processors that multiply it."""

import ctypes
import importlib
import inspect
import mmap
import sys
import weakref

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

pytest.importorskip("numba")

from tinyvit import TrainStep, create_model, no_grad, optim, predict
from tinyvit import kernels as all_kernels
from tinyvit.execution.inference import predictions
from tinyvit.execution.precision import Precision
from tinyvit.kernels import bf16, reference


@pytest.fixture(scope="module", autouse=True)
def available(numba_kernels):
    if not bf16.available():
        pytest.skip("this processor multiplies no bfloat16")


def test_kernels_take_what_their_references_take():
    for op, kernel in importlib.import_module("tinyvit.kernels.bf16.table").KERNELS.items():
        assert [*inspect.signature(kernel.run).parameters] == [*inspect.signature(op).parameters]


def rounded(x):
    return torch.tensor(x).bfloat16().double()


def near(got, expected, tolerance=3e-6):
    """To float32's rounding of sums."""
    return np.abs(got - expected.numpy()).max() <= tolerance * max(1e-30, float(expected.abs().max()))


sizes = st.one_of(st.integers(1, 70), st.sampled_from([391, 515, 1030]))


@example(17, 49, 17, True, 0)  # a panel of which 17 columns count: one more than a narrow tile has
@example(9, 16, 48, False, 0)
@example(1570, 33, 17, True, 0)  # two parts of the inner dimension, for the gradient of the weight
@example(3, 1570, 17, True, 0)
@given(st.integers(1, 70) | st.just(391), sizes, sizes, st.booleans(), st.integers(0, 99))
def test_products_are_those_of_rounded_operands(rows, inner, outer, biased, seed):
    rng = np.random.default_rng(seed)
    x, weight, bias, dy, residual = (
        rng.standard_normal(s, np.float32)
        for s in ((1, rows, inner), (outer, inner), outer, (1, rows, outer), (1, rows, outer))
    )
    table = all_kernels._merged("cpu", "jit", "bf16")
    bias = bias if biased else None
    X, W, D = (rounded(a) for a in (x[0], weight, dy[0]))
    shift = torch.tensor(bias).double() if biased else 0.0
    y, vjp = table[reference.linear](None, x, weight, bias, needs=(True, True, biased))
    dx, dweight, dbias = vjp(dy)
    assert near(y[0], X @ W.T + shift) and near(dx[0], D @ W) and near(dweight, D.T @ X)
    assert dbias is None if not biased else near(dbias, torch.tensor(dy[0]).double().sum(0))
    y, vjp = table[reference.add_linear](None, residual, x, weight, bias, needs=(True, True, False, False))
    same, dx, dweight, dbias = vjp(dy)
    assert near(y[0], torch.tensor(residual[0]).double() + X @ W.T + shift) and same is dy and near(dx[0], D @ W)
    assert dweight is None and dbias is None
    shift = np.zeros(outer, np.float32) if bias is None else bias
    h = (X @ W.T + torch.tensor(shift).double()).requires_grad_()
    gelu = torch.nn.functional.gelu(h)
    strided = np.repeat(weight, 2, axis=1)[:, ::2]
    y, vjp = table[reference.linear_gelu](None, x, strided, shift, approximate="none", needs=(True, True, True))
    (dh,) = torch.autograd.grad(gelu, h, torch.tensor(dy[0]).double())
    dx, dweight, dbias = vjp(dy)
    assert near(y[0], gelu.detach(), 1e-5) and near(dbias, dh.sum(0), 1e-5)
    for got, a, b in ((dx[0], dh, W), (dweight, dh.T, X)):  # the gradient of what is between is rounded, too
        assert (np.abs(got - (a @ b).numpy()) <= 2**-8 * (abs(a) @ abs(b)).numpy() + 1e-6).all()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="protects memory by Linux's C library")
@pytest.mark.parametrize("rows, columns", [(1, 1), (17, 33), (9, 64), (16, 31)])
def test_nothing_is_read_behind_the_last_number(rows, columns):
    """The matrix ends where a page begins that nobody may read: the process would end."""
    loops = importlib.import_module("tinyvit.kernels.bf16.loops")
    page = mmap.PAGESIZE
    pages = mmap.mmap(-1, 4 * page)
    matrix = np.frombuffer(pages, np.float32, rows * columns, 3 * page - 4 * rows * columns).reshape(rows, columns)
    matrix[:] = 1
    behind = ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(pages)) + 3 * page)
    protect = ctypes.CDLL(None).mprotect
    assert protect(behind, ctypes.c_size_t(page), mmap.PROT_NONE if hasattr(mmap, "PROT_NONE") else 0) == 0
    try:
        rounded_rows = np.zeros((rows, -(-columns // 32) * 16), np.int32)
        loops.round_rows(matrix, rounded_rows)
        packed = loops.panels_of_pairs(rows, columns)
        loops.pack_columns(matrix, packed)
        turned = loops.panels_of_pairs(columns, rows)
        loops.pack_rows(matrix, turned, 0)
        columns_rounded = loops.rows_of_pairs(columns, rows)
        loops.round_columns(matrix, columns_rounded, 0)
    finally:
        assert protect(behind, ctypes.c_size_t(page), mmap.PROT_READ | mmap.PROT_WRITE) == 0
    one, two = 0x3F80, 0x3F803F80  # 1.0 in bfloat16, and twice
    assert packed[0, 0, 0] == rounded_rows[0, 0] and turned[0, 0, 0] == columns_rounded[0, 0]
    assert columns_rounded[0, 0] == (one if rows == 1 else two)
    assert rounded_rows[0, 0] == (one if columns == 1 else two)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3.4e38])
def test_special_values_go_where_they_go_in_float32(value):
    x, weight = np.ones((9, 40), np.float32), np.ones((33, 40), np.float32)
    x[4, 7], weight[20, 3] = value, value
    y, _ = all_kernels._merged("cpu", "jit", "bf16")[reference.linear](None, x, weight, None, needs=(False,) * 3)
    expected = rounded(x).float() @ rounded(weight).float().T
    assert np.array_equal(y, expected.numpy(), equal_nan=True)


def test_a_step_and_predictions_are_float32_s_to_bfloat16_s_rounding():
    def losses(precision):
        model = create_model("vit_nano_patch8_32", num_classes=5)
        step = TrainStep(model, optim.AdamW(model.parameters(), lr=3e-3), precision=precision)
        rng = np.random.default_rng(0)
        x, y = rng.standard_normal((40, 3, 32, 32), np.float32), rng.integers(0, 5, 40)
        return np.array([float(step(x, y)) for _ in range(20)]), predict(model, x, precision=precision)

    (expected, scores), (got, ours) = losses("fp32"), losses("bf16")
    assert 0 < np.abs(got - expected).max() < 0.02 and expected[-1] < 0.8 * expected[0]
    assert ours.dtype == np.float32 and 0 < np.linalg.norm(ours - scores) < 0.05 * np.linalg.norm(scores)


def test_a_layer_keeps_its_input_for_the_gradient_in_16_bits_alone():
    x, weight = np.ones((1, 40, 64), np.float32), np.ones((32, 64), np.float32)
    gone = weakref.ref(x)
    _, vjp = all_kernels._merged("cpu", "jit", "bf16")[reference.linear](None, x, weight, None, needs=(True,) * 3)
    del x
    assert gone() is None and vjp(np.ones((1, 40, 32), np.float32))[1].shape == (32, 64)


@pytest.mark.parametrize("tokens, queries", [(128, 128), (300, 300), (300, 1)])
def test_attention_over_many_tokens_rounds_its_operands(tokens, queries):
    rng = np.random.default_rng(0)
    qkv, heads, dim = rng.standard_normal((2, tokens, 3 * 2 * 40), np.float32), 2, 40
    table = all_kernels._merged("cpu", "jit", "bf16")
    y, vjp = table[reference.qkv_attention](None, qkv, num_heads=heads, queries=queries, needs=(True,))
    q, k, v = rounded(qkv.reshape(2, tokens, 3, heads, dim).transpose(2, 0, 3, 1, 4))
    shares = torch.softmax(q[:, :, :queries] @ k.transpose(2, 3) / dim**0.5, -1).float().bfloat16().double()
    expected = (shares @ v).transpose(1, 2).reshape(2, queries, heads * dim)
    wrong = np.abs(y - expected.numpy()) / float(expected.abs().max())
    assert np.median(wrong) < 1e-7 and wrong.max() < 1e-3  # a share may be rounded to the other side
    whole = all_kernels._merged("cpu", "jit")[reference.qkv_attention]
    exact, exact_vjp = whole(None, qkv, num_heads=heads, queries=queries, needs=(True,))
    alone, _ = table[reference.qkv_attention](None, qkv, num_heads=heads, queries=queries, needs=(False,))
    assert np.array_equal(alone, y) and 0 < np.abs(y - exact).max() < 0.02
    dy = rng.standard_normal(y.shape, np.float32)
    (got,), (exact_d,) = vjp(dy), exact_vjp(dy)
    assert 0 < np.linalg.norm(got - exact_d) < 0.02 * np.linalg.norm(exact_d)
    whole_dy, D, Y = (
        x.reshape(2, queries, heads, dim).transpose(1, 2) for x in (torch.tensor(dy), rounded(dy), torch.tensor(y))
    )
    weights = torch.softmax(q[:, :, :queries] @ k.transpose(2, 3) / dim**0.5, -1)
    scores = weights * (D @ v.transpose(2, 3) - (whole_dy.double() * Y).sum(-1, keepdim=True)) / dim**0.5
    scores = scores.float().bfloat16().double()
    dq = torch.zeros_like(q)
    dq[:, :, :queries] = scores @ k
    expected = torch.stack([dq, scores.transpose(2, 3) @ q[:, :, :queries], shares.transpose(2, 3) @ D])
    wrong = np.abs(got.reshape(2, tokens, 3, heads, dim).transpose(2, 0, 3, 1, 4) - expected.numpy())
    for part, largest in zip(wrong, expected.abs().amax((1, 2, 3, 4)), strict=True):
        assert np.median(part) < 1e-6 * largest and part.max() < 2e-3 * largest


@pytest.mark.parametrize("queries, model", [(1, 32), (130, 64), (200, 51)])
def test_a_query_that_is_not_finite_spoils_its_own_result_alone(queries, model):
    qkv = np.random.default_rng(0).standard_normal((1, 200, 3 * model), np.float32)
    qkv[0, 0, 3] = np.nan
    with np.errstate(invalid="ignore"):
        y, _ = all_kernels._merged("cpu", "jit", "bf16")[reference.qkv_attention](
            None, qkv, num_heads=1, queries=queries, needs=(False,)
        )
    assert np.isnan(y[0, 0]).all() and np.isfinite(y[0, 1:]).all()


@pytest.mark.parametrize("rows, inner, hidden, columns", [(1, 1, 1, 1), (5, 40, 33, 130), (391, 64, 300, 49)])
def test_the_products_of_an_mlp_round_what_is_between_them(rows, inner, hidden, columns):
    loops, table = (importlib.import_module(f"tinyvit.kernels.bf16.{name}") for name in ("loops", "table"))
    rng = np.random.default_rng(0)
    residual, x, weight1, bias1, weight2, bias2 = (
        rng.standard_normal(s, np.float32)
        for s in ((rows, columns), (rows, inner), (hidden, inner), hidden, (columns, hidden), columns)
    )
    packed1, packed2 = table._pack(weight1), table._pack(weight2)
    packed1[-1, :, (hidden - 1) % 32 + 1 :] = 0x7FC07FC0  # NaN, which nothing may depend on
    y = np.empty((rows, columns), np.float32)
    loops.mlp(residual, x, packed1, bias1, packed2, bias2, y, importlib.import_module("tinyvit.kernels.jit.loops").GELU)
    between = torch.nn.functional.gelu(rounded(x) @ rounded(weight1).T + torch.tensor(bias1))
    expected = rounded(between.float().numpy()) @ rounded(weight2).T + torch.tensor(bias2) + torch.tensor(residual)
    wrong = np.abs(y - expected.numpy()) / float(expected.abs().max())
    assert np.median(wrong) < 1e-6 and wrong.max() < 2e-3  # a number may be rounded to the other side


@pytest.mark.parametrize("size", [1, 16, 31, 1000])
def test_room_is_aligned_to_cache_lines(size):
    """Loads of tiles take twice as long elsewhere."""
    rooms = [importlib.import_module("tinyvit.kernels.jit.compiling").aligned(size) for _ in range(5)]
    assert all(room.ctypes.data % 64 == 0 and room.size == size for room in rooms)


def test_few_tokens_attend_in_float32():
    qkv = np.random.default_rng(0).standard_normal((2, 127, 96), np.float32)
    found = [
        all_kernels._merged(*names)[reference.qkv_attention](None, qkv, num_heads=1, needs=(False,))[0]
        for names in (("cpu", "jit"), ("cpu", "jit", "bf16"))
    ]
    assert np.array_equal(*found)


@pytest.mark.parametrize("change", ["in place", "another array", "written and said"])
def test_a_stream_of_predictions_follows_the_weights(change):
    model = create_model("vit_nano_patch8_32", num_classes=5)
    x = np.random.default_rng(0).standard_normal((6, 3, 32, 32), np.float32)
    model.head.weight.data = np.random.default_rng(1).standard_normal(model.head.weight.shape, np.float32)
    weight = model.blocks[0].mlp.fc1.weight

    def batches():
        yield x
        with no_grad():
            if change == "in place":
                model.blocks[0].mlp.fc1.weight *= 2
            elif change == "another array":
                weight.data = weight.data * 2
            else:
                weight.data[:] = weight.data * 2
                weight.changed()
        yield x

    before, after = predictions(model, batches(), precision="bf16")
    assert np.array_equal(after, predict(model, x, precision="bf16")) and not np.array_equal(after, before)


def test_packed_weights_are_kept_for_predictions_and_as_long_as_their_arrays():
    model = create_model("vit_nano_patch8_32", num_classes=5)
    mode = Precision("bf16", model.parameters())
    for _ in range(2):
        model.head.weight.data = model.head.weight.data + 1
        mode.refresh()
        assert mode._packed.weights == {id(p.data): None for p in model.parameters()}
    step = TrainStep(model, optim.AdamW(model.parameters()), precision="bf16")
    step(np.ones((2, 3, 32, 32), np.float32), np.zeros(2, np.int64))
    assert step.precision._packed.weights == {}
