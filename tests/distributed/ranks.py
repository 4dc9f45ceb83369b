"""What the processes of the tests run: `ranks.py steps OUT`, or `ranks.py FAULT tinyvit's arguments [then others]`."""

import ctypes
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np

import tinyvit
from tinyvit import cli, data, distributed, execution, optim
from tinyvit.data import Augment
from tinyvit.distributed import launch, processes
from tinyvit.training import run, run_directory

# Batches that divide and do not, several shards a process, weighted classes, parts of a shard.
CASES = {
    "odd": dict(batch=13),
    "even": dict(batch=24, shards=12, threads=2),
    "weights": dict(batch=17, class_weights=np.arange(1, 11) / 5),
    "parts": dict(batch=24, accumulate=2, label_smoothing=0.1, mixed=False, clip_norm=None),
}
FAULT_AT = 4  # the step, the second of an epoch


def steps(group, case):
    """The weights, and the loss, hits and norm of each of three steps with all that is random switched on."""
    options = dict(shards=12, threads=1, clip_norm=0.5, mixed=True) | CASES[case]
    batch, mixed = options.pop("batch"), options.pop("mixed")
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (3 * batch, 3, 8, 8), dtype=np.uint8)
    split = data.splits.ArraySplit(images, rng.integers(0, 10, 3 * batch), [])
    sizes = dict(image_size=8, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=10)
    model = tinyvit.create_model("vit_nano_patch8_32", **sizes, proj_drop_rate=0.1, drop_path=0.1)
    step = tinyvit.TrainStep(model, optim.AdamW(model.parameters(), lr=1e-2), group=group, **options)
    mix = dict(mixup=0.4, cutmix=1.0, num_classes=10) if mixed else {}
    augment = Augment((0.5,) * 3, (0.2,) * 3, flip=True, padding=2, erasing=0.3, turn=5, zoom=0.1, **mix)
    loader = data.Loader(split, batch, transform=augment, alternate_flip=True, group=group)
    found = [[float(step(*part)), step.correct, step.grad_norm] for part in loader.epoch(1)]
    return {**model.state_dict(), "found": np.array(found)}


def break_step(fault, fault_of_first=lambda: None):
    """Let rank 1 have this fault in a step, and rank 0 the other."""
    original = execution.train_step.TrainStep.__call__

    def step(self, images, labels):
        if self.step_index == FAULT_AT:
            (fault_of_first, fault)[self.group.rank]()
        return original(self, images, labels)

    execution.train_step.TrainStep.__call__ = step


def fail():
    raise ValueError("a planted fault")


def save_slowly():
    """From here on saving takes longer than a process waits in a step, and half of that time Python stands still."""
    original = run.RunDirectory.save

    def save(self, *arguments):
        ctypes.PyDLL(None).usleep(int(5e5 * processes.PATIENCE))
        time.sleep(processes.PATIENCE)
        original(self, *arguments)

    run.RunDirectory.save = save


def stop():
    """Until rank 0 has ended."""
    first = re.search(r"process (\d+)", distributed.init()._names[0])[1]
    wait = f"for i in $(seq 200); do kill -0 {first} || break; sleep 0.1; done; kill -KILL {os.getpid()}"
    subprocess.Popen(["sh", "-c", wait], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    time.sleep(5 * processes.BEAT)  # rank 0 has to hear of it first
    os.kill(os.getpid(), signal.SIGSTOP)


def main(fault, arguments):
    if fault in ("hang", "interrupt", "stop"):
        processes.PATIENCE, processes.BEAT, processes.GRACE = 1.0, 0.1, 0.2
        processes.LAST_WORDS, processes.END_OF_HANGING = 1, 2
    if fault == "lack":
        launch.HEAD_START = 0.5
        sys.modules |= {"mpi4py": None} if os.environ["PMI_RANK"] == "1" else {}
        return cli.main(arguments)
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):  # torchrun has started all anew after a fault
        fault, arguments = "none", [*arguments, "--resume"]
    rank = distributed.init().rank
    if fault == "kill":
        break_step(lambda: os.kill(os.getpid(), signal.SIGKILL))
    elif fault == "hang":
        break_step(lambda: time.sleep(1000))
    elif fault == "stop":
        run.load = (lambda *_: time.sleep(1000), lambda *_: stop())[rank]
    elif fault == "error":
        break_step(fail)
    elif fault == "interrupt":
        break_step(lambda: os.kill(os.getpid(), signal.SIGINT), save_slowly)
    elif fault == "numpy" and rank == 1:
        np.__version__ = "0.0"
    while "then" in arguments:
        first = arguments.index("then")
        assert cli.main(arguments[:first]) == 0
        arguments = arguments[first + 1 :]
    return cli.main(arguments)


if __name__ == "__main__":
    what, *arguments = sys.argv[1:]
    processes.PAUSE = 2e-3  # so many processes share few cores
    run_directory.curves_png = lambda *_: None
    if what == "steps":
        group = distributed.init()
        for case in CASES:
            np.savez(f"{arguments[0]}/{case}-{group.rank}.npz", **steps(group, case))
    else:
        sys.exit(main(what, arguments))
