"""Training and inference speed of tinyvit beside PyTorch and JAX on this machine.

All contenders start from the same weights and take turns, step by step, in one process, so that a machine whose speed
drifts treats them alike. Each row gives the median over the steps.

    python bench/train_bench.py                                  # every case, every contender that is installed
    python bench/train_bench.py --cases tiny-cifar --peers torch --steps 20 --json out.json

Unset OPENBLAS_CORETYPE and the like first: a forced core type slows NumPy down.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

import tinyvit

sys.path.insert(0, str(Path(__file__).parent))
import peers

# name: (model, overrides, batch)
CASES = {
    "tiny-cifar": ("vit_tiny_patch4_32", {}, 64),
    "micro": ("vit_micro_patch4_32", {}, 128),
    "vit-small": ("vit_small_patch16_224", {}, 8),
    "vit-base": ("vit_base_patch16_224", {}, 8),
}
PEERS: dict[str, tuple[str | None, Callable]] = {  # name: (module it needs, builder)
    "tinyvit": (None, peers.tinyvit_peer),
    "torch": ("torch", peers.torch_peer),
    "torch.compile": ("torch", lambda *case: peers.torch_peer(*case, compiled=True)),
    "torch bf16": ("torch", lambda *case: peers.torch_peer(*case, bf16=True)),
    "JAX": ("jax", peers.jax_peer),
}


SETTLE = 0.3  # seconds between two contenders: threads of the one before keep spinning for a while


def flops(config: tinyvit.ViTConfig) -> int:
    """Floating-point operations of one picture's forward pass in matrix products (multiply-adds x 2)."""
    n, d = config.num_tokens, config.embed_dim
    patches = config.num_patches * config.in_chans * config.patch_size[0] * config.patch_size[1] * d
    block = n * d * (4 * d + 2 * config.mlp_dim) + 2 * n * n * d
    return 2 * (patches + config.depth * block + d * config.num_classes)


def build(case: str, seed: int = 0) -> tuple[tinyvit.VisionTransformer, np.ndarray, np.ndarray]:
    name, overrides, batch = CASES[case]
    model = tinyvit.create_model(name, **overrides)
    rng = np.random.default_rng(seed)
    # The paper's head of zeros would make most gradients zero.
    model.head.weight.data = 0.02 * rng.standard_normal(model.head.weight.shape, dtype=np.float32)
    config = model.config
    images = rng.standard_normal((batch, config.in_chans, *config.image_size), dtype=np.float32)
    return model, images, rng.integers(0, config.num_classes, batch)


def sgemm_rate(size: int = 2048, repeats: int = 7) -> float:
    """FLOP/s of NumPy's float32 matrix product, the best of several."""
    a, b = np.random.default_rng(0).standard_normal((2, size, size), dtype=np.float32)
    a @ b
    return max(2 * size**3 / timed(lambda: a @ b) for _ in range(repeats))


def timed(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def interleave(contenders: list[peers.Peer], kind: str, steps: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Seconds of every counted step of every contender.

    They take turns. Each turn begins with a step that is not counted, which brings back what the others drove out of the
    caches, so that what is counted is the pace of a run of steps, as in a training.
    """
    times: dict[str, list[float]] = {peer.name: [] for peer in contenders}
    for i in range(warm_up + steps):
        for peer in contenders:
            time.sleep(SETTLE)
            getattr(peer, kind)()
            seconds = timed(getattr(peer, kind))
            if i >= warm_up:
                times[peer.name].append(seconds)
    return times


def difference(a: peers.Peer, b: peers.Peer) -> dict[str, float]:
    """Relative differences of loss and gradients (the largest over the parameters, each against its own largest entry)."""
    loss_a, grads_a = a.gradients()
    loss_b, grads_b = b.gradients()
    worst = max(
        float(np.abs(grads_a[k] - grads_b[k]).max() / np.abs(grads_b[k]).max()) for k in grads_b if grads_b[k].any()
    )
    return {"loss": abs(loss_a - loss_b) / abs(loss_b), "gradients": worst}


def peak_memory(case: str, peer: str) -> float | None:
    """Peak resident memory in MiB of a process of its own that trains three steps with this contender alone."""
    command = [sys.executable, __file__, "--cases", case, "--peers", peer, "--memory-of", peer]
    result = subprocess.run(command, capture_output=True, text=True)
    return float(result.stdout) if result.returncode == 0 else None


def run_case(case: str, names: list[str], steps: int, memory: bool) -> dict:
    model, images, labels = build(case)
    contenders = [PEERS[name][1](build(case)[0], images, labels) for name in names]  # the same weights for each
    result: dict = {"case": case, "model": CASES[case][0], "batch": len(images), "peers": {}}
    if "tinyvit" in names and "torch" in names:
        result["difference"] = difference(contenders[names.index("tinyvit")], contenders[names.index("torch")])
    rates = [sgemm_rate()]
    for kind in ("step", "infer"):
        for name, seconds in interleave(contenders, kind, steps).items():
            rate = len(images) / statistics.median(seconds)
            work = flops(model.config) * (3 if kind == "step" else 1)
            row = result["peers"].setdefault(name, {})
            row[kind] = {"images_per_second": rate, "gflops": rate * work / 1e9, "seconds": seconds}
        rates.append(sgemm_rate())
    result["sgemm_gflops"] = statistics.median(rates) / 1e9
    if memory:
        for name in names:
            result["peers"][name]["peak_mib"] = peak_memory(case, name)
    return result


def table(result: dict) -> str:
    lines = [f"{result['case']}: {result['model']}, batch {result['batch']}; sgemm {result['sgemm_gflops']:.0f} GFLOP/s"]
    if "difference" in result:
        d = result["difference"]
        lines[0] += f"; from torch: loss {d['loss']:.1e}, gradients {d['gradients']:.1e}"
    lines.append(f"{'':14}|{'training':^31}|{'inference':^31}| peak")
    head = f"{'img/s':>8} {'ours x':>7} {'GFLOP/s':>8} {'sgemm':>5} "
    lines.append(f"{'':14}|{head}|{head}|  MiB")
    own = result["peers"].get("tinyvit")
    for name, row in result["peers"].items():
        cells = []
        for kind in ("step", "infer"):
            rate, gflops = row[kind]["images_per_second"], row[kind]["gflops"]
            ratio = f"{own[kind]['images_per_second'] / rate:.2f}" if own else ""
            cells.append(f"{rate:8.1f} {ratio:>7} {gflops:8.0f} {gflops / result['sgemm_gflops']:5.0%} ")
        peak = row.get("peak_mib")
        lines.append(f"{name:14}|{cells[0]}|{cells[1]}|{peak:5.0f}" if peak else f"{name:14}|{cells[0]}|{cells[1]}|")
    return "\n".join(lines)


def machine() -> dict:
    from threadpoolctl import threadpool_info

    versions = {"python": platform.python_version(), "numpy": np.__version__, "tinyvit": tinyvit.__version__}
    for name in ("torch", "jax"):
        if name in sys.modules:
            versions[name] = sys.modules[name].__version__
    blas = [f"{b['internal_api']} {b['version']} {b.get('architecture')}" for b in threadpool_info() if b["user_api"] == "blas"]
    forced = {k: v for k, v in os.environ.items() if k.startswith(("OPENBLAS_", "OMP_", "MKL_"))}
    return {"cores": tinyvit.shards.available_cores(), "blas": blas, "versions": versions, "environment": forced,
            "processor": platform.processor() or platform.machine(), "date": time.strftime("%Y-%m-%d")}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--steps", type=int, default=10, help="counted steps of each contender")
    parser.add_argument("--no-memory", action="store_true", help="leave out peak memory (a process per contender)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--memory-of", choices=PEERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        peer = PEERS[args.memory_of][1](*build(args.cases[0]))
        for _ in range(3):
            peer.step()
        # Not getrusage: its maximum is inherited from the process that started this one.
        status = Path("/proc/self/status").read_text()
        print(int(status.partition("VmHWM:")[2].split()[0]) / 1024)
        return
    names = [name for name in args.peers if PEERS[name][0] is None or importlib.util.find_spec(PEERS[name][0])]
    if missing := [name for name in args.peers if name not in names]:
        print(f"not installed: {', '.join(missing)}", file=sys.stderr)
    results = []
    for case in args.cases:
        results.append(run_case(case, names, args.steps, not args.no_memory))
        print(table(results[-1]), flush=True)
        print()
    record = {"machine": machine(), "command": " ".join(sys.argv), "results": results}
    print("machine:", json.dumps(record["machine"]))
    if args.json:
        args.json.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
