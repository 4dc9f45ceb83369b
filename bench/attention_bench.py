"""Speed and accuracy of attention: tinyvit's kernel beside its reference and PyTorch's backends, on a GPU or a CPU.

    python bench/attention_bench.py                                   # on the GPU where one works, else on the CPU
    python bench/attention_bench.py --device cpu --cases base-224 --batches 1 8 --json record.json --plot chart.png

Each contender turns the packed output of the qkv layer (B, N, 3 H D) into (B, N, H D), and with "backward" a gradient
of the latter into one of the former too. Each call takes other inputs, so that they do not come from the cache. Times
are medians. Work is counted as 4 B H N^2 D operations forward and 3.5 times that with backward; memory as each array
read or written once: 4 times B N H D numbers forward, 8 times more backward. "roof" is the share of the roofline: the
time that the device needs at least, by its own rate of matrix products or of a copy, both measured here, over the time
taken. "error" is |x - x64| / |x64| against float64, over the first and the last image. "ours x" is a time over ours.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import statistics
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import array_api_compat.numpy
import numpy as np

from tinyvit.files import atomic
from tinyvit.kernels import reference
from tinyvit.models import registry

sys.path.insert(0, str(Path(__file__).parent))
import attention_chart
import attention_contenders
import devices
from attention_contenders import CONTENDERS, Inputs

# The image sizes that the published checkpoints use; huge has patches of 14, which divide 378 but not 384.
CASES = {
    "cifar-p4": registry.model_config("vit_tiny_patch4_32"),
    "cifar-p8": registry.model_config("vit_tiny_patch4_32", patch_size=8),
    "tiny-224": registry.model_config("vit_tiny_patch16_224"),
    "small-224": registry.model_config("vit_small_patch16_224"),
    "base-224": registry.model_config("vit_base_patch16_224"),
    "large-224": registry.model_config("vit_large_patch16_224"),
    "huge-224": registry.model_config("vit_huge_patch14_224"),
    "tiny-384": registry.model_config("vit_tiny_patch16_384"),
    "small-384": registry.model_config("vit_small_patch16_384"),
    "base-384": registry.model_config("vit_base_patch16_384"),
    "large-384": registry.model_config("vit_large_patch16_384"),
    "huge-378": registry.model_config("vit_huge_patch14_224", image_size=378),
}
# Batches by the image's size in pixels, device by device.
BATCHES = {
    "cpu": {32: (8, 64), 224: (1, 8), 378: (2,), 384: (2,)},
    "cuda": {32: (128, 1024), 224: (32, 256), 378: (16, 64), 384: (16, 64)},
}
ROUNDS = {"cpu": 3, "cuda": 20}
KINDS = {"forward": False, "forward_backward": True}
TITLES = {"forward": "forward", "forward_backward": "forward + backward"}
DEFAULT = {"cpu": ["tinyvit", "reference", "torch flash", "torch math"], "cuda": list(CONTENDERS)}


class Peaks(NamedTuple):
    """What the device does at most: bytes copied per second (read and written), operations per second in products."""

    copy: float
    matmul: float


def work(config: Any, batch: int, itemsize: int, backward: bool) -> tuple[float, float]:
    """Floating-point operations, and bytes of memory to read and write."""
    unit = batch * config.num_tokens * config.embed_dim
    return 4.0 * unit * config.num_tokens * (3.5 if backward else 1), float(unit * itemsize * (12 if backward else 4))


def make_inputs(device: Any, config: Any, batch: int, dtype: str) -> Inputs:
    """As many sets as fill the largest cache twice."""
    shape = (batch, config.num_tokens, 3 * config.embed_dim)
    nbytes = math.prod(shape) * np.dtype(dtype if dtype != "bfloat16" else "float16").itemsize
    sets = range(max(2, min(200, math.ceil(2 * device.cache / nbytes))))
    dys = [device.random((*shape[:2], config.embed_dim), dtype) for _ in sets]
    return Inputs(config.num_heads, [device.random(shape, dtype) for _ in sets], dys)


def exact(inputs: Inputs, backward: bool) -> np.ndarray:
    """Results of the first set's first and last image, in float64."""
    qkv, dy = ends([inputs.qkvs[0]]), ends([inputs.dys[0]])
    y, vjp = reference.qkv_attention(array_api_compat.numpy, qkv, num_heads=inputs.heads, needs=(backward,))
    return vjp(dy)[0] if backward else y


def error(results: list[Any], expected: np.ndarray) -> float:
    """Relative error of the first and the last image; NaN where there is one."""
    return float(np.linalg.norm(ends(results) - expected) / np.linalg.norm(expected))


def ends(parts: list[Any]) -> np.ndarray:
    """The first and the last image of a batch in parts."""
    return np.stack([attention_contenders.to_numpy(x) for x in (parts[0][0], parts[-1][-1])])


def attempt(make: Callable, inputs: Inputs, backward: bool, expected: np.ndarray) -> tuple[Callable | None, dict]:
    """A contender's calls with what is known of it after the first one: its error, or why it refuses."""
    with warnings.catch_warnings(record=True) as reasons:  # torch says there why a backend does not take the shape
        warnings.simplefilter("always")
        try:
            call = make(inputs, backward)
            return call, {"error": error(call(0), expected)}
        except Exception as problem:  # whatever it is, the others go on
            return None, {"refused": reason(problem, [str(w.message) for w in reasons])}


def reason(problem: Exception, warned: Sequence[str] = ()) -> str:
    """In one line. Before it raises, torch warns of every backend, also of those that we have switched off."""
    said = [text.partition(" (Triggered internally")[0].strip() for text in [*warned, str(problem)]]
    said = [text for text in said if text and not text.endswith("because:") and "runtime disabled" not in text]
    return said[0].splitlines()[0] if said else type(problem).__name__


def measure(
    device: Any, config: Any, inputs: Inputs, names: list[str], kind: str, peaks: Peaks, rounds: int
) -> dict[str, Any]:
    """One kind of work by every contender: what was measured and what follows from it."""
    qkv, backward = inputs.qkvs[0], KINDS[kind]
    flops, nbytes = work(config, len(qkv), qkv.dtype.itemsize, backward)
    floor = max(flops / peaks.matmul, nbytes / peaks.copy)
    expected = exact(inputs, backward)
    rows, calls = {}, {}
    for name in names:
        call, rows[name] = attempt(CONTENDERS[name], inputs, backward, expected)
        if call is not None:
            calls[name] = call
        device.free()
    for name, seconds in device.times(calls, len(inputs.qkvs), rounds).items():
        if isinstance(seconds, Exception):
            rows[name] = {"refused": reason(seconds)}
            continue
        median = statistics.median(seconds)
        rates = {"flops_per_second": flops / median, "bytes_per_second": nbytes / median, "roofline": floor / median}
        rows[name] |= {"seconds": median, **rates, "eager": name in device.eager, "all_seconds": seconds}
    return {"flops": flops, "bytes": nbytes, "floor_seconds": floor, "contenders": rows, **compare(rows)}


def compare(rows: dict[str, dict]) -> dict:
    """The best torch backend, and its time over ours."""
    torch = {name: row["seconds"] for name, row in rows.items() if name.startswith("torch") and "seconds" in row}
    if not torch or "seconds" not in rows.get("tinyvit", {}):
        return {}
    best = min(torch, key=torch.get)
    return {"best_torch": best, "ratio": torch[best] / rows["tinyvit"]["seconds"]}


def table(result: dict, device: str) -> str:
    """All contenders of one shape, at most 110 columns wide."""
    unit, scale = ("us", 1e6) if device == "cuda" else ("ms", 1e3)
    rate, per = ("TFLOP/s", 1e12) if device == "cuda" else ("GFLOP/s", 1e9)
    floors = " and ".join(f"{result[kind]['floor_seconds'] * scale:.3g}" for kind in KINDS)
    shape = f"batch {result['batch']}, {result['heads']} heads of {result['head_dim']}, {result['tokens']} tokens"
    head = f"{unit:>9}{rate:>9}{'GB/s':>7}{'roof':>6}{'error':>8}{'ours x':>7}"
    lines = [f"{result['case']}: {shape}, {result['dtype']}; not under {floors} {unit}"]
    lines.append(f"{'':16}|" + "|".join(f"{TITLES[kind]:^{len(head)}}" for kind in KINDS))
    lines.append(f"{'':16}|{head}|{head}")
    for name in result["forward"]["contenders"]:
        cells = []
        for kind in KINDS:
            rows = result[kind]["contenders"]
            row, own = rows[name], rows.get("tinyvit", {}).get("seconds")
            if "refused" in row:
                cells.append(f" {row['refused']:{len(head) - 1}.{len(head) - 1}}")
                continue
            ratio = f"{row['seconds'] / own:.2f}" if own else ""
            cells.append(
                f"{row['seconds'] * scale:9.3f}{row['flops_per_second'] / per:9.1f}{row['bytes_per_second'] / 1e9:7.1f}"
                f"{row['roofline']:6.0%}{row['error']:8.1e}{ratio:>7}"
            )
        name += "*" if any(result[kind]["contenders"][name].get("eager") for kind in KINDS) else ""
        lines.append(f"{name:16}|" + "|".join(cells))
    if any("*" in line for line in lines):
        lines.append("* launched one by one from Python: not a CUDA graph, so gaps between launches count")
    return "\n".join(lines)


def summary(results: list[dict]) -> str:
    """Our speed against the best torch backend, line by line."""
    lines = [f"{'tinyvit against the best torch backend':48}{TITLES['forward']:>22}{TITLES['forward_backward']:>26}"]
    for result in results:
        cells = [
            f"{result[kind]['ratio']:.2f} x ({result[kind]['best_torch'][6:]})" if "ratio" in result[kind] else "-"
            for kind in KINDS
        ]
        shape = f"{result['case']:10} batch {result['batch']:<5} {result['tokens']:3} tokens  {result['dtype']}"
        lines.append(f"{shape:48}{cells[0]:>22}{cells[1]:>26}")
    return "\n".join(lines)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = devices.Parser("attention_bench", __doc__)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--batches", nargs="+", type=int, metavar="B", help="images at a time (default: by case)")
    parser.add_argument("--dtypes", nargs="+", choices=devices.Gpu.dtypes, help="float32 (CPU); bfloat16 (GPU)")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, metavar="NAME", help=", ".join(CONTENDERS))
    parser.add_argument("--rounds", type=int, metavar="N", help="repetitions (default: 3 turns on a CPU, 20 on a GPU)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all numbers")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="a chart; needs matplotlib")
    args = parser.parse_args(arguments)
    for name in ("batches", "rounds"):
        if any(n < 1 for n in np.atleast_1d(getattr(args, name) or 1)):
            parser.error(f"--{name} must be at least 1")
    for path in (args.json, args.plot):
        if path and not path.resolve().parent.is_dir():
            parser.error(f"no directory {path.resolve().parent} to write {path.name} to")
    if args.plot and not importlib.util.find_spec("matplotlib"):
        parser.error("--plot needs matplotlib: pip install matplotlib")
    return args


def contenders(chosen: list[str] | None, device: str) -> list[str]:
    names = chosen or DEFAULT[device]
    if any(name.startswith("torch") for name in names) and importlib.util.find_spec("torch") is None:
        print("not installed: torch", file=sys.stderr)
        return [name for name in names if not name.startswith("torch")]
    return names


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    try:
        device = devices.choose(args.device)
    except RuntimeError as problem:
        sys.exit(f"attention_bench: error: {problem}")
    dtypes = args.dtypes or [device.dtypes[-1]]
    if unknown := [dtype for dtype in dtypes if dtype not in device.dtypes]:
        sys.exit(f"attention_bench: error: on device {device.name} expected {device.dtypes[0]}, got {unknown[0]}")
    names = contenders(args.contenders, device.name)
    copy, matmul = device.copy_rate(), {dtype: device.matmul_rate(dtype) for dtype in dtypes}
    rates = ", ".join(f"{rate / 1e12:.3g} TFLOP/s in {dtype}" for dtype, rate in matmul.items())
    print(f"{device.describe()}: copies {copy / 1e9:.0f} GB/s, multiplies matrices at {rates}\n")
    results: list[dict] = []
    record = {"device": device.name, "machine": devices.machine(device), "command": " ".join(sys.argv)}
    record |= {"peaks": {"copy": copy, "matmul": matmul}, "results": results}
    for case in args.cases:
        config = CASES[case]
        for batch in args.batches or BATCHES[device.name][config.image_size[0]]:
            for dtype in dtypes:
                inputs = make_inputs(device, config, batch, dtype)
                result = {"case": case, "batch": batch, "heads": config.num_heads, "tokens": config.num_tokens}
                result |= {"head_dim": config.embed_dim // config.num_heads, "dtype": dtype}
                for kind in KINDS:
                    peaks, rounds = Peaks(copy, matmul[dtype]), args.rounds or ROUNDS[device.name]
                    result[kind] = measure(device, config, inputs, names, kind, peaks, rounds)
                results.append(result)
                print(table(result, device.name), end="\n\n", flush=True)
                if args.json:  # after each, in case that the machine or its time is lost
                    with atomic.atomic_write(args.json) as file:
                        file.write_text(json.dumps(record, indent=1))
    print(summary(results))
    if args.plot:
        with atomic.atomic_write(args.plot) as file:
            attention_chart.draw(record, TITLES, file)


if __name__ == "__main__":
    main()
