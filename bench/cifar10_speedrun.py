"""How accurate a recipe becomes from scratch, how soon, and what it costs: several seeds, beside PyTorch if wished.

    python bench/cifar10_speedrun.py --recipe cifar10-cpu-10min --seeds 0 1 2 --json out.json --plot out.png
    python bench/cifar10_speedrun.py --recipe cifar10-cpu-10min --minutes 2 --torch     # the same steps in PyTorch, too

The accuracy is that of the last weights on the test images; no epoch is chosen by them. With --validate they are a
tenth of the training images, to try things out. Seconds count from the start of training, with evaluation after each
epoch. Unset OPENBLAS_CORETYPE and the like first.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from tinyvit import optim
from tinyvit.checkpoints.loading import open_checkpoint
from tinyvit.data import Augment
from tinyvit.execution import system_info
from tinyvit.files import atomic
from tinyvit.models.summary import summarise
from tinyvit.training import build, run
from tinyvit.training.config import TrainConfig
from tinyvit.training.display import Display
from tinyvit.training.recipes import FILES
from tinyvit.training.run_directory import RunDirectory
from tinyvit.training.schedule import learning_rate

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
MARKS = (0.6, 0.7, 0.8, 0.85, 0.9, 0.94)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", required=True, choices=FILES)
    parser.add_argument("--data", default="cifar10", help="as for tinyvit train (default: cifar10)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="S")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, help="instead of the recipe's length")
    length.add_argument("--epochs", type=int, help="instead of the recipe's length")
    parser.add_argument("--validate", action="store_true", help="measure on a tenth of the training images, held out")
    parser.add_argument("--torch", action="store_true", help="train the same model on the same batches in PyTorch, too")
    parser.add_argument("--out", type=Path, help="keep the run directories here")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="accuracy over time; needs matplotlib")
    return parser.parse_args(arguments)


def train(args: argparse.Namespace, seed: int, out: Path) -> dict[str, Any]:
    """One run of the recipe: its curve, its last accuracy, the seconds to the marks, and the FLOPs."""
    given = {"recipe": args.recipe, "data": args.data, "seed": seed, "out": str(out)}
    given |= {name: value for name in ("minutes", "epochs") if (value := getattr(args, name)) is not None}
    given |= {"val_fraction": 0.1} if args.validate else {}
    begun = time.monotonic()
    progress = run.train(given, started=begun)
    record = RunDirectory(out).read_record()
    curve = [(row["seconds"], row["val_accuracy"]) for row in progress.history]
    flops = 3 * summarise(open_checkpoint(out).config).flops * progress.step * record.options["batch_size"]
    return {
        "seed": seed,
        "accuracy": curve[-1][1],
        "wall_seconds": time.monotonic() - begun,
        "steps": progress.step,
        "flops": flops,
        "seconds_to": {f"{mark:.0%}": next((s for s, a in curve if a >= mark), None) for mark in MARKS},
        "curve": curve,
    }


def torch_muon() -> Any:
    """Muon for matrices and convolutions: torch's own takes no convolutions."""
    import torch

    class Muon(torch.optim.Optimizer):
        def __init__(self, params: Any, weight_decay: float) -> None:
            super().__init__(params, {"lr": 0.0, "weight_decay": weight_decay})

        @torch.no_grad()
        def step(self) -> None:
            for group in self.param_groups:
                for p in group["params"]:
                    m = self.state[p].setdefault("m", torch.zeros_like(p)).lerp_(p.grad, 0.05)
                    x = p.grad.lerp(m, 0.95).flatten(1)
                    tall = x.shape[0] > x.shape[1]
                    x = x.T if tall else x
                    x = x / (x.norm() + 1e-7)
                    for _ in range(5):
                        square = x @ x.T
                        x = 3.4445 * x + (2.0315 * square @ square - 4.7750 * square) @ x
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    x = (x.T if tall else x).reshape(p.shape)
                    p.sub_(x, alpha=group["lr"] * max(1.0, p.shape[-2] / p.shape[-1]) ** 0.5)

    return Muon


def train_torch(out: Path) -> dict[str, Any]:
    """The run at `out` again in PyTorch: the same first weights, batches, learning rates and number of steps."""
    import torch
    from reference_models import torch_twin

    record = RunDirectory(out).read_record()
    options = TrainConfig(**{**record.options, "device": "cpu"})
    if (
        options.drop_path
        or options.dropout
        or options.ema
        or options.clip_norm
        or options.optimizer not in ("muon", "adamw")
    ):
        raise SystemExit("--torch covers recipes with muon or adamw, without drop path, dropout, averages and clipping")
    with Display() as display:
        data = run.load(options, None, display)
    parts = build.make_parts(options, data, None, 1)
    model = torch_twin(parts.model).float()
    names = {id(p): name for name, p in parts.model.named_parameters()}
    own = dict(model.named_parameters())
    scale = options.adam_lr / options.lr if options.optimizer == "muon" else None
    optimizers = []
    for group in optim.param_groups(parts.model, options.weight_decay, adam_lr_scale=scale):
        params = [own[names[id(p)]] for p in group["params"]]
        kind = torch_muon() if group.get("muon") else torch.optim.AdamW
        optimizers.append((kind(params, weight_decay=group["weight_decay"]), group["lr_scale"]))
    rate, step, begun = learning_rate(options.schedule, options.lr, record.length), 0, time.monotonic()
    epoch = 0
    while step < record.length.total_steps:
        for images, labels in parts.loader.epoch(epoch):
            if step >= record.length.total_steps:
                break
            for optimizer, scale in optimizers:
                optimizer.zero_grad()
                for group in optimizer.param_groups:
                    group["lr"] = rate(step) * scale
            loss = torch.nn.functional.cross_entropy(
                model(torch.from_numpy(np.ascontiguousarray(images))),
                torch.from_numpy(labels),
                label_smoothing=options.label_smoothing,
            )
            loss.backward()
            for optimizer, _ in optimizers:
                optimizer.step()
            step += 1
        epoch += 1
    seconds = time.monotonic() - begun
    split, hits = data.validation, 0
    with torch.no_grad():
        for start in range(0, len(split), 500):
            where = np.arange(start, min(start + 500, len(split)))
            images, labels = Augment(data.mean, data.std)(
                split.read(where), split.labels[where], np.random.default_rng(0)
            )
            hits += int((model(torch.from_numpy(images)).argmax(1).numpy() == labels).sum())
    return {"accuracy": hits / len(split), "seconds": seconds, "steps": step}


def plot(path: Path, rows: list[dict[str, Any]], title: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="seconds", ylabel="accuracy, %", title=title)
    for row in rows:
        seconds, accuracy = zip(*row["curve"], strict=True)
        axes.plot(seconds, [100 * a for a in accuracy], marker=".", label=f"seed {row['seed']}")
        if "torch" in row:
            label = f"PyTorch, seed {row['seed']}"
            axes.plot(row["torch"]["seconds"], 100 * row["torch"]["accuracy"], "s", label=label)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    about = {
        "recipe": args.recipe,
        "machine": system_info.one_line(system_info.collect()),
        "commit": commit.stdout.strip(),
        "split": "a tenth of the training images" if args.validate else "test",
    }
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for seed in args.seeds:
            out = (args.out or Path(scratch)) / f"{args.recipe}-{seed}"
            row = train(args, seed, out)
            rows.append(row)
            if args.torch:
                row["torch"] = train_torch(out)
            accuracies = [row["accuracy"] for row in rows]
            spread = statistics.stdev(accuracies) if len(rows) > 1 else None
            result = {**about, "mean": statistics.mean(accuracies), "spread": spread, "runs": rows}
            if args.json:
                atomic.write_text(args.json, json.dumps(result, indent=1))
            marks = ", ".join(f"{mark} in {s:.0f} s" for mark, s in row["seconds_to"].items() if s is not None)
            print(
                f"seed {seed}: {row['accuracy']:.2%} in {row['wall_seconds']:.0f} s, {row['flops']:.2e} FLOPs; {marks}"
            )
            if "torch" in row:
                print(f"  PyTorch: {row['torch']['accuracy']:.2%}, {row['torch']['seconds']:.0f} s for the same steps")
    print(f"mean {result['mean']:.2%}" + (f", standard deviation {spread:.2%}" if spread is not None else ""))
    if args.plot:
        plot(args.plot, rows, f"{args.recipe}, {about['machine']}")


if __name__ == "__main__":
    main()
