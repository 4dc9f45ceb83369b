"""The CUDA kernels' own sources and their Python wrappers, run on the CPU, against the reference in float64."""

from __future__ import annotations

import math
import subprocess
import sys
import warnings

import array_api_compat.numpy as numpy_namespace
import cuda_sim
import numpy as np
import pytest
from cublas_sim import CuBLASLt
from cuda_checks import TOLERANCE, both, check, draw
from cuda_sim import SCALARS, cuda_version, decode, encode, error, guarded

from tinyvit import functional as F
from tinyvit import kernels, nn
from tinyvit.backend import arrays, cuda_graph, random
from tinyvit.engine import ops
from tinyvit.engine.tensor import Tensor, grad
from tinyvit.execution.precision import Precision
from tinyvit.kernels import cuda, half_precision, reference
from tinyvit.kernels.cuda import cublas, layers, linear

pytestmark = pytest.mark.skipif(cuda_sim.COMPILER is None, reason="no C++ compiler")

# --- layer norm -------------------------------------------------------------------------------------------------------

NORMS = [
    ("bf16", (11, 13, 192)),  # several steps a block
    ("bf16", (20, 768)),  # several warps a row, several steps a block
    ("bf16", (19, 1280)),  # as wide as ViT-H
    ("f16", (13, 257)),
    ("f16", (9, 30)),
    ("float", (3, 100)),
    ("float", (33, 8)),
]


@pytest.mark.parametrize("scalar, shape", NORMS)
def test_layer_norm(folder, scalar, shape):
    rng = np.random.default_rng(shape[-1])
    x, weight, bias = rng.standard_normal(shape) + 3, rng.standard_normal(shape[-1]), rng.standard_normal(shape[-1])
    check(folder, "layer_norm", scalar, [x, weight, bias], {"eps": 1e-6}, multiprocessors=1)


@pytest.mark.parametrize("kilobytes, blocks", [(99, 2), (163, 3), (227, 3)])
def test_the_norms_blocks_run_at_once(folder, kilobytes, blocks):
    """As many as the shared memory of a multiprocessor holds: 48 KB are too much for three on cards with 99."""
    with cuda_sim.device(folder, multiprocessors=1, shared_limit=kilobytes << 10) as xp:
        x, weight = np.ones((60, 192), np.float32).astype(np.float16), np.ones(192, np.float16)
        launched, run = [], cuda_sim.Kernel.__call__
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cuda_sim.Kernel, "__call__", lambda *a, **k: launched.append(a[1]) or run(*a, **k))
            y, vjp = cuda_version(reference.layer_norm)(
                xp, *map(guarded, (x, weight, weight)), eps=1e-6, needs=(True,) * 3
            )
            vjp(y)
    assert launched[1] == (blocks,)


def test_a_residual_block_adds_and_sums_in_the_norms_kernel(folder):
    """y = x + linear(norm(x)), twice: the gradients of x meet in the norm, which also gives the bias's before it."""
    rng, launched = np.random.default_rng(0), []
    width = 24
    arrays = [rng.standard_normal((5, 7, width)), *(rng.standard_normal((2, width, width)) * 0.3),
              *rng.standard_normal((6, width)) + 0.5]  # fmt: skip

    def gradients() -> list[np.ndarray]:
        tensors = [Tensor(x.astype(np.float32), requires_grad=True) for x in arrays]
        x, *weights = tensors
        for i in range(2):
            normal = F.layer_norm(x, weights[2 + 3 * i], weights[3 + 3 * i])
            x = x + F.linear(normal, weights[i], weights[4 + 3 * i])
        return grad(x, tensors, draw(1, x.shape).astype(np.float32))

    expected = gradients()
    with cuda_sim.everything_on_device(folder, library=CuBLASLt()), pytest.MonkeyPatch.context() as patch:
        run = cuda_sim.Kernel.__call__
        patch.setattr(cuda_sim.Kernel, "__call__", lambda *a, **k: launched.append((a[0]._name, a[3])) or run(*a, **k))
        actual = gradients()
    names = [name for name, _ in launched]
    assert names.count("column_sums") == 1  # of the gradient that the pass starts from
    assert names.count("layer_norm_backward") == 2 and names.count("sum_partials") == 1 and names[-1] == "sum_partials"
    assert all(given[5] is not cuda.NULL for name, given in launched if name == "layer_norm_backward")
    for ours, right in zip(actual, expected, strict=True):
        assert error(ours, right) < 2e-6


def test_sums_that_were_noted_end_with_the_pass(folder):
    """Whoever changes a gradient that was returned, and goes on from it, gets the sums of what it is then."""
    with cuda_sim.everything_on_device(folder):
        x, weight, bias = (Tensor(draw(i, (4, 4)[:n]).astype(np.float32), requires_grad=True) for i, n in
                           enumerate((2, 2, 1)))  # fmt: skip
        dx = grad(F.layer_norm(x, bias, bias), x, np.ones((4, 4), np.float32) * np.arange(4, dtype=np.float32))
        dx += 1
        dbias = grad(F.linear(x, weight, bias), bias, dx)
    assert kernels.notes.get() is None and np.allclose(dbias, dx.sum(axis=0), atol=1e-5)


# --- linear layers and GELU -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("scalar, shape", [("bf16", (3, 5, 7)), ("f16", (2, 8)), ("float", (1, 1000))])
def test_gelu(folder, scalar, shape, approximate):
    x = np.asarray(draw(3, shape) * 3)
    check(folder, "gelu", scalar, [x], {"approximate": approximate})


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("scalar, tolerance", [("float", 1.5e-7), ("bf16", 4e-3), ("f16", 5e-4)])
def test_gelu_everywhere(folder, scalar, tolerance, approximate):
    """Each value by itself, also far out, where powers of x overflow."""
    x = np.concatenate([np.linspace(-9, 9, 4001), [0.0, 1e4, -1e4, 6e4, -6e4, 1e-5, -1e-5]])[None]
    actual, expected = both(folder, "gelu", scalar, [x], {"approximate": approximate})
    exact = decode(encode(x, scalar))
    assert (np.abs(decode(actual[0]) - expected[0]) / np.maximum(np.abs(exact), 1)).max() < tolerance
    dy = decode(encode(draw(9, x.shape), scalar))
    assert (np.abs(decode(actual[1]) - expected[1]) / np.maximum(np.abs(dy), 1)).max() < 3 * tolerance


def test_gelu_gives_the_layer_before_its_biass_gradient(folder):
    x, weight, bias = (Tensor(draw(i, shape).astype(np.float32), requires_grad=True)
                       for i, shape in enumerate(((2, 5, 6), (8, 6), (8,))))  # fmt: skip
    dy, launched = draw(3, (2, 5, 8)).astype(np.float32), []

    def gradients() -> list[np.ndarray]:
        return grad(F.gelu(F.linear(x, weight, bias)), [x, weight, bias], dy)

    expected = gradients()
    with cuda_sim.everything_on_device(folder), pytest.MonkeyPatch.context() as patch:
        kernel = cuda.kernel
        patch.setattr(cuda, "kernel", lambda file, name, **c: launched.append(name) or kernel(file, name, **c))
        actual = gradients()
    assert launched == ["bias_gelu_forward", "bias_gelu_backward", "sum_partials"]
    for ours, right in zip(actual, expected, strict=True):
        assert error(ours, right) < 2e-6


@pytest.mark.parametrize("scalar, shape", [("bf16", (3, 5, 16)), ("float", (4, 7)), ("f16", (2, 9, 2, 24))])
def test_a_sum_with_drop_path(folder, scalar, shape):
    scale = np.random.default_rng(0).integers(0, 3, (shape[0],) + (1,) * (len(shape) - 1)) * 0.625
    check(folder, "add_scaled", scalar, [draw(0, shape), draw(1, shape)], {"scale": scale})


LINEAR = [("float", 33, 40), ("f16", 100, 264), ("float", 7, 10), ("f16", 1, 3)]


@pytest.mark.parametrize("scalar, rows, columns", LINEAR)
def test_linear_and_linear_gelu(folder, scalar, rows, columns):
    """With and without a bias; more rows than a block has, columns that end within a vector's width."""
    rng = np.random.default_rng(columns)
    x, weight, bias = rng.standard_normal((rows, 6)), rng.standard_normal((columns, 6)), rng.standard_normal(columns)
    check(folder, "linear", scalar, [x, weight, bias], {})
    check(folder, "linear", scalar, [x, weight, None], {})
    check(folder, "add_linear", scalar, [draw(1, (rows, columns)), x, weight, bias], {})
    for approximate in ("none", "tanh"):
        check(folder, "linear_gelu", scalar, [x, weight, bias], {"approximate": approximate})
        check(folder, "mlp", scalar, [x, x, weight, bias, weight.T, x[0]], {"approximate": approximate})


@pytest.mark.parametrize("scalar, rows, inner, columns", [("float", 9, 5, 40), ("bf16", 33, 24, 16), ("f16", 3, 2, 7)])
def test_products_through_cublas(folder, scalar, rows, inner, columns):
    """Layouts, transpositions, leading dimensions and epilogues, as the library itself would read them."""
    rng = np.random.default_rng(columns)
    x, weight, bias = (rng.standard_normal(shape) for shape in ((2, rows, inner), (columns, inner), columns))
    library = CuBLASLt()
    check(folder, "linear", scalar, [x, weight, bias], {}, library=library)
    check(folder, "linear", scalar, [x, weight, None], {}, library=library)
    check(folder, "add_linear", scalar, [draw(1, (2, rows, columns)), x, weight, bias], {}, library=library)
    assert set(library.calls) == {"BIAS", "DEFAULT"}
    for approximate in ("none", "tanh"):
        check(folder, "linear_gelu", scalar, [x, weight, bias], {"approximate": approximate}, library=library)
        weights = [weight, bias, weight.T, x[0, 0]]
        check(folder, "mlp", scalar, [None, x, *weights], {"approximate": approximate}, library=library)
    assert ("GELU_AUX_BIAS" in library.calls) == (scalar != "float" and columns % 8 == 0)


@pytest.mark.parametrize("fast, capability", [(True, 90), (True, 80), (False, 90)])
@pytest.mark.parametrize("seed", range(4))
def test_the_inputs_gradient_in_tf32(folder, seed, fast, capability):
    """On Hopper a product in the forward one's layout."""
    rows, inner, outer = np.random.default_rng(seed).integers(1, 70, 3).tolist()
    x, weight, dy = (draw(i, shape) for i, shape in enumerate(((rows, inner), (outer, inner), (rows, outer))))
    token = cublas.tf32.set(fast)
    try:
        with cuda_sim.device(folder, library=CuBLASLt(), capability=capability) as xp:
            inputs = (guarded(a.astype(np.float32)) for a in (x, weight, dy))
            _, vjp = linear.linear(xp, next(inputs), next(inputs), None, needs=(True, True, False))
            dx, dweight, _ = vjp(next(inputs))
            layouts = {(key.columns, key.a_transposed, key.b_transposed) for key in cublas._plans if key.rows == rows}
    finally:
        cublas.tf32.reset(token)
    assert error(dx, dy @ weight) < 1e-6 and error(dweight, dy.T @ x) < 1e-6
    assert (inner, False, fast and capability == 90) in layouts


@pytest.mark.parametrize("without", [("BIAS", "GELU_AUX_BIAS"), ("DEFAULT", "BIAS")])
def test_products_without_some_epilogues(folder, without):
    """Where cuBLASLt has no algorithm for one our own kernels, or CuPy's product, take its place."""
    rng = np.random.default_rng(0)
    inputs = [rng.standard_normal(shape) for shape in ((9, 8), (16, 8), 16)]
    library = CuBLASLt(without)
    check(folder, "linear", "f16", inputs, {}, library=library)
    check(folder, "add_linear", "f16", [draw(1, (9, 16)), *inputs], {}, library=library)
    check(folder, "linear_gelu", "f16", inputs, {"approximate": "tanh"}, library=library)
    assert not set(without) & set(library.calls)


def test_a_layer_without_the_bias_epilogue_can_still_be_captured(driver, folder):
    x, weight, bias = (draw(i, shape).astype(np.float32) for i, shape in enumerate(((9, 8), (16, 8), (16,))))
    with cuda_sim.device(folder, library=CuBLASLt(("BIAS",))) as xp, cuda_graph.capture():
        y, _ = cuda_version(reference.linear)(xp, *map(guarded, (x, weight, bias)), needs=(True,) * 3)
    assert np.allclose(y, x @ weight.T + bias, rtol=1e-5, atol=1e-5)


def test_an_algorithm_that_is_refused_at_launch(folder):
    """The product without a bias takes its place, from then on without asking again."""
    rng, library = np.random.default_rng(0), CuBLASLt(refused=("BIAS",))
    x, weight, bias = (rng.standard_normal(shape).astype(np.float32) for shape in ((9, 8), (16, 8), 16))
    with cuda_sim.device(folder, library=library) as xp, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            y, vjp = cuda_version(reference.linear)(xp, *map(guarded, (x, weight, bias)), needs=(True,) * 3)
            gradients = vjp(guarded(y))
    assert library.calls == ["DEFAULT"] * 3 * 3  # y, dW, dx
    (warning,) = caught
    assert "cuBLASLt refuses" in str(warning.message) and "BIAS" in str(warning.message)
    right = x @ weight.T + bias
    assert np.allclose(y, right, rtol=1e-5, atol=1e-5)
    for ours, expected in zip(gradients, (right @ weight, right.T @ x, right.sum(axis=0)), strict=True):
        assert np.allclose(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scalar, alignment", [("f16", 2), ("float", 4)])
def test_matrices_for_which_there_are_only_algorithms_of_less_alignment(folder, scalar, alignment):
    rng, library = np.random.default_rng(0), CuBLASLt(alignment=alignment)
    inputs = [rng.standard_normal(shape) for shape in ((9, 7), (5, 7), 5)]
    check(folder, "linear", scalar, inputs, {}, library=library)
    assert set(library.calls) == {"BIAS", "DEFAULT"}


def test_a_product_that_keeps_a_graph_from_being_captured_is_named(folder):
    x, weight = (np.ones(shape, np.float32) for shape in ((9, 8), (16, 8)))
    product = r"product of float32 \(9, 8\) and \(8, 16\)"
    for library, reason in ((None, "no library"), (CuBLASLt(("DEFAULT",)), product)):
        refused = pytest.raises(cuda_graph.NotCapturable, match=f"cuBLASLt's products: .*{reason}")
        with cuda_sim.device(folder, library=library) as xp, cuda_graph.capture(), refused:
            linear.linear(xp, x, weight, None, needs=(True, True, False))


def test_what_cublas_misses_is_said(monkeypatch):
    cublas._load.cache_clear()
    monkeypatch.setitem(sys.modules, "nvmath.bindings", None)
    monkeypatch.setattr(arrays, "is_cupy", lambda x: True)
    try:
        assert cublas.library() is None and "nvmath" in cublas.missing()
        needed = r"^precision tf32 needs nvmath-python: pip install [^\n]*nvmath\.bindings"
        with pytest.raises(ValueError, match=needed):
            Precision("tf32", nn.Linear(2, 2).parameters())
    finally:
        cublas._load.cache_clear()


def test_the_stand_in_for_cublas_has_nvidias_numbers():
    theirs = pytest.importorskip("nvmath.bindings.cublasLt")
    for name in ("Epilogue", "MatmulDescAttribute", "MatmulPreferenceAttribute", "MatrixLayoutAttribute"):
        for ours in getattr(CuBLASLt, name):
            assert getattr(theirs, name)[ours.name] == ours
    assert issubclass(theirs.cuBLASLtError, Exception) and theirs.matmul_heuristic_result_dtype.itemsize == 96
    assert theirs.matmul_heuristic_result_dtype.fields["algo"][1] == 0 and theirs.ReductionScheme.COMPUTE_TYPE == 2
    assert theirs.MatmulHeuristicResult(8).ptr % 8 == 0 and callable(theirs.matmul_algo_check)


@pytest.mark.parametrize("rows, columns", [(37, 264), (5, 9)])
def test_bias_kernels_in_bf16(folder, rows, columns):
    """Whose matrix products NumPy cannot do: the kernels around them."""
    rng = np.random.default_rng(rows)
    x, bias, dy = (encode(rng.standard_normal(shape), "bf16") for shape in ((rows, columns), columns, (rows, columns)))
    with cuda_sim.device(folder, seed=5) as xp:
        sums, matrix = linear.partial_sums(xp, x), guarded(x)
        linear.columns("column_sums", matrix, matrix, sums)
        out, dx, partial = xp.empty(x.shape, x.dtype), xp.empty(x.shape, x.dtype), linear.partial_sums(xp, x)
        linear.columns("bias_gelu_forward", matrix, matrix, guarded(bias), out)
        linear.columns("bias_gelu_backward", matrix, matrix, guarded(bias), guarded(dy), dx, partial)
        (dbias,) = linear.sum_partials(xp, partial, x.dtype)
    exact, vjp = reference.gelu(numpy_namespace, decode(x) + decode(bias), approximate="none", needs=(True,))
    (slope,) = vjp(decode(dy))
    assert error(sums.sum(axis=0, dtype=np.float64), decode(x).sum(axis=0)) < 1e-6
    for actual, right in ((out, exact), (dx, slope), (dbias, slope.sum(axis=0))):
        assert error(decode(actual), right) < 1e-2


SUMS = [
    ("bf16", (5, 3, 16), (0,)),
    ("bf16", (4, 7, 13), (0, 1)),
    ("f16", (9, 1, 24), (0, 1)),
    ("float", (40, 2, 3), (0,)),
    ("float", (3, 4, 5), (1,)),  # the others through the library
    ("float", (3, 4, 5), (0, 2)),
    ("float", (3, 4), (0, 1)),
]


@pytest.mark.parametrize("scalar, shape, axis", SUMS)
def test_sums(folder, scalar, shape, axis):
    x = encode(draw(0, shape), scalar)
    with cuda_sim.device(folder, seed=2) as xp:
        y = cuda_version(half_precision.sum_in_fp32)(xp, guarded(x), axis)
    assert y.dtype == x.dtype and error(decode(y), decode(x).sum(axis=axis)) < TOLERANCE[scalar]


def test_gradients_of_what_was_repeated_are_sums_of_columns(folder):
    """Those of position embeddings, class tokens and layer scales."""
    launched = []
    with cuda_sim.everything_on_device(folder), pytest.MonkeyPatch.context() as patch:
        kernel = cuda.kernel
        patch.setattr(cuda, "kernel", lambda file, name, **c: launched.append(name) or kernel(file, name, **c))
        x = draw(0, (3, 4, 5)).astype(np.float32)
        position, scale = (Tensor(np.ones(shape, np.float32), requires_grad=True) for shape in ((1, 4, 5), (5,)))
        token = Tensor(np.ones((1, 1, 5), np.float32), requires_grad=True)
        gradients = grad((x + position) * scale, [position, scale], x)
        gradients += [grad(ops.broadcast_to(token, (3, 1, 5)), token, x[:, :1])]
    assert launched == ["column_sums", "sum_partials"] * 3
    right = (x.sum(axis=0, keepdims=True), (x * (x + 1)).sum(axis=(0, 1)), x[:, :1].sum(axis=0, keepdims=True))
    for ours, expected in zip(gradients, right, strict=True):
        assert np.allclose(ours, expected, rtol=1e-5, atol=1e-5)


# --- loss -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scalar, classes", [("float", 10), ("f16", 1000), ("bf16", 33)])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("soft", [False, True])
def test_cross_entropy(folder, scalar, classes, smoothing, soft):
    rng = np.random.default_rng(classes)
    labels = rng.dirichlet(np.ones(classes), 5) if soft else rng.integers(0, classes, 5)
    logits = rng.standard_normal((5, classes)) * 3
    check(folder, "cross_entropy", scalar, [logits], {"labels": labels, "label_smoothing": smoothing})


def test_cross_entropy_of_extreme_logits_and_of_labels_that_are_no_class(folder):
    logits = np.array([[1e4, -1e4, 0], [-1e4, 1e4, 1e4]])
    actual, _ = both(folder, "cross_entropy", "float", [logits], {"labels": np.array([1, 1]), "label_smoothing": 0.0})
    dy = draw(9, ())
    assert actual[0] == pytest.approx((2e4 + math.log(2)) / 2, rel=1e-6)
    assert actual[1] / dy == pytest.approx(np.array([[0.5, -0.5, 0.0], [0.0, -0.25, 0.25]]), abs=1e-7)
    for label in (3, -1, 2**32):
        params = {"labels": np.array([label, 1]), "label_smoothing": 0.0}
        for loss, gradient in both(folder, "cross_entropy", "float", [logits], params):
            assert np.isnan(loss) and np.isnan(gradient[0]).all() and np.isfinite(gradient[1]).all()


# --- dropout ----------------------------------------------------------------------------------------------------------


DROPS = [("float", (3, 5), 4), ("f16", (1, 1), 7), ("bf16", (2, 24), 3), ("bf16", (130, 131), 3), ("f16", (1,), 7000)]


@pytest.mark.parametrize("scalar, shape, samples", DROPS)
@pytest.mark.parametrize("seed, step, place, first", [(0, 0, 0, 0), (7, 123456, 3, 5), (2**32 - 1, 1, 40, 1000)])
def test_dropout_masks_are_the_hosts(folder, scalar, shape, samples, seed, step, place, first):
    """Bit for bit, whether the step comes as a number or lies on the device."""
    drop = 0.3
    right = random.keep_mask(drop, samples, shape, random.Draw(seed, step, place, first))
    assert 0 < right.sum() < right.size or right.size < 8
    with cuda_sim.device(folder, seed=4, multiprocessors=1) as xp:
        like = xp.empty((samples, 2), SCALARS[scalar])
        for steps in (step, guarded(np.array(step, np.int64))):
            draw = random.Draw(seed, steps, place, first)
            mask = cuda_version(reference.dropout_mask)(xp, like, drop=drop, shape=shape, draw=draw)
            assert np.array_equal(mask, encode(right / (1 - drop), scalar))


def test_dropout_masks_of_large_seeds_and_of_everything(folder):
    with cuda_sim.device(folder) as xp:
        like = xp.empty((4, 2), np.float32)
        for draw, drop in (
            (random.Draw(2**40, 1, 0, 0), 0.5),
            (random.Draw(1, 1, 0, 0), 1.0),
            (random.Draw(1, 1, 0, 0), 0.0),
        ):
            ours, right = (
                f(numpy_namespace if f is reference.dropout_mask else xp, like, drop=drop, shape=(50,), draw=draw)
                for f in (cuda_version(reference.dropout_mask), reference.dropout_mask)
            )
            assert np.array_equal(ours, right)


# --- around the kernels -----------------------------------------------------------------------------------------------


def test_what_no_kernel_covers_runs_through_the_reference(folder):
    """float64, no rows, masks, large head dimensions: the same values, without a launch."""
    rng = np.random.default_rng(4)
    large = rng.standard_normal((1, 2, 3 * 129)).astype(np.float32)
    qkv, mask = rng.standard_normal((2, 5, 24)).astype(np.float32), rng.standard_normal((5, 5)) > -1
    calls = [
        ("qkv_attention", [qkv.astype(np.float64)], {"num_heads": 1}),
        ("qkv_attention", [large], {"num_heads": 1}),
        ("qkv_attention", [qkv], {"num_heads": 1, "mask": mask}),
        ("layer_norm", [qkv[:0], qkv[0, 0], qkv[0, 1]], {"eps": 1e-6}),
        ("gelu", [qkv[:0]], {"approximate": "none"}),
        ("linear", [qkv.astype(np.float64), np.ones((3, 24)), None], {}),
        ("linear_gelu", [qkv[:0], np.ones((3, 24), np.float32), np.ones(3, np.float32)], {"approximate": "none"}),
    ]
    with cuda_sim.device(folder):
        assert not layers.covers_cross_entropy(qkv[:0, 0], labels=np.zeros(0, np.int64))  # whose mean is NaN
        assert cuda.covers(qkv, qkv) and not cuda.covers(qkv, qkv[:0])
        for name, inputs, params in calls:
            needs = tuple(x is not None for x in inputs)
            y, vjp = cuda_version(getattr(reference, name))(numpy_namespace, *inputs, needs=needs, **params)
            right, right_vjp = getattr(reference, name)(numpy_namespace, *inputs, needs=needs, **params)
            assert np.array_equal(y, right) and y.dtype == right.dtype
            for g, expected in zip(vjp(y), right_vjp(right), strict=True):
                assert (g is None and expected is None) or np.array_equal(g, expected)


def test_importing_the_kernels_needs_no_cupy():
    program = "import sys; sys.modules['cupy'] = None; import tinyvit.kernels.cuda.table"
    subprocess.run([sys.executable, "-c", program], check=True)
