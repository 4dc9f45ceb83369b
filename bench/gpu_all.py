"""Everything that only a GPU can show, in order of worth, as far as the time reaches.

    python bench/gpu_all.py --json DIR --minutes 15            # results come into DIR as they are made
    python bench/gpu_all.py --json DIR --minutes 15 --data CIFAR10 --only compile kernels-norms times

First come the kernels for Hopper by themselves: if they hang or end their process, the other parts leave them out.
Then kernels are compiled, in as many processes as there are cores, into a cache that all parts share. Attention and
whole steps are timed beside PyTorch within the first ten minutes at worst. The other kernels' tests follow in groups,
so that a kernel that ends its process leaves no more than its group unknown, then tests of whole steps, times of
kernels, the recipes for CIFAR-10, and a search for faster matrix products. Each part is a command with a time limit
of its own: one that fails, hangs or is not started leaves the others alone. DIR/PART.txt is what it printed,
DIR/PART.json its figures, DIR/gpu_all.json what became of each, and what failed and why; DIR/gpu_all.tar.gz holds all
these files.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
import attention_bench
import devices

import tinyvit
from tinyvit import functional, optim
from tinyvit.backend.devices import mover
from tinyvit.files import atomic

ROOT = Path(__file__).parents[1]
NOT_STARTED, MOST_SHOWN = "not started: no time left", 12
GRACE = 10.0  # seconds between the end of a part's time, when it is interrupted, and its being killed


HOPPER = "kernels-hopper"
GROUPS = {  # of tests of kernels, by words in their names
    "attention": "attention and not hopper",
    "norms": "norm or drop_path",
    "products": "(linear or products) and not hopper",
    "images": "convolutions",
}


class Part(NamedTuple):
    """What Python is to run, its time limit, and the time without which it is not started, in seconds."""

    name: str
    command: list[str]
    limit: int
    least: int


def parts(folder: Path, data: str) -> list[Part]:
    """In order of worth."""

    def script(name: str, file: str, limit: int, least: int, *options: str) -> Part:
        return Part(name, [f"bench/{file}.py", *options, "--json", str(folder / f"{name}.json")], limit, least)

    def tests(name: str, limit: int, *options: str) -> Part:
        """Named as they start, with a traceback of what takes more than a minute, in case one never ends, and with the
        reasons of what is skipped.
        """
        report = f"--junitxml={folder / name}.xml", "-o", "faulthandler_timeout=60"
        return Part(name, ["-m", "pytest", "-v", "-rfEs", "-m", "gpu", "--tb=short", *report, *options], limit, 30)

    def kernels(name: str, limit: int, which: str) -> Part:
        return tests(name, limit, "tests/gpu/test_gpu_kernels.py", "-n", "6", "-k", which)

    on_gpu, recipe = ("--device", "cuda"), ("--data", data, "--recipe")
    cases = ("cifar-p4", "base-224", "base-384")
    steps = (*on_gpu, "--no-memory", "--steps", "5", "--peers", "tinyvit", "torch")
    first, *others = (kernels(f"kernels-{name}", 60, which) for name, which in GROUPS.items())
    return [
        kernels(HOPPER, 120, "hopper"),  # in which a trial that hangs gets its verdict
        Part("compile", ["bench/gpu_all.py", "--compile"], 100, 20),
        first,
        script("attention", "attention_bench", 75, 20, *on_gpu, "--rounds", "8", "--cases", *cases),
        script("steps-tiny", "train_bench", 70, 30, *steps, "--cases", "tiny-cifar"),
        script("steps-base", "train_bench", 90, 45, *steps, "--cases", "vit-base"),
        *others,
        kernels("kernels-others", 60, f"not ({' or '.join(('hopper', *GROUPS.values()))})"),
        tests("tests-steps", 150, "tests/gpu/test_gpu_steps.py", "-n", "6"),
        script("times", "gpu_times", 120, 30),
        script("profile", "gpu_times", 60, 30, "--only", "profile"),
        tests("tests-memory", 60, "tests/gpu/test_gpu_steps.py", "-n", "0", "-k", "memory"),
        script("recipe-1min", "cifar10_speedrun", 150, 100, *recipe, "cifar10-gpu-1min"),
        script("tune", "gpu_times", 120, 60, "--only", "tune"),
        script("steps-tuned", "gpu_times", 60, 30, "--only", "steps"),
        script("steps-compiled", "train_bench", 300, 120, *steps, "torch.compile", "--cases", "tiny-cifar", "vit-base"),
        tests("tests-all", 300, "tests", "--ignore=tests/gpu", "-n", "6"),
        script("recipe-best", "cifar10_speedrun", 900, 300, *recipe, "cifar10-gpu-best"),
    ]


def run(part: Part, folder: Path, seconds: float) -> str:
    """What became of a part that has so much time."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in a shell's background, which the part would inherit
        signal.signal(signal.SIGINT, signal.default_int_handler)
    with open(folder / f"{part.name}.txt", "w") as out:
        process = subprocess.Popen(
            [sys.executable, *part.command], cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGINT)  # so that pytest still shows the tracebacks it has
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
            return f"ended after {seconds:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # also what it left behind
            process.wait()
    return "done" if status == 0 else f"failed: exit status {status}"


def conclusion(log: Path, done: bool) -> list[str]:
    """The last line of a part that is done; of another one pytest's lines of what failed, else its last lines."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    failed = [line for line in lines if line.startswith(("FAILED ", "ERROR ")) and "::" in line]
    return [lines[-1].strip("= ")] if done and lines else list(dict.fromkeys(failed)) or lines[-5:]


def _breaks(log: Path, ended: bool) -> bool:
    """Whether a test has left its process without a GPU, or hangs: took over a minute of a part that was `ended`.

    Results that differ are found before a kernel is used.
    """
    signs = "CUDA(Runtime|Driver)Error|crashed while running|their trial did not end" + r"|Timeout \(" * ended
    return bool(re.search(signs, log.read_text(errors="replace")))


def run_all(wanted: list[Part], folder: Path, seconds: float) -> list[dict]:
    """Run the parts one after the other within so many seconds; a record of each, also in DIR/gpu_all.json."""
    end, records = time.monotonic() + seconds, []
    for part in wanted:
        start = time.monotonic()
        left = end - start - GRACE
        became = run(part, folder, min(part.limit, left)) if left >= part.least else NOT_STARTED
        took = round(time.monotonic() - start, 1)
        records.append({"part": part.name, "became": became, "seconds": took, "command": " ".join(part.command)})
        print(f"{part.name:17} {took:7.1f} s  {became}", flush=True)
        if became != NOT_STARTED:
            records[-1]["conclusion"] = conclusion(folder / f"{part.name}.txt", became == "done")
            print(*(f"    {line}" for line in records[-1]["conclusion"][:MOST_SHOWN]), sep="\n", flush=True)
            if part.name == HOPPER and _breaks(folder / f"{part.name}.txt", became.startswith("ended")):
                os.environ["TINYVIT_WGMMA"] = "0"
                print("    the other parts run without the kernels for Hopper (TINYVIT_WGMMA=0)", flush=True)
        with atomic.atomic_write(folder / "gpu_all.json") as file:
            file.write_text(json.dumps(records, indent=1))
        pack(folder)
    return records


def pack(folder: Path) -> None:
    """All results in one file, as some rented machines give back few; without what was compiled."""
    with atomic.atomic_write(folder / "gpu_all.tar.gz") as file, tarfile.open(file, "w:gz") as tar:
        for path in (*sorted(folder.iterdir()), folder / "kernels/tinyvit_products.json"):
            if path.suffix in (".txt", ".json", ".xml") and path.exists():
                tar.add(path, path.name)


# --- compiling --------------------------------------------------------------------------------------------------------

STEPS = ("vit_tiny_patch4_32", "vit_base_patch16_224", "cct_7_3x1_32")


def jobs() -> list[tuple[str, str]]:
    """What compiles the kernels that the parts need: cases of attention and models, each with a dtype or precision.

    A case for each shape of heads: Hopper's kernels would be tried for it several times at once.
    """
    shapes = {(c.num_tokens, c.embed_dim // c.num_heads): case for case, c in reversed(attention_bench.CASES.items())}
    attention = [(case, dtype) for case in shapes.values() for dtype in ("bfloat16", "float16", "float32")]
    return [(model, precision) for model in STEPS for precision in ("bf16", "tf32")] + attention


def warm(job: tuple[str, str], device: str = "cuda") -> None:
    """Run what a job names once, on as few images as possible: shapes of rows decide how kernels are compiled."""
    name, precision = job
    if name in attention_bench.CASES:
        config = attention_bench.CASES[name]
        qkv = np.zeros((1, config.num_tokens, 3 * config.embed_dim), np.float32)
        x = tinyvit.Tensor(qkv, requires_grad=True)
        x = tinyvit.Tensor(mover(precision)(mover(device)(x.data)), requires_grad=True)
        functional.qkv_attention(x, config.num_heads).sum().backward()
        return
    model = tinyvit.create_model(name, depth=2).to(device)
    images = np.zeros((2, model.config.in_chans, *model.config.image_size), np.float32)
    step = tinyvit.TrainStep(model, optim.AdamW(model.parameters()), clip_norm=1.0, precision=precision)
    step(images, np.array([0, 1]))
    tinyvit.predict(model, images, batch_size=2, precision=precision)


def compile_all() -> None:
    context, start = multiprocessing.get_context("spawn"), time.monotonic()
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), context) as pool:
        started = {pool.submit(warm, job): job for job in jobs()}
        failed = [(started[f], f.exception()) for f in concurrent.futures.as_completed(started) if f.exception()]
    for job, problem in failed:
        print(f"{' '.join(job)}: {type(problem).__name__}: {problem}")
    print(f"{len(started) - len(failed)} of {len(started)} jobs in {time.monotonic() - start:.0f} s")
    sys.exit(bool(failed))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="DIR", help="where all results go")
    parser.add_argument("--minutes", type=float, default=15.0, help="for all parts together (default: 15)")
    parser.add_argument("--data", default="cifar10", help="as for tinyvit train (default: cifar10)")
    parser.add_argument("--only", nargs="+", metavar="PART", help="these parts alone")
    parser.add_argument("--compile", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.compile:
        compile_all()
    if args.json is None:
        parser.exit(2, "gpu_all: error: expected --json DIR\n")
    if args.data != "cifar10" and not Path(args.data).exists():
        parser.exit(2, f"gpu_all: error: expected --data cifar10 or a directory, got {args.data}\n")
    folder = args.json.resolve()  # parts run elsewhere
    table = parts(folder, args.data if args.data == "cifar10" else str(Path(args.data).resolve()))
    if unknown := set(args.only or ()) - {part.name for part in table}:
        names = ", ".join(part.name for part in table)
        parser.exit(2, f"gpu_all: error: expected parts among {names}, got {', '.join(sorted(unknown))}\n")
    try:
        devices.choose("cuda")
    except RuntimeError as problem:
        sys.exit(f"gpu_all: error: {problem}")
    folder.mkdir(parents=True, exist_ok=True)
    for name, cache in (("CUPY_CACHE_DIR", "kernels"), ("TORCHINDUCTOR_CACHE_DIR", "inductor")):
        os.environ.setdefault(name, str(folder / cache))
    os.environ |= {"PYTHONUNBUFFERED": "1", "COLUMNS": "200"}  # all that a part printed is there, and not cut off
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    wanted = [part for part in table if args.only is None or part.name in args.only]
    records = run_all(wanted, folder, 60 * args.minutes)
    sys.exit(any(record["became"] != "done" for record in records))


if __name__ == "__main__":
    main()
