"""Shared by the tests of runs and of the command line: small images, and the real command in a subprocess."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

from tinyvit.backend import parallel

THREADS = parallel.available_cores()  # of a command in a process of its own
ROOT = Path(__file__).parents[2]
SIGKILL = getattr(signal, "SIGKILL", signal.SIGTERM)  # Windows has none
COMMAND = [sys.executable, "-m", "tinyvit"]
NANO = ["--model", "vit_nano_patch8_32"]


def make_images(directory, *, train=24, test=6, size=32, noise=160, seed=0):
    """An image folder of three classes that differ in their colour, below some noise."""
    rng = np.random.default_rng(seed)
    for split, count in (("train", train), ("test", test)):
        for channel, name in enumerate(("red", "green", "blue")):
            folder = directory / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, noise, (size, size, 3))
                pixels[..., channel] += 15
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i:02}.png")
    return directory


def count_decoded(monkeypatch):
    """A list that grows by the source of each image that is opened from now on, in this process."""
    opened, original = [], Image.open
    monkeypatch.setattr(Image, "open", lambda source, **how: (opened.append(source), original(source, **how))[1])
    return opened


def environment(first=None):
    """The environment of a command: this tinyvit, no GPU, and output at once even where it is a pipe.

    Modules in the directory `first` go before all others.
    """
    paths = [str(path) for path in (first, ROOT, os.environ.get("PYTHONPATH")) if path]
    ours = {"CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1", "PYTHONPATH": os.pathsep.join(paths)}
    return os.environ | ours


def tinyvit(*arguments, cwd=None, timeout=120, **options):
    """Run `tinyvit ARGUMENTS` to its end."""
    command = [*COMMAND, *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=cwd, timeout=timeout, env=environment(), **options
    )


def start(*arguments, cwd=None):
    """Start `tinyvit ARGUMENTS` in the background."""
    command = [*COMMAND, *map(str, arguments)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cwd, env=environment()
    )


def stop_when(process, reached, signum=SIGKILL, timeout=60):
    """Send the process a signal once `reached()`; returns its output and errors."""
    deadline = time.monotonic() + timeout
    while not reached():
        assert process.poll() is None, f"ended before it could be stopped: {process.communicate()}"
        assert time.monotonic() < deadline, "did not get there in time"
        time.sleep(0.005)
    process.send_signal(signum)
    return process.communicate(timeout=timeout)


def assert_one_line_error(result, status):
    """The command failed with this status and exactly one line on standard error. Returns the message."""
    assert result.returncode == status, (result.returncode, result.stdout, result.stderr)
    assert result.stderr.startswith("tinyvit: error: "), result.stderr
    assert result.stderr.count("\n") == 1 and result.stderr.endswith("\n"), result.stderr
    return result.stderr.removeprefix("tinyvit: error: ").strip()
