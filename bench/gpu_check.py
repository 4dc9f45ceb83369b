"""One call that proves and times everything that only a GPU can show.

    python bench/gpu_check.py                       # everything but the search for plans: a few minutes
    python bench/gpu_check.py --only check_replay time_steps
    python bench/gpu_check.py --tune --json out.json

Compares every kernel with the reference in float64 on many shapes, twice, to see the same bits; outputs are full of NaN
before. Whole steps (gpu_steps) as CUDA graphs and in single launches, in every precision. Times (gpu_times) on the
device alone: kernels bound by memory as a share of the device's own copy rate. Attention's and the other large kernels'
checks come last, for they compile hundreds of variants. `--tune` times attention under other plans than our own. A part
that breaks says so and leaves the others alone; the exit status is 1 if anything failed.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
import traceback
from collections.abc import Callable

import numpy as np
from gpu_common import (
    LIMITS,
    Poisoned,
    compare,
    cupy,
    error,
    np_namespace,
    record,
    results,
    rng,
    xp,
)  # first: looks for a GPU
from gpu_steps import (
    check_changes,
    check_memory,
    check_precisions,
    check_predictions,
    check_products,
    check_replay,
    check_waiting,
    time_predictions,
    time_steps,
)  # fmt: skip
from gpu_times import time_attention, time_others, time_products, tune_attention

import tinyvit
from tinyvit.backend import random
from tinyvit.kernels import cuda, reference
from tinyvit.kernels.cuda import layers, optimizers


def check_attention() -> None:
    for dtype in LIMITS:
        for n in (1, 17, 50, 65, 96, 197, 257, 577, 1025):
            for dim in (64,) if n > 257 else (16, 20, 32, 64, 72, 80, 96, 128):
                compare("qkv_attention", dtype, [rng.standard_normal((2, n, 3 * 3 * dim))], num_heads=3)
        for n, queries in ((65, None), (197, 1), (577, None)):  # dropout
            keep = (rng.random((2, 3, queries or n, n)) > 0.2) / 0.8
            qkv = [rng.standard_normal((2, n, 3 * 3 * 64))]
            compare("qkv_attention", dtype, qkv, num_heads=3, queries=queries, keep=keep)
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
            compare("linear", dtype, [draw((rows, inner)), weight, None])
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
    """All parameters of a ViT at once, three steps, clipped, with copies in the gradients' dtype; their average."""
    sizes = [p.size for p in tinyvit.create_model("vit_tiny_patch4_32").parameters()]
    options = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8}
    for dtype in LIMITS:
        right = [[rng.standard_normal(n), np.zeros(n), np.zeros(n)] for n in sizes]
        ours = [[cupy.asarray(x.astype(np.float32)) for x in row] for row in right]
        p, m, v = zip(*ours, strict=True)
        copies = [cupy.empty(n, dtype) for n in sizes]
        many = {"copies": copies, "lr_scales": [1.0] * len(sizes), "weight_decays": [0.05] * len(sizes)}
        opt = optimizers.ManyAdamW(xp, **options)
        opt.set("lr", 0.01)
        for step in (1, 2, 3):
            gradients = [rng.standard_normal(n).astype(dtype) for n in sizes]
            norm = math.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in gradients))
            opt.update(p, [cupy.asarray(g) for g in gradients], m, v, max_norm=norm / 2, **many)
            for row, g in zip(right, gradients, strict=True):
                exact = g.astype(np.float64) * (norm / 2 / (norm + 1e-6))
                reference.adamw(
                    np_namespace(), row[0], exact, *row[1:], lr=0.01, weight_decay=0.05, step=step, **options
                )
            record(f"gradient norm {dtype.name}", [abs(float(opt.get("norm")) / norm - 1)], 1e-10)
        errors = [
            error(cupy.asnumpy(a), b) for x, y in zip(ours, right, strict=True) for a, b in zip(x, y, strict=True)
        ]
        record(f"adamw of {len(sizes)} parameters, gradients {dtype.name}", errors, 1e-5)
        copied = all(
            (cupy.asnumpy(c) == cupy.asnumpy(x[0]).astype(dtype)).all() for c, x in zip(copies, ours, strict=True)
        )
        record(f"adamw's {dtype.name} copies", [0.0 if copied else math.inf], 1e-30)
    averages = [cupy.zeros(n, np.float32) for n in sizes]
    optimizers.ManyLerp(xp).update(averages, p, 0.25)
    record(
        "averages of parameters",
        [error(cupy.asnumpy(a), cupy.asnumpy(x) / 4) for a, x in zip(averages, p, strict=True)],
        1e-6,
    )


def check_dropout() -> None:
    """The host's masks, bit for bit, with the step as a number and in device memory."""
    for dtype in LIMITS:
        for samples, shape, drop in (
            (256, (1, 1), 0.1),
            (33, (65, 192), 0.3),
            (5, (3, 7), 0.5),
            (64, (12, 197, 197), 0.1),
        ):
            for seed, step, place, first in ((0, 0, 0, 0), (12345, 2**31 + 7, 40, 1000)):
                draw = random.Draw(seed, step, place, first)
                right = (random.keep_mask(drop, samples, shape, draw) * np.float32(1 / (1 - drop))).astype(dtype)
                for number in (step, cupy.asarray(np.array(step, np.int64))):
                    draw = random.Draw(seed, number, place, first)
                    like = cupy.empty((samples, 1), dtype)
                    mask = layers.dropout_mask(Poisoned(), like, drop=drop, shape=shape, draw=draw)
                    same = cupy.asnumpy(mask).tobytes() == right.tobytes()
                    record(f"dropout masks {dtype.name} {samples} x {shape}", [0.0 if same else math.inf], 1e-30)


def check_labels() -> None:
    """A number that is no class makes the loss NaN."""
    logits = cupy.zeros((4, 3), np.float32)
    loss, vjp = layers.cross_entropy(xp, logits, labels=cupy.asarray([0, 1, 3, 2]), label_smoothing=0.1, needs=(True,))
    (gradient,) = vjp(cupy.ones((), np.float32))
    good = bool(cupy.isnan(loss)) and list(cupy.asnumpy(cupy.isnan(gradient).any(axis=1))) == [
        False,
        False,
        True,
        False,
    ]
    record("labels that are no class", [0.0 if good else math.inf], 1e-30)


def run(section: Callable[[], None]) -> None:
    """One part, whose failure leaves the others alone."""
    start, before = time.perf_counter(), len(results)
    print(f"\n--- {section.__name__}", flush=True)
    try:
        section()
        cupy.cuda.Device().synchronize()
    except Exception:
        traceback.print_exc(file=sys.stdout)
        results.append({"check": section.__name__, "error": math.inf, "limit": 0.0, "ok": False, "broke": True})
    checks = [r for r in results[before:] if "check" in r]
    passed = f"{sum(r['ok'] for r in checks)} of {len(checks)} checks passed, " if checks else ""
    print(f"    {passed}{time.perf_counter() - start:.1f} s", flush=True)
    cupy.get_default_memory_pool().free_all_blocks()


CHECKS = (
    check_products, check_dropout, check_labels, check_adamw, check_replay, check_changes, check_waiting, check_memory,
    check_precisions, check_predictions,
)  # fmt: skip
TIMES = (time_steps, time_predictions, time_attention, time_products, time_others)
KERNEL_CHECKS = (check_attention, check_others)  # last: they compile hundreds of kernels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tune", action="store_true", help="time attention under other plans too (several minutes)")
    parser.add_argument("--checks-only", action="store_true", help="no timing")
    parser.add_argument("--only", nargs="+", metavar="PART", help="parts by their names, e.g. check_replay time_steps")
    parser.add_argument("--json", metavar="FILE", help="write all numbers there")
    arguments = parser.parse_args()
    times = () if arguments.checks_only else TIMES
    parts = [*CHECKS, *times, *KERNEL_CHECKS, *((tune_attention,) if arguments.tune else ())]
    if arguments.only:
        parts = [p for p in (*CHECKS, *TIMES, *KERNEL_CHECKS, tune_attention) if p.__name__ in arguments.only]
    properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)
    print(properties["name"].decode(), "CuPy", cupy.__version__, "driver", cupy.cuda.runtime.driverGetVersion())
    print(f"{cuda.multiprocessors()} multiprocessors, {cuda.shared_limit() >> 10} KB of shared memory for a block")
    for part in parts:
        run(part)
        if arguments.json:  # after each, in case that the machine or its time is lost
            with open(arguments.json, "w") as file:
                json.dump(results, file, indent=1, default=str)
    checks = [r for r in results if "check" in r]
    failed = [r for r in checks if not r["ok"]]
    print()
    for dtype in LIMITS:
        of_dtype = [r for r in checks if dtype.name in r["check"] and 1e-20 < r["limit"] <= LIMITS[dtype]]
        if of_dtype:
            worst = max(of_dtype, key=lambda r: r["error"])
            print(f"{dtype.name:9} worst error {worst['error']:.1e} of {worst['limit']:.0e}: {worst['check']}")
    for r in failed:
        print(
            f"FAILED {r['check']}" + (" (broke off)" if r.get("broke") else f": {r['error']:.1e} of {r['limit']:.0e}")
        )
    print(f"{len(checks) - len(failed)} of {len(checks)} comparisons passed")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
