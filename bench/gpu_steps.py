"""What only a GPU can show of products and whole steps: CUDA graphs beside single launches. Part of gpu_check."""

from __future__ import annotations

import contextlib
import gc
import math
import re
import time
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
from gpu_common import FP32, LIMITS, cupy, record, results, rng, stream, xp

import tinyvit
from tinyvit import optim
from tinyvit.backend import cuda_graph, random
from tinyvit.backend.cuda_graph import Graphed
from tinyvit.execution import inference
from tinyvit.kernels.cuda import cublas

DROPS = {"drop_path": 0.2, "proj_drop_rate": 0.1, "attn_drop_rate": 0.1, "pos_drop_rate": 0.1}
MODEL, SMALL = "vit_tiny_patch4_32", {"depth": 3, "num_classes": 10}
PRODUCTS = (
    (65 * 64, 192, 576),
    (197 * 16, 768, 3072),
    (197 * 16, 3072, 768),
    (256, 768, 1000),
    (5, 24, 16),
    (7, 9, 10),
)
PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
TIMED = ((MODEL, 1024), ("vit_base_patch16_224", 256))


def expect(what: str, good: Any) -> None:
    """A check that is right or wrong."""
    record(what, [0.0 if good else math.inf], 1e-30)


# --- products -------------------------------------------------------------------------------------------------------


def check_products() -> None:
    """Every form of cuBLASLt's products, also captured, against float64; which forms it has no algorithm for."""
    expect("nvmath-python finds cuBLASLt", cublas.library() is not None)
    if cublas.library() is None:
        print(f"    {cublas.missing()}")
        return
    print("cuBLASLt", cublas.library().get_version())
    for dtype in LIMITS:
        for rows, inner, outer in PRODUCTS:
            check_product(dtype, rows, inner, outer, LIMITS[dtype])
    token = cublas.tf32.set(True)
    check_product(FP32, 197 * 16, 768, 3072, 2e-3, " in tf32")
    cublas.tf32.reset(token)


def check_product(dtype: np.dtype, rows: int, inner: int, outer: int, limit: float, label: str = "") -> None:
    shapes = ((rows, inner), (outer, inner), (outer,), (rows, outer))
    x, w, b, dy = (cupy.asarray(rng.standard_normal(shape).astype(dtype)) for shape in shapes)
    X, W, B, DY = (a.astype(np.float64) for a in (x, w, b, dy))
    hidden = X @ W.T + B
    gelu = 0.5 * hidden * (1 + cupy.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
    forms: dict[str, tuple[Callable, tuple]] = {
        "plain": (lambda: (cublas.linear(xp, x, w, None),), (X @ W.T,)),
        "bias": (lambda: (cublas.linear(xp, x, w, b),), (hidden,)),
        "GELU": (lambda: cublas.linear_gelu(xp, x, w, b, True), (gelu, hidden)),
        "GELU alone": (lambda: cublas.linear_gelu(xp, x, w, b, False), (gelu, None)),
        "input's gradient": (lambda: (cublas.input_gradient(xp, dy, w),), (DY @ W,)),
        "weight's gradient": (lambda: cublas.weight_gradient(xp, dy, x, False), (DY.T @ X, None)),
        "weight's and bias's": (lambda: cublas.weight_gradient(xp, dy, x, True), (DY.T @ X, DY.sum(axis=0))),
    }
    for form, (call, right) in forms.items():
        if form.startswith("GELU") and dtype == FP32:
            continue
        what = f"product {dtype.name}{label} {rows} x {inner} to {outer}: {form}"
        first = call()
        if first is None or first[0] is None:
            print(f"    no algorithm: {what}")
            continue
        cupy.cuda.Device().synchronize()  # inputs were made on another stream
        with stream():
            call()
            stream().begin_capture()
            captured = call()
            replay = stream().end_capture()
            replay.launch(stream())
            stream().synchronize()
        pairs = [(a, c, e) for a, c, e in zip(first, captured, right, strict=True) if e is not None]
        same = all((a.view(np.uint8) == c.view(np.uint8)).all() for a, c, _ in pairs)
        errors = [float(cupy.linalg.norm(a.astype(np.float64) - e) / cupy.linalg.norm(e)) for a, _, e in pairs]
        record(what, errors, limit, bool(same))


# --- steps ----------------------------------------------------------------------------------------------------------


def make_step(
    precision: str = "fp32", drops: dict | None = None, model: str = MODEL, config: dict = SMALL, **options: Any
) -> Any:
    """A TrainStep on the GPU; two that are made alike are alike."""
    with random.scope(1):
        vit = tinyvit.create_model(model, **config, **(drops or {}))
    vit.head.weight.data = np.random.default_rng(0).standard_normal(vit.head.weight.shape).astype(np.float32) * 0.02
    vit.to("cuda")
    opt = optim.AdamW(vit.parameters(), lr=1e-3, weight_decay=0.05)
    options |= {"clip_norm": 1.0, "label_smoothing": 0.1, "ema": optim.EMA(vit, 0.9), "seed": 5}
    return tinyvit.TrainStep(vit, opt, precision=precision, **options)


def in_single_launches(graphed: Graphed) -> None:
    graphed._capture = lambda *_: False


def batch(size: int = 64, seed: int = 0, image_size: int = 32, classes: int = 10) -> tuple[Any, Any]:
    draw = np.random.default_rng(seed)
    images = draw.standard_normal((size, 3, image_size, image_size), np.float32)
    return cupy.asarray(images), cupy.asarray(draw.integers(0, classes, size))


def state(step: Any) -> list[np.ndarray]:
    """Weights, their averages and the optimizer's state."""
    return [*step.model.state_dict().values(), *step.ema.state_dict().values(), *step.optimizer.state_dict().values()]


def check_replay() -> None:
    """Graphs and single launches give the same bits of weights, averages, state, losses and norms."""
    for precision in PRECISIONS:
        for options in ({}, {"accumulate": 2}):
            what = f"steps in {precision} {options or ''}"
            replayed, single = (make_step(precision, DROPS, **options) for _ in "12")
            in_single_launches(single.graph)
            numbers, reasons = ([], []), []
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                for i in range(9):
                    images, labels = batch(64 if i != 6 else 40, seed=i)
                    for step, list_ in zip((replayed, single), numbers, strict=True):
                        step.optimizer.lr = 1e-3 / (i + 1)
                        loss = step(images, labels)
                        list_.append((float(loss), step.grad_norm, step.correct))
                    reasons.append(replayed.graph.reason)
            for warning in caught:
                print(f"    {what}: {warning.message}")
            whole = [reason is None for reason in reasons]
            expect(
                f"{what}: replayed but for the first and the short batch", whole == [i not in (0, 6) for i in range(9)]
            )
            expect(f"{what}: the same losses and norms", numbers[0] == numbers[1])
            pairs = zip(state(replayed), state(single), strict=True)
            expect(f"{what}: the same bits", all(a.tobytes() == b.tobytes() for a, b in pairs))
            if numbers[0] != numbers[1]:
                print(f"    {what}\n      {numbers[0]}\n      {numbers[1]}")
            if replayed.graph._graph is not None:
                describe_graph(what, replayed.graph._graph._graph)


def describe_graph(what: str, captured: Any) -> None:
    try:
        dot = captured.debug_dot_str(1)
    except Exception as problem:  # no check of ours
        print(f"    {what}: the graph cannot be described: {problem}")
        return
    kinds = {kind: len(re.findall(rf"\b{kind}\b", dot)) for kind in ("KERNEL", "MEMCPY", "MEMSET")}
    print(f"    {what}: graph of {kinds}")
    results.append({"graph": what, **kinds})
    expect(f"{what}: nothing comes from the host", not re.search(r"Host ?to ?Device|HtoD|H2D", dot, re.IGNORECASE))


def check_changes() -> None:
    """What changes between replays: dropout's masks, the learning rate, weights that are loaded."""
    images, labels = batch()
    step = make_step(drops=DROPS)
    step.optimizer.lr, step.ema = 0.0, None
    losses = [float(step(images, labels)) for _ in range(6)]
    expect("dropout differs between replays", len(set(losses)) == 6 and step.graph.reason is None)
    other = make_step(drops=DROPS)
    other.optimizer.lr, other.ema = 0.0, None
    expect("dropout repeats with the seed", [float(other(images, labels)) for _ in range(6)] == losses)

    before = step.model.state_dict()["blocks.0.mlp.fc1.weight"]
    step.optimizer.lr = 1e-2
    step(images, labels)
    after = step.model.state_dict()["blocks.0.mlp.fc1.weight"]
    largest = float(np.abs(after - before).max())
    expect("a learning rate of 0 changes nothing, another one does in the next replay", 1e-3 < largest < 2e-2)
    expect("it was a replay", step.graph.reason is None)

    step = make_step("bf16")
    for _ in range(3):
        step(images, labels)
    zeros = {name: 0 * x for name, x in step.model.state_dict().items()}
    step.model.load_state_dict(zeros)
    loss = float(step(images, labels))
    expect("weights that are loaded reach a captured step", abs(loss - math.log(10)) < 1e-3)
    print(f"    loss of zero weights {loss:.6f}; {step.graph.reason}")

    skipping = make_step("fp16")
    for _ in range(3):
        skipping(images, labels)
    before, scale = state(skipping), skipping.loss_scale
    skipping(images * 1e6, labels)
    expect("an overflow halves the loss scale", skipping.loss_scale == scale / 2)
    same = all(np.array_equal(a, b) for a, b in zip(state(skipping), before, strict=True))
    expect("and changes no weight, no average and nothing of the optimizer", same)
    expect("in a replay", skipping.graph.reason is None)


def check_waiting() -> None:
    """Replays wait for nothing: the host is done long before the device, and CuPy sees no synchronisation."""
    import cupyx

    images, labels = batch(1024)
    step = make_step("bf16", DROPS)
    for _ in range(3):
        step(images, labels)
    cupy.cuda.Device().synchronize()
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with cupyx.allow_synchronize(False):
            for _ in range(20):
                step(images, labels)
    host = time.perf_counter() - start
    cupy.cuda.Device().synchronize()
    device = time.perf_counter() - start
    print(f"    20 steps: {host * 50:.2f} ms of the host a step, {device * 50:.2f} ms until the device was done")
    expect("steps are started without waiting", host < 0.8 * device)


def check_memory() -> None:
    """A hundred replays, with evaluations and short batches between them, take no more memory; all of it comes back."""
    start = free_memory()
    step, used = make_step("bf16", DROPS), []
    images, labels = batch(256)
    for i in range(120):
        step(images, labels)
        if i % 20 == 10:
            step(images[:100], labels[:100])
            with step.ema.applied():
                tinyvit.predict(step.model, images, batch_size=64)
        if i >= 30:
            cupy.cuda.Device().synchronize()
            used.append(cupy.cuda.runtime.memGetInfo()[0])
    print(f"    free memory {used[0] >> 20} MiB after 30 steps, {used[-1] >> 20} MiB after 120")
    expect("memory is stable over replays", used[0] - used[-1] < 64 << 20)
    expect("steps are replayed after predictions", step.graph.reason is None)
    del step, images, labels
    lost = start - free_memory()
    print(f"    {lost >> 20} MiB are still held when the step is gone")
    expect("the memory of a step and of its graphs is given back", lost < 192 << 20)  # room for cuBLASLt stays


def free_memory() -> int:
    """Bytes that are free once everything that nobody uses is given back."""
    gc.collect()
    cuda_graph._give_back()
    cupy.get_default_memory_pool().free_all_blocks()
    cupy.cuda.Device().synchronize()
    return cupy.cuda.runtime.memGetInfo()[0]


def check_precisions() -> None:
    """Every precision learns what fp32 learns."""
    finals = {}
    draw = np.random.default_rng(3)
    image = (3, *make_step().model.config.image_size)
    means = draw.standard_normal((10, *image)).astype(np.float32)
    for precision in PRECISIONS:
        step, losses = make_step(precision), []
        data = np.random.default_rng(4)
        for _ in range(60):
            labels = data.integers(0, 10, 128)
            images = 0.1 * means[labels] + data.standard_normal((128, *image), np.float32)
            losses.append(float(step(images, labels)))
        finals[precision] = float(np.mean(losses[-10:]))
        expect(f"{precision}: replayed", step.graph.reason is None)
        print(f"    {precision}: loss {losses[0]:.4f} to {finals[precision]:.4f}, loss scale {step.loss_scale:g}")
    for precision in PRECISIONS[1:]:
        expect(f"{precision} learns like fp32", abs(finals[precision] - finals["fp32"]) < 0.1)
    expect("fp32 learns", finals["fp32"] < 1.9)


def check_predictions() -> None:
    """Captured predictions are those of single launches, and the CPU's."""
    model = make_step().model
    images, _ = batch(7 * 32 + 5)
    host = {name: x for name, x in model.state_dict().items()}
    on_cpu = tinyvit.create_model(MODEL, **SMALL)
    on_cpu.load_state_dict(host)
    right = tinyvit.predict(on_cpu, cupy.asnumpy(images), batch_size=64)
    for precision, limit in (("fp32", 1e-5), ("tf32", 3e-3), ("bf16", 3e-2), ("fp16", 5e-3)):
        captured = tinyvit.predict(model, images, batch_size=32, precision=precision)
        with single_launches():
            alone = tinyvit.predict(model, images, batch_size=32, precision=precision)
        error = float(np.linalg.norm(captured - right) / np.linalg.norm(right))
        record(f"predictions in {precision}", [error], limit, captured.tobytes() == alone.tobytes())


@contextlib.contextmanager
def single_launches() -> Any:
    capture, Graphed._capture = Graphed._capture, lambda *_: False
    kept, inference._kept = inference._kept, weakref.WeakKeyDictionary()  # no graphs of earlier calls
    try:
        yield
    finally:
        Graphed._capture, inference._kept = capture, kept


# --- times ----------------------------------------------------------------------------------------------------------


def flops(config: Any) -> int:
    """Of one image's forward pass in matrix products (multiply-adds x 2)."""
    n, d = config.num_tokens, config.embed_dim
    patches = config.num_patches * config.in_chans * config.patch_size[0] * config.patch_size[1] * d
    return 2 * (patches + config.depth * n * d * (4 * d + 2 * config.mlp_dim + 2 * n) + d * config.num_classes)


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
    for name, size in TIMED:
        for precision in ("bf16", "tf32"):
            for way in ("graph", "launches"):
                step = make_step(precision, model=name, config={})
                config = step.model.config
                if way == "launches":
                    in_single_launches(step.graph)
                images, labels = batch(size, image_size=config.image_size[0], classes=config.num_classes)
                step.ema = None  # as in train_bench
                ms = milliseconds(lambda step=step, x=images, y=labels: step(x, y), 20)
                rate = 3 * flops(config) * size / ms / 1e9
                used = (cupy.cuda.runtime.memGetInfo()[1] - cupy.cuda.runtime.memGetInfo()[0]) / 2**30
                what, photos = f"{name} batch {size} {precision} {way}", size / ms * 1e3
                print(f"    {what:48} {ms:8.2f} ms {images:9.0f} images/s {rate:5.0f} TFLOP/s {used:5.1f} GiB")
                if way == "graph" and step.graph.reason:
                    print(f"        {step.graph.reason}")
                results.append({"time": f"step {what}", "ms": ms, "images_per_second": photos, "tflops": rate})
                del step, images, labels
                gc.collect()  # a step and its graph know each other
                cupy.get_default_memory_pool().free_all_blocks()


def time_predictions() -> None:
    for name, size in TIMED:
        model = make_step(model=name, config={}).model
        images, _ = batch(size * 8, image_size=model.config.image_size[0])
        for way in ("graph", "launches"):
            with contextlib.nullcontext() if way == "graph" else single_launches():
                predict = lambda model=model, x=images, n=size: tinyvit.predict(
                    model, x, batch_size=n, precision="bf16"
                )
                ms = milliseconds(predict, 3) / 8
            print(f"    {name} batch {size} bf16 {way}: {ms:.2f} ms a batch, {size / ms * 1e3:.0f} images/s")
            results.append({"time": f"predict {name} {way}", "ms": ms})
