"""How long the CUDA kernels, training steps and predictions take on a GPU, beside what the device can do.

    python bench/gpu_times.py                                # all but the last two: about a minute
    python bench/gpu_times.py --only steps attention --json times.json
    python bench/gpu_times.py --only profile                 # which kernels a step consists of; needs torch for CUDA
    python bench/gpu_times.py --only tune                    # products under cuBLASLt's first eight algorithms

`tune` keeps each product's fastest algorithm in a file beside CuPy's compiled kernels, which later runs on this kind of
device read: they add up in other orders, so that their last digits change. Deleting the file undoes it.

Times of kernels are the device's own: a CUDA graph of several calls, timed by events. That the results are right is
what `python -m pytest -m gpu` shows.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import math
import sys
import time
import traceback
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import devices
import numpy as np
from train_bench import flops

import tinyvit
from tinyvit import optim
from tinyvit.backend import random
from tinyvit.backend.cuda_graph import Graphed
from tinyvit.execution import inference
from tinyvit.kernels.cuda import (
    attention,
    cublas,
    layers,
    linear,
    linear_gelu_sm90a,
    optimizers,
    product_file,
)

NAMES = ("steps", "predictions", "attention", "products", "others", "profile", "tune")
parser = devices.Parser("gpu_times", __doc__)
parser.set_defaults(device="cuda")
parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES[:-2])
parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there")
args = parser.parse_args()
try:
    gpu = devices.choose(args.device)
    if gpu.name == "cpu":
        raise RuntimeError("expected --device cuda, got cpu")
except RuntimeError as error:
    sys.exit(f"gpu_times: error: {error}")

xp, cupy = importlib.import_module("array_api_compat.cupy"), gpu.cupy
BF16, FP32 = gpu.bfloat16, np.dtype(np.float32)
rng = np.random.default_rng(0)
results: list[dict[str, Any]] = []

# CIFAR's ViT with patches of 4 in batches of 1024, ViT-B/16 in batches of 256, ViT-L/16 at 384 of 64.
ATTENTION = ((1024, 3, 65), (256, 12, 197), (64, 16, 577))  # batch, heads, rows; D = 64
TOKENS = ((1024 * 65, 192), (256 * 197, 768))  # rows and width of the activations
MODELS = ("vit_tiny_patch4_32", "vit_base_patch16_224")
STEPS = tuple(zip(MODELS, (1024, 256), strict=True))  # models and their batches


@functools.cache
def stream() -> Any:
    """The stream that is captured and timed."""
    return cupy.cuda.Stream(non_blocking=True)


def microseconds(calls: list[Callable[[], Any]], repeats: int = 15) -> float:
    """Time of one call on the device, the median over launches of a graph of all of them."""
    cupy.cuda.Device().synchronize()  # inputs were made on another stream
    with stream():
        kept = [call() for call in calls]  # compiles, and keeps each call's arrays apart
        del kept
        stream().begin_capture()
        kept = [call() for call in calls]
        graph = stream().end_capture()
        times = []
        for _ in range(repeats):
            start, end = cupy.cuda.Event(), cupy.cuda.Event()
            start.record(stream())
            graph.launch(stream())
            end.record(stream())
            end.synchronize()
            times.append(cupy.cuda.get_elapsed_time(start, end) * 1e3 / len(calls))
    del kept
    return float(np.median(times))


def sets(nbytes: int) -> range:
    """As many sets of inputs as overflow the cache twice, by their numbers."""
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
        return [lambda qkv=qkv: attention.qkv_attention(xp, qkv, num_heads=heads, needs=(True,))[0] for qkv in qkvs]
    vjps = [attention.qkv_attention(xp, qkv, num_heads=heads, needs=(True,))[1] for qkv in qkvs]
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
            call = functools.partial(layers.layer_norm, xp, x, *vectors, eps=1e-6, needs=(True,) * 3)
            return functools.partial(call()[1], dy, x) if back else lambda: call()[0]

        def gelu(back: bool, rows: int = rows, columns: int = 4 * dim) -> Callable:
            x, bias, dy = random_array((rows, columns)), random_array(columns), random_array((rows, columns))
            out = cupy.empty((rows, columns), BF16)
            if back:
                return lambda: linear.columns("bias_gelu_backward", x, x, bias, dy, out, linear.partial_sums(xp, x))
            return lambda: linear.columns("bias_gelu_forward", x, x, bias, out)

        def column_sums(rows: int = rows, columns: int = 3 * dim) -> Callable:
            x = random_array((rows, columns))
            return lambda: linear.columns("column_sums", x, x, linear.partial_sums(xp, x))

        show(f"layer_norm {rows} x {dim}", 2 * size, functools.partial(norm, False))
        show(f"layer_norm backward with residual {rows} x {dim}", 4 * size, functools.partial(norm, True))
        show(f"bias_gelu {rows} x {4 * dim}", 8 * size, functools.partial(gelu, False))
        show(f"bias_gelu backward {rows} x {4 * dim}", 12 * size, functools.partial(gelu, True))
        show(f"column_sums {rows} x {3 * dim}", 3 * size, column_sums)

        def fused(back: bool, rows: int = rows, dim: int = dim) -> Callable:
            x, weight, bias = random_array((rows, dim)), random_array((4 * dim, dim)), random_array(4 * dim)
            if not back:
                return lambda: linear_gelu_sm90a.forward(xp, x, weight, bias, "none", True)
            hidden = random_array((rows, 4 * dim))
            return lambda: linear_gelu_sm90a.backward(xp, x, weight.reshape(dim, -1), hidden, bias, "none")

        def mlp(rows: int = rows, dim: int = dim) -> Callable:
            shapes = (rows, dim), (rows, dim), (4 * dim, dim), 4 * dim, (dim, 4 * dim), dim
            arrays = [random_array(shape) for shape in shapes]
            return lambda: linear_gelu_sm90a.mlp(xp, *arrays, "none")

        x, wide = random_array((rows, dim)), 4 * dim
        if linear_gelu_sm90a.takes(x, wide, "none", "mlp"):  # beside both products, GELU and the sum
            show(f"MLP in one kernel {rows} x {dim} to {wide}", 3 * size, mlp)
        if linear_gelu_sm90a.takes(x, wide, "none"):  # beside fc1's product and GELU
            show(f"linear_gelu in one kernel {rows} x {dim} to {wide}", 9 * size, functools.partial(fused, False))
        if linear_gelu_sm90a.takes(x, wide, "none", "backward"):  # beside fc2's input gradient and GELU's
            show(
                f"linear_gelu backward in one kernel {rows} x {dim} to {wide}", 9 * size, functools.partial(fused, True)
            )

    def adamw() -> Callable:
        sizes = [p.size for p in model.parameters()]
        p, m, v = ([cupy.zeros(n, cupy.float32) for n in sizes] for _ in range(3))
        copies, gradients = ([random_array(n) for n in sizes] for _ in range(2))
        ones = [1.0] * len(sizes)
        options = {"lr_scales": ones, "weight_decays": ones, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "max_norm": 1.0}
        state = optimizers.UpdateState(xp)
        options |= {"rounded": copies, "steps": [0] * len(sizes), "state": state, "decoupled": True}
        state.begin(1e-3, 0)
        return lambda: optimizers.update_adamw(xp, p, gradients, m, v, **options)

    def ema() -> Callable:
        a, b = ([cupy.zeros(p.size, cupy.float32) for p in model.parameters()] for _ in range(2))
        state = optimizers.UpdateState(xp)
        return lambda: optimizers.update_average(xp, a, b, state=state, weight=0.1)

    for name in MODELS:
        model = tinyvit.create_model(name)
        show(f"norm, clipping and AdamW of {name}", 30 * model.num_parameters(), adamw)
        show(f"averages of {name}", 12 * model.num_parameters(), ema)

    mask = functools.partial(layers.dropout_mask, xp, random_array(1024), drop=0.1, shape=(65, 768))
    show("dropout masks, 1024 x 65 x 768", 2 * 1024 * 65 * 768, lambda: lambda: mask(draw=random.Draw(0, 0, 0, 0)))

    x = random_array(64)
    call = functools.partial(linear.gelu, xp, x, approximate="none", needs=(False,))
    call()
    start = time.perf_counter()
    for _ in range(2000):
        call()
    launch = (time.perf_counter() - start) / 2000 * 1e6
    cupy.cuda.Device().synchronize()
    print(f"\na launch from Python, with its result's allocation: {launch:.1f} microseconds of the host")
    results.append({"time": "launch", "microseconds": launch})


def time_products() -> None:
    """Each product of a block, through cuBLASLt with its epilogue."""
    print("\nproducts of a block through cuBLASLt: microseconds and TFLOP/s (fp32 in tf32)")
    for dtype in (BF16, FP32):
        token = cublas.tf32.set(True)
        for rows, dim in TOKENS:
            for name, inner, outer in (
                ("qkv", dim, 3 * dim),
                ("proj", dim, dim),
                ("fc1", dim, 4 * dim),
                ("fc2", 4 * dim, dim),
            ):
                count = len(sets(rows * (inner + outer) * dtype.itemsize))
                x, dy = ([random_array((rows, n), dtype) for _ in range(count)] for n in (inner, outer))
                weight, bias = random_array((outer, inner), dtype), random_array(outer, dtype)
                forms: dict[str, Callable] = {
                    "forward": lambda x, dy, w=weight, b=bias: cublas.linear(xp, x, w, b),
                    "and residual": lambda x, dy, w=weight, b=bias: cublas.linear(xp, x, w, b, dy),
                    "dx": lambda x, dy, w=weight: cublas.input_gradient(xp, dy, w),
                    "dW": lambda x, dy: cublas.weight_gradient(xp, dy, x),
                }
                line = f"  {dtype.name:9}{rows:6} x {inner:4} to {outer:4} {name:5}"
                for form, call in forms.items():
                    if call(x[0], dy[0]) is None:
                        line += f"  {form}: no algorithm"
                        continue
                    micros = microseconds([functools.partial(call, a, b) for a, b in zip(x, dy, strict=True)], 7)
                    rate = 2 * rows * inner * outer / micros / 1e6
                    line += f"  {form} {micros:.0f} {rate:.0f}"
                    results.append(
                        {"time": f"{dtype.name} {name} {form} {rows} x {dim}", "microseconds": micros, "tflops": rate}
                    )
                print(line)
        cublas.tf32.reset(token)


def tune_products() -> None:
    """Measure cuBLASLt's algorithms for every product of the models' steps and predictions, and keep the fastest."""
    for name, size in STEPS:
        for precision in ("bf16", "tf32"):
            with single_launches():
                step = make_step(precision, name)
                images, labels = batch(size, step.model.config)
                step(images, labels)
                tinyvit.predict(step.model, images, batch_size=size, precision=precision)
            del step, images, labels
            cupy.get_default_memory_pool().free_all_blocks()
    for key in [key for key, plan in cublas._plans.items() if plan is not None]:
        if key.many > 1 or "GELU" in key.epilogue:
            continue  # no part of these models
        token = cublas.tf32.set(key.tf32)
        try:
            times = cublas.search(key, functools.partial(microseconds, product_calls(key), 7))
        finally:
            cublas.tf32.reset(token)
        if not times:
            continue  # cuBLASLt refuses them all, with a warning
        print(f"  {times[0]:7.1f} to {min(times):7.1f}  {' '.join(map(str, key[1:]))}")
        results.append({"tune": key._asdict(), "microseconds": times})
    print(f"  kept in {product_file.path()}")


def product_calls(key: Any) -> list[Callable[[], Any]]:
    """Calls of products of a kind."""
    dtype, calls = BF16 if key.scalar == "bf16" else FP32, []
    a_shape, b_shape = (key.rows, key.inner), (key.inner, key.columns)
    shapes = (a_shape[:: -1 if key.a_transposed else 1], b_shape[:: -1 if key.b_transposed else 1])
    options = {"a_transposed": key.a_transposed, "b_transposed": key.b_transposed, "epilogue": key.epilogue}
    if key.epilogue == "BIAS":
        options["bias"] = random_array(key.columns, dtype)
    for _ in sets(dtype.itemsize * (math.prod(a_shape) + math.prod(b_shape) + key.rows * key.columns)):
        operands = (random_array(shape, dtype) for shape in (*shapes, (key.rows, key.columns)))
        calls.append(functools.partial(cublas._product, xp, *operands, **options))
    return calls


# --- training steps and predictions ---------------------------------------------------------------------------------


def make_step(precision: str, model: str) -> tinyvit.TrainStep:
    vit = tinyvit.create_model(model).to("cuda")
    optimizer = optim.AdamW(vit.parameters(), lr=1e-3, weight_decay=0.05)
    return tinyvit.TrainStep(vit, optimizer, clip_norm=1.0, label_smoothing=0.1, precision=precision)


def batch(size: int, config: tinyvit.ViTConfig) -> tuple[Any, Any]:
    images = rng.standard_normal((size, config.in_chans, *config.image_size), np.float32)
    return cupy.asarray(images), cupy.asarray(rng.integers(0, config.num_classes, size))


@contextlib.contextmanager
def single_launches() -> Iterator[None]:
    """Within this context nothing is captured into a CUDA graph."""
    capture, Graphed._capture = Graphed._capture, lambda *_: False
    kept, inference._kept = inference._kept, weakref.WeakKeyDictionary()  # no graphs of earlier calls
    try:
        yield
    finally:
        Graphed._capture, inference._kept = capture, kept


WAYS: dict[str, Callable[[], Any]] = {"graph": contextlib.nullcontext, "launches": single_launches}


def milliseconds(call: Callable[[], Any], repeats: int) -> float:
    """Of one call among many, on the clock."""
    for _ in range(3):
        call()
    cupy.cuda.Device().synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    cupy.cuda.Device().synchronize()
    return (time.perf_counter() - start) / repeats * 1e3


def time_steps() -> None:
    """Training steps as graphs and in single launches."""
    for name, size in STEPS:
        for precision in ("bf16", "tf32"):
            for way, context in WAYS.items():
                step = make_step(precision, name)
                config = step.model.config
                images, labels = batch(size, config)
                with context():
                    ms = milliseconds(functools.partial(step, images, labels), 20)
                rate, per_second = 3 * flops(config) * size / ms / 1e9, size / ms * 1e3
                what = f"{name} batch {size} {precision} {way}"
                print(f"  {what:48} {ms:8.2f} ms {per_second:9.0f} images/s {rate:5.0f} TFLOP/s")
                if way == "graph" and step.graph.reason:
                    print(f"    not a graph: {step.graph.reason}")
                results.append({"time": f"step {what}", "ms": ms, "images_per_second": per_second, "tflops": rate})
                del step, images, labels
                cupy.get_default_memory_pool().free_all_blocks()


def profile_steps(repeats: int = 10) -> None:
    """The kernels of a step, by NVIDIA's tracing, which torch's profiler reads for the whole process."""
    profiler = importlib.import_module("torch.profiler")
    importlib.import_module("torch").cuda.init()
    for name, size in STEPS:
        step = make_step("bf16", name)
        images, labels = batch(size, step.model.config)
        milliseconds(functools.partial(step, images, labels), 1)
        with profiler.profile(activities=[profiler.ProfilerActivity.CUDA]) as trace:
            for _ in range(repeats):
                step(images, labels)
            cupy.cuda.Device().synchronize()
        rows = [(x.self_device_time_total / repeats, x.count / repeats, x.key) for x in trace.key_averages()]
        total, launches = (sum(row[i] for row in rows) for i in (0, 1))
        print(f"  {name} batch {size}: {total:.0f} us in {launches:.0f} kernels, copies and memsets a step")
        for micros, count, key in sorted(rows, reverse=True)[:40]:
            print(f"    {micros:8.0f} us {micros / total:6.1%} {count:6.1f} x  {key[:90]}")
        results.append({"profile": name, "rows": rows})
        del step


def time_predictions() -> None:
    for name, size in STEPS:
        model = make_step("bf16", name).model
        images, _ = batch(size * 8, model.config)
        for way, context in WAYS.items():
            with context():
                predict = functools.partial(tinyvit.predict, model, images, batch_size=size, precision="bf16")
                ms = milliseconds(predict, 3) / 8
            print(f"  {name} batch {size} bf16 {way}: {ms:.2f} ms a batch, {size / ms * 1e3:.0f} images/s")
            results.append({"time": f"predict {name} {way}", "ms": ms})


def main() -> None:
    parts = (
        time_steps, time_predictions, time_attention, time_products, time_others, profile_steps, tune_products,
    )  # fmt: skip
    machine = devices.machine(gpu)
    print(json.dumps(machine))
    failed = False
    for name, part in zip(NAMES, parts, strict=True):
        if name not in args.only:
            continue
        print(f"\n{name}", flush=True)
        try:
            part()
        except Exception:  # the other parts may do
            failed = True
            traceback.print_exc()
        finally:  # also when the machine's time is up
            if args.json:
                args.json.write_text(json.dumps({"machine": machine, "results": results}, indent=1, default=str))
    sys.exit(failed)


if __name__ == "__main__":
    main()
