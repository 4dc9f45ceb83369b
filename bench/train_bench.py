"""Training and inference speed of tinyvit beside PyTorch, JAX, ONNX Runtime and OpenVINO on this machine.

All contenders start from the same weights and take turns, step by step, in one process, so that a machine whose speed
drifts treats them alike. Each row gives the median over the steps. On a CPU they compute in float32, where their name
does not say otherwise, on a GPU in bfloat16 (weights and optimizer in float32) on a batch that lies there already;
logits go to the host on both.

    python bench/train_bench.py                                  # every case, every contender that is installed
    python bench/train_bench.py --cases tiny-cifar --peers torch --steps 20 --json out.json
    python bench/train_bench.py --device cuda --json gpu.json    # on a GPU; gpu_all.py does this and more

Unset OPENBLAS_CORETYPE and the like first: a forced core type slows NumPy down.
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import tinyvit
from tinyvit.files import atomic

sys.path.insert(0, str(Path(__file__).parent))
import devices
import isolation
import peers
from devices import sgemm_rate, timed

# name: (model, overrides, batch)
CASES = {
    "tiny-cifar": ("vit_tiny_patch4_32", {}, 64),
    "micro": ("vit_micro_patch4_32", {}, 128),
    "vit-small": ("vit_small_patch16_224", {}, 8),
    "vit-base": ("vit_base_patch16_224", {}, 8),
}
GPU_BATCHES = {"tiny-cifar": 1024, "vit-small": 256, "vit-base": 256}


def peer_of(module: str, function: str, **options: bool | str) -> Callable[..., peers.Peer]:
    """A builder of contenders that imports its library only when it is called."""

    def build(*arguments: object) -> peers.Peer:
        return getattr(importlib.import_module(module), function)(*arguments, **options)

    return build


PEERS: dict[str, tuple[str | None, Callable]] = {  # name: (module it needs, builder)
    "tinyvit": (None, peers.tinyvit_peer),
    "tinyvit bf16": (None, peer_of("peers", "tinyvit_peer", precision="bf16")),
    "tinyvit int8": (None, peer_of("peers", "tinyvit_peer", precision="int8")),
    "torch": ("torch", peer_of("peers_torch", "torch_peer")),
    "torch.compile": ("torch", peer_of("peers_torch", "torch_peer", compiled=True)),
    "torch bf16": ("torch", peer_of("peers_torch", "torch_peer", bf16=True)),
    "torch oneDNN": ("torch", peer_of("peers_torch", "onednn_peer")),
    "JAX": ("jax", peer_of("peers_jax", "jax_peer")),
    "ONNX Runtime": ("onnxruntime", peer_of("peers_runtimes", "onnxruntime_peer")),
    "ONNX Runtime int8": ("onnxruntime", peer_of("peers_runtimes", "onnxruntime_peer", int8=True)),
    "OpenVINO": ("openvino", peer_of("peers_runtimes", "openvino_peer")),
    "OpenVINO bf16": ("openvino", peer_of("peers_runtimes", "openvino_peer", bf16=True)),
}
ONLY_INFER = {
    "tinyvit int8",
    "torch oneDNN",
    "ONNX Runtime",
    "ONNX Runtime int8",
    "OpenVINO",
    "OpenVINO bf16",
}
CPU_ONLY = {"tinyvit bf16", "torch bf16", *ONLY_INFER}  # on a GPU both are in bfloat16 anyway

SETTLE = 0.3  # seconds between two contenders: threads of the one before keep spinning for a while
UNCOUNTED = 0.3  # seconds of steps before each that is counted: after a pause short ones take up to twice their time
DISTURBED = 1.2  # times that the fastest of several large matrix products outruns the slowest
GPU_REPEATS = {"step": 10, "infer": 40}  # in one reading, after which the host waits for the device


def flops(config: tinyvit.ViTConfig) -> int:
    """Floating-point operations of one image's forward pass in matrix products (multiply-adds x 2)."""
    n, d = config.num_tokens, config.embed_dim
    patches = config.num_patches * config.in_chans * config.patch_size[0] * config.patch_size[1] * d
    block = n * d * (4 * d + 2 * config.mlp_dim) + 2 * n * n * d
    return 2 * (patches + config.depth * block + d * config.num_classes)


def build(case: str, seed: int = 0, device: str = "cpu") -> tuple[tinyvit.VisionTransformer, np.ndarray, np.ndarray]:
    """A model and its batch."""
    name, overrides, batch = CASES[case]
    batch = batch if device == "cpu" else GPU_BATCHES[case]
    model = tinyvit.create_model(name, **overrides)
    rng = np.random.default_rng(seed)
    # The paper's head of zeros would make most gradients zero.
    model.head.weight.data = 0.02 * rng.standard_normal(model.head.weight.shape, dtype=np.float32)
    config = model.config
    images = rng.standard_normal((batch, config.in_chans, *config.image_size), dtype=np.float32)
    return model, images, rng.integers(0, config.num_classes, batch)


def make_peer(case: str, name: str, device: str) -> peers.Peer:
    """A contender with its batch; all have the same weights."""
    return PEERS[name][1](*build(case, device=device), device)


def interleave(
    contenders: dict[str, Any], kind: str, steps: int, device: str = "cpu", free: Callable[[], None] = lambda: None
) -> dict[str, list[float]]:
    """Seconds of every counted step of every contender.

    They take turns. Each turn begins with steps that are not counted, which bring back what the others drove out of
    the caches, so that what is counted is the pace of a run of steps, as in a training. A contender that fails is
    dropped from `contenders`, its memory is given back by `free`, and the others go on.
    """
    warm_up, repeats, settle, uncounted = (
        (1, 1, SETTLE, UNCOUNTED) if device == "cpu" else (3, GPU_REPEATS[kind], 0.0, 0.0)
    )
    able = [name for name in contenders if kind == "infer" or name not in ONLY_INFER]
    times: dict[str, list[float]] = {name: [] for name in able}
    for i in range(warm_up + steps):
        for name in list(times):
            time.sleep(settle)
            seconds = attempt(name, functools.partial(reading, contenders[name], kind, repeats, uncounted))
            if seconds is None:
                del contenders[name], times[name]
                gc.collect()
                free()
            elif i >= warm_up:
                times[name].append(seconds)
    return times


def reading(peer: Any, kind: str, repeats: int, uncounted: float) -> float:
    """Seconds of a step, by the clock over many, after one or `uncounted` seconds of them that are not counted."""
    start = time.perf_counter()
    peer.run(kind)
    while time.perf_counter() - start < uncounted:
        peer.run(kind)
    return timed(functools.partial(peer.run, kind, repeats)) / repeats


def difference(a: peers.Peer, b: peers.Peer) -> dict[str, float]:
    """Relative differences of loss and gradients (the worst parameter's, against its own largest entry)."""
    loss_a, grads_a = a.gradients()
    loss_b, grads_b = b.gradients()
    worst = max(
        float(np.abs(grads_a[k] - grads_b[k]).max() / np.abs(grads_b[k]).max()) for k in grads_b if grads_b[k].any()
    )
    return {"loss": abs(loss_a - loss_b) / abs(loss_b), "gradients": worst}


def peak_memory(case: str, peer: str, device: str = "cpu") -> float | None:
    """Memory in MiB of a process of its own that trains three steps with this contender alone.

    On a CPU it is the peak of what is resident, on a GPU what is held afterwards, for the pools give nothing back.
    """
    command = [sys.executable, __file__, "--cases", case, "--peers", peer, "--device", device, "--memory-of", peer]
    result = subprocess.run(command, capture_output=True, text=True)
    return float(result.stdout) if result.returncode == 0 else None


def print_memory(case: str, name: str, device: str) -> None:
    """What `peak_memory` reads."""
    if device == "cuda":
        import cupy

        free = cupy.cuda.runtime.memGetInfo()[0]
    peer = make_peer(case, name, device)
    for _ in range(3):
        peer.run("infer" if name in ONLY_INFER else "step")
    if device == "cuda":
        print((free - cupy.cuda.runtime.memGetInfo()[0]) / 2**20)
        return
    # Not getrusage: its maximum is inherited from the process that started this one.
    status = Path("/proc/self/status").read_text()
    print(int(status.partition("VmHWM:")[2].split()[0]) / 1024)


def attempt(name: str, function: Callable[[], Any]) -> Any:
    """The function's result; None, and a line on standard error, if it fails: the other contenders go on."""
    try:
        return function()
    except Exception as problem:
        print(f"{name}: {type(problem).__name__}: {str(problem).strip().partition(chr(10))[0]}", file=sys.stderr)
        return None


def gather(case: str, names: list[str], device: str, isolate: bool) -> dict[str, Any]:
    """The contenders of a case by name, without those that cannot be made."""
    start = functools.partial(isolation.start, make_peer) if isolate else make_peer
    made = {name: attempt(name, functools.partial(start, case, name, device)) for name in names}
    return {name: peer for name, peer in made.items() if peer is not None}


def run_case(case: str, names: list[str], device: devices.Host | devices.Gpu, args: argparse.Namespace) -> dict:
    model, images, _ = build(case, device=device.name)
    contenders = gather(case, names, device.name, args.isolate)
    result: dict = {"case": case, "model": CASES[case][0], "batch": len(images), "device": device.name, "peers": {}}
    if "tinyvit" in contenders and "torch" in contenders:
        found = attempt("difference", functools.partial(difference, contenders["tinyvit"], contenders["torch"]))
        result |= {"difference": found} if found else {}
    if device.name == "cuda":  # compiles; where that fails the others go on
        losses = {name: attempt(name, peer.loss) for name, peer in contenders.items()}
        result["first_loss"] = {name: loss for name, loss in losses.items() if loss is not None}
        contenders = {name: contenders[name] for name in result["first_loss"]}
    rate_of = sgemm_rate if device.name == "cpu" else functools.partial(device.matmul_rate, "bfloat16")
    rates = [rate_of()]
    for kind in ("step", "infer"):
        for name, seconds in interleave(contenders, kind, args.steps, device.name, device.free).items():
            rate = len(images) / statistics.median(seconds)
            work = flops(model.config) * (3 if kind == "step" else 1)
            row = result["peers"].setdefault(name, {})
            row[kind] = {"images_per_second": rate, "gflops": rate * work / 1e9, "seconds": seconds}
        rates.append(rate_of())
    if max(rates) > DISTURBED * min(rates):
        product = f"{min(rates) / 1e9:.0f} to {max(rates) / 1e9:.0f} GFLOP/s"
        print(f"{case}: a matrix product ran at {product}: other processes disturb this measurement", file=sys.stderr)
    result["sgemm_gflops" if device.name == "cpu" else "bf16_gflops"] = statistics.median(rates) / 1e9
    del contenders
    gc.collect()
    device.free()
    if not args.no_memory:
        for name in result["peers"]:
            result["peers"][name]["peak_mib"] = peak_memory(case, name, device.name)
    return result


def table(result: dict) -> str:
    cpu = result["device"] == "cpu"
    unit, scale, share = ("GFLOP/s", 1, "sgemm") if cpu else ("TFLOP/s", 1e3, "bf16")
    top = result["sgemm_gflops" if cpu else "bf16_gflops"]
    lines = [f"{result['case']}: {result['model']}, batch {result['batch']}; {share} {top / scale:.0f} {unit}"]
    if "difference" in result:
        d = result["difference"]
        lines[0] += f"; from torch: loss {d['loss']:.1e}, gradients {d['gradients']:.1e}"
    lines.append(f"{'':17}|{'training':^32}|{'inference':^32}| {'peak' if cpu else 'held'}")
    head = f"{'img/s':>8} {'ours x':>7} {unit:>8} {share:>5} "
    lines.append(f"{'':17}|{head}|{head}|  MiB")
    own = result["peers"].get("tinyvit")
    for name, row in result["peers"].items():
        cells = []
        for kind in ("step", "infer"):
            if kind not in row:
                cells.append(f"{'' if kind == 'step' and name in ONLY_INFER else 'failed':^32}")
                continue
            rate, gflops = row[kind]["images_per_second"], row[kind]["gflops"]
            ratio = f"{own[kind]['images_per_second'] / rate:.2f}" if own and kind in own else ""
            cells.append(f"{rate:8.1f} {ratio:>7} {gflops / scale:8.0f} {gflops / top:5.0%} ")
        peak = row.get("peak_mib")
        lines.append(f"{name:17}|{cells[0]}|{cells[1]}|{peak:5.0f}" if peak else f"{name:17}|{cells[0]}|{cells[1]}|")
    if "first_loss" in result:
        losses = ", ".join(f"{name} {loss:.5f}" for name, loss in result["first_loss"].items())
        lines.append(f"loss of the first step: {losses}")
    return "\n".join(lines)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = devices.Parser("train_bench", __doc__)
    parser.add_argument("--cases", nargs="+", choices=CASES)
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--steps", type=int, default=10, help="readings of each (of several steps on a GPU)")
    parser.add_argument("--isolate", action="store_true", help="each contender in a process of its own, still in turn")
    parser.add_argument("--no-memory", action="store_true", help="leave out peak memory (a process per contender)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--memory-of", choices=PEERS, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # JAX would take most of a GPU's memory at once
    try:
        device = devices.choose(args.device)
    except RuntimeError as problem:
        sys.exit(f"train_bench: error: {problem}")
    cases = args.cases or list(CASES if device.name == "cpu" else GPU_BATCHES)
    if args.memory_of:
        print_memory(cases[0], args.memory_of, device.name)
        return
    names = [name for name in args.peers if PEERS[name][0] is None or importlib.util.find_spec(PEERS[name][0])]
    if missing := [name for name in args.peers if name not in names]:
        print(f"not installed: {', '.join(missing)}", file=sys.stderr)
    if device.name == "cuda":
        names = [name for name in names if name not in CPU_ONLY]
    if unknown := [case for case in cases if device.name == "cuda" and case not in GPU_BATCHES]:
        sys.exit(f"train_bench: error: device cuda has the cases {', '.join(GPU_BATCHES)}, not {', '.join(unknown)}")
    record: dict = {"machine": devices.machine(device), "command": " ".join(sys.argv), "results": []}
    for case in cases:
        result = attempt(case, functools.partial(run_case, case, names, device, args))
        if result is None:
            continue
        record["results"].append(result)
        print(table(result), end="\n\n", flush=True)
        if args.json:  # after each, in case that the machine or its time is lost
            with atomic.atomic_write(args.json) as file:
                file.write_text(json.dumps(record, indent=1))
    print("machine:", json.dumps(record["machine"]))
    if len(record["results"]) < len(cases):
        sys.exit(1)


if __name__ == "__main__":
    main()
