"""Every CUDA kernel on a GPU, at the shapes of real models, against its reference in float64.

The same sources run on a simulator in tests/kernels/test_cuda_kernels.py, at smaller and stranger shapes.
"""

from __future__ import annotations

import functools
import math
import warnings

import array_api_compat.numpy as numpy_namespace
import numpy as np
import pytest
from on_gpu import DTYPES, HAS_GPU, LIMITS, Poisoned, check_kernel, difference, dtype

from tinyvit import kernels
from tinyvit.backend import arrays, random
from tinyvit.kernels import reference

if not HAS_GPU:
    pytest.skip("CuPy finds no GPU", allow_module_level=True)
pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def xp():
    import array_api_compat.cupy

    return array_api_compat.cupy


@pytest.fixture(scope="module")
def table():
    from tinyvit.kernels.cuda.table import KERNELS

    return KERNELS


@pytest.fixture
def rng():
    return np.random.default_rng(0)


ATTENTION = [(2, 65, 3, 64), (2, 197, 3, 64), (1, 577, 2, 64), (1, 257, 1, 80), (2, 17, 2, 20)]  # B, N, heads, D


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("batch, n, heads, dim", ATTENTION)
def test_attention(table, xp, rng, monkeypatch, name, batch, n, heads, dim):
    monkeypatch.setenv("TINYVIT_WGMMA", "0")  # the kernels for every GPU, and without trials
    kernel, qkv = table[reference.qkv_attention], rng.standard_normal((batch, n, 3 * heads * dim))
    check_kernel(kernel, xp, "qkv_attention", dtype(name), [qkv], num_heads=heads)


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("n, queries, dropout", [(65, None, True), (197, 1, True), (197, 17, False)])
def test_attention_with_dropout_and_of_the_first_tokens(table, xp, rng, name, n, queries, dropout):
    qkv = rng.standard_normal((2, n, 3 * 3 * 64))
    keep = (rng.random((2, 3, queries or n, n)) > 0.2) / 0.8 if dropout else None
    params = {"num_heads": 3, "queries": queries, "dropout_mask": keep}
    check_kernel(table[reference.qkv_attention], xp, "qkv_attention", dtype(name), [qkv], **params)


@pytest.mark.parametrize("name", DTYPES)
def test_attention_of_large_logits(table, xp, rng, name):
    """Up to 1e4: nothing overflows."""
    qkv = rng.standard_normal((1, 197, 3 * 64))
    qkv[..., :128] *= math.sqrt(1e4 * 8 / np.abs(qkv[0, :, :64] @ qkv[0, :, 64:128].T).max())
    check_kernel(table[reference.qkv_attention], xp, "qkv_attention", dtype(name), [qkv], limit=0.1, num_heads=1)


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("n", [65, 197])
def test_attention_sums_the_columns_of_its_gradient(table, xp, rng, name, n):
    qkv, dy = (xp.asarray(rng.standard_normal((5, n, width * 64)).astype(dtype(name))) for width in (9, 3))
    _, vjp = table[reference.qkv_attention].run(xp, qkv, num_heads=3, needs=(True,))
    token = kernels.notes.set({})
    try:
        (dqkv,) = vjp(dy)
        noted, sums = kernels.notes.get()["sums"]
    finally:
        kernels.notes.reset(token)
    assert noted is dqkv
    assert difference(sums, arrays.to_numpy(dqkv).astype(np.float64).sum(axis=(0, 1))) < LIMITS[name]


@pytest.fixture
def hopper(monkeypatch):
    """The kernels that only sm_90a has, of which nothing is known yet."""
    from tinyvit.kernels import cuda
    from tinyvit.kernels.cuda import attention_sm90a, trial

    if cuda.capability() != 90 or cuda.compiler() < trial.COMPILER:
        pytest.skip("no Hopper GPU with NVRTC 12.9 or later")
    monkeypatch.setattr(attention_sm90a, "_verdicts", {})
    return attention_sm90a


def test_attention_for_hopper_passes_its_trial(hopper, xp):
    """In a process of its own: the others of these tests run the kernels in this one."""
    from tinyvit.kernels import cuda

    qkv = xp.zeros((1, 197, 3 * 2 * 64), dtype=dtype("bfloat16"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # which says by how much they differ
        assert all(hopper.takes(qkv, cuda.NULL, 2, 197, backward) for backward in (False, True))


def test_linear_gelu_for_hopper_is_tried(hopper, xp):
    """As ViT-Ti has it: the verdict is kept for later processes."""
    from tinyvit.kernels.cuda import linear_gelu_sm90a

    rows = xp.zeros((linear_gelu_sm90a.LEAST_ROWS, 192), dtype=dtype("bfloat16"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # which says what is wrong; slower ones are left out without a word
        linear_gelu_sm90a.takes(rows, 768, "none")
    assert linear_gelu_sm90a._verdicts


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("name, inner", [("bfloat16", 192), ("float16", 64), ("bfloat16", 256), ("bfloat16", 384)])
def test_linear_gelu_on_hopper(hopper, table, xp, rng, monkeypatch, name, inner, approximate):
    """In this process; then the way back through the next layer, and the trial, which may find it slower."""
    from tinyvit.kernels.cuda import linear, linear_gelu_sm90a, linear_gelu_trial

    found = dict(
        linear_gelu_trial.problems(
            xp, scalar="bf16" if name == "bfloat16" else "f16", inner=inner, columns=4 * inner, approximate=approximate
        )
    )
    assert not [problem for problem in found.values() if problem and not problem.startswith("it is slower")], found
    monkeypatch.setattr(linear_gelu_sm90a, "takes", lambda *_: True)
    rows, columns = linear_gelu_sm90a.LEAST_ROWS + 1, 4 * inner
    x, weight, bias = rng.standard_normal((rows, inner)), rng.standard_normal((columns, inner)), np.ones(columns)
    inputs = [x, weight * inner**-0.5, bias]
    check_kernel(table[reference.linear_gelu], xp, "linear_gelu", dtype(name), inputs, approximate=approximate)
    inputs = [x, *inputs, inputs[1].T / 2, x[0]]
    check_kernel(table[reference.mlp], xp, "mlp", dtype(name), inputs, approximate=approximate)
    if inner <= linear_gelu_sm90a.WIDEST:
        options = {"approximate": approximate, "needs": (False,) * 6}
        rounded = [a.astype(dtype(name)) for a in inputs]
        y, _ = table[reference.mlp].run(xp, *map(xp.asarray, rounded), **options)
        right, _ = reference.mlp(numpy_namespace, *(a.astype(np.float64) for a in rounded), **options)
        assert difference(y, right) < LIMITS[name]
    hidden, following, dy = (
        xp.asarray(rng.standard_normal(s).astype(dtype(name)))
        for s in ((rows, columns), (inner, columns), (rows, inner))
    )
    bias = xp.asarray(bias.astype(dtype(name)))
    dx, partial = linear_gelu_sm90a.backward(xp, dy, following, hidden, bias, approximate)
    between = linear.input_gradient(xp, dy, following)
    right, _ = linear.gelu_gradient(xp, hidden, bias, between, approximate)
    assert difference(dx, arrays.to_numpy(right).astype(np.float64)) < LIMITS[name]
    assert difference(partial.sum(axis=0), arrays.to_numpy(dx).astype(np.float64).sum(axis=0)) < LIMITS[name]


HOPPER = [  # B, N, D of two heads; of 600 heads each has one block
    ("bfloat16", 3, 128, 64), ("bfloat16", 3, 197, 64), ("bfloat16", 300, 130, 64), ("bfloat16", 3, 257, 64),
    ("bfloat16", 3, 577, 64), ("bfloat16", 3, 1025, 64), ("bfloat16", 3, 197, 32), ("bfloat16", 3, 257, 80),
    ("bfloat16", 3, 577, 128), ("float16", 3, 197, 64), ("float16", 3, 257, 80),
]  # fmt: skip


@pytest.mark.parametrize("name, batch, n, dim", HOPPER)
def test_attention_on_hopper(hopper, table, xp, rng, monkeypatch, name, batch, n, dim):
    monkeypatch.setattr(hopper, "_try", lambda *_: {"forward": None, "backward": None})
    qkv = rng.standard_normal((batch, n, 3 * 2 * dim))
    check_kernel(table[reference.qkv_attention], xp, "qkv_attention", dtype(name), [qkv], num_heads=2)


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("rows, dim", [(65 * 16, 192), (197 * 4, 768), (333, 1280), (50, 257)])
def test_layer_norm(table, xp, rng, name, rows, dim):
    inputs = [rng.standard_normal((rows, dim)) + 2, rng.standard_normal(dim), rng.standard_normal(dim)]
    check_kernel(table[reference.layer_norm], xp, "layer_norm", dtype(name), inputs, eps=1e-6)


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("rows, dim", [(65 * 16, 192), (197 * 4, 768), (33, 1280)])
def test_layer_norm_adds_a_gradient_and_sums_its_columns(table, xp, rng, name, rows, dim):
    """As in a backward pass: the sums are those of what it returns, which is rounded."""
    x, weight, bias, dy, other = (
        xp.asarray(rng.standard_normal(shape).astype(dtype(name)))
        for shape in ((rows, dim), dim, dim, *[(rows, dim)] * 2)
    )
    token = kernels.notes.set({})
    try:
        _, vjp = table[reference.layer_norm].run(xp, x, weight, bias, eps=1e-6, needs=(True,) * 3)
        alone, together = vjp(dy)[0], vjp(dy, other)[0]
        noted, sums = kernels.notes.get()["sums"]
    finally:
        kernels.notes.reset(token)
    alone, other, found, sums = (arrays.to_numpy(a).astype(np.float64) for a in (alone, other, together, sums))
    assert noted is together and difference(found, alone + other) < LIMITS[name]
    assert np.abs(sums - found.sum(axis=0)).max() < 4 * LIMITS[name] * math.sqrt(rows)


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("shape", [(16, 65, 192), (4, 197, 768), (5, 3, 7)])
def test_sums_with_drop_path(table, xp, rng, name, shape):
    scale = (rng.random((shape[0], 1, 1)) > 0.3) / 0.7
    inputs = [rng.standard_normal(shape) for _ in range(2)]
    check_kernel(table[reference.add_scaled], xp, "add_scaled", dtype(name), inputs, scale=scale)


LINEAR = [(65 * 16, 192, 768), (197 * 4, 768, 3072), (1024, 192, 10), (3, 7, 9)]  # rows, width in, width out


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("rows, inner, outer", LINEAR)
def test_linear_and_linear_gelu(table, xp, rng, name, rows, inner, outer):
    x, bias = rng.standard_normal((rows, inner)), rng.standard_normal(outer)
    weight = rng.standard_normal((outer, inner)) / math.sqrt(inner)
    residual = rng.standard_normal((rows, outer))
    for b in (bias, None):
        check_kernel(table[reference.linear], xp, "linear", dtype(name), [x, weight, b])
        check_kernel(table[reference.add_linear], xp, "add_linear", dtype(name), [residual, x, weight, b])
    for approximate in ("none", "tanh"):
        params = {"approximate": approximate}
        check_kernel(table[reference.linear_gelu], xp, "linear_gelu", dtype(name), [x, weight, bias], **params)
        weights = [weight, bias, weight.T * math.sqrt(inner / outer), x[0]]
        check_kernel(table[reference.mlp], xp, "mlp", dtype(name), [x, x, *weights], **params)


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu(table, xp, rng, name, approximate):
    x = rng.standard_normal((1000, 77)) * 3
    check_kernel(table[reference.gelu], xp, "gelu", dtype(name), [x], approximate=approximate)


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("channels, outputs, size", [(3, 256, 32), (64, 128, 16)])
def test_convolutions_and_pooling_of_compact_transformers(table, xp, rng, name, channels, outputs, size):
    images, padding = rng.standard_normal((4, channels, size, size)), ((1, 1), (1, 1))
    weight = rng.standard_normal((outputs, channels, 3, 3)) / math.sqrt(9 * channels)
    params = {"stride": (1, 1), "padding": padding}
    check_kernel(table[reference.conv2d], xp, "conv2d", dtype(name), [images, weight], **params)
    params = {"kernel": (3, 3), "stride": (2, 2), "padding": padding}
    check_kernel(table[reference.max_pool2d], xp, "max_pool2d", dtype(name), [images], **params)


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("batch, classes", [(1024, 10), (256, 1000), (5, 21843)])
def test_cross_entropy(table, xp, rng, name, batch, classes):
    logits, kernel = rng.standard_normal((batch, classes)) * 3, table[reference.cross_entropy]
    for labels in (rng.integers(0, classes, batch), rng.dirichlet(np.ones(classes), batch)):
        params = {"labels": labels, "label_smoothing": 0.1}
        check_kernel(kernel, xp, "cross_entropy", dtype(name), [logits], **params)


def test_a_label_that_is_no_class_makes_the_loss_nan(table, xp):
    labels = xp.asarray(np.array([0, 1, 3, 2]))
    logits, run = xp.zeros((4, 3), dtype=xp.float32), table[reference.cross_entropy].run
    loss, vjp = run(xp, logits, labels=labels, label_smoothing=0.1, needs=(True,))
    (gradient,) = vjp(xp.ones((), dtype=xp.float32))
    assert math.isnan(float(loss))
    assert list(np.isnan(arrays.to_numpy(gradient)).any(axis=1)) == [False, False, True, False]


DRAWS = [(0, 0, 0, 0), (12345, 2**31 + 7, 40, 1000)]  # seed, step, place, first sample


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("samples, shape, drop", [(256, (1, 1), 0.1), (33, (65, 192), 0.3), (5, (3, 7), 0.5)])
def test_dropout_masks_are_the_hosts(table, xp, name, samples, shape, drop):
    """Bit for bit, with the step as a number and in device memory."""
    like = xp.empty((samples, 1), dtype=dtype(name))
    for seed, step, place, first in DRAWS:
        mask = random.keep_mask(drop, samples, shape, random.Draw(seed, step, place, first))
        right = (mask * np.float32(1 / (1 - drop))).astype(dtype(name))
        for number in (step, xp.asarray(np.array(step, np.int64))):
            draw = random.Draw(seed, number, place, first)
            mask = table[reference.dropout_mask].run(Poisoned(xp), like, drop=drop, shape=shape, draw=draw)
            assert arrays.to_numpy(mask).tobytes() == right.tobytes()


# --- cuBLASLt ---------------------------------------------------------------------------------------------------------

PRODUCTS = [(65 * 64, 192, 576), (197 * 16, 768, 3072), (256, 768, 1000), (5, 24, 16), (7, 9, 10), (333, 256, 1)]


@pytest.mark.parametrize("name, limit", [("float32", 1e-5), ("tf32", 2e-3), ("float16", 2e-3), ("bfloat16", 1e-2)])
@pytest.mark.parametrize("rows, inner, outer", PRODUCTS)
def test_products_through_cublaslt(xp, rng, name, limit, rows, inner, outer):
    """Each form, called and replayed from a CUDA graph, against float64."""
    from tinyvit.kernels.cuda import cublas

    if cublas.library() is None:
        pytest.skip(cublas.missing())
    narrow = dtype("float32" if name == "tf32" else name)
    sizes = ((rows, inner), (outer, inner), (outer,), (rows, outer))
    x, w, b, dy = (xp.asarray(rng.standard_normal(size).astype(narrow)) for size in sizes)
    X, W, B, DY = (arrays.to_numpy(a).astype(np.float64) for a in (x, w, b, dy))
    hidden = X @ W.T + B
    gelu = 0.5 * hidden * (1 + np.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
    forms = {
        "plain": (lambda: (cublas.linear(xp, x, w, None),), (X @ W.T,)),
        "bias": (lambda: (cublas.linear(xp, x, w, b),), (hidden,)),
        "bias and residual": (lambda: (cublas.linear(xp, x, w, b, dy),), (hidden + DY,)),
        "GELU": (lambda: cublas.linear_gelu(xp, x, w, b, True), (gelu, hidden)),
        "GELU alone": (lambda: cublas.linear_gelu(xp, x, w, b, False), (gelu, None)),
        "input's gradient": (lambda: (cublas.input_gradient(xp, dy, w),), (DY @ W,)),
        "weight's gradient": (lambda: (cublas.weight_gradient(xp, dy, x),), (DY.T @ X,)),
    }
    token = cublas.tf32.set(name == "tf32")
    try:
        for form, (call, exact) in forms.items():
            if form.startswith("GELU") and (narrow == np.float32 or outer % 8):
                continue  # cuBLASLt has no such epilogue
            found = call()
            if found is None or found[0] is None:
                assert inner % 8 or outer % 8, f"{form}: no algorithm"
                continue
            for actual, again, right in zip(found, replayed(call), exact, strict=True):
                if right is not None:
                    assert difference(actual, right) < limit, form
                    assert arrays.to_numpy(actual).tobytes() == arrays.to_numpy(again).tobytes(), form
    finally:
        cublas.tf32.reset(token)


def test_a_search_for_products_is_kept(xp, rng, tmp_path, monkeypatch):
    """All that cuBLASLt proposes is right, and another process finds and takes what was kept."""
    from tinyvit.kernels.cuda import cublas, product_file

    if cublas.library() is None:
        pytest.skip(cublas.missing())
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(cublas, "_plans", {})
    product_file._read.cache_clear()
    x, dy = (rng.standard_normal((197 * 16, width)).astype(np.float16) for width in (768, 2304))
    exact, arguments, calls = dy.T.astype(np.float64) @ x, (xp, xp.asarray(dy), xp.asarray(x)), []

    def measure():
        calls.append(cublas.weight_gradient(*arguments))
        assert difference(calls[-1], exact) < LIMITS["float16"]
        return -len(calls)  # so that the last is the best

    try:
        cublas.weight_gradient(*arguments)
        (key,) = cublas._plans
        assert len(cublas.search(key, measure)) == len(calls) > 0
        chosen = cublas._plans.pop(key).algorithm
        product_file._read.cache_clear()
        again = cublas.weight_gradient(*arguments)
        assert np.array_equal(cublas._plans[key].algorithm, chosen)
        assert arrays.to_numpy(again).tobytes() == arrays.to_numpy(calls[-1]).tobytes()
    finally:
        product_file._read.cache_clear()


@functools.cache
def capture_stream():
    """One for all tests: cuBLASLt keeps a workspace for each stream."""
    import cupy

    return cupy.cuda.Stream(non_blocking=True)


def replayed(call):
    """What `call` gives when it is captured into a CUDA graph and launched from there."""
    import cupy

    cupy.cuda.Device().synchronize()  # the inputs were made on another stream
    with capture_stream() as stream:
        call()
        stream.begin_capture()
        results = call()
        graph = stream.end_capture()
        graph.launch(stream)
        stream.synchronize()
    return results
