"""One call that proves and times every CUDA kernel on the GPU at hand.

    python bench/gpu_check.py                       # everything but the search for plans: a minute or two
    python bench/gpu_check.py --tune --json out.json

Compares every kernel with the reference in float64 on many shapes, twice, to see the same bits; outputs are full of NaN
before. Then times them on the device alone (CUDA graphs of launches over inputs that do not fit the cache, median):
kernels bound by memory as a share of the device's own copy rate.
`--tune` times attention under other plans than our own. The exit status is 1 if any comparison failed.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

import tinyvit
from tinyvit.kernels import cuda, cupy_, cupy_attention, cupy_linear, cupy_optim, reference, reference_optim

try:
    import array_api_compat.cupy as xp
    import cupy

    cupy.cuda.runtime.getDeviceCount()
except Exception as error:
    sys.exit(f"gpu_check needs CuPy and a GPU: {error}")

try:
    import ml_dtypes

    BF16 = np.dtype(ml_dtypes.bfloat16)
except ImportError:
    sys.exit("gpu_check needs ml_dtypes, for bfloat16")

LIMITS = {np.dtype(np.float32): 1e-5, np.dtype(np.float16): 2e-3, BF16: 1e-2}
# What is timed: CIFAR's ViT with patches of 4 in batches of 1024, ViT-B/16 in batches of 256, ViT-L/16 at 384 of 64.
ATTENTION = ((1024, 3, 65), (256, 12, 197), (64, 16, 577))  # batch, heads, rows; D = 64
TOKENS = ((1024 * 65, 192), (256 * 197, 768))  # rows and width of the activations
MODELS = ("vit_tiny_patch4_32", "vit_base_patch16_224")
rng = np.random.default_rng(0)
results: list[dict[str, Any]] = []


# --- comparisons ------------------------------------------------------------------------------------------------------


class Poisoned:
    """CuPy's namespace, whose empty arrays are full of NaN."""

    @staticmethod
    def empty(shape: Any, dtype: Any) -> Any:
        x = xp.empty(shape, dtype=dtype)
        x.data.memset(0xFF, x.nbytes)
        return x

    def __getattr__(self, name: str) -> Any:
        return getattr(xp, name)


def error(actual: Any, expected: Any) -> float:
    """|actual - expected| / |expected|."""
    actual, expected = (np.asarray(x, np.float64) for x in (actual, expected))
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    return float(np.linalg.norm(actual - expected) / max(np.linalg.norm(expected), 1e-30))


def record(what: str, errors: list[float], limit: float, same: bool = True) -> None:
    worst = max(math.inf if math.isnan(e) else e for e in errors)
    results.append({"check": what, "error": worst, "limit": limit, "repeats": same, "ok": worst < limit and same})
    if not results[-1]["ok"]:
        print(f"FAILED {what}: error {worst:.1e}, limit {limit:.0e}{'' if same else ', other bits the second time'}")


def compare(name: str, dtype: np.dtype, inputs: list, limit: float | None = None, **params: Any) -> None:
    """A kernel's results and gradients against the reference's in float64."""

    def rounded(x: Any) -> Any:
        return x.astype(dtype) if isinstance(x, np.ndarray) and x.dtype.kind == "f" else x

    def exact(x: Any) -> Any:
        return rounded(x).astype(np.float64) if isinstance(x, np.ndarray) and x.dtype.kind == "f" else x

    def on_device(x: Any) -> Any:
        return cupy.asarray(rounded(x)) if isinstance(x, np.ndarray) else x

    def run(function: Callable, namespace: Any, place: Callable) -> list:
        needs = tuple(x is not None for x in inputs)
        y, vjp = function(namespace, *map(place, inputs), needs=needs, **{k: place(v) for k, v in params.items()})
        dy = np.asarray(np.random.default_rng(1).standard_normal(y.shape))
        return [y, *vjp(place(dy))]

    expected = run(getattr(reference, name), np_namespace(), exact)
    first, second = ([x.get() for x in run(cupy_.KERNELS[name], Poisoned(), on_device) if x is not None] for _ in "12")
    errors = [error(a, b) for a, b in zip(first, [x for x in expected if x is not None], strict=True)]
    same = all(a.tobytes() == b.tobytes() for a, b in zip(first, second, strict=True))
    shapes = " ".join(str(x.shape) for x in inputs if x is not None)
    record(f"{name} {dtype.name} {shapes}", errors, limit or LIMITS[dtype], same)


def np_namespace() -> Any:
    import array_api_compat.numpy

    return array_api_compat.numpy


def check_attention() -> None:
    for dtype in LIMITS:
        for n in (1, 17, 50, 65, 96, 197, 257, 577, 1025):
            for dim in (64,) if n > 257 else (16, 32, 64, 72, 80, 96, 128):
                compare("qkv_attention", dtype, [rng.standard_normal((2, n, 3 * 3 * dim))], num_heads=3)
        for n, queries in ((65, 1), (197, 1), (197, 17)):  # the last block computes only what the head reads
            compare("qkv_attention", dtype, [rng.standard_normal((2, n, 3 * 3 * 64))], num_heads=3, queries=queries)
        for n in (65, 197):  # logits up to 1e4: nothing may overflow
            qkv = rng.standard_normal((1, n, 3 * 64))
            qkv[..., :128] *= math.sqrt(1e4 * 8 / np.abs(qkv[0, :, :64] @ qkv[0, :, 64:128].T).max())
            compare("qkv_attention", dtype, [qkv], limit=0.1, num_heads=1)


def check_others() -> None:
    draw = rng.standard_normal
    for dtype in LIMITS:
        for rows, dim in ((1, 64), (65, 192), (197 * 4, 768), (1000, 1024), (333, 1280), (77, 30), (50, 257)):
            compare("layer_norm", dtype, [draw((rows, dim)) + 2, draw(dim), draw(dim)], eps=1e-6)
        for rows, inner, outer in ((65 * 16, 192, 768), (197 * 4, 768, 3072), (1024, 192, 10), (3, 7, 9)):
            weight = draw((outer, inner)) / math.sqrt(inner)
            compare("linear", dtype, [draw((rows, inner)), weight, draw(outer)])
            for approximate in ("none", "tanh"):
                compare("linear_gelu", dtype, [draw((rows, inner)), weight, draw(outer)], approximate=approximate)
        for approximate in ("none", "tanh"):
            compare("gelu", dtype, [draw((1000, 77)) * 3], approximate=approximate)
        for batch, classes in ((1024, 10), (256, 1000), (5, 21843)):
            for smoothing in (0.0, 0.1):
                hard = {"labels": rng.integers(0, classes, batch), "label_smoothing": smoothing}
                compare("cross_entropy", dtype, [draw((batch, classes)) * 3], **hard)
                soft = {"labels": rng.dirichlet(np.ones(classes), batch), "label_smoothing": smoothing}
                compare("cross_entropy", dtype, [draw((batch, classes)) * 3], **soft)


def check_adamw() -> None:
    """All parameters of a ViT at once, three steps, clipped, with copies in the gradients' dtype."""
    sizes = [p.size for p in tinyvit.create_model("vit_tiny_patch4_32").parameters()]
    options = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8}
    for dtype in LIMITS:
        right = [[rng.standard_normal(n), np.zeros(n), np.zeros(n)] for n in sizes]
        ours = [[cupy.asarray(x.astype(np.float32)) for x in row] for row in right]
        copies = [cupy.empty(n, dtype) for n in sizes]
        ones = [1.0] * len(sizes)
        many = {"dtype": dtype, "copies": copies, "lr_scales": ones, "weight_decays": [0.05] * len(sizes), **options}
        opt = cupy_optim.ManyAdamW(xp, *zip(*ours, strict=True), **many)
        for step in (1, 2, 3):
            gradients = [rng.standard_normal(n).astype(dtype) for n in sizes]
            norm = math.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in gradients))
            opt.control[0] = 0.01
            opt.set_gradients([cupy.asarray(g) for g in gradients])
            opt.clip(norm / 2)
            opt.step()
            for row, g in zip(right, gradients, strict=True):
                exact = g.astype(np.float64) * (norm / 2 / (norm + 1e-6))
                reference_optim.adamw(
                    np_namespace(), row[0], exact, *row[1:], lr=0.01, weight_decay=0.05, step=step, **options
                )
            record(f"gradient norm {dtype.name}", [abs(float(opt.control[5]) / norm - 1)], 1e-10)
        errors = [error(a.get(), b) for x, y in zip(ours, right, strict=True) for a, b in zip(x, y, strict=True)]
        record(f"adamw of {len(sizes)} parameters, gradients {dtype.name}", errors, 1e-5)
        copied = all((c.get() == x[0].get().astype(dtype)).all() for c, x in zip(copies, ours, strict=True))
        record(f"adamw's {dtype.name} copies", [0.0 if copied else math.inf], 1e-30)


# --- timing -----------------------------------------------------------------------------------------------------------


def microseconds(calls: list[Callable[[], Any]], repeats: int = 15) -> float:
    """Time of one call on the device: a graph goes through all of them, which touch different memory."""
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        kept = [call() for call in calls]  # compiles, and keeps each call's arrays apart
        del kept
        stream.begin_capture()
        kept = [call() for call in calls]
        graph = stream.end_capture()
        times = []
        for _ in range(repeats):
            start, end = cupy.cuda.Event(), cupy.cuda.Event()
            start.record(stream)
            graph.launch(stream)
            end.record(stream)
            end.synchronize()
            times.append(cupy.cuda.get_elapsed_time(start, end) * 1e3 / len(calls))
    del kept
    return float(np.median(times))


def sets(nbytes: int) -> range:
    """Numbers for as many sets of inputs as overflow the cache twice."""
    l2 = cupy.cuda.Device().attributes["L2CacheSize"]
    return range(max(2, min(50, math.ceil(3 * l2 / nbytes))))


@functools.cache
def noise(dtype: np.dtype) -> Any:
    bits = rng.standard_normal(1 << 20, dtype=np.float32).astype(dtype).view(f"u{dtype.itemsize}")
    return cupy.asarray(bits)


def random_array(shape: Any, dtype: np.dtype = BF16) -> Any:
    """Normal numbers, which repeat after a million."""
    size = int(np.prod(shape))
    return cupy.resize(noise(dtype), size).view(dtype).reshape(shape)


def attention_calls(batch: int, heads: int, n: int, backward: bool, dtype: Any = BF16) -> list[Callable]:
    """Calls of our attention, forward or backward alone."""
    nbytes = batch * n * heads * 64 * np.dtype(dtype).itemsize * (8 if backward else 4)
    qkvs = [random_array((batch, n, 3 * heads * 64), dtype) for _ in sets(nbytes)]
    if not backward:
        return [lambda qkv=qkv: cupy_.qkv_attention(xp, qkv, num_heads=heads, needs=(True,))[0] for qkv in qkvs]
    vjps = [cupy_.qkv_attention(xp, qkv, num_heads=heads, needs=(True,))[1] for qkv in qkvs]
    dys = [random_array((batch, n, heads * 64), dtype) for _ in qkvs]
    return [lambda vjp=vjp, dy=dy: vjp(dy) for vjp, dy in zip(vjps, dys, strict=True)]


def time_attention() -> None:
    print("\nattention, bf16, D = 64: microseconds forward, backward, both (beside torch's: attention_bench)")
    for batch, heads, n in ATTENTION:
        forward, backward = (microseconds(attention_calls(batch, heads, n, back)) for back in (False, True))
        flops, shape = 4 * batch * heads * n * n * 64, f"{batch} x {heads} x {n}"
        rates = f"{flops / forward / 1e6:4.0f} and {2.5 * flops / backward / 1e6:4.0f} TFLOP/s"
        print(f"  {shape:16} {forward:7.1f} {backward:7.1f} {forward + backward:7.1f}   {rates}")
        results.append({"time": f"attention {shape}", "microseconds": [forward, backward]})


def tune_attention() -> None:
    """Other plans than our own, fastest first."""
    own = cupy_attention.forward_plan, cupy_attention.backward_plan
    step = {False: ("KEYS", (32, 64, 80)), True: ("QUERIES", (32, 64))}
    for batch, heads, n in ATTENTION:
        for back in (False, True):
            timed = []
            for choice in choices(n, *step[back]):
                plan = own[back](n, n, 64, 2, **choice)
                if plan is None:
                    continue
                name = "backward_plan" if back else "forward_plan"
                setattr(cupy_attention, name, functools.partial(own[back], **choice))
                try:
                    timed.append((microseconds(attention_calls(batch, heads, n, back), 7), plan.constants, plan.parts))
                except Exception as problem:  # a plan that the device refuses
                    print(f"  {choice}: {problem}")
                finally:
                    cupy_attention.forward_plan, cupy_attention.backward_plan = own
            print(f"\n{'backward' if back else 'forward'} {batch} x {heads} x {n}; ours is {own[back](n, n, 64, 2)}")
            for micros, constants, parts in sorted(timed, key=lambda row: row[0])[:6]:
                print(f"  {micros:7.1f}  {constants} in {parts}")
            results.append({"tune": f"{batch} x {heads} x {n}", "backward": back, "times": timed})


def choices(n: int, step: str, sizes: tuple[int, ...]) -> Iterator[dict[str, int]]:
    for tiles in (1, 2) if n > 16 else (1,):
        for size in sizes:
            for warps in (4, 5, 7, 8, 13):
                if warps <= math.ceil(n / 16 / tiles):
                    yield {"TILES": tiles, step: size, "WARPS": warps}


def copy_rate() -> float:
    """GB/s of a copy on the device, read and written bytes counted."""
    a, b = cupy.ones(1 << 28, cupy.float32), cupy.empty(1 << 28, cupy.float32)
    return 2 * a.nbytes / microseconds([lambda: cupy.copyto(b, a)]) / 1e3


def time_others() -> None:
    rate = copy_rate()
    print(f"\nbound by memory: microseconds, GB/s and share of a copy's {rate:.0f} GB/s")

    def show(name: str, nbytes: int, make: Callable[[], Callable]) -> None:
        micros = microseconds([make() for _ in sets(nbytes)])
        print(f"  {name:44} {micros:8.1f} {nbytes / micros / 1e3:7.0f} {nbytes / micros / 1e3 / rate:6.2f}")
        results.append({"time": name, "microseconds": micros, "share": nbytes / micros / 1e3 / rate})

    for rows, dim in TOKENS:
        size, vectors = rows * dim * 2, [random_array(dim) for _ in range(2)]

        def norm(back: bool, rows: int = rows, dim: int = dim, vectors: list = vectors) -> Callable:
            x, dy = random_array((rows, dim)), random_array((rows, dim))
            call = functools.partial(cupy_.layer_norm, xp, x, *vectors, eps=1e-6, needs=(True,) * 3)
            return functools.partial(call()[1], dy) if back else lambda: call()[0]

        def add_norm(rows: int = rows, dim: int = dim, vectors: list = vectors) -> Callable:
            x, y = random_array((rows, dim)), random_array((rows, dim))
            return lambda: cupy_.add_layer_norm(xp, x, y, *vectors, eps=1e-6, needs=(True,) * 4)[0]

        def gelu(back: bool, rows: int = rows, columns: int = 4 * dim) -> Callable:
            x, bias, dy = random_array((rows, columns)), random_array(columns), random_array((rows, columns))
            out = cupy.empty((rows, columns), BF16)
            if back:
                return lambda: cupy_linear.columns(
                    "bias_gelu_backward", x, x, bias, dy, out, cupy_linear.partial_sums(xp, x)
                )
            return lambda: cupy_linear.columns("bias_gelu_forward", x, x, bias, out)

        def column_sums(rows: int = rows, columns: int = 3 * dim) -> Callable:
            x = random_array((rows, columns))
            return lambda: cupy_linear.columns("column_sums", x, x, cupy_linear.partial_sums(xp, x))

        show(f"layer_norm {rows} x {dim}", 2 * size, functools.partial(norm, False))
        show(f"layer_norm backward {rows} x {dim}", 3 * size, functools.partial(norm, True))
        show(f"add_layer_norm {rows} x {dim}", 4 * size, add_norm)
        show(f"bias_gelu {rows} x {4 * dim}", 8 * size, functools.partial(gelu, False))
        show(f"bias_gelu backward {rows} x {4 * dim}", 12 * size, functools.partial(gelu, True))
        show(f"column_sums {rows} x {3 * dim}", 3 * size, column_sums)

    def adamw() -> Callable:
        sizes = [p.size for p in model.parameters()]
        arrays = [[cupy.zeros(n, cupy.float32) for n in sizes] for _ in range(3)]
        copies, gradients = ([random_array(n) for n in sizes] for _ in range(2))
        ones = [1.0] * len(sizes)
        options = {"dtype": BF16, "copies": copies, "lr_scales": ones, "weight_decays": ones, "beta1": 0.9}
        opt = cupy_optim.ManyAdamW(xp, *arrays, **options, beta2=0.999, eps=1e-8)
        opt.set_gradients(gradients)

        def step() -> None:
            opt.clip(1.0)
            opt.step()

        return step

    for name in MODELS:
        model = tinyvit.create_model(name)
        show(f"norm, clipping and AdamW of {name}", 30 * model.num_parameters(), adamw)

    x = random_array(64)
    call = functools.partial(cupy_.gelu, xp, x, approximate="none", needs=(False,))
    call()
    start = time.perf_counter()
    for _ in range(2000):
        call()
    launch = (time.perf_counter() - start) / 2000 * 1e6
    cupy.cuda.Device().synchronize()
    print(f"\na launch from Python, with its result's allocation: {launch:.1f} microseconds of the host")
    results.append({"time": "launch", "microseconds": launch})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tune", action="store_true", help="time attention under other plans too (several minutes)")
    parser.add_argument("--checks-only", action="store_true", help="no timing")
    parser.add_argument("--json", metavar="FILE", help="write all numbers there")
    arguments = parser.parse_args()
    properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)
    print(properties["name"].decode(), "CuPy", cupy.__version__, "driver", cupy.cuda.runtime.driverGetVersion())
    print(f"{cuda.multiprocessors()} multiprocessors, {cuda.shared_limit() >> 10} KB of shared memory for a block")
    for part in (check_attention, check_others, check_adamw):
        start = time.perf_counter()
        part()
        print(f"{part.__name__}: {time.perf_counter() - start:.1f} s")
    checks = [r for r in results if "check" in r]
    failed = [r for r in checks if not r["ok"]]
    for dtype in LIMITS:
        worst = max(
            (r for r in checks if dtype.name in r["check"] and r["limit"] <= LIMITS[dtype]), key=lambda r: r["error"]
        )
        print(f"{dtype.name:9} worst error {worst['error']:.1e} of {worst['limit']:.0e}: {worst['check']}")
    if not arguments.checks_only:
        time_attention()
        time_others()
    if arguments.tune:
        tune_attention()
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(results, file, indent=1, default=str)
    print(f"\n{len(checks) - len(failed)} of {len(checks)} comparisons passed")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
